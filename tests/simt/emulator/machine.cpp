// Runs launches: the blocks one after the other, the threads of a block as fibers in the order that a seed
// gives.

#include "machine.h"

#include <link.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "crash.h"
#include "host.h"
#include "memory.h"

#if defined(RK_SIMT_ADDRESS)
#include <sanitizer/asan_interface.h>
#endif

RK_SIMT_BUILTIN uint3 threadIdx, blockIdx;
RK_SIMT_BUILTIN dim3 blockDim, gridDim;

namespace simt {

Machine machine;

namespace {

constexpr int poison = 0xff;  // NaN in every float type, -1 in every integer type
constexpr int64_t patience = 500'000;

thread_local volatile char anchor;  // one thread-local variable that is always there
std::mutex one_at_a_time;
std::atomic<int64_t> launches{0};

// ---- whose turn it is ----

int pick() {
  switch (machine.strategy) {
    case Strategy::in_turn:
      return machine.ready.next(machine.running < 0 ? 0 : machine.rank[machine.running] + 1);
    case Strategy::at_random:
      return machine.ready.next(static_cast<int>(machine.random() % machine.threads));
    default:
      return machine.ready.next(0);
  }
}

void order_threads() {
  if (machine.strategy != Strategy::in_turn) {
    std::shuffle(machine.by_rank.begin(), machine.by_rank.end(), machine.random);
  }
  for (int i = 0; i < machine.threads; ++i) machine.rank[machine.by_rank[i]] = i;
}

void all_are_ready() {
  order_threads();
  machine.ready.clear(machine.threads);
  for (int i = 0; i < machine.threads; ++i) machine.ready.add(i);
}

// Decides which lanes that wait for active_mask at one place learn that they are together: all, or any of
// them.
void answer_who_is_active(Thread& asking) {
  const int first = machine.running & ~(warp_size - 1);
  const bool all = machine.strategy == Strategy::in_turn || machine.random() % 2 == 0;
  unsigned mask = 0;
  for (int lane = 0; lane < warp_size && first + lane < machine.threads; ++lane) {
    const Thread& other = machine.thread[first + lane];
    const bool here = other.asks_who_is_active && other.place == asking.place;
    if (&other == &asking || (here && (all || machine.random() % 2 == 0))) mask |= 1u << lane;
  }
  for (int lane = 0; lane < warp_size; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    machine.thread[first + lane].active = mask;
    machine.thread[first + lane].asks_who_is_active = false;
  }
}

std::string thread_name(int number) {
  const uint3& i = machine.thread[number].index;
  return "thread (" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

std::string where_it_waits(int number) {
  const Thread& t = machine.thread[number];
  return thread_name(number) + " waits in " + t.what + " at " + describe(t.place);
}

[[noreturn]] void deadlock() {
  std::string text = "deadlock: no thread can go on";
  std::vector<Place> told;
  for (int i = 0; i < machine.threads && told.size() < 4; ++i) {
    const Thread& t = machine.thread[i];
    if (t.state == State::done || std::find(told.begin(), told.end(), t.place) != told.end()) continue;
    told.push_back(t.place);
    text += "; " + where_it_waits(i);
  }
  fail_at(Place{}, text);
}

void end_thread();

void thread_start() {
  arrived_on_new_stack();
  std::string thrown;
  try {
    machine.launch->thread(machine.launch->closure);
  } catch (const std::exception& error) {
    thrown = error.what();
  }
  if (!thrown.empty()) fail("threw an exception: %s", thrown.c_str());
  end_thread();
}

// Stops the current thread (or the host) for now, or for ever, and runs the one whose turn it is: maybe
// itself.
void let_others_run(bool for_ever) {
  Context& from = machine.running < 0 ? machine.host : machine.current().context;
  Context* to = &machine.host;
  if (machine.ready.empty()) {
    if (machine.ended < machine.threads) deadlock();
    machine.running = -1;
  } else {
    const int next = machine.by_rank[pick()];
    if (next == machine.running && !machine.current().asks_who_is_active) return;
    machine.running = next;
    Thread& t = machine.thread[next];
    threadIdx = t.index;
    if (t.asks_who_is_active) answer_who_is_active(t);
    if (t.state == State::new_) {
      machine.stacks.start(t.context, thread_start);
      t.state = State::ready;
    }
    to = &t.context;
  }
  if (to == &from) return;
  // Only now: this stack must not be the one that was just given away.
  if (for_ever) machine.stacks.release(from);
  switch_context(from, *to, for_ever);
}

void progress() { machine.steps = 0; }

void block_current(State state) {
  Thread& t = machine.current();
  t.state = state;
  machine.ready.remove(machine.rank[machine.running]);
  let_others_run(false);
}

void make_ready(int number) {
  machine.thread[number].state = State::ready;
  machine.ready.add(machine.rank[number]);
}

Warp& current_warp() { return machine.warp[machine.running / warp_size]; }

// Fails if a lane of this warp waits for the current thread, which will not come.
void check_nobody_waits_for_current(const char* instead) {
  const Warp& warp = current_warp();
  for (int g = 0; g < warp.group_count; ++g) {
    if ((warp.groups[g].mask >> lane() & 1) == 0) continue;
    const int other = (machine.running & ~(warp_size - 1)) + __builtin_ctz(warp.groups[g].arrived);
    fail("%s, but %s with a mask that names this thread", instead, where_it_waits(other).c_str());
  }
}

void end_thread() {
  check_nobody_waits_for_current("has ended");
  if (machine.waiting > 0) {
    for (int i = 0; i < machine.threads; ++i) {
      if (machine.thread[i].state == State::at_barrier) {
        fail("has ended, but %s: all threads of a block must get there", where_it_waits(i).c_str());
      }
    }
  }
  machine.current().state = State::done;
  current_warp().live &= ~(1u << lane());
  machine.ready.remove(machine.rank[machine.running]);
  ++machine.ended;
  progress();
  let_others_run(true);
  abort();
}

// ---- blocks ----

// The library's thread-local memory is where static shared memory lies (see simt.h).
void find_static_shared() {
  static ptrdiff_t anchor_offset = -1;
  static size_t bytes = 0;
  anchor = 1;
  char* address = const_cast<char*>(&anchor);
  if (anchor_offset < 0) {
    const auto visit = [](dl_phdr_info* info, size_t, void* data) {
      const ElfW(Phdr)* tls = nullptr;
      bool ours = false;
      for (int i = 0; i < info->dlpi_phnum; ++i) {
        const ElfW(Phdr) & header = info->dlpi_phdr[i];
        const uintptr_t start = info->dlpi_addr + header.p_vaddr, at = reinterpret_cast<uintptr_t>(&machine);
        if (header.p_type == PT_LOAD && at >= start && at < start + header.p_memsz) ours = true;
        if (header.p_type == PT_TLS) tls = &header;
      }
      if (!ours || tls == nullptr) return 0;
      anchor_offset = static_cast<char*>(data) - static_cast<char*>(info->dlpi_tls_data);
      bytes = tls->p_memsz;
      return 1;
    };
    if (dl_iterate_phdr(visit, address) == 0)
      throw std::runtime_error("simt: thread-local memory was not found");
  }
  machine.static_shared = address - anchor_offset;
  machine.static_shared_bytes = bytes;
}

class DynamicShared {
 public:
  explicit DynamicShared(size_t bytes) : bytes_(bytes), memory_(bytes + 2 * canary + 32) {
    // Aligned to 16 bytes and to no more.
    char* start = memory_.data() + canary;
    machine.dynamic_shared = start + (48 - reinterpret_cast<uintptr_t>(start) % 32) % 32;
#if defined(RK_SIMT_ADDRESS)
    __asan_poison_memory_region(machine.dynamic_shared - canary, canary);
    __asan_poison_memory_region(machine.dynamic_shared + bytes, canary);
#endif
  }
  ~DynamicShared() {
#if defined(RK_SIMT_ADDRESS)
    __asan_unpoison_memory_region(machine.dynamic_shared - canary, bytes_ + 2 * canary);
#endif
    machine.dynamic_shared = nullptr;
  }
  void fill() {
#if defined(RK_SIMT_ADDRESS)
    memset(machine.dynamic_shared, poison, bytes_);
#else
    memset(machine.dynamic_shared - canary, poison, bytes_ + 2 * canary);
#endif
  }
  bool intact() const {
#if defined(RK_SIMT_ADDRESS)
    return true;
#else
    const auto poisoned = [](const char* p) {
      return std::all_of(p, p + canary, [](char c) { return c == static_cast<char>(poison); });
    };
    return poisoned(machine.dynamic_shared - canary) && poisoned(machine.dynamic_shared + bytes_);
#endif
  }

 private:
  size_t bytes_;
  std::vector<char> memory_;
};

void start_block(uint64_t number) {
  const dim3 grid = machine.launch->grid, block = machine.launch->block;
  machine.block_number = number;
  blockIdx = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
              static_cast<unsigned>(number / grid.x / grid.y)};
  for (int i = 0; i < machine.threads; ++i) {
    Thread& t = machine.thread[i];
    t.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    t.state = State::new_;
    t.asks_who_is_active = false;
  }
  for (size_t w = 0; w < machine.warp.size(); ++w) {
    const int lanes = std::min<int>(warp_size, machine.threads - static_cast<int>(w) * warp_size);
    machine.warp[w].live = lanes == warp_size ? ~0u : (1u << lanes) - 1;
    machine.warp[w].group_count = 0;
  }
  machine.ended = machine.waiting = 0;
  machine.epoch = 0;
  machine.running = -1;
  all_are_ready();
  progress();
  races_block();
}

void run_blocks(const Launch& launch) {
  const uint64_t count = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  std::vector<uint32_t> order;
  if (machine.strategy != Strategy::in_turn && count <= 1 << 20) {
    order.resize(count);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), machine.random);
  }
  DynamicShared dynamic(launch.shared_bytes);
  for (uint64_t i = 0; i < count; ++i) {
    dynamic.fill();
    memset(machine.static_shared, poison, machine.static_shared_bytes);
    start_block(order.empty() ? i : order[i]);
    let_others_run(false);
    if (!machine.error.empty()) {
      machine.stacks.reset();
      throw std::runtime_error(machine.error);
    }
    if (!dynamic.intact()) fail("a thread of this block wrote outside of the dynamic shared memory");
  }
}

}  // namespace

