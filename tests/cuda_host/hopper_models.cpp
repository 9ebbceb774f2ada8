// The models of mbarrier, TMA and wgmma on their own: one product of each kind from boxes of
// scattered blocks, compared with sums in double; the same with a wrong descriptor must differ.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/warpgroup_tile.cuh"

namespace pykvcache::cuda {
namespace {

constexpr int kKeys = 64, kDim = 128, kRealDim = 104, kBlock = 16, kHeads = 3, kBlocks = 9;
constexpr int kHead = 1;
constexpr int32_t kTable[kKeys / kBlock] = {5, -1, 0, 8};  // -1: a hole

struct Params {
  TensorMap maps[2];
  const uint16_t* q;  // [64, kDim]
  float* scores;      // [64, kKeys]
  float* values;      // [64, kDim]
  uint64_t flips[3];  // bits of the descriptors of q, k, v that are wrong
};

using Queries = WarpgroupTile<kGroupRows, kDim>;
using Keys = WarpgroupTile<kKeys, kDim>;
// More than is used: wrong descriptors lead there.
constexpr int kSharedBytes = Queries::kBytes + 2 * Keys::kBytes + (32 << 10);

// One warpgroup: scores = q k^T, values = bf16(scores) v.
void products(const Params params) {
  unsigned char* const q = dynamic_shared();
  unsigned char* const tiles[2] = {q + Queries::kBytes, q + Queries::kBytes + Keys::kBytes};
  auto* const barrier = reinterpret_cast<Barrier*>(tiles[1] + Keys::kBytes);
  const int thread = threadIdx.x, lane = thread % 32;
  if (thread == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    barrier_arrive_expecting(barrier, 2 * Keys::kBytes);
    for (int side = 0; side < 2; ++side)
      for (int slab = 0; slab < Keys::kSlabs; ++slab)
        for (int i = 0; i < kKeys / kBlock; ++i)
          copy_box(tiles[side] + slab * Keys::kSlabBytes + i * kBlock * Keys::kRowBytes,
                   &params.maps[side], barrier, slab * kBoxColumns, 0, kHead, kTable[i]);
  }
  for (int i = thread; i < kGroupRows * kDim / 8; i += kWarpgroup)
    std::memcpy(q + Queries::offset(i / (kDim / 8), i % (kDim / 8)), params.q + i * 8, 16);
  async_proxy_fence();
  __syncthreads();
  barrier_wait(barrier, 0);
  float scores[kKeys / 8][4], values[kDim / 8][4] = {};
  uint32_t weights[kKeys / 16][4];
  warpgroup_fence(scores);
  for (int step = 0; step < kDim / 16; ++step)
    multiply_shared<BFloat16>(
        scores, (Queries::sum_columns(q) + Queries::column_step(step)) ^ params.flips[0],
        (Keys::sum_columns(tiles[0]) + Keys::column_step(step)) ^ params.flips[1], step > 0);
  warpgroup_commit();
  warpgroup_wait<0>(scores);
  for (int n = 0; n < kKeys / 16; ++n)
    for (int i = 0; i < 4; ++i)
      weights[n][i] =
          pack<BFloat16>(scores[2 * n + i / 2][i % 2 * 2], scores[2 * n + i / 2][i % 2 * 2 + 1]);
  warpgroup_fence(values, weights);
  for (int step = 0; step < kKeys / 16; ++step)
    multiply_registers<BFloat16>(
        values, weights[step], (Keys::sum_rows(tiles[1]) + Keys::row_step(step)) ^ params.flips[2]);
  warpgroup_commit();
  warpgroup_wait<0>(values, weights);
  for (int i = 0; i < 4; ++i) {
    const int row = thread / 32 * 16 + lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
    for (int j = 0; j < kKeys / 8; ++j) params.scores[row * kKeys + 8 * j + column] = scores[j][i];
    for (int j = 0; j < kDim / 8; ++j) params.values[row * kDim + 8 * j + column] = values[j][i];
  }
}

struct Test {
  std::vector<uint16_t> q, caches[2];
  std::vector<float> scores, values;
  Params params = {};

  Test() : scores(kGroupRows * kKeys), values(kGroupRows * kDim) {
    std::mt19937 random(1);
    std::uniform_real_distribution<float> number(-1, 1);
    for (int i = 0; i < kGroupRows * kDim; ++i)
      q.push_back(from_float<BFloat16>(number(random)).bits);
    for (int side = 0; side < 2; ++side) {
      for (int i = 0; i < kBlocks * kHeads * kBlock * kRealDim; ++i)
        caches[side].push_back(from_float<BFloat16>(number(random)).bits);
      params.maps[side] =
          encode_map({caches[side].data(),
                      {kRealDim, kBlock, kHeads, kBlocks},
                      {2 * kRealDim, 2 * kRealDim * kBlock, 2 * kRealDim * kBlock * kHeads},
                      kBlock});
    }
    params.q = q.data();
    params.scores = scores.data();
    params.values = values.data();
  }

