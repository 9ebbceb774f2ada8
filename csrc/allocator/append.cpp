// Growth of sequences: append and reserve.
//
// An append is planned in full before anything is given out. While planning, references that the
// append will drop are taken away at once: of two rows that write one shared block, the first gets
// a copy and the second, by then the only owner, writes in place. roll_back() returns them. All
// releases are planned before any write, so a block is never both the source of a copy and reused
// by it.
#include <limits>

#include "allocator/allocator.h"

namespace pykvcache {

void Allocator::plan_release(uint32_t slot, int32_t group, Reach reach) {
  const Table& table = store_.table(slot, group);
  const int32_t length = store_.sequence(slot).length;
  const int32_t dead = reach.chunk > 0    ? length / reach.chunk * reach.chunk
                       : reach.window > 0 ? length - reach.window + 1
                                          : 0;
  if (dead <= table.dead) return;
  plan_.releases.push_back({slot, group, dead});
  for (int32_t i = block_size_.index(dead); i-- > block_size_.index(table.dead);) {
    plan_.unshared.push_back(table.blocks[i]);
    if (pool_.unshare(table.blocks[i])) plan_.given_back.push_back(table.blocks[i]);
  }
}

void Allocator::plan_copy(uint32_t slot, int32_t group, int32_t index) {
  const int32_t block = store_.table(slot, group).blocks[index];
  plan_.copies.push_back({slot, group, index});
  plan_.unshared.push_back(block);
  pool_.unshare(block);
}

void Allocator::plan_growth(uint32_t slot, int32_t group, int32_t entries) {
  std::vector<int32_t>& blocks = store_.table(slot, group).blocks;
  plan_.growths.push_back({slot, group, entries});
  if (blocks.capacity() < static_cast<size_t>(entries)) {
    blocks.reserve(std::max<size_t>(entries, 2 * blocks.capacity()));
  }
}

// Copies of shared entries that will be written, and growth.
void Allocator::plan_writes(Ints counts) {
  int64_t needed = 0;
  int32_t max_blocks = 0;
  for (size_t row = 0; row < counts.size(); ++row) {
    const uint32_t slot = plan_.slots[row];
    const int32_t end = block_size_.count(plan_.lengths[row]);
    const int32_t begin = counts[row] > 0 ? block_size_.index(store_.sequence(slot).length) : end;
    for (int32_t group = 0; group < groups(); ++group) {
      std::vector<int32_t>& blocks = store_.table(slot, group).blocks;
      const auto size = static_cast<int32_t>(blocks.size());
      for (int32_t i = begin; i < std::min(end, size); ++i) {
        if (pool_.refs(blocks[i]) > 1) [[unlikely]]
          plan_copy(slot, group, i);
      }
      if (end > size) {
        needed += end - size;
        plan_growth(slot, group, end);
      }
      max_blocks = std::max({max_blocks, end, size});
    }
  }
  plan_.needed = needed + static_cast<int64_t>(plan_.copies.size());
  plan_.max_blocks = max_blocks;
}

void Allocator::plan_append(Ints handles, Ints counts, std::span<const Reach> reach,
                            const char* op) {
  constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max();
  check_counts(op, "counts", counts, handles.size(), kMaxLength);
  store_.resolve(handles, true, op, plan_.slots);
  plan_.lengths.resize(handles.size());
  plan_.copies.clear();
  plan_.releases.clear();
  plan_.unshared.clear();
  plan_.given_back.clear();
  plan_.growths.clear();
  for (size_t row = 0; row < counts.size(); ++row) {
    const int64_t length = store_.sequence(plan_.slots[row]).length + counts[row];
    if (length > kMaxLength) {
      bad_argument(op, ": row ", row, " would have ", length, " tokens, more than ", kMaxLength);
    }
    plan_.lengths[row] = static_cast<int32_t>(length);
  }
  try {
    for (size_t group = 0; group < reach.size(); ++group) {
      if (reach[group].window == 0 && reach[group].chunk == 0) continue;
      for (const uint32_t slot : plan_.slots) {
        plan_release(slot, static_cast<int32_t>(group), reach[group]);
      }
    }
    plan_writes(counts);
    const auto given_back = static_cast<int64_t>(plan_.given_back.size());
    check_available(plan_.needed, pool_.num_free() + given_back, op);
  } catch (...) {
    roll_back();
    throw;
  }
}

void Allocator::roll_back() {
  for (const int32_t block : plan_.unshared) pool_.share(block);
}

Copies Allocator::commit() {
  Copies copies(plan_.copies.empty() ? 0 : groups());
  for (const Plan::Release& release : plan_.releases) {
    Table& table = store_.table(release.slot, release.group);
    const int32_t begin = block_size_.index(table.dead), end = block_size_.index(release.dead);
    std::fill(table.blocks.begin() + begin, table.blocks.begin() + end, -1);
    table.dead = release.dead;
    if (begin < end) ++table.edits;
  }
  for (const int32_t block : plan_.given_back) pool_.give_back(block);
  for (const Plan::Copy& copy : plan_.copies) {
    Table& table = store_.table(copy.slot, copy.group);
    int32_t& entry = table.blocks[copy.index];
    const int32_t src = entry;
    pool_.take(1, &entry);
    ++table.edits;
    copies[copy.group].push_back({src, entry});
  }
  for (const Plan::Growth& growth : plan_.growths) {
    std::vector<int32_t>& blocks = store_.table(growth.slot, growth.group).blocks;
    const auto size = static_cast<int32_t>(blocks.size());
    blocks.resize(growth.entries);
    pool_.take(growth.entries - size, blocks.data() + size);
  }
  for (size_t row = 0; row < plan_.slots.size(); ++row) {
    store_.sequence(plan_.slots[row]).length = plan_.lengths[row];
  }
  counters_.copies += static_cast<int64_t>(plan_.copies.size());
  counters_.steps += 1;
  counters_.block_steps += pool_.num_used();
  return copies;
}

Copies Allocator::append(Ints handles, Ints counts) {
  plan_append(handles, counts, {}, "append");
  return commit();
}

void Allocator::reserve(Ints handles, Ints capacities) {
  store_.resolve(handles, true, "reserve", slots_);
  check_counts("reserve", "capacities", capacities, handles.size(),
               std::numeric_limits<int32_t>::max());
  const auto missing = [&](size_t row, int32_t group) {
    const auto size = static_cast<int64_t>(store_.table(slots_[row], group).blocks.size());
    return std::max<int64_t>(0, block_size_.count(capacities[row]) - size);
  };
  int64_t needed = 0;
  for (size_t row = 0; row < slots_.size(); ++row) {
    for (int32_t group = 0; group < groups(); ++group) needed += missing(row, group);
  }
  check_available(needed, pool_.num_free(), "reserve");
  for (size_t row = 0; row < slots_.size(); ++row) {
    for (int32_t group = 0; group < groups(); ++group) {
      std::vector<int32_t>& blocks = store_.table(slots_[row], group).blocks;
      const int64_t extra = missing(row, group);
      blocks.resize(blocks.size() + extra);
      pool_.take(extra, blocks.data() + blocks.size() - extra);
    }
  }
}

}  // namespace pykvcache
