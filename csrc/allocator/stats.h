// Where the bytes of the pool are. The unit is a token slot of one layer: a block has block_size *
// layers_of_the_largest_group of them. live + reserved + internal + rounding + external are the
// slots that someone uses or waits for; idle ones are free while nobody waits.
#pragma once

#include <cstdint>
#include <vector>

namespace pykvcache {

struct Stats {
  int64_t live = 0;      // tokens that can still be attended, a shared one counted once
  int64_t reserved = 0;  // blocks that reserve() took ahead, and pinned blocks without a sequence
  int64_t internal = 0;  // slack in last blocks, and tokens that left the reach of their group
  int64_t rounding = 0;  // layers that a smaller group does not have
  int64_t external = 0;  // free, but not enough for the request that was refused last
  int64_t idle = 0;      // free, and nobody waits

  int64_t num_blocks = 0, used_blocks = 0, peak_blocks = 0;
  int64_t table_entries = 0;  // references from tables
  int64_t table_blocks = 0;   // distinct blocks in tables
  int64_t pinned_blocks = 0;
  int64_t sequences = 0, tokens = 0;
  int64_t copies = 0, forks = 0, refusals = 0, steps = 0, block_steps = 0;
  int64_t metadata_bytes = 0;
  int64_t cached_blocks = 0;                  // free, but they hold known prefixes
  int64_t prompt_tokens = 0, hit_tokens = 0;  // of allocate_cached()
  int64_t evictions = 0, merged_blocks = 0;
  std::vector<int64_t> group_blocks;  // distinct blocks of each group
};

}  // namespace pykvcache
