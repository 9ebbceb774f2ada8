// Small cases of every kernel without torch or Python, for sanitizers: what is shared between CUDA
// threads shows as a race when each is an OS thread, and what lies outside an array when each array
// is an allocation of its own. Results are compared with a plain computation in double.
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/cache_kernels.cuh"
#include "cuda/hopper.cuh"
#include "cuda/merge.cuh"
#include "cuda/schedule.h"
#include "cuda_host/problem.h"

namespace pykvcache::cuda {
namespace {

const Case kCases[] = {
    {.name = "bf16"},
    {.name = "fp16, window, sinks",
     .q = DType::kFloat16,
     .cache = DType::kFloat16,
     .window = 9,
     .sinks = true},
    {.name = "fp8, block 3, softcap",
     .cache = DType::kFloat8E4M3,
     .block_size = 3,
     .softcap = 2.0f,
     .slot_scales = true},
    {.name = "hole, deterministic, masked dims", .dim = 48, .hole = true, .deterministic = true},
    {.name = "cut over many CTAs", .rows = {{1, 400}, {1, 3}, {1, 130}}},
    {.name = "float",
     .q = DType::kFloat32,
     .cache = DType::kFloat32,
     .block_size = 1,
     .dim = 20,
     .rows = {{1, 37}, {2, 70}, {1, 0}, {1, 200}}},
    {.name = "wgmma", .rows = {{20, 300}, {1, 20}}, .wgmma = true},
    {.name = "wgmma, all features, blocks of 48",
     .q = DType::kFloat16,
     .cache = DType::kFloat16,
     .block_size = 48,
     .dim = 40,
     .rows = {{60, 500}, {9, 5}},
     .window = 150,
     .softcap = 2.0f,
     .sinks = true,
     .hole = true,
     .wgmma = true},
    {.name = "wgmma, blocks of 3", .block_size = 3, .rows = {{20, 300}, {1, 20}}, .wgmma = true},
};
bool attention_is_right(const Case& c) {
  Problem problem(c);
  setenv("PYKVCACHE_CUDA_PREFILL", c.wgmma ? "wgmma" : "mma", 1);
  const uint64_t before = cuda_host::counts().warpgroup_products;
  int longest = 0;
  for (const Row& row : c.rows) longest = std::max(longest, row.q_len);
  Schedule s = make_schedule(problem.p, longest, problem.max_blocks);
  const auto plan = std::make_unique<int32_t[]>(problem.p.batch + 1);
  const auto values = std::make_unique<float[]>(s.part_values_count());
  const auto states = std::make_unique<SoftmaxState[]>(s.part_states_count());
  s.params.plan = plan.get();
  s.params.part_values = values.get();
  s.params.part_states = states.get();
  run(s, false, nullptr);
  double worst = 0.0;
  for (size_t b = 0; b < c.rows.size(); ++b)
    for (int query = 0; query < c.rows[b].q_len; ++query)
      for (int head = 0; head < kHeads * c.group; ++head)
        worst = worse(worst, problem.error_of(b, query, head));
  const bool right = worst <= (c.q == DType::kFloat32 ? 1e-4 : 3e-2) &&
                     (cuda_host::counts().warpgroup_products > before) == c.wgmma;
  std::printf("%-34s largest error %.2g%s\n", c.name, worst, right ? "" : "  WRONG");
  return right;
}

// Tokens are written to slots, blocks copied, and everything gathered again.
bool cache_operators_are_right() {
  const Case c{.name = "", .q = DType::kFloat16, .cache = DType::kFloat16, .rows = {{40, 40}}};
  Problem problem(c);
  const int64_t tokens = 40, width = kHeads * c.dim;
  const auto slots = std::make_unique<int64_t[]>(tokens);
  SlotMappingParams mapping;
  mapping.block_table = problem.p.block_table;
  mapping.seq_lens = problem.p.seq_lens;
  mapping.cu_seqlens_q = problem.p.cu_seqlens_q;
  mapping.slots = slots.get();
  mapping.block_table_stride = mapping.max_blocks = problem.max_blocks;
  mapping.batch = 1;
  mapping.num_tokens = tokens;
  mapping.block_size = Divisor(c.block_size);
  map_slots(mapping, nullptr);

  WriteArguments w;
  w.sides = 2;
  Array tokens_data(c.cache, tokens * width);
  for (int64_t i = 0; i < tokens * width; ++i) tokens_data.set(i, problem.number());
  for (int side = 0; side < 2; ++side) {
    w.caches[side] = problem.view(problem.caches[side]);
    w.tokens[side] = {tokens_data.data(), c.cache, width, c.dim};
  }
  w.slots = slots.get();
  w.num_tokens = tokens;
  w.num_heads = kHeads;
  w.block_size = c.block_size;
  w.num_slots = problem.num_blocks * c.block_size;
  write(w, nullptr);

  const auto pair = std::make_unique<int64_t[]>(2);  // the last block to one that is not in use
  std::vector<bool> used(problem.num_blocks, false);
  for (int i = 0; i < 3; ++i) used[problem.table[i]] = true;
  pair[0] = problem.table[2];
  pair[1] = std::find(used.begin(), used.end(), false) - used.begin();
  CopyParams copy;
  copy.pairs = pair.get();
  copy.block_bytes = copy.from_stride = copy.to_stride = width * c.block_size * 2;
  for (Array* cache : problem.caches) {
    copy.from = static_cast<const char*>(cache->data());
    copy.to = static_cast<char*>(cache->data());
    copy_blocks(copy, 1, nullptr);
  }
  std::vector<int32_t> table(problem.table);
  table[2] = static_cast<int32_t>(pair[1]);

  GatherParams g;
  Array dense[2] = {{c.cache, tokens * width}, {c.cache, tokens * width}};
  for (int side = 0; side < 2; ++side) {
    g.caches[side] = w.caches[side];
    g.dense[side] = dense[side].data();
  }
  g.block_table = problem.int_data(table);
  g.cu_seqlens_k = problem.p.cu_seqlens_q;
  g.block_table_stride = problem.max_blocks;
  g.batch = 1;
  g.num_heads = kHeads;
  g.total = tokens;
  g.block_size = Divisor(c.block_size);
  gather(g, 2, nullptr);
  bool right = true;
  for (int64_t i = 0; i < tokens * width; ++i)
    right &= dense[0].get(i) == tokens_data.get(i) && dense[1].get(i) == tokens_data.get(i);
  std::printf("%-34s %s\n", "cache operators", right ? "identical" : "WRONG");
  return right;
}

bool divisors_are_exact() {
  std::mt19937 random(3);
  bool right = true;
  for (int64_t d : {1, 2, 3, 5, 7, 16, 17, 100, 528, 4096, 65537, 1 << 30, 0x7fffffff}) {
    const Divisor divisor(d);
    for (int i = 0; i < 2000; ++i) {
      const int64_t at = i < 1000 ? int64_t{i / 2} * d - i % 2 : random();
      const auto n = static_cast<int32_t>(std::clamp<int64_t>(at & 0x7fffffff, 0, 0x7fffffff));
      right &= divisor.quotient(n) == n / d && divisor.remainder(n) == n % d;
    }
  }
  std::printf("%-34s %s\n", "division", right ? "exact" : "WRONG");
  return right;
}

// Rows of one unit each, more than the plan's kernel takes at once.
bool plan_is_right() {
  const int64_t rows = 3 * kPlanThreads - 5;
  std::vector<int32_t> starts(rows + 1), lengths(rows, 5), made(rows + 1, -1);
  std::iota(starts.begin(), starts.end(), 0);
  AttentionParams p;
  p.seq_lens = lengths.data();
  p.cu_seqlens_q = starts.data();
  p.batch = rows;
  p.num_heads = p.num_kv_heads = p.block_size = 1;
  KernelParams params = kernel_params(p, 1);
  params.plan = made.data();
  plan(params, nullptr);
  const bool right = made == starts;
  std::printf("%-34s %s\n", "plan", right ? "right" : "WRONG");
  return right;
}

bool refusal_says_what_is_supported() {
  AttentionParams p;
  p.head_dim = 1000;
  p.v_head_dim = 64;
  try {
    choose_kernel(p, Phase::kDecode, [](const Capability&) { return true; });
  } catch (const std::invalid_argument& error) {
    const std::string text = error.what();
    const auto says = [&](const char* what) { return text.find(what) != text.npos; };
    const bool right = says("D 1000") && says("q float32") && says("up to 576") &&
                       says("float8_e4m3fn caches") && says("prefill on Hopper");
    std::printf("%-34s %s\n", "refusal", right ? "readable" : "WRONG");
    return right;
  }
  return false;
}

}  // namespace
}  // namespace pykvcache::cuda

// Runs all cases; or, given the name of a KV_OMITTABLE and a case's number (-1: the plan), that
// case without it.
int main(int count, char** arguments) {
  using namespace pykvcache::cuda;
  if (count > 2) {
    cuda_host::omitted() = arguments[1];
    const int number = std::atoi(arguments[2]);
    return (number < 0 ? plan_is_right() : attention_is_right(kCases[number])) ? 0 : 1;
  }
  bool right = cache_operators_are_right();
  right &= plan_is_right();
  right &= divisors_are_exact();
  right &= refusal_says_what_is_supported();
  for (const Case& c : kCases) right &= attention_is_right(c);
  return right ? 0 : 1;
}
