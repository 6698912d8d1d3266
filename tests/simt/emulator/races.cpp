// The checked build: the compiler (-fsanitize=thread, without its library) calls what is below at every
// access to memory. Two accesses to one byte of which at least one writes must be ordered: by __syncthreads,
// or by a __syncwarp with both lanes in its mask, or because one thread makes both. Nothing orders blocks.
// What is not ordered is reported whatever the schedule was; so are reads of shared memory that nobody has
// written, misaligned accesses, and other threads' local variables.
//
// For each word of four bytes (or each byte, where somebody touches less than a word) is kept: the last
// write, and the reads since then, as far as a later write needs them (all that one thread's next read comes
// after are forgotten). This is the FastTrack method (Flanagan and Freund 2009), with a block's barriers as
// one clock and a vector of clocks only among the lanes of a warp.
#if defined(RK_SIMT_CHECKED)

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <unordered_map>

#include "machine.h"
#include "memory.h"

extern char __start_rk_simt_builtin[], __stop_rk_simt_builtin[];

namespace simt {

namespace {

// An access: by whom, and when. Blocks are counted from 1; 0 is nobody.
struct Event {
  uint32_t block;
  uint32_t epoch;  // barriers that the block had passed
  uint32_t clock;  // __syncwarps that the thread had passed
  uint16_t thread;
  int32_t code;  // where, relative to this library
};

enum class Readers : uint8_t { none, one, lanes, warps, blocks };

struct Cell {
  uint32_t launch;  // what is below was of this one
  uint32_t owner;   // and of this block's shared memory, if it is not 0
  Event write;
  Event read;         // of several readers the last one, to be named
  Event atomic_read;  // the last one: only plain writes collide with it
  bool atomic_write;
  bool constant;  // was read by __ldg
  Readers readers;
  int32_t set;    // the lanes, when they are several
  int32_t split;  // of a word: its bytes, if they are kept one by one, else -1
};

using Bytes = std::array<Cell, 4>;

struct LaneSet {
  uint32_t mask;
  uint32_t clock[warp_size];
};

constexpr size_t page_size = 4096;
struct Page {
  Cell words[page_size / 4];
};

struct Shadow {
  struct Known {
    uintptr_t number;
    Page* page;
  };
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  std::array<Known, 256> known{};  // of these, for speed
  uint32_t launch = 0;
  std::vector<LaneSet> sets;
  std::deque<Bytes> bytes;
  Memory used[4] = {};  // the device's memory that was used last
  int next_used = 0;
  std::vector<uint32_t> clocks;  // [thread][lane]: what a thread knows of the lanes of its warp

  uint32_t& clock(int thread, int lane) { return clocks[thread * warp_size + lane]; }

  // The word of an address. What it held of another launch, or another block's shared memory, is gone.
  Cell& word(uintptr_t address, uint32_t owner) {
    const uintptr_t number = address / page_size;
    Known& found = known[number % known.size()];
    if (found.page == nullptr || found.number != number) {
      std::unique_ptr<Page>& page = pages[number];
      if (page == nullptr) page = std::make_unique<Page>();
      found = {number, page.get()};
    }
    Cell& cell = found.page->words[address % page_size / 4];
    if (cell.launch == launch && cell.owner == owner) return cell;
    const int32_t split = cell.launch == launch ? cell.split : -1;
    cell = Cell{};
    cell.launch = launch;
    cell.owner = owner;
    cell.split = split;
    if (split >= 0) bytes[split].fill(Cell{});
    return cell;
  }

  // From now on every byte of a word has what was the word's.
  void split_up(Cell& word) {
    word.split = static_cast<int32_t>(bytes.size());
    bytes.emplace_back();
    for (Cell& byte : bytes.back()) {
      byte = word;
      if (word.readers != Readers::lanes) continue;
      byte.set = static_cast<int32_t>(sets.size());
      sets.push_back(LaneSet(sets[word.set]));
    }
  }

