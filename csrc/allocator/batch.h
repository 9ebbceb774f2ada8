// Metadata arrays of a batch, kept up to date by one call a step.
//
// The caller owns the arrays and gives their addresses once. A step appends tokens to every row,
// releases blocks that left a group's reach, and writes what changed: new table entries, lengths
// and the slots of the new tokens. Rows whose table was changed elsewhere are written anew. A step
// that would not fit the arrays changes nothing and says what it needs.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "allocator/allocator.h"

namespace pykvcache {

struct BatchArrays {
  std::vector<int32_t*> block_tables;   // [group] -> [B, columns], -1 where unused
  std::vector<int64_t*> slot_mappings;  // [group] -> [tokens]
  int32_t* seq_lens = nullptr;          // [B]
  int32_t* cu_seqlens_q = nullptr;      // [B + 1]
  int64_t columns = 0, tokens = 0;      // capacities
};

class Batch {
 public:
  explicit Batch(int32_t groups) : reach_(groups), arrays_{} {}

  // Rows from now on; rows that stay the same keep what was written. New arrays are due if the
  // number of rows changed.
  void bind(Ints handles);
  void set_arrays(const BatchArrays& arrays);
  void set_reach(std::vector<Reach> reach) { reach_ = std::move(reach); }

  struct Result {
    bool fits;
    int64_t tokens;   // length of the slot mappings, needed or written
    int64_t columns;  // of the longest table
    int32_t max_count;
    Copies copies;
  };
  // `width` > 0 gives every row that many query tokens, of which the last counts[row] are real: the
  // others have slot -1. Otherwise rows are packed.
  Result step(Allocator& allocator, Ints counts, int64_t width, bool release);

  int64_t rows() const { return static_cast<int64_t>(handles_.size()); }

 private:
  struct Written {
    int32_t entries = 0;  // table entries that the array shows
    uint32_t edits = 0;   // Table::edits at that time
    bool stale = true;    // the array shows another sequence, or nothing yet

    bool shows(const Table& table) const {
      return !stale && edits == table.edits && static_cast<size_t>(entries) == table.blocks.size();
    }
  };
  void write_table(const Table& table, Written& written, int32_t* row);

  std::vector<int64_t> handles_;
  std::vector<Written> written_;  // [group][row]
  std::vector<Reach> reach_;
  BatchArrays arrays_;
  int64_t restores_ = 0;
};

}  // namespace pykvcache
