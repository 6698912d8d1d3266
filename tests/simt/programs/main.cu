// programs                              the names of the cases, with "wrong" after those that have a wrong
// version programs all                          runs everything that is right programs NAME right|wrong FIRST
// SEEDS runs a case once a seed, and prints a line each: "ok", "wrong result", or
//                                       what the emulation said

#include <cstdint>

#include "cases.h"

#if defined(RK_SIMT)
extern "C" void simt_seed(uint64_t seed);
#else
static void simt_seed(uint64_t) {}
#endif

static bool run(const Case& which, bool right) {
  try {
    const bool good = which.run(right);
    puts(good ? "ok" : "wrong result");
    return good;
  } catch (const std::exception& error) {
    puts(error.what());
    return false;
  }
}

static int run_all() {
  int failures = 0;
  for (const Case& one : Case::all()) {
    printf("%s: ", one.name.c_str());
    failures += run(one, true) ? 0 : 1;
  }
  printf("%zu cases, %d failed\n", Case::all().size(), failures);
  return failures > 0;
}

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "all") return run_all();
  if (argc != 5) {
    for (const Case& one : Case::all()) printf("%s%s\n", one.name.c_str(), one.can_be_wrong ? " wrong" : "");
    return 0;
  }
  for (const Case& one : Case::all()) {
    if (one.name != argv[1]) continue;
    const uint64_t first = strtoull(argv[3], nullptr, 10), count = strtoull(argv[4], nullptr, 10);
    for (uint64_t seed = first; seed < first + count; ++seed) {
      simt_seed(seed);
      run(one, std::string(argv[2]) == "right");
      fflush(stdout);
    }
    return 0;
  }
  fprintf(stderr, "no case %s\n", argv[1]);
  return 2;
}