  // Calls visit(cell) for what holds the bytes.
  template <typename Visit>
  void visit(uintptr_t first, size_t size, uint32_t owner, Visit visit) {
    const uintptr_t end = first + size;
    while (first < end) {
      const uintptr_t next = std::min(end, (first | 3) + 1);
      Cell& cell = word(first, owner);
      if (next - first == 4 && cell.split < 0) {
        visit(cell);
        first = next;
        continue;
      }
      if (cell.split < 0) split_up(cell);
      const int32_t split = cell.split;
      for (; first < next; ++first) visit(bytes[split][first & 3]);
    }
  }
};

Shadow shadow;

const char* code_base() { return reinterpret_cast<const char*>(&races_launch); }

bool same_warp(const Event& a, const Event& b) { return a.thread / warp_size == b.thread / warp_size; }

bool lane_is_known(const Event& now, int lane, uint32_t clock) {
  return shadow.clock(now.thread, lane) >= clock;
}

// Whether `before` is sure to have happened before `now`.
bool ordered(const Event& before, const Event& now) {
  if (before.block != now.block) return before.block == 0;
  if (before.thread == now.thread || before.epoch < now.epoch) return true;
  return same_warp(before, now) && lane_is_known(now, before.thread % warp_size, before.clock);
}

// Of a call that returns to `code`.
Place place_of(const void* code) {
  Place place;
  place.frames[place.count++] = static_cast<const char*>(code) - 1;
  return place;
}

[[noreturn]] void report(const void* code, uintptr_t address, size_t size, const char* does, const char* did,
                         const Event& before) {
  const dim3 b = machine.launch->block, g = machine.launch->grid;
  const unsigned t = before.thread, block = before.block - 1;
  char text[300];
  snprintf(text, sizeof text, "(%u,%u,%u)%s(%u,%u,%u) %s ", t % b.x, t / b.x % b.y, t / b.x / b.y,
           " of block ", block % g.x, block / g.x % g.y, block / g.x / g.y, did);
  fail_at(place_of(code), std::string("race: ") + does + " " + std::to_string(size) + " bytes of " +
                              describe_memory(reinterpret_cast<const void*>(address)) + ", which thread " +
                              text + "at " + describe(code_base() + before.code - 1) +
                              " with no barrier between the two");
}

enum class Access { read, write, atomic_read, atomic_write };

const char* does_text(Access access) {
  switch (access) {
    case Access::read:
      return "reads";
    case Access::write:
      return "writes";
    case Access::atomic_read:
      return "reads (atomic or volatile)";
    default:
      return "writes (atomic or volatile)";
  }
}

// One of the reads that no barrier orders before `now`, or null.
const Event* colliding_read(const Cell& cell, const Event& now) {
  switch (cell.readers) {
    case Readers::none:
      return nullptr;
    case Readers::one:
      return ordered(cell.read, now) ? nullptr : &cell.read;
    case Readers::blocks:
      return &cell.read;
    default:
      break;
  }
  if (cell.read.block != now.block) return &cell.read;
  if (cell.read.epoch < now.epoch) return nullptr;
  // Lanes of several warps: one at least is of another warp than this thread.
  if (cell.readers == Readers::warps || !same_warp(cell.read, now)) return &cell.read;
  const LaneSet& set = shadow.sets[cell.set];
  for (int l = 0; l < warp_size; ++l) {
    if (set.mask >> l & 1 && l != now.thread % warp_size && !lane_is_known(now, l, set.clock[l]))
      return &cell.read;
  }
  return nullptr;
}

void add_reader(Cell& cell, const Event& now) {
  const Event before = cell.read;
  cell.read = now;
  if (cell.readers == Readers::none) {
    cell.readers = Readers::one;
  } else if (cell.readers == Readers::blocks || before.block != now.block) {
    cell.readers = Readers::blocks;
  } else if (before.epoch < now.epoch) {
    cell.readers = Readers::one;
  } else if (cell.readers == Readers::warps || !same_warp(before, now)) {
    cell.readers = Readers::warps;
  } else {
    if (cell.readers == Readers::one) {
      if (ordered(before, now)) return;
      cell.readers = Readers::lanes;
      cell.set = static_cast<int32_t>(shadow.sets.size());
      shadow.sets.push_back({1u << (before.thread % warp_size), {}});
      shadow.sets.back().clock[before.thread % warp_size] = before.clock;
    }
    LaneSet& set = shadow.sets[cell.set];
    set.mask |= 1u << (now.thread % warp_size);
    set.clock[now.thread % warp_size] = now.clock;
  }
}

// Whose memory it is: the block's if it is shared, else 0.
uint32_t owner_of(const char* p) {
  const auto inside = [p](const char* start, size_t size) { return p >= start && p < start + size; };
  const bool shared = inside(machine.dynamic_shared, machine.launch->shared_bytes) ||
                      inside(machine.static_shared, machine.static_shared_bytes);
  return shared ? static_cast<uint32_t>(machine.block_number) + 1 : 0;
}

// Fails unless these bytes are the device's: allocated there, a tensor's, or a constant of this library.
void check_memory(const char* p, size_t size, const void* code) {
  for (const Memory& memory : shadow.used) {
    if (memory.holds(p, size)) return;
  }
  Memory found{};
  Dl_info library, ours;
  if (find_memory(p, size, found)) {
    shadow.used[shadow.next_used++ % 4] = found;
    return;
  }
  if (dladdr(p, &library) != 0 && dladdr(code_base(), &ours) != 0 && library.dli_fbase == ours.dli_fbase)
    return;
  fail_at(place_of(code), "touches " + std::to_string(size) + " bytes of " + describe_memory(p) +
                              ", which are not the device's, or past the end of a tensor");
}

// What has nothing to do with other threads: own variables, the launch's arguments, threadIdx.
bool is_private(const char* p, const void* code) {
  const Context& own = machine.current().context;
  if (p >= own.bottom && p < own.bottom + own.size) return true;
  const char* closure = static_cast<const char*>(machine.launch->closure);
  if (p >= closure && p < closure + machine.launch->closure_size) return true;
  if (p >= __start_rk_simt_builtin && p < __stop_rk_simt_builtin) return true;
  const bool of_thread = machine.stacks.holds(p);
  if (of_thread || (p >= machine.host.bottom && p < machine.host.bottom + machine.host.size)) {
    fail_at(place_of(code),
            of_thread ? "touches a local variable of another thread" : "touches the host's stack");
  }
  return false;
}

void access_cell(Cell& cell, uintptr_t address, const Event& now, Access access, size_t size,
                 const void* code) {
  const bool atomic = access == Access::atomic_read || access == Access::atomic_write;
  if (!(atomic && cell.atomic_write) && !ordered(cell.write, now)) {
    report(code, address, size, does_text(access), cell.atomic_write ? "wrote (atomically)" : "wrote",
           cell.write);
  }
  if (access == Access::read) {
    add_reader(cell, now);
    return;
  }
  if (access == Access::atomic_read) {
    cell.atomic_read = now;
    return;
  }
  if (const Event* read = colliding_read(cell, now))
    report(code, address, size, does_text(access), "read", *read);
  if (access == Access::write && !ordered(cell.atomic_read, now)) {
    report(code, address, size, does_text(access), "read (atomically)", cell.atomic_read);
  }
  if (cell.constant) {
    report(code, address, size, does_text(access), "read by __ldg, for which nobody may write there,",
           cell.read);
  }
  cell.write = now;
  cell.atomic_write = access == Access::atomic_write;
  cell.readers = Readers::none;
}

Event event_now(const void* code) {
  const uint16_t thread = static_cast<uint16_t>(machine.running);
  return {static_cast<uint32_t>(machine.block_number) + 1, machine.epoch,
          shadow.clock(thread, thread % warp_size), thread,
          static_cast<int32_t>(static_cast<const char*>(code) - code_base())};
}

// Whether any of these bytes of a block's shared memory has been written.
bool written(uint32_t owner, uintptr_t first, size_t size) {
  bool any = false;
  shadow.visit(first, size, owner, [&any](Cell& cell) { any = any || cell.write.block != 0; });
  return any;
}

// Code of the host is at work: it may not touch what is on the device only.
void note_of_host(const void* address, size_t size, const void* code) {
  Memory found{};
  if (machine.quiet || !find_memory(address, size, found) || found.of_host_too) return;
  host_error(("simt: code of the host touches memory of the device, at " + describe(place_of(code))).c_str());
}

void note(const void* address, size_t size, size_t alignment, Access access, const void* code) {
  if (size == 0) return;
  if (!in_kernel()) return note_of_host(address, size, code);
  const char* p = static_cast<const char*>(address);
  if (is_private(p, code)) return;
  const uintptr_t first = reinterpret_cast<uintptr_t>(address);
  if (first % alignment != 0) {
    fail_at(place_of(code), std::string(does_text(access)) + " " + std::to_string(size) + " bytes of " +
                                describe_memory(address) + ", which is not a multiple of " +
                                std::to_string(alignment));
  }
  const uint32_t owner = owner_of(p);
  if (owner == 0) check_memory(p, size, code);
  const Event now = event_now(code);
  const bool reads = access == Access::read || access == Access::atomic_read;
  if (owner != 0 && reads && !written(owner, first, size)) {
    fail_at(place_of(code), "reads " + std::to_string(size) + " bytes of " + describe_memory(address) +
                                ", which no thread of this block has written");
  }
  shadow.visit(first, size, owner, [&](Cell& cell) { access_cell(cell, first, now, access, size, code); });
}

}  // namespace

void races_launch() {
  ++shadow.launch;
  std::fill(std::begin(shadow.used), std::end(shadow.used), Memory{});
  shadow.sets.clear();
  shadow.bytes.clear();
  // What other launches touched may be gone.
  if (shadow.pages.size() > 1024) {
    shadow.pages.clear();
    shadow.known = {};
  }
}

void races_block() {
  shadow.clocks.assign(static_cast<size_t>(machine.threads) * warp_size, 0);
  for (int t = 0; t < machine.threads; ++t) shadow.clock(t, t % warp_size) = 1;
}

void races_sync_warp(unsigned mask) {
  const int first = machine.running & ~(warp_size - 1);
  uint32_t all[warp_size] = {};
  for (int l = 0; l < warp_size; ++l) {
    if ((mask >> l & 1) == 0) continue;
    for (int other = 0; other < warp_size; ++other)
      all[other] = std::max(all[other], shadow.clock(first + l, other));
  }
  for (int l = 0; l < warp_size; ++l) {
    if ((mask >> l & 1) == 0) continue;
    memcpy(&shadow.clock(first + l, 0), all, sizeof all);
    ++shadow.clock(first + l, l);
  }
}

void read_only(const void* address, size_t size) {
  if (!in_kernel()) return;
  const void* code = __builtin_return_address(0);
  note(address, size, 1, Access::read, code);
  const uintptr_t first = reinterpret_cast<uintptr_t>(address);
  const uint32_t owner = owner_of(static_cast<const char*>(address));
  shadow.visit(first, size, owner, [&](Cell& cell) {
    if (cell.write.block != 0) {
      report(code, first, size, "reads by __ldg, for which nobody may write there,", "wrote", cell.write);
    }
    cell.constant = true;
  });
}

}  // namespace simt

