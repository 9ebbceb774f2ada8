#include "allocator/batch.h"

#include <algorithm>
#include <limits>

#include "allocator/slots.h"

namespace pykvcache {

void Batch::bind(Ints handles) {
  const size_t old_rows = handles_.size(), rows = handles.size(), groups = reach_.size();
  if (rows != old_rows) {
    handles_.assign(handles.begin(), handles.end());
    written_.assign(rows * groups, {});
    arrays_ = {};
    return;
  }
  for (size_t row = 0; row < rows; ++row) {
    if (handles_[row] == handles[row]) continue;
    handles_[row] = handles[row];
    for (size_t group = 0; group < groups; ++group) written_[group * rows + row].stale = true;
  }
}

void Batch::set_arrays(const BatchArrays& arrays) {
  arrays_ = arrays;
  std::fill(written_.begin(), written_.end(), Written{});
}

void Batch::write_table(const Table& table, Written& written, int32_t* row) {
  const auto size = static_cast<int32_t>(table.blocks.size());
  const bool grown_only = !written.stale && written.edits == table.edits && written.entries <= size;
  const int32_t begin = grown_only ? written.entries : 0;
  std::copy(table.blocks.begin() + begin, table.blocks.end(), row + begin);
  if (written.entries > size) std::fill(row + size, row + written.entries, -1);
  written = {size, table.edits, false};
}

Batch::Result Batch::step(Allocator& allocator, Ints counts, int64_t width, bool release) {
  constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();
  const int64_t rows = this->rows();
  check_width("step", width);
  if (width > 0) check_counts("step", "counts", counts, rows, width);
  std::span<const Reach> reach;
  if (release) reach = reach_;
  allocator.plan_append(handles_, counts, reach, "step");

  Result result{true, 0, allocator.plan_.max_blocks, 0, {}};
  for (const int64_t count : counts) {
    result.tokens += width > 0 ? width : count;
    result.max_count = std::max(result.max_count, static_cast<int32_t>(count));
  }
  if (width > 0) result.max_count = static_cast<int32_t>(width);
  if (result.tokens > kMaxTokens) {
    allocator.roll_back();
    bad_argument("step: ", result.tokens, " tokens are more than ", kMaxTokens);
  }
  result.fits = result.tokens <= arrays_.tokens && result.columns <= arrays_.columns &&
                arrays_.seq_lens != nullptr;
  if (!result.fits) {
    allocator.roll_back();
    return result;
  }
  result.copies = allocator.commit();

  if (restores_ != allocator.restores_) {
    restores_ = allocator.restores_;
    for (Written& written : written_) written.stale = true;
  }
  const Allocator::Plan& plan = allocator.plan_;
  for (size_t group = 0; group < reach_.size(); ++group) {
    int64_t* slots = arrays_.slot_mappings[group];
    for (int64_t row = 0; row < rows; ++row) {
      const auto [slot, length, begin, end] = plan.rows[row];
      const Table& table = allocator.store_.table(slot, static_cast<int32_t>(group));
      Written& written = written_[group * rows + row];
      if (!written.shows(table)) {
        write_table(table, written, arrays_.block_tables[group] + row * arrays_.columns);
      }
      const auto count = static_cast<int32_t>(counts[row]);
      const int64_t padding = width > 0 ? width - count : 0;
      std::fill_n(slots, padding, -1);
      write_slots(table.blocks, allocator.block_size_, length - count, length, slots + padding);
      slots += padding + count;
    }
  }
  int64_t start = 0;
  for (int64_t row = 0; row < rows; ++row) {
    arrays_.seq_lens[row] = plan.rows[row].length;
    arrays_.cu_seqlens_q[row] = static_cast<int32_t>(start);
    start += width > 0 ? width : counts[row];
  }
  arrays_.cu_seqlens_q[rows] = static_cast<int32_t>(start);
  return result;
}

}  // namespace pykvcache
