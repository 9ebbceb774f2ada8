// Reuse of prefixes: sequences that begin with known blocks, and tell what they hold.
#include <algorithm>
#include <limits>

#include "allocator/allocator.h"

namespace pykvcache {

namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

int64_t sum_of(Ints counts) {
  int64_t sum = 0;
  for (const int64_t count : counts) sum += count;
  return sum;
}

}  // namespace

void Allocator::cache_prefixes(Ints windows) {
  if (!windows.empty() && static_cast<int64_t>(windows.size()) != groups()) {
    bad_argument("windows must have one entry for each of ", groups(), " groups, got ",
                 windows.size());
  }
  check_counts("prefix_cache", "windows", windows, windows.size(), kMaxInt32);
  std::vector<int32_t> sizes(windows.begin(), windows.end());
  sizes.resize(groups());
  prefixes_.emplace(num_blocks(), block_size_, std::move(sizes));
  entries_.resize(groups());
}

PrefixCache& Allocator::prefixes(const char* op) {
  if (!prefixes_) bad_argument(op, ": the allocator was made without prefix_cache=True");
  return *prefixes_;
}

void Allocator::collide_hashes() { prefixes("collide_hashes").collide_hashes(); }

void Allocator::check_prompts(const char* op, Ints tokens, Ints counts, Ints salts) const {
  check_counts(op, "counts", counts, counts.size(), kMaxInt32);
  if (salts.size() != counts.size()) {
    bad_argument(op, ": salts must have one entry for each of ", counts.size(), " rows, got ",
                 salts.size());
  }
  if (sum_of(counts) != static_cast<int64_t>(tokens.size())) {
    bad_argument(op, ": prompts have ", tokens.size(), " tokens, not ", sum_of(counts));
  }
}

void Allocator::lookup(Ints tokens, Ints counts, Ints salts, int64_t* hits) {
  const PrefixCache& prefixes = this->prefixes("lookup");
  check_prompts("lookup", tokens, counts, salts);
  for (size_t row = 0; row < counts.size(); ++row) {
    hits[row] = prefixes.match(tokens.first(counts[row]), salts[row], nodes_);
    tokens = tokens.subspan(counts[row]);
  }
}

void Allocator::share_match(uint32_t slot, std::span<const int32_t> nodes, int32_t length) {
  store_.sequence(slot).length = length;
  for (int32_t group = 0; group < groups(); ++group) {
    Table& table = store_.table(slot, group);
    const int32_t window = prefixes_->window(group);
    table.dead = window > 0 ? std::max(0, length - window) : 0;
    table.blocks.assign(nodes.size(), -1);
    for (size_t i = block_size_.index(table.dead); i < nodes.size(); ++i) {
      table.blocks[i] = prefixes_->blocks(nodes[i])[group];
      prefixes_->share(table.blocks[i], pool_);
    }
  }
}

void Allocator::allocate_cached(Ints tokens, Ints counts, Ints salts, int64_t* handles,
                                int64_t* hits) {
  PrefixCache& prefixes = this->prefixes("allocate_cached");
  check_prompts("allocate_cached", tokens, counts, salts);
  store_.reserve(static_cast<int64_t>(counts.size()));
  for (size_t row = 0; row < counts.size(); ++row) {
    const Ints prompt = tokens.first(counts[row]);
    tokens = tokens.subspan(counts[row]);
    const uint32_t slot = open_sequence(salts[row]);
    const int32_t length = prefixes.match(prompt, salts[row], nodes_);
    share_match(slot, nodes_, length);
    prefixes.start(traces_[slot], prompt, nodes_, length);
    prefixes.counters.asked += counts[row];
    prefixes.counters.found += length;
    handles[row] = store_.sequence(slot).handle;
    hits[row] = length;
  }
}

// Entries of all groups, -1 where a table has none.
std::span<int32_t> Allocator::entries_at(uint32_t slot, int32_t index) {
  for (int32_t group = 0; group < groups(); ++group) {
    const std::vector<int32_t>& blocks = store_.table(slot, group).blocks;
    entries_[group] = index < static_cast<int32_t>(blocks.size()) ? blocks[index] : -1;
  }
  return entries_;
}

// The last block of a sequence has been filled.
void Allocator::add_block(uint32_t slot, uint64_t hash) {
  Trace& trace = traces_[slot];
  const int32_t index = block_size_.index(trace.recorded - 1);
  const std::span<int32_t> entries = entries_at(slot, index);
  if (!prefixes_->add_block(trace, hash, entries, pool_)) return;
  for (int32_t group = 0; group < groups(); ++group) {
    Table& table = store_.table(slot, group);
    if (table.blocks[index] == entries[group]) continue;
    table.blocks[index] = entries[group];
    ++table.edits;
  }
}

