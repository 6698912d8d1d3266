#include <cstdio>
#include <cstdint>

#include "cases.h"

extern "C" void simt_seed(uint64_t seed);

int main(int argc, char** argv) {
  if (argc != 5) {
    for (const auto& entry : Case::all()) puts(entry.first.c_str());
    return 0;
  }
  for (const auto& [name, run] : Case::all()) {
    if (name != argv[1]) continue;
    const uint64_t first = strtoull(argv[3], nullptr, 10), count = strtoull(argv[4], nullptr, 10);
    for (uint64_t seed = first; seed < first + count; ++seed) {
      simt_seed(seed);
      try {
        puts(run(std::string(argv[2]) == "right") ? "ok" : "wrong result");
      } catch (const std::exception& error) {
        puts(error.what());
      }
      fflush(stdout);
    }
    return 0;
  }
  fprintf(stderr, "no case %s\n", argv[1]);
  return 2;
}
