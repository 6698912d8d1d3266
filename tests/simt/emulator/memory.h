// Which memory is the device's: only that may kernels touch, and (page-locked and managed memory aside) only
// they may.
#pragma once

#include <cstddef>

namespace simt {

struct Memory {
  const char* start;
  const char* end;
  bool of_host_too;
  bool holds(const char* p, size_t size) const {
    return p >= start && p <= end && size <= static_cast<size_t>(end - p);
  }
};

// From now on memory is the device's, until it is forgotten by the same key.
void add_memory(const void* key, const void* start, size_t size, bool of_host_too);
bool forget_memory(const void* key);

// A part of the device's memory that holds these bytes, if `found` gets one.
bool find_memory(const void* address, size_t size, Memory& found);

// Something that code of the host did wrong outside of any launch: raised by the next launch, or by who asks.
void host_error(const char* text);
void raise_host_error();

}  // namespace simt