// ---- what the headers call ----

void Ready::clear(int threads) {
  words_ = (threads + 63) / 64;
  count_ = 0;
  std::fill(bits_, bits_ + words_, 0);
}

int Ready::next(int rank) const {
  int word = rank >> 6;
  if (word >= words_) word = 0, rank = 0;
  uint64_t bits = bits_[word] & (~uint64_t{0} << (rank & 63));
  while (bits == 0) {
    word = word + 1 == words_ ? 0 : word + 1;
    bits = bits_[word];
  }
  return word * 64 + __builtin_ctzll(bits);
}

void run(const Launch& launch) {
  if (machine.running >= 0 && machine.owner == __builtin_thread_pointer())
    fail("a kernel cannot launch a kernel");
  raise_host_error();
  check_launch(launch);
  std::lock_guard<std::mutex> lock(one_at_a_time);
  machine.owner = __builtin_thread_pointer();
  ++launches;
  struct Forget {
    ~Forget() { machine.launch = nullptr; }
  } forget;
  machine.launch = &launch;
  machine.error.clear();
  machine.running = -1;
  machine.quiet = false;
  machine.host = host_context();
  gridDim = launch.grid;
  blockDim = launch.block;
  machine.threads = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  machine.thread.resize(machine.threads);
  machine.warp.resize((machine.threads + warp_size - 1) / warp_size);
  machine.rank.resize(machine.threads);
  machine.by_rank.resize(machine.threads);
  std::iota(machine.by_rank.begin(), machine.by_rank.end(), 0);
  find_static_shared();
  races_launch();
  CatchCrashes catch_crashes;
  run_blocks(launch);
}

