// What an operator asks torch's C interface about tensors goes through here: the kernels are compiled with
// these functions' names in the place of torch's (support.py).
//
// New tensors are full of NaN (-1 in integers), so that what no kernel writes is seen; torch itself fills
// only what its dispatcher makes. A tensor's memory is the device's from when its address is asked for until
// its handle is deleted. All of these tensors are on the device, as far as the operator knows.

#include <cstdint>
#include <cstring>

#include "memory.h"

struct AtenTensorOpaque;
using Tensor = AtenTensorOpaque*;

extern "C" {

// Weak: programs without torch have the emulation, too.
#define RK_TORCH __attribute__((weak)) int32_t
RK_TORCH aoti_torch_empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides,
                                  int32_t dtype, int32_t device_type, int32_t device_index, Tensor* tensor);
RK_TORCH aoti_torch_get_data_ptr(Tensor tensor, void** data);
RK_TORCH aoti_torch_get_storage_size(Tensor tensor, int64_t* bytes);
RK_TORCH aoti_torch_get_dim(Tensor tensor, int64_t* dimensions);
RK_TORCH aoti_torch_get_size(Tensor tensor, int64_t dimension, int64_t* size);
RK_TORCH aoti_torch_get_stride(Tensor tensor, int64_t dimension, int64_t* stride);
RK_TORCH aoti_torch_get_dtype(Tensor tensor, int32_t* dtype);
RK_TORCH aoti_torch_delete_tensor_object(Tensor tensor);
__attribute__((weak)) size_t aoti_torch_dtype_element_size(int32_t dtype);
#undef RK_TORCH

#define RK_HERE __attribute__((visibility("hidden"))) int32_t

RK_HERE simt_empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                           int32_t device_type, int32_t device_index, Tensor* tensor) {
  int32_t error =
      aoti_torch_empty_strided(dimensions, sizes, strides, dtype, device_type, device_index, tensor);
  void* data = nullptr;
  int64_t bytes = 0;
  if (error == 0) error = aoti_torch_get_data_ptr(*tensor, &data);
  if (error == 0) error = aoti_torch_get_storage_size(*tensor, &bytes);
  if (error == 0 && bytes > 0) memset(data, 0xff, static_cast<size_t>(bytes));
  return error;
}

// The address, and up to its last element the memory is the device's: not the rest of the storage of a view.
RK_HERE simt_get_data_ptr(Tensor tensor, void** data) {
  int32_t dtype = 0, error = aoti_torch_get_data_ptr(tensor, data);
  int64_t dimensions = 0, elements = 1;
  if (error == 0) error = aoti_torch_get_dtype(tensor, &dtype);
  if (error == 0) error = aoti_torch_get_dim(tensor, &dimensions);
  for (int64_t d = 0; d < dimensions && error == 0 && elements > 0; ++d) {
    int64_t size = 0, stride = 0;
    error = aoti_torch_get_size(tensor, d, &size);
    if (error == 0) error = aoti_torch_get_stride(tensor, d, &stride);
    elements = size == 0 ? 0 : elements + (size - 1) * stride;
  }
  if (error == 0 && elements > 0) {
    const size_t bytes = static_cast<size_t>(elements) * aoti_torch_dtype_element_size(dtype);
    simt::add_memory(tensor, *data, bytes, false);
  }
  return error;
}
RK_HERE simt_get_mutable_data_ptr(Tensor tensor, void** data) { return simt_get_data_ptr(tensor, data); }
RK_HERE simt_get_const_data_ptr(Tensor tensor, const void** data) {
  return simt_get_data_ptr(tensor, const_cast<void**>(data));
}

RK_HERE simt_delete_tensor_object(Tensor tensor) {
  simt::forget_memory(tensor);
  return aoti_torch_delete_tensor_object(tensor);
}

}  // extern "C"
