// What kernels read of sequences: lengths, block tables and slots.
#include <limits>

#include "allocator/allocator.h"
#include "allocator/slots.h"

namespace pykvcache {

void Allocator::lengths(Ints handles, int32_t* out) {
  store_.resolve(handles, false, "lengths", slots_);
  for (const uint32_t slot : slots_) *out++ = store_.sequence(slot).length;
}

int64_t Allocator::block_table(Ints handles, int64_t group, std::vector<int32_t>& out) {
  check_group(group);
  store_.resolve(handles, false, "block_table", slots_);
  size_t columns = 0;
  for (const uint32_t slot : slots_) {
    columns = std::max(columns, store_.table(slot, static_cast<int32_t>(group)).blocks.size());
  }
  out.assign(slots_.size() * columns, -1);
  for (size_t row = 0; row < slots_.size(); ++row) {
    const auto& blocks = store_.table(slots_[row], static_cast<int32_t>(group)).blocks;
    std::copy(blocks.begin(), blocks.end(), out.begin() + row * columns);
  }
  return static_cast<int64_t>(columns);
}

void Allocator::slot_mapping(Ints handles, Ints counts, int64_t group, int64_t width,
                             std::vector<int64_t>& out) {
  check_group(group);
  check_width("slot_mapping", width);
  store_.resolve(handles, false, "slot_mapping", slots_);
  check_counts("slot_mapping", "counts", counts, handles.size(),
               width > 0 ? width : std::numeric_limits<int32_t>::max());
  int64_t total = 0;
  for (size_t row = 0; row < slots_.size(); ++row) {
    if (counts[row] > store_.sequence(slots_[row]).length) {
      bad_argument("slot_mapping: counts[", row, "] is ", counts[row], ", but the sequence has ",
                   store_.sequence(slots_[row]).length, " tokens");
    }
    total += width > 0 ? width : counts[row];
  }
  out.assign(total, -1);
  int64_t* slots = out.data();
  for (size_t row = 0; row < slots_.size(); ++row) {
    const int32_t length = store_.sequence(slots_[row]).length;
    if (width > 0) slots += width - counts[row];
    write_slots(store_.table(slots_[row], static_cast<int32_t>(group)).blocks, block_size_,
                length - static_cast<int32_t>(counts[row]), length, slots);
    slots += counts[row];
  }
}

}  // namespace pykvcache
