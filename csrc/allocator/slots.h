// Positions of a sequence as slots of the pool.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "allocator/block_size.h"

namespace pykvcache {

// Writes the slots of positions [begin, end), -1 in released blocks.
inline void write_slots(const std::vector<int32_t>& blocks, BlockSize block_size, int32_t begin,
                        int32_t end, int64_t* slots) {
  if (end - begin == 1) {  // a decode step: the loop costs more than its body
    const int32_t index = block_size.index(begin), block = blocks[index];
    *slots = block < 0 ? -1 : int64_t{block - index} * block_size + begin;
    return;
  }
  while (begin < end) {
    const int32_t index = block_size.index(begin), offset = begin - index * block_size;
    const int32_t run = std::min(end - begin, block_size - offset);
    if (blocks[index] < 0) {
      std::fill_n(slots, run, -1);
    } else {
      std::iota(slots, slots + run, int64_t{blocks[index]} * block_size + offset);
    }
    slots += run;
    begin += run;
  }
}

}  // namespace pykvcache
