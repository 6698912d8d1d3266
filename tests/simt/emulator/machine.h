// The emulated block and its threads, as machine.cpp and races.cpp share them.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "fibers.h"
#include "runtime.h"

namespace simt {

constexpr int warp_size = 32;
constexpr int max_frames = 10;
constexpr size_t canary = 64;  // bytes on either side of the dynamic shared memory

// A place in the kernel: the addresses to which the calls there will return, innermost first.
struct Place {
  const void* frames[max_frames];
  int count = 0;
  uint64_t hash = 0;  // of the frames
  bool operator==(const Place& other) const { return hash == other.hash && count == other.count; }
};

enum class State : uint8_t { new_, ready, at_barrier, in_collective, done };

struct Thread {
  Context context;
  uint3 index;
  State state;
  bool asks_who_is_active;
  bool predicate;
  unsigned active;   // the answer
  const char* what;  // the operation in which it waits
  Place place;
  void* slot;
};

// Lanes that wait for each other in one collective operation.
struct Group {
  unsigned mask, arrived;
  Place place;
};

struct Warp {
  unsigned live;  // lanes that exist and have not ended
  int group_count;
  Group groups[warp_size];
};

// SplitMix64 (Steele, Lea and Flood 2014): random enough, and fast.
struct Random {
  using result_type = uint64_t;
  uint64_t state = 0;
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return ~uint64_t{0}; }
  uint64_t operator()() {
    uint64_t x = state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
  }
};

// Which threads can run, by rank: the order in which a strategy prefers them.
class Ready {
 public:
  void clear(int threads);
  void add(int rank) { bits_[rank >> 6] |= uint64_t{1} << (rank & 63), ++count_; }
  void remove(int rank) { bits_[rank >> 6] &= ~(uint64_t{1} << (rank & 63)), --count_; }
  bool empty() const { return count_ == 0; }
  // The first one at or after `rank`, going round.
  int next(int rank) const;

 private:
  int words_ = 0;
  int count_ = 0;
  uint64_t bits_[max_threads / 64];
};

// How the next thread is picked. Every seed has one of them.
enum class Strategy : uint8_t {
  in_turn,     // round and round, as a GPU might
  at_random,   // any of them
  by_priority  // always the first of a random order: some run far ahead, others are left behind as long as
               // can be
};

struct Machine {
  // The launch.
  const Launch* launch = nullptr;
  Strategy strategy = Strategy::in_turn;
  Random random;
  Context host;
  std::atomic<void*> owner{};  // whose launch it is: a thread of the operating system
  bool quiet = false;          // the emulation's own accesses to memory are going on
  std::string error;

  // The block.
  uint64_t block_number = 0;
  int threads = 0;
  int ended = 0;
  int waiting = 0;     // at the barrier
  int running = -1;    // the thread that runs now, -1: the host
  int64_t steps = 0;   // switches since a thread last got anywhere
  uint32_t epoch = 0;  // barriers that the block has passed
  Ready ready;
  std::vector<Thread> thread;
  std::vector<Warp> warp;
  std::vector<int> rank, by_rank;

  Stacks stacks;
  char* dynamic_shared = nullptr;
  char* static_shared = nullptr;  // the library's thread-local memory
  size_t static_shared_bytes = 0;

  Thread& current() { return thread[running]; }
};

extern Machine machine;

Place place_of_caller(const void* frame);
std::string describe(const void* code);    // file:line of an address in the code
std::string describe(const Place& place);  // and of the calls that lead there
std::string function_name(const void* code);
std::string describe_memory(const void* address);
[[noreturn]] void fail_at(const Place& place, const std::string& text);

// Whether a kernel's thread is at work, and not the emulation itself or code of the host.
inline bool in_kernel() {
  return machine.running >= 0 && !machine.quiet &&
         machine.owner.load(std::memory_order_relaxed) == __builtin_thread_pointer();
}

// What the checked build does at each step; empty in the others.
void races_launch();
void races_block();
void races_sync_warp(unsigned mask);

}  // namespace simt
