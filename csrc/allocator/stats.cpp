#include "allocator/stats.h"

#include "allocator/inspector.h"

namespace pykvcache {

std::vector<Inspector::Use> Inspector::count_uses() const {
  const int32_t block_size = allocator_.block_size_;
  std::vector<Use> uses(pool_.num_blocks());
  std::vector<Span> spans;
  for (uint32_t slot = 0; slot < store_.num_slots(); ++slot) {
    const int32_t length = store_.sequence(slot).length;
    for (int32_t group = 0; group < store_.groups(); ++group) {
      const Table& table = store_.table(slot, group);
      for (size_t i = table.dead / block_size; i < table.blocks.size(); ++i) {
        const int64_t first = static_cast<int64_t>(i) * block_size;
        const auto offset = [&](int64_t position) {
          return static_cast<int32_t>(std::clamp<int64_t>(position - first, 0, block_size));
        };
        const int32_t begin = offset(table.dead), end = offset(length);
        Use& use = uses[table.blocks[i]];
        use.group = group;
        use.index = static_cast<int32_t>(i);
        use.written |= end > 0;
        ++use.refs;
        if (end - begin == block_size) {
          use.live = block_size;
        } else if (begin < end) {
          spans.push_back({table.blocks[i], begin, end});
        }
      }
    }
  }
  add_spans(spans, uses);
  return uses;
}

// Counts slots once that are in several spans.
void Inspector::add_spans(std::vector<Span>& spans, std::vector<Use>& uses) {
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) {
    return a.block != b.block ? a.block < b.block : a.begin < b.begin;
  });
  Span last = {-1, 0, 0};
  for (const Span& span : spans) {
    if (span.block != last.block) last = {span.block, 0, 0};
    const int32_t more = std::max(0, span.end - std::max(span.begin, last.end));
    last.end = std::max(last.end, span.end);
    uses[span.block].live += more;
  }
}

int64_t Inspector::metadata_bytes() const {
  size_t bytes = sizeof(Allocator);
  bytes += pool_.refs_.capacity() * sizeof(uint32_t) + pool_.free_.capacity() * sizeof(int32_t);
  bytes += store_.sequences_.capacity() * sizeof(Sequence);
  bytes += store_.tables_.capacity() * sizeof(Table);
  for (const Table& table : store_.tables_) bytes += table.blocks.capacity() * sizeof(int32_t);
  if (allocator_.prefixes_) bytes += allocator_.prefixes_->bytes();
  for (const Trace& trace : allocator_.traces_) {
    bytes += sizeof(Trace) + trace.tail.capacity() * sizeof(int64_t);
  }
  return static_cast<int64_t>(bytes);
}

Stats Inspector::stats() const {
  Stats stats;
  const int64_t block_size = allocator_.block_size_;
  const int64_t most_layers =
      *std::max_element(allocator_.layers_.begin(), allocator_.layers_.end());
  stats.group_blocks.resize(store_.groups());
  for (const Use& use : count_uses()) {
    if (use.refs == 0) continue;
    const int64_t layers = allocator_.layers_[use.group];
    const int64_t live = std::min<int64_t>(use.live, block_size);
    stats.live += live * layers;
    (use.written ? stats.internal : stats.reserved) += (block_size - live) * layers;
    stats.rounding += block_size * (most_layers - layers);
    stats.table_entries += use.refs;
    ++stats.table_blocks;
    ++stats.group_blocks[use.group];
  }
  const int64_t pinned_only = allocator_.num_used() - stats.table_blocks;
  const int64_t free_slots = allocator_.num_free() * block_size * most_layers;
  const bool waits = allocator_.refused_ > allocator_.num_free();
  stats.reserved += pinned_only * block_size * most_layers;
  (waits ? stats.external : stats.idle) = free_slots;

  stats.num_blocks = pool_.num_blocks();
  stats.used_blocks = allocator_.num_used();
  stats.peak_blocks = pool_.peak();
  stats.pinned_blocks = static_cast<int64_t>(pool_.pins_.size());
  stats.sequences = store_.num_live();
  for (const Sequence& sequence : store_.sequences_) {
    if (sequence.handle != 0) stats.tokens += sequence.length;
  }
  const Allocator::Counters& counters = allocator_.counters_;
  stats.copies = counters.copies;
  stats.forks = counters.forks;
  stats.refusals = counters.refusals;
  stats.steps = counters.steps;
  stats.block_steps = counters.block_steps;
  stats.metadata_bytes = metadata_bytes();
  stats.cached_blocks = allocator_.num_cached();
  if (allocator_.prefixes_) {
    const PrefixCache::Counters& prefixes = allocator_.prefixes_->counters;
    stats.prompt_tokens = prefixes.asked;
    stats.hit_tokens = prefixes.found;
    stats.evictions = prefixes.evictions;
    stats.merged_blocks = prefixes.merged;
  }
  return stats;
}

Stats Allocator::stats() const { return Inspector(*this).stats(); }

}  // namespace pykvcache
