// Reads every table, pin, free id and node of an allocator: stats.cpp counts, integrity.cpp and
// prefix_integrity.cpp check.
#pragma once

#include <vector>

#include "allocator/allocator.h"
#include "allocator/stats.h"

namespace pykvcache {

// Throws IntegrityError with the text of `parts` unless the condition holds.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]]
    throw IntegrityError(message(parts...));
}

class Inspector {
 public:
  explicit Inspector(const Allocator& allocator)
      : allocator_(allocator), pool_(allocator.pool_), store_(allocator.store_) {}

  Stats stats() const;
  void check() const;

 private:
  struct Use {  // of a block, by all tables
    int32_t group = -1, index = -1;
    int32_t live = 0;      // slots that some sequence may still read, at least block_size if all
    bool written = false;  // holds tokens, live or not
    uint32_t refs = 0;
  };
  struct Span {  // live slots of a block that one sequence does not fill
    int32_t block, begin, end;
  };
  std::vector<Use> count_uses() const;
  static void add_spans(std::vector<Span>& spans, std::vector<Use>& uses);
  void check_slots() const;
  void check_tables() const;
  void check_references() const;
  void check_free_list() const;
  void check_prefixes() const;  // prefix_integrity.cpp
  int64_t metadata_bytes() const;

  const Allocator& allocator_;
  const BlockPool& pool_;
  const SequenceStore& store_;
};

}  // namespace pykvcache
