#include "allocator/timing.h"

#include <random>

#include "allocator/batch.h"

namespace pykvcache {

namespace {

constexpr int64_t kBlockSize = 16, kLength = 1000, kRows = 256, kSteps = 64;
constexpr int64_t kMostBlocks = 512;  // of a sequence that wears the pool
constexpr int64_t kLayers[] = {1};

Allocator worn_allocator(int64_t num_blocks) {
  Allocator allocator(num_blocks, kBlockSize, kLayers, 1);
  std::mt19937_64 random(0);
  std::vector<int64_t> handles;
  while (allocator.num_free() > kMostBlocks) {
    const int64_t length = static_cast<int64_t>(random() % (kMostBlocks * kBlockSize)) + 1;
    allocator.allocate({&length, 1}, &handles.emplace_back());
  }
  std::shuffle(handles.begin(), handles.end(), random);
  for (size_t i = 0; i < handles.size() / 2; ++i) allocator.free({&handles[i], 1});
  return allocator;
}

// The arrays of a batch, as its owner would hold them.
struct Arrays {
  explicit Arrays(int64_t columns)
      : table(kRows * columns, -1), slots(kRows), lens(kRows), starts(kRows + 1) {
    batch.block_tables = {table.data()};
    batch.slot_mappings = {slots.data()};
    batch.seq_lens = lens.data();
    batch.cu_seqlens_q = starts.data();
    batch.columns = columns;
    batch.tokens = kRows;
  }
  std::vector<int32_t> table;
  std::vector<int64_t> slots;
  std::vector<int32_t> lens, starts;
  BatchArrays batch;
};

}  // namespace

Timings time_allocator(int64_t num_blocks, int64_t repeats) {
  std::vector<double> init, allocate, free, append, step, fork, drop, select;
  const std::vector<int64_t> lengths(kRows, kLength), ones(kRows, 1);
  const int64_t blocks = kRows * ((kLength + kBlockSize - 1) / kBlockSize);
  std::vector<int64_t> seqs(kRows), children(kRows), pairs(kRows);
  for (int64_t row = 0; row < kRows; ++row) pairs[row] = row / 2;
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    init.push_back(time_per(1, [&] { Allocator(num_blocks, kBlockSize, kLayers, 1); }));
  }
  Allocator allocator = worn_allocator(num_blocks);
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    allocate.push_back(time_per(blocks, [&] { allocator.allocate(lengths, seqs.data()); }));
    free.push_back(time_per(blocks, [&] { allocator.free(seqs); }));

    allocator.allocate(lengths, seqs.data());
    fork.push_back(time_per(kRows, [&] {
      for (int64_t row = 0; row < kRows; ++row) allocator.fork({&seqs[row], 1}, 1, &children[row]);
    }));
    drop.push_back(time_per(kRows, [&] { allocator.free(children); }));
    append.push_back(time_per(kSteps, [&] {
      for (int64_t i = 0; i < kSteps; ++i) allocator.append(seqs, ones);
    }));
    Arrays arrays((kLength + 3 * kSteps) / kBlockSize);
    Batch batch(1);
    batch.bind(seqs);
    batch.set_arrays(arrays.batch);
    batch.step(allocator, ones, 0, true);
    step.push_back(time_per(kSteps, [&] {
      for (int64_t i = 0; i < kSteps; ++i) batch.step(allocator, ones, 0, true);
    }));
    select.push_back(time_per(kRows, [&] { allocator.select(seqs, pairs, children.data()); }));
    allocator.free(children);
  }
  return {{"init, a pool", init},          {"allocate, a block", allocate},
          {"free, a block", free},         {"append to 256 sequences", append},
          {"step of 256 sequences", step}, {"fork of 1,000 tokens", fork},
          {"free of a fork", drop},        {"select, a row of 1,000 tokens", select}};
}

}  // namespace pykvcache