void* dynamic_shared() { return machine.dynamic_shared; }
unsigned lane() { return static_cast<unsigned>(machine.running) % warp_size; }

void fail_at(const Place& place, const std::string& text) {
  machine.quiet = true;  // until the next launch
  const auto triple = [](const uint3& i) {
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
  };
  std::string message = "simt: ";
  if (machine.launch != nullptr) {
    message += "kernel " + function_name(machine.launch->kernel) + ", block " + triple(blockIdx);
    if (machine.running >= 0) message += ", thread " + triple(threadIdx);
    const std::string at = describe(place);
    if (!at.empty()) message += ", at " + at;
    message += ": ";
  }
  machine.error = message + text;
  if (machine.running < 0) throw std::runtime_error(machine.error);
  Context& here = machine.current().context;
  machine.running = -1;
  switch_context(here, machine.host, true);
  abort();
}

void fail(const char* format, ...) {
  char text[2000];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  fail_at(machine.running < 0 ? Place{} : place_of_caller(__builtin_frame_address(0)), text);
}

void collective(const char* what, unsigned mask, void* slot, Finish finish) {
  if (machine.running < 0) fail("%s outside of a kernel", what);
  Thread& t = machine.current();
  Warp& warp = current_warp();
  const int first = machine.running & ~(warp_size - 1);
  const unsigned bit = 1u << lane();
  t.what = what;
  t.place = place_of_caller(__builtin_frame_address(0));
  t.slot = slot;
  if ((mask & bit) == 0) fail("%s with mask 0x%08x, which does not name this lane (%u)", what, mask, lane());
  if ((mask & ~warp.live) != 0) {
    fail("%s with mask 0x%08x names lane %d, which has ended or does not exist", what, mask,
         __builtin_ctz(mask & ~warp.live));
  }
  Group* mine = nullptr;
  for (int g = 0; g < warp.group_count; ++g) {
    Group& group = warp.groups[g];
    if (group.mask == mask && group.place == t.place) {
      mine = &group;
    } else if ((group.mask & bit) != 0 && (group.arrived & mask) != 0) {
      fail(
          "%s with mask 0x%08x waits for lanes one of which waits for this one elsewhere: %s with mask "
          "0x%08x",
          what, mask, where_it_waits(first + __builtin_ctz(group.arrived & mask)).c_str(), group.mask);
    }
  }
  if (mine == nullptr) {
    for (int l = 0; l < warp_size; ++l) {
      if ((mask >> l & 1) != 0 && machine.thread[first + l].state == State::at_barrier) {
        fail("%s with mask 0x%08x, but %s", what, mask, where_it_waits(first + l).c_str());
      }
    }
    mine = &warp.groups[warp.group_count++];
    mine->mask = mask;
    mine->arrived = 0;
    mine->place = t.place;
  }
  mine->arrived |= bit;
  if (mine->arrived != mask) return block_current(State::in_collective);
  *mine = warp.groups[--warp.group_count];
  void* slots[warp_size];
  for (int l = 0; l < warp_size; ++l) slots[l] = mask >> l & 1 ? machine.thread[first + l].slot : nullptr;
  machine.quiet = true;
  finish(slots, mask);
  machine.quiet = false;
  for (int l = 0; l < warp_size; ++l) {
    if ((mask & ~bit) >> l & 1) make_ready(first + l);
  }
  progress();
  if (machine.strategy != Strategy::in_turn) let_others_run(false);
}

