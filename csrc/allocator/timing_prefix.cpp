#include <random>

#include "allocator/allocator.h"
#include "allocator/timing.h"

namespace pykvcache {

namespace {

constexpr int64_t kBlockSize = 16, kRows = 256, kSteps = 64, kLength = 1000;
constexpr int64_t kMostBlocks = 512;  // of a sequence that fills the pool
constexpr int64_t kLayers[] = {1}, kWindows[] = {0};
constexpr int64_t kVocabulary = 128000;
constexpr int64_t kPrompts = 16;     // of a sample
constexpr int64_t kNewBlocks = 512;  // of a sample of evictions

// The tokens of a prompt, which its number stands for.
std::vector<int64_t> prompt_of(int64_t number) {
  std::minstd_rand random(static_cast<uint32_t>(number + 1));
  std::vector<int64_t> tokens((random() % kMostBlocks + 1) * kBlockSize);
  for (int64_t& token : tokens) token = random() % kVocabulary;
  return tokens;
}

struct CachedPool {
  explicit CachedPool(int64_t num_blocks) : allocator(num_blocks, kBlockSize, kLayers, 1) {
    allocator.cache_prefixes(kWindows);
    std::vector<int64_t> seqs;
    while (allocator.num_free() > kMostBlocks) {
      const auto tokens = prompt_of(static_cast<int64_t>(seqs.size()));
      const auto length = static_cast<int64_t>(tokens.size());
      allocator.allocate({&length, 1}, &seqs.emplace_back());
      allocator.record({&seqs.back(), 1}, tokens, {&length, 1});
    }
    num_prompts = static_cast<int64_t>(seqs.size());
    std::shuffle(seqs.begin(), seqs.end(), std::mt19937_64(0));
    for (const int64_t& seq : seqs) allocator.free({&seq, 1});
  }

  Allocator allocator;
  int64_t num_prompts;
};

// Prompts drawn from all that the pool holds: none of their blocks is in the processor's caches.
void time_hits(CachedPool& pool, std::mt19937_64& random, std::vector<double>& hit,
               std::vector<double>& end) {
  std::vector<int64_t> tokens, counts, seqs(kPrompts), hits(kPrompts);
  const std::vector<int64_t> salts(kPrompts, 0);
  for (int64_t i = 0; i < kPrompts; ++i) {
    const auto prompt = prompt_of(static_cast<int64_t>(random() % pool.num_prompts));
    tokens.insert(tokens.end(), prompt.begin(), prompt.end());
    counts.push_back(static_cast<int64_t>(prompt.size()));
  }
  const auto blocks = static_cast<int64_t>(tokens.size()) / kBlockSize;
  hit.push_back(time_per(blocks, [&] {
    pool.allocator.allocate_cached(tokens, counts, salts, seqs.data(), hits.data());
  }));
  if (hits != counts) bad_argument("a prompt was not found");
  end.push_back(time_per(blocks, [&] { pool.allocator.free(seqs); }));
}

// Decode steps of rows with unlike tokens; every 16th token fills a block.
void time_records(Allocator& allocator, std::mt19937_64& random, std::vector<double>& record) {
  const std::vector<int64_t> lengths(kRows, kLength), ones(kRows, 1);
  std::vector<int64_t> seqs(kRows), tokens(kRows * kLength);
  for (int64_t& token : tokens) token = static_cast<int64_t>(random() % kVocabulary);
  allocator.allocate(lengths, seqs.data());
  allocator.record(seqs, tokens, lengths);
  double total = 0;
  for (int64_t step = 0; step < kSteps; ++step) {
    for (int64_t row = 0; row < kRows; ++row) tokens[row] = random() % kVocabulary;
    allocator.append(seqs, ones);
    total += time_per(kSteps, [&] { allocator.record(seqs, Ints(tokens).first(kRows), ones); });
  }
  record.push_back(total);
  allocator.free(seqs);
}

}  // namespace

Timings time_prefixes(int64_t num_blocks, int64_t repeats) {
  CachedPool pool(num_blocks);
  std::mt19937_64 random(1);
  std::vector<double> hit, end, evict, record;
  for (int64_t repeat = 0; repeat < repeats; ++repeat) time_hits(pool, random, hit, end);
  for (int64_t repeat = 0; repeat < repeats; ++repeat) time_records(pool.allocator, random, record);
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    const int64_t length = kNewBlocks * kBlockSize;
    int64_t seq;
    evict.push_back(time_per(kNewBlocks, [&] { pool.allocator.allocate({&length, 1}, &seq); }));
  }
  return {{"prefix hit, a block", hit},
          {"free into the cache, a block", end},
          {"record 1 token of 256 sequences", record},
          {"evict + allocate, a block", evict}};
}

}  // namespace pykvcache
