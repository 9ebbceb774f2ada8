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

void Allocator::Plan::clear() {
  copies.clear();
  overwrites.clear();
  growths.clear();
  releases.clear();
  unshared.clear();
  given_back.clear();
  needed = max_blocks = 0;
}

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

// Whether the next token of a sequence, in this block, takes the place of one in a known prefix.
bool Allocator::overwrites(uint32_t slot, int32_t block) const {
  const int32_t length = store_.sequence(slot).length;
  return prefixes_ && prefixes_->holds(block, length - block_size_.index(length) * block_size_);
}

// Shared blocks among entries [begin, end) of a table, which will be written.
void Allocator::plan_copies(uint32_t slot, int32_t group, int32_t begin, int32_t end) {
  const std::vector<int32_t>& blocks = store_.table(slot, group).blocks;
  for (int32_t i = begin; i < end; ++i) {
    if (pool_.refs(blocks[i]) == 1) {
      if (i == begin && overwrites(slot, blocks[i])) plan_.overwrites.push_back({slot, group, i});
      continue;
    }
    plan_.copies.push_back({slot, group, i});
    plan_.unshared.push_back(blocks[i]);
    pool_.unshare(blocks[i]);
    ++plan_.needed;
  }
}

void Allocator::plan_growth(uint32_t slot, int32_t group, int32_t entries) {
  std::vector<int32_t>& blocks = store_.table(slot, group).blocks;
  plan_.growths.push_back({slot, group, entries});
  plan_.needed += entries - static_cast<int32_t>(blocks.size());
  if (blocks.capacity() < static_cast<size_t>(entries)) {
    blocks.reserve(std::max<size_t>(entries, 2 * blocks.capacity()));
  }
}

void Allocator::plan_writes(int32_t group) {
  const bool caches = prefixes_.has_value();
  int32_t max_blocks = 0;
  for (const Plan::Row& row : plan_.rows) {
    const std::vector<int32_t>& blocks = store_.table(row.slot, group).blocks;
    const auto size = static_cast<int32_t>(blocks.size());
    const int32_t present = std::min(row.end, size);
    bool shared = false;
    for (int32_t i = row.begin; i < present; ++i) shared |= pool_.refs(blocks[i]) > 1;
    if (caches && row.begin < present) shared |= overwrites(row.slot, blocks[row.begin]);
    if (shared) [[unlikely]]
      plan_copies(row.slot, group, row.begin, present);
    if (row.end > size) plan_growth(row.slot, group, row.end);
    max_blocks = std::max({max_blocks, row.end, size});
  }
  plan_.max_blocks = std::max(plan_.max_blocks, max_blocks);
}

void Allocator::plan_append(Ints handles, Ints counts, std::span<const Reach> reach,
                            const char* op) {
  constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max();
  check_counts(op, "counts", counts, handles.size(), kMaxLength);
  store_.resolve(handles, true, op, slots_);
  plan_.clear();
  plan_.rows.resize(handles.size());
  for (size_t i = 0; i < counts.size(); ++i) {
    const int64_t old_length = store_.sequence(slots_[i]).length, length = old_length + counts[i];
    if (length > kMaxLength) {
      bad_argument(op, ": row ", i, " would have ", length, " tokens, more than ", kMaxLength);
    }
    const int32_t end = block_size_.count(length);
    const int32_t begin = counts[i] > 0 ? block_size_.index(old_length) : end;
    plan_.rows[i] = {slots_[i], static_cast<int32_t>(length), begin, end};
  }
  try {
    for (size_t group = 0; group < reach.size(); ++group) {
      if (reach[group].window == 0 && reach[group].chunk == 0) continue;
      for (const Plan::Row& row : plan_.rows) {
        plan_release(row.slot, static_cast<int32_t>(group), reach[group]);
      }
    }
    for (int32_t group = 0; group < groups(); ++group) plan_writes(group);
    const auto given_back = static_cast<int64_t>(plan_.given_back.size());
    const int64_t available = num_free() + given_back;
    check_available(plan_.needed, available, op);
    const auto overwrites = static_cast<int64_t>(plan_.overwrites.size());
    plan_.keeps_overwritten = overwrites > 0 && plan_.needed + overwrites <= available;
    if (plan_.keeps_overwritten) plan_.needed += overwrites;
  } catch (...) {
    roll_back();
    throw;
  }
}

void Allocator::roll_back() {
  for (const int32_t block : plan_.unshared) pool_.share(block);
}

// A new block for an entry; returns the one that is to be copied to it.
int32_t Allocator::replace(const Plan::Copy& copy, Copies& copies) {
  Table& table = store_.table(copy.slot, copy.group);
  int32_t& entry = table.blocks[copy.index];
  const int32_t src = entry;
  pool_.take(1, &entry);
  ++table.edits;
  ++counters_.copies;
  copies[copy.group].push_back({src, entry});
  return src;
}

Copies Allocator::commit() {
  Copies copies(plan_.copies.empty() && !plan_.keeps_overwritten ? 0 : groups());
  for (const Plan::Release& release : plan_.releases) {
    Table& table = store_.table(release.slot, release.group);
    const int32_t begin = block_size_.index(table.dead), end = block_size_.index(release.dead);
    std::fill(table.blocks.begin() + begin, table.blocks.begin() + end, -1);
    table.dead = release.dead;
    if (begin < end) ++table.edits;
  }
  for (const int32_t block : plan_.given_back) {
    prefixes_ ? prefixes_->give_back(block, pool_) : pool_.give_back(block);
  }
  if (!plan_.keeps_overwritten) {
    for (const Plan::Copy& lost : plan_.overwrites) {
      prefixes_->forget_block(store_.table(lost.slot, lost.group).blocks[lost.index], pool_);
    }
    plan_.overwrites.clear();
  }
  make_room(plan_.needed);
  for (const Plan::Copy& copy : plan_.copies) replace(copy, copies);
  plan_.kept.clear();
  for (const Plan::Copy& copy : plan_.overwrites) plan_.kept.push_back(replace(copy, copies));
  for (const Plan::Growth& growth : plan_.growths) {
    std::vector<int32_t>& blocks = store_.table(growth.slot, growth.group).blocks;
    const auto size = static_cast<int32_t>(blocks.size());
    blocks.resize(growth.entries);
    pool_.take(growth.entries - size, blocks.data() + size);
  }
  // Only now: none of them may be given out by this step, which will copy them.
  for (const int32_t block : plan_.kept) prefixes_->drop(block, pool_);
  for (const Plan::Row& row : plan_.rows) store_.sequence(row.slot).length = row.length;
  counters_.steps += 1;
  counters_.block_steps += num_used();
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
  check_available(needed, num_free(), "reserve");
  make_room(needed);
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