unsigned barrier(const char* what, bool predicate) {
  if (machine.running < 0) fail("%s outside of a kernel", what);
  static unsigned count;  // nobody gets to the next barrier before everybody has read the count of this one
  Thread& t = machine.current();
  t.what = what;
  t.predicate = predicate;
  t.place = place_of_caller(__builtin_frame_address(0));
  check_nobody_waits_for_current("waits for all threads of the block");
  if (machine.ended > 0) {
    fail("%s: %d of the %d threads of the block have ended and will not get there", what, machine.ended,
         machine.threads);
  }
  if (machine.waiting > 0) {
    int other = 0;
    while (machine.thread[other].state != State::at_barrier) ++other;
    if (strcmp(machine.thread[other].what, what) != 0 || !(machine.thread[other].place == t.place)) {
      fail("%s, but %s: all threads of a block must meet at the same one", what,
           where_it_waits(other).c_str());
    }
  }
  if (++machine.waiting < machine.threads) {
    block_current(State::at_barrier);
    return count;
  }
  machine.waiting = 0;
  ++machine.epoch;
  count = 0;
  for (Thread& other : machine.thread) {
    other.state = State::ready;
    count += other.predicate;
  }
  all_are_ready();
  progress();
  let_others_run(false);
  return count;
}

unsigned active_mask() {
  if (machine.running < 0) fail("__activemask outside of a kernel");
  Thread& t = machine.current();
  t.place = place_of_caller(__builtin_frame_address(0));
  t.asks_who_is_active = true;
  must_switch();
  return t.active;
}

void must_switch() {
  if (++machine.steps > patience) {
    fail("no thread has got anywhere for a long time: does one wait for what none of them will do?");
  }
  let_others_run(false);
}

void may_switch() {
  if (machine.running < 0 || machine.random() % 4 != 0) return;
  if (machine.strategy == Strategy::by_priority) {
    // Without this, a thread that spins would never let the one that it waits for run.
    const int mine = machine.rank[machine.running],
              other = static_cast<int>(machine.random() % machine.threads);
    const int there = machine.by_rank[other];
    const bool ready =
        machine.thread[there].state == State::ready || machine.thread[there].state == State::new_;
    if (other != mine && ready) {
      std::swap(machine.by_rank[mine], machine.by_rank[other]);
      std::swap(machine.rank[machine.running], machine.rank[there]);
    }
  }
  must_switch();
}

void before_atomic(const char* what, const void* address) {
  if (machine.stacks.holds(address)) fail("%s on a local variable", what);
  may_switch();
}

void fence() { may_switch(); }

#if !defined(RK_SIMT_CHECKED)
void races_launch() {}
void races_block() {}
void races_sync_warp(unsigned) {}
void read_only(const void*, size_t) {}
#endif

}  // namespace simt

// ---- what tests call ----

#define RK_SIMT_EXPORT extern "C" __attribute__((visibility("default")))

// What follows is a function of the seed: the order of blocks and threads.
RK_SIMT_EXPORT void simt_seed(uint64_t seed) {
  std::lock_guard<std::mutex> lock(simt::one_at_a_time);
  simt::machine.strategy = static_cast<simt::Strategy>(seed % 3);
  simt::machine.random.state = seed;
}

// Copies what code of the host did wrong since the last launch, if anything, and forgets it.
RK_SIMT_EXPORT int simt_take_host_error(char* text, size_t size) {
  try {
    simt::raise_host_error();
  } catch (const std::runtime_error& error) {
    snprintf(text, size, "%s", error.what());
    return 1;
  }
  return 0;
}

RK_SIMT_EXPORT int64_t simt_launches() { return simt::launches; }
