// Reads every table, pin and free id of an allocator: stats.cpp counts, integrity.cpp checks.
#pragma once

#include <vector>

#include "allocator/allocator.h"
#include "allocator/stats.h"

namespace pykvcache {

class Inspector {
 public:
  explicit Inspector(const Allocator& allocator)
      : allocator_(allocator), pool_(allocator.pool_), store_(allocator.store_) {}

  Stats stats() const;
  void check() const;

 private:
  struct Use {  // of a block, by all tables
    int32_t group = -1, index = -1;
    int32_t begin = 0, end = 0;  // offsets that hold live tokens
    uint32_t refs = 0;
  };
  std::vector<Use> count_uses() const;
  void check_slots() const;
  void check_tables() const;
  void check_references() const;
  void check_free_list() const;
  int64_t metadata_bytes() const;

  const Allocator& allocator_;
  const BlockPool& pool_;
  const SequenceStore& store_;
};

}  // namespace pykvcache