void Allocator::record_row(uint32_t slot, Ints tokens) {
  Trace& trace = traces_[slot];
  while (!tokens.empty() && trace.epoch == prefixes_->epoch()) {
    const size_t missing = block_size_ - trace.tail.size();
    const Ints part = tokens.first(std::min(missing, tokens.size()));
    trace.tail.insert(trace.tail.end(), part.begin(), part.end());
    trace.recorded += static_cast<int32_t>(part.size());
    tokens = tokens.subspan(part.size());
    if (part.size() == missing) add_block(slot, prefixes_->hash_of(trace));
  }
  trace.recorded += static_cast<int32_t>(tokens.size());
}

// One token for each row, as every decode step has it. Blocks that this fills are added together,
// so that their memory is on its way before the first is.
void Allocator::record_step(Ints tokens) {
  filled_.clear();
  for (size_t row = 0; row < slots_.size(); ++row) {
    Trace& trace = traces_[slots_[row]];
    ++trace.recorded;
    if (trace.epoch != prefixes_->epoch()) continue;
    trace.tail.push_back(tokens[row]);
    if (trace.tail.size() == static_cast<size_t>(block_size_)) {
      filled_.push_back({slots_[row], prefixes_->hash_of(trace)});
      prefixes_->prefetch(filled_.back().hash);
    }
  }
  for (const auto& [slot, hash] : filled_) add_block(slot, hash);
}

void Allocator::record(Ints handles, Ints tokens, Ints counts) {
  prefixes("record");
  store_.resolve(handles, true, "record", slots_);
  check_counts("record", "counts", counts, handles.size(), kMaxInt32);
  if (sum_of(counts) != static_cast<int64_t>(tokens.size())) {
    bad_argument("record: tokens must have ", sum_of(counts), " entries, the sum of counts, got ",
                 tokens.size());
  }
  for (size_t row = 0; row < slots_.size(); ++row) {
    const int32_t recorded = traces_[slots_[row]].recorded;
    const int32_t length = store_.sequence(slots_[row]).length;
    if (counts[row] > length - recorded) {
      bad_argument("record: counts[", row, "] is ", counts[row], ", but the sequence has ", length,
                   " tokens, of which ", recorded, " were recorded");
    }
  }
  if (std::ranges::all_of(counts, [](int64_t count) { return count == 1; })) {
    record_step(tokens);
    return;
  }
  for (size_t row = 0; row < slots_.size(); ++row) {
    record_row(slots_[row], tokens.first(counts[row]));
    tokens = tokens.subspan(counts[row]);
  }
}

void Allocator::end_trace(uint32_t slot) {
  const Trace& trace = traces_[slot];
  if (trace.tail.empty()) return;
  const int32_t index = block_size_.index(trace.recorded);
  prefixes_->add_tail(traces_[slot], entries_at(slot, index), pool_);
}

// All blocks of a sequence, those of one node together and the tail first: it is evicted first.
void Allocator::drop_nodes(uint32_t slot) {
  size_t entries = 0;
  for (int32_t group = 0; group < groups(); ++group) {
    entries = std::max(entries, store_.table(slot, group).blocks.size());
  }
  for (size_t i = entries; i-- > 0;) {
    for (const int32_t block : entries_at(slot, static_cast<int32_t>(i))) {
      if (block >= 0) prefixes_->drop(block, pool_);
    }
  }
}

void Allocator::set_priority(Ints handles, Ints priorities) {
  prefixes("set_priority");
  store_.resolve(handles, true, "set_priority", slots_);
  if (priorities.size() != handles.size()) {
    bad_argument("set_priority: priorities must have one entry for each of ", handles.size(),
                 " rows, got ", priorities.size());
  }
  for (size_t row = 0; row < priorities.size(); ++row) {
    if (priorities[row] < BlockMarks::kLowest || priorities[row] > BlockMarks::kHighest) {
      bad_argument("set_priority: priorities[", row, "] must be ", BlockMarks::kLowest, " to ",
                   BlockMarks::kHighest, ", got ", priorities[row]);
    }
  }
  for (size_t row = 0; row < slots_.size(); ++row) {
    const auto priority = static_cast<int32_t>(priorities[row]);
    traces_[slots_[row]].priority = priority;
    for (int32_t group = 0; group < groups(); ++group) {
      const Table& table = store_.table(slots_[row], group);
      for (size_t i = block_size_.index(table.dead); i < table.blocks.size(); ++i) {
        prefixes_->set_priority(table.blocks[i], priority);
      }
    }
  }
}

void Allocator::forget_prefixes() { prefixes("forget_prefixes").forget(pool_); }

}  // namespace pykvcache
