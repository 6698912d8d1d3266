// The toolkit and the GPUs for which the CUDA part was built. recsys_kernels/backends/registry.py compares
// them with the machine.
#ifndef RK_CUDA_RELEASE  // no CUDA toolkit at build time
#define RK_CUDA_RELEASE 0
#define RK_CUDA_ARCHITECTURES
#define RK_CUDA_PTX 0
#endif
#define RK_QUOTED(text) #text
#define RK_TEXT(macro) RK_QUOTED(macro)

extern "C" {

// The toolkit's release, 1300 for 13.0; the driver has to serve it. 0: built without.
__attribute__((visibility("default"))) int rk_cuda_release() { return RK_CUDA_RELEASE; }

// The architectures with code of their own, ascending: "75_80_90".
__attribute__((visibility("default"))) const char* rk_cuda_architectures() {
  return RK_TEXT(RK_CUDA_ARCHITECTURES);
}

// The architecture whose PTX the library holds, which this and newer GPUs can compile. 0: built without CUDA.
__attribute__((visibility("default"))) int rk_cuda_ptx() { return RK_CUDA_PTX; }

}  // extern "C"
