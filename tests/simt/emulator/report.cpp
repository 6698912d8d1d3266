// Where things are, in words: lines of the source, and regions of memory.

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <map>

#include "machine.h"

namespace simt {

namespace {

struct Line {
  std::string function, file;  // the file with its line
};

// The function and line of an address, and those into which it was inlined; empty without debugging
// information.
const std::vector<Line>& lines_of(const void* code) {
  static std::map<const void*, std::vector<Line>> known;
  const auto found = known.find(code);
  if (found != known.end()) return found->second;
  std::vector<Line>& lines = known[code];
  Dl_info info;
  if (dladdr(code, &info) == 0) return lines;
  std::string file_name;
  for (const char* p = info.dli_fname; *p != 0; ++p) {
    if (*p == '\'') {
      file_name += "'\\''";
    } else {
      file_name += *p;
    }
  }
  char address[32];
  snprintf(address, sizeof address, "0x%tx",
           static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase));
  // The sanitizers' runtime must not be loaded there.
  const std::string command =
      "env -u LD_PRELOAD addr2line -Cfie '" + file_name + "' " + address + " 2>/dev/null";
  FILE* output = popen(command.c_str(), "r");
  if (output == nullptr) return lines;
  char function[4096], file[4096];
  while (fgets(function, sizeof function, output) && fgets(file, sizeof file, output)) {
    function[strcspn(function, "\n")] = file[strcspn(file, "\n")] = 0;
    lines.push_back({function, file});
  }
  pclose(output);
  return lines;
}

// The emulation's own files and the libraries' are not what is asked for.
bool tells_something(const std::string& file) {
  const size_t slash = file.rfind('/');
  const std::string name = slash == std::string::npos ? file : file.substr(slash + 1);
  return name.rfind("simt", 0) != 0 && name.rfind("machine.cpp", 0) != 0 && name.rfind("warp.cpp", 0) != 0 &&
         name.rfind("crash.cpp", 0) != 0 && name.rfind("??", 0) != 0 && file.rfind("/usr/", 0) != 0;
}

std::string short_name(const std::string& file) {
  const size_t slash = file.rfind('/'), space = file.find(' ', slash == std::string::npos ? 0 : slash);
  return file.substr(slash == std::string::npos ? 0 : slash + 1,
                     space == std::string::npos ? space : space - slash - 1);
}

std::string raw(const void* code) {
  char text[32];
  snprintf(text, sizeof text, "%p", code);
  return text;
}

}  // namespace

Place place_of_caller(const void* frame) {
  Place place;
  const auto* at = static_cast<const uintptr_t*>(frame);
  while (place.count < max_frames && machine.stacks.holds(at)) {
    if (at[1] == 0) break;
    // The call itself lies before the address to which it returns.
    place.frames[place.count++] = reinterpret_cast<const void*>(at[1] - 1);
    place.hash = (place.hash ^ at[1]) * 0x9e3779b97f4a7c15u;
    place.hash ^= place.hash >> 32;
    at = reinterpret_cast<const uintptr_t*>(at[0]);
  }
  return place;
}

std::string describe(const void* code) {
  for (const Line& line : lines_of(code)) {
    if (tells_something(line.file)) return short_name(line.file);
  }
  return raw(code);
}

std::string describe(const Place& place) {
  std::string text, last;
  for (int i = 0; i < place.count; ++i) {
    for (const Line& line : lines_of(place.frames[i])) {
      if (!tells_something(line.file) || line.file == last) continue;
      text += (text.empty() ? "" : ", called at ") + short_name(line.file);
      last = line.file;  // of a recursion, one call
    }
  }
  return text;
}

std::string function_name(const void* code) {
  const std::vector<Line>& lines = lines_of(code);
  if (lines.empty() || lines.back().function == "??") return machine.launch->name;
  // Without the result's type, the arguments and what follows them.
  std::string whole = lines.back().function;
  const std::string unnamed = "(anonymous namespace)::";
  for (size_t at = whole.find(unnamed); at != std::string::npos; at = whole.find(unnamed)) {
    whole.erase(at, unnamed.size());
  }
  if (whole.rfind("void ", 0) == 0) whole.erase(0, 5);
  int depth = 0;
  for (size_t i = 0; i < whole.size(); ++i) {
    if (whole[i] == '<') ++depth;
    if (whole[i] == '>') --depth;
    if (whole[i] == '(' && depth == 0) return whole.substr(0, i);
  }
  return whole;
}

std::string describe_memory(const void* address) {
  const char* p = static_cast<const char*>(address);
  const auto inside = [p](const char* start, size_t size) { return p >= start && p < start + size; };
  char text[64];
  if (inside(machine.dynamic_shared, machine.launch->shared_bytes)) {
    snprintf(text, sizeof text, "byte %td of the dynamic shared memory", p - machine.dynamic_shared);
  } else if (inside(machine.dynamic_shared - canary, machine.launch->shared_bytes + 2 * canary)) {
    return "memory outside of the dynamic shared memory";
  } else if (inside(machine.static_shared, machine.static_shared_bytes)) {
    snprintf(text, sizeof text, "static shared memory at %p", address);
  } else if (machine.stacks.holds(address)) {
    snprintf(text, sizeof text, "a thread's local memory at %p", address);
  } else {
    snprintf(text, sizeof text, "global memory at %p", address);
  }
  return text;
}

}  // namespace simt