// ---- what the compiler calls ----

using simt::Access;

#define RK_SIMT_HOOK extern "C" __attribute__((visibility("hidden"), noinline)) void
#define RK_SIMT_HOOKS(size)                                                       \
  RK_SIMT_HOOK __tsan_read##size(void* p) {                                       \
    simt::note(p, size, size, Access::read, __builtin_return_address(0));         \
  }                                                                               \
  RK_SIMT_HOOK __tsan_write##size(void* p) {                                      \
    simt::note(p, size, size, Access::write, __builtin_return_address(0));        \
  }                                                                               \
  RK_SIMT_HOOK __tsan_unaligned_read##size(void* p) {                             \
    simt::note(p, size, 1, Access::read, __builtin_return_address(0));            \
  }                                                                               \
  RK_SIMT_HOOK __tsan_unaligned_write##size(void* p) {                            \
    simt::note(p, size, 1, Access::write, __builtin_return_address(0));           \
  }                                                                               \
  RK_SIMT_HOOK __tsan_volatile_read##size(void* p) {                              \
    if (simt::in_kernel()) simt::may_switch();                                    \
    simt::note(p, size, size, Access::atomic_read, __builtin_return_address(0));  \
  }                                                                               \
  RK_SIMT_HOOK __tsan_volatile_write##size(void* p) {                             \
    if (simt::in_kernel()) simt::may_switch();                                    \
    simt::note(p, size, size, Access::atomic_write, __builtin_return_address(0)); \
  }