  double element(int side, int key, int d) const {
    const int block = kTable[key / kBlock];
    if (block < 0 || d >= kRealDim) return 0.0;
    const int64_t at = ((int64_t{block} * kHeads + kHead) * kBlock + key % kBlock) * kRealDim + d;
    return to_float(BFloat16{caches[side][at]});
  }

  // The largest differences of scores and values.
  std::pair<double, double> run(uint64_t q_flip = 0, uint64_t k_flip = 0, uint64_t v_flip = 0) {
    params.flips[0] = q_flip;
    params.flips[1] = k_flip;
    params.flips[2] = v_flip;
    cuda_host::launch(&products, dim3{1}, dim3{kWarpgroup}, kSharedBytes, params);
    double worst[2] = {};
    for (int row = 0; row < kGroupRows; ++row) {
      for (int key = 0; key < kKeys; ++key) {
        double sum = 0.0;
        for (int d = 0; d < kDim; ++d)
          sum += double{to_float(BFloat16{q[row * kDim + d]})} * element(0, key, d);
        worst[0] = std::fmax(worst[0], std::abs(sum - scores[row * kKeys + key]));
      }
      for (int d = 0; d < kDim; ++d) {
        double sum = 0.0;
        for (int key = 0; key < kKeys; ++key)
          sum += to_float(from_float<BFloat16>(scores[row * kKeys + key])) * element(1, key, d);
        worst[1] = std::fmax(worst[1], std::abs(sum - values[row * kDim + d]));
      }
    }
    return {worst[0], worst[1]};
  }
};

int failures = 0;
void expect(bool holds, const char* what) {
  std::printf("%-60s %s\n", what, holds ? "right" : "WRONG");
  failures += !holds;
}

void check_products() {
  Test test;
  for (const bool late : {false, true}) {
    cuda_host::boxes_are_late() = late;
    const auto [scores, values] = test.run();
    expect(scores < 1e-4 && values < 1e-3, late ? "products of late boxes" : "of early boxes");
  }
  const uint64_t swizzle = uint64_t{3} << 62;  // 64 bytes instead of 128
  const uint64_t stride = uint64_t{96} << 32;  // 512 bytes instead of 1,024
  const uint64_t leading = uint64_t{1} << 25;  // slabs 8 KiB nearer or farther
  expect(test.run(swizzle).first > 0.1, "a wrong swizzle of q shows");
  expect(test.run(stride).first > 0.1, "a wrong stride of q shows");
  expect(test.run(0, swizzle).first > 0.1, "a wrong swizzle of k shows");
  expect(test.run(0, stride).first > 0.1, "a wrong stride of k shows");
  expect(test.run(0, leading).first < 1e-4, "k has no leading offset");
  expect(test.run(0, 0, swizzle).second > 0.1, "a wrong swizzle of v shows");
  expect(test.run(0, 0, stride).second > 0.1, "a wrong stride of v shows");
  expect(test.run(0, 0, leading).second > 0.1, "a wrong leading offset of v shows");
}

// Two threads of one warp; the other 30 arrive as one.
void count_phases(const Params) {
  auto* const barrier = reinterpret_cast<Barrier*>(dynamic_shared());
  if (threadIdx.x != 0) return;
  barrier_init(barrier, 2);
  expect(!cuda_host::phase_ended(barrier, 0), "a new barrier is in its first phase");
  expect(cuda_host::phase_ended(barrier, 1), "the phase before the first has ended");
  barrier_arrive(barrier);
  barrier_arrive_expecting(barrier, 32);
  expect(!cuda_host::phase_ended(barrier, 0), "a phase waits for bytes");
  cuda_host::change_barrier(barrier, 0, -32);
  expect(cuda_host::phase_ended(barrier, 0), "and ends with them");
  expect(!cuda_host::phase_ended(barrier, 1), "the next one has begun");
  cuda_host::change_barrier(barrier, 0, -16);
  barrier_arrive_expecting(barrier, 16);
  expect(!cuda_host::phase_ended(barrier, 1), "bytes may land before they are expected");
  barrier_arrive(barrier);
  expect(cuda_host::phase_ended(barrier, 1), "each phase counts anew");
}

void check_maps() {
  alignas(16) static uint16_t data[64];
  const auto refused = [](const BoxLayout& layout) {
    try {
      encode_map(layout);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  expect(!refused({data, {8, 16, 1, 1}, {16, 256, 256}, 16}), "a map that the driver takes");
  expect(refused({data + 1, {8, 16, 1, 1}, {16, 256, 256}, 16}), "not one of an odd address");
  expect(refused({data, {8, 16, 1, 1}, {24, 256, 256}, 16}), "nor of strides of 24 bytes");
  expect(refused({data, {8, 16, 1, 1}, {16, 256, int64_t{1} << 40}, 16}), "nor of huge ones");
  expect(refused({data, {8, 16, 1, 1}, {16, 256, 256}, 512}), "nor of boxes of 512");
}

}  // namespace
}  // namespace pykvcache::cuda

int main() {
  using namespace pykvcache::cuda;
  check_products();
  check_maps();
  cuda_host::launch(&count_phases, dim3{1}, dim3{32}, 1024, Params{});
  return failures > 0;
}
