#include "memory.h"

#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace simt {

namespace {

std::mutex guard;

// Made at the first use and never destroyed: code of the host can run before and after everything else here.
std::unordered_map<const void*, Memory>& all() {
  static auto& memory = *new std::unordered_map<const void*, Memory>;
  return memory;
}

std::string& error() {
  static auto& text = *new std::string;
  return text;
}

}  // namespace

void add_memory(const void* key, const void* start, size_t size, bool of_host_too) {
  const char* p = static_cast<const char*>(start);
  std::lock_guard<std::mutex> lock(guard);
  all()[key] = {p, p + size, of_host_too};
}

bool forget_memory(const void* key) {
  std::lock_guard<std::mutex> lock(guard);
  return all().erase(key) > 0;
}

bool find_memory(const void* address, size_t size, Memory& found) {
  std::lock_guard<std::mutex> lock(guard);
  for (const auto& entry : all()) {
    if (!entry.second.holds(static_cast<const char*>(address), size)) continue;
    found = entry.second;
    return true;
  }
  return false;
}

void host_error(const char* text) {
  std::lock_guard<std::mutex> lock(guard);
  if (error().empty()) error() = text;
}

void raise_host_error() {
  std::string text;
  {
    std::lock_guard<std::mutex> lock(guard);
    text.swap(error());
  }
  if (!text.empty()) throw std::runtime_error(text);
}

}  // namespace simt