RK_SIMT_HOOKS(1)
RK_SIMT_HOOKS(2)
RK_SIMT_HOOKS(4)
RK_SIMT_HOOKS(8)
RK_SIMT_HOOKS(16)

RK_SIMT_HOOK __tsan_read_range(void* p, size_t size) {
  simt::note(p, size, 1, Access::read, __builtin_return_address(0));
}
RK_SIMT_HOOK __tsan_write_range(void* p, size_t size) {
  simt::note(p, size, 1, Access::write, __builtin_return_address(0));
}
RK_SIMT_HOOK __tsan_init() {}
RK_SIMT_HOOK __tsan_func_entry(void*) {}
RK_SIMT_HOOK __tsan_func_exit() {}
RK_SIMT_HOOK __tsan_vptr_read(void*) {}
RK_SIMT_HOOK __tsan_vptr_update(void*, void*) {}

// Code of the host uses all of these; device code loads and stores (simt_atomics.h).
#define RK_SIMT_ATOMIC(T, bits)                                                                          \
  extern "C" T __tsan_atomic##bits##_load(const volatile T* p, int) {                                    \
    simt::note(const_cast<const T*>(p), sizeof(T), sizeof(T), Access::atomic_read,                       \
               __builtin_return_address(0));                                                             \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                      \
  extern "C" void __tsan_atomic##bits##_store(volatile T* p, T value, int) {                             \
    simt::note(const_cast<const T*>(p), sizeof(T), sizeof(T), Access::atomic_write,                      \
               __builtin_return_address(0));                                                             \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                        \
  }                                                                                                      \
  RK_SIMT_FETCH(T, bits, exchange, __atomic_exchange_n)                                                  \
  RK_SIMT_FETCH(T, bits, fetch_add, __atomic_fetch_add)                                                  \
  RK_SIMT_FETCH(T, bits, fetch_sub, __atomic_fetch_sub)                                                  \
  RK_SIMT_FETCH(T, bits, fetch_and, __atomic_fetch_and)                                                  \
  RK_SIMT_FETCH(T, bits, fetch_or, __atomic_fetch_or)                                                    \
  RK_SIMT_FETCH(T, bits, fetch_xor, __atomic_fetch_xor)                                                  \
  extern "C" int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T value, int, \
                                                               int) {                                    \
    simt::note(const_cast<const T*>(p), sizeof(T), sizeof(T), Access::atomic_write,                      \
               __builtin_return_address(0));                                                             \
    return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);   \
  }                                                                                                      \
  extern "C" int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* expected, T value, int a, \
                                                             int b) {                                    \
    return __tsan_atomic##bits##_compare_exchange_strong(p, expected, value, a, b);                      \
  }
#define RK_SIMT_FETCH(T, bits, name, builtin)                                       \
  extern "C" T __tsan_atomic##bits##_##name(volatile T* p, T value, int) {          \
    simt::note(const_cast<const T*>(p), sizeof(T), sizeof(T), Access::atomic_write, \
               __builtin_return_address(0));                                        \
    return builtin(p, value, __ATOMIC_SEQ_CST);                                     \
  }
RK_SIMT_ATOMIC(uint8_t, 8)
RK_SIMT_ATOMIC(uint16_t, 16)
RK_SIMT_ATOMIC(uint32_t, 32)
RK_SIMT_ATOMIC(uint64_t, 64)
extern "C" void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
extern "C" void __tsan_atomic_signal_fence(int) {}

#endif
