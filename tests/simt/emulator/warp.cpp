// What the lanes of a warp compute together.

#include <cstring>

#include "machine.h"

namespace simt {

namespace {

struct ShuffleSlot {
  uint64_t value, result;
  unsigned source;
};

void finish_shuffle(void* const* slots, unsigned mask) {
  for (unsigned l = 0; l < warp_size; ++l) {
    if ((mask >> l & 1) == 0) continue;
    ShuffleSlot& slot = *static_cast<ShuffleSlot*>(slots[l]);
    if ((mask >> slot.source & 1) == 0) {
      fail("a shuffle with mask 0x%08x: lane %u reads from lane %u, which does not take part", mask, l,
           slot.source);
    }
    slot.result = static_cast<ShuffleSlot*>(slots[slot.source])->value;
  }
}

struct VoteSlot {
  uint64_t value;
  unsigned result;
};

void finish_ballot(void* const* slots, unsigned mask) {
  unsigned votes = 0;
  for (unsigned l = 0; l < warp_size; ++l) {
    if (mask >> l & 1 && static_cast<VoteSlot*>(slots[l])->value != 0) votes |= 1u << l;
  }
  for (unsigned l = 0; l < warp_size; ++l) {
    if (mask >> l & 1) static_cast<VoteSlot*>(slots[l])->result = votes;
  }
}

void finish_match(void* const* slots, unsigned mask) {
  for (unsigned l = 0; l < warp_size; ++l) {
    if ((mask >> l & 1) == 0) continue;
    VoteSlot& slot = *static_cast<VoteSlot*>(slots[l]);
    slot.result = 0;
    for (unsigned other = 0; other < warp_size; ++other) {
      if (mask >> other & 1 && static_cast<VoteSlot*>(slots[other])->value == slot.value)
        slot.result |= 1u << other;
    }
  }
}

void finish_sync(void* const*, unsigned mask) { races_sync_warp(mask); }

}  // namespace

uint64_t shuffle(const char* what, unsigned mask, uint64_t value, unsigned source) {
  ShuffleSlot slot{value, 0, source};
  collective(what, mask, &slot, finish_shuffle);
  return slot.result;
}

unsigned ballot(const char* what, unsigned mask, bool predicate) {
  VoteSlot slot{predicate, 0};
  collective(what, mask, &slot, finish_ballot);
  return slot.result;
}

unsigned match_any(unsigned mask, uint64_t value) {
  VoteSlot slot{value, 0};
  collective("__match_any_sync", mask, &slot, finish_match);
  return slot.result;
}

void sync_warp(unsigned mask) { collective("__syncwarp", mask, nullptr, finish_sync); }

}  // namespace simt
