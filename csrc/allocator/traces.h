// What each sequence has told the prefix index of its tokens.
#pragma once

#include <cstdint>
#include <vector>

namespace pykvcache {

struct Trace {
  // Instead of an epoch. Lost: tokens are counted but not indexed, until the sequence is empty
  // again. Unknown: for ever, since its salt is not known.
  static constexpr uint32_t kLost = 0, kUnknown = ~0u;

  int64_t salt = 0;
  uint64_t tip_serial = 0;    // of `tip`, to notice when the node is another one by now
  int32_t tip = -1;           // node of the last full block; -1: there is none yet
  int32_t recorded = 0;       // tokens
  uint32_t epoch = kUnknown;  // if it is not the index's, the sequence is lost
  int32_t priority = 0;       // of the blocks that it adds
  std::vector<int64_t> tail;  // tokens after the last full block

  // Memory of the tail is kept.
  void begin(int64_t new_salt, uint32_t new_epoch) {
    salt = new_salt;
    tip = -1;
    recorded = priority = 0;
    epoch = new_epoch;
    tail.clear();
  }
  void lose() {
    if (epoch != kUnknown) epoch = kLost;
    tail.clear();
  }
};

}  // namespace pykvcache
