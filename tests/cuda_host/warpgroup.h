// wgmma: products of a warpgroup, after PTX ISA 9.0, "Asynchronous warpgroup level matrix
// instructions": register fragments, strides, matrix descriptors. Read boxes.h first.
//
// A product happens when its group is waited for, in the thread that waits: registers and shared
// memory that were changed before are seen changed, accumulators that are read before are old. Each
// lane reads its part of the operands itself, so that ThreadSanitizer sees who reads.
#pragma once

#include "cuda_host/boxes.h"

namespace cuda_host {

// Fields of a matrix descriptor; addresses and offsets lack their four low bits.
struct Descriptor {
  uint32_t start, leading, stride;
  int base_offset, bits;  // of the swizzle: spans of 16 << bits bytes

  explicit Descriptor(uint64_t d)
      : start((d & 0x3fff) << 4),
        leading((d >> 16 & 0x3fff) << 4),
        stride((d >> 32 & 0x3fff) << 4),
        base_offset(d >> 49 & 7) {
    const int mode = d >> 62;
    bits = mode == 0 ? 0 : 4 - mode;
    if (base_offset != 0) stop("wgmma: base offsets are not modelled");
  }

  // 2-byte element k of row `outer`, k contiguous ("K-major"). Eight rows of a span each lie
  // together; `stride` leads to the next eight, and without swizzle `leading` to the next 8 k.
  uint32_t element_k_major(int outer, int k) const {
    const uint32_t chunk = bits == 0 ? k / 8 * leading : k / 8 * 16;
    return swizzled(start + outer % 8 * (16u << bits) + outer / 8 * stride + chunk + k % 8 * 2,
                    bits);
  }

  // The same where the outer dimension is contiguous ("MN-major"): a span of it for each k; eight k
  // lie together, `stride` leads to the next eight and `leading` to the next span. Without swizzle
  // the two change places.
  uint32_t element_outer_major(int outer, int k) const {
    const int span = 8 << bits;
    const uint32_t next_span = bits == 0 ? stride : leading, next_k = bits == 0 ? leading : stride;
    return swizzled(start + outer % span * 2 + outer / span * next_span + k % 8 * (16u << bits) +
                        k / 8 * next_k,
                    bits);
  }
};

inline float read_element(uint32_t address, const Product& product) {
  uint16_t bits;
  std::memcpy(&bits, shared_pointer(address, 2), 2);
  return product.to_float(bits);
}

// This warp's 16 rows of one product.
inline void compute(const Product& product) {
  Warp& warp = *current->warp;
  const int lane = current->lane, g = lane / 4, t = lane % 4;
  const int first_row = static_cast<int>(current->thread_idx.x / kWarp % 4) * 16;
  const int columns = 8 * product.columns;
  float right[128], left[8];  // this lane's parts of b and a
  const Descriptor a(product.a), b(product.b);
  for (int e = lane, i = 0; e < columns * 16; e += kWarp, ++i) {
    const int n = e / 16, k = e % 16;
    right[i] = read_element(
        product.b_columns_contiguous ? b.element_outer_major(n, k) : b.element_k_major(n, k),
        product);
  }
  for (int i = 0; i < 8; ++i) {
    const int row = i / 2 % 2 * 8 + g, k = i / 4 * 8 + 2 * t + i % 2;
    left[i] = product.a_registers != nullptr
                  ? product.to_float(product.a_registers[i / 2] >> 16 * (i % 2))
                  : read_element(a.element_k_major(first_row + row, k), product);
  }
  const Unseen unseen;
  for (int e = lane, i = 0; e < columns * 16; e += kWarp, ++i)
    warp.right[e % 16][e / 16] = right[i];
  for (int i = 0; i < 8; ++i) warp.left[i / 2 % 2 * 8 + g][i / 4 * 8 + 2 * t + i % 2] = left[i];
  warp.exchange.arrive(lane == 0, [] { ++counts().warpgroup_products; });
  for (int j = 0; j < product.columns; ++j)
    for (int i = 0; i < 4; ++i) {
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k)
        sum += warp.left[g + i / 2 * 8][k] * warp.right[k][8 * j + 2 * t + i % 2];
      float& c = product.c[4 * j + i];
      c = product.accumulate ? c + sum : sum;
    }
  warp.exchange.arrive(lane == 0, [] {});
}

inline void commit_products() {
  current->product_groups.push_back(std::move(current->open_products));
  current->open_products.clear();
}

inline void finish_products(size_t pending) {
  auto& groups = current->product_groups;
  while (groups.size() > pending) {
    for (const Product& product : groups.front()) compute(product);
    groups.pop_front();
  }
}

}  // namespace cuda_host
