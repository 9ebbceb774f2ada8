// A random call of paged attention with a plain computation in double to compare with. Every array
// is an allocation of exactly its size, so that a sanitizer sees what lies outside.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cpu/numeric.h"
#include "cuda/kernel_params.h"

namespace pykvcache::cuda {

struct Row {
  int q_len;
  int kv_len;
};

struct Case {
  const char* name;
  DType q = DType::kBFloat16;
  DType cache = DType::kBFloat16;
  int group = 3;
  int block_size = 16;
  int dim = 64;
  std::vector<Row> rows = {{1, 37}, {2, 70}, {1, 0}, {7, 33}};
  int window = 0;
  float softcap = 0.0f;
  bool sinks = false;
  bool slot_scales = false;
  bool hole = false;
  bool deterministic = false;
  bool wgmma = false;
};

constexpr int kHeads = 2;  // of K and V

// Elements of a dtype, each array in an allocation of exactly its size.
class Array {
 public:
  Array(DType dtype, int64_t count)
      : dtype_(dtype), bytes_(new unsigned char[count * bytes_of(dtype)]) {
    std::memset(bytes_.get(), 0xff, count * bytes_of(dtype));  // NaN
  }
  void* data() const { return bytes_.get(); }
  void set(int64_t i, float x) { store_float(data(), i, dtype_, x); }
  float get(int64_t i) const { return load_float(data(), i, dtype_); }

 private:
  DType dtype_;
  std::unique_ptr<unsigned char[]> bytes_;
};

// The larger error; NaN is the largest and stays.
double worse(double a, double b) { return std::isnan(a) || b <= a ? a : b; }

template <class T>
std::unique_ptr<T[]> exact(const std::vector<T>& from) {
  std::unique_ptr<T[]> copy(new T[from.size()]);
  std::copy(from.begin(), from.end(), copy.get());
  return copy;
}

struct Problem {
  const Case& c;
  std::mt19937 random{7};
  std::vector<int32_t> starts{0}, lengths, table;
  int64_t max_blocks = 0, num_blocks = 2, tokens = 0;
  AttentionParams p;
  std::vector<std::unique_ptr<Array>> arrays;
  std::vector<std::unique_ptr<int32_t[]>> ints;
  Array *q, *caches[2], *scales[2] = {}, *sinks = nullptr, *out, *lse;

  explicit Problem(const Case& chosen) : c(chosen) {
    lay_out();
    fill();
  }

  float number() { return std::uniform_real_distribution<float>(-1, 1)(random); }
  Array* array(DType dtype, int64_t count) {
    arrays.push_back(std::make_unique<Array>(dtype, count));
    return arrays.back().get();
  }
  const int32_t* int_data(const std::vector<int32_t>& from) {
    ints.push_back(exact(from));
    return ints.back().get();
  }

  void lay_out() {
    for (const Row& row : c.rows) {
      starts.push_back(starts.back() + row.q_len);
      lengths.push_back(row.kv_len);
      const int64_t blocks = (row.kv_len + c.block_size - 1) / c.block_size;
      num_blocks += blocks;
      max_blocks = std::max(max_blocks, blocks);
    }
    tokens = starts.back();
    std::vector<int32_t> ids(num_blocks);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), random);
    table.assign(c.rows.size() * max_blocks, 2147480000);  // must not be read
    for (size_t b = 0; b < c.rows.size(); ++b)
      for (int64_t i = 0; i * c.block_size < c.rows[b].kv_len; ++i) {
        table[b * max_blocks + i] = ids.back();
        ids.pop_back();
      }
    if (c.hole) table[1] = -1;
  }

  CacheView view(Array* data) const {
    CacheView v;
    v.data = data->data();
    v.dtype = c.cache;
    v.num_blocks = num_blocks;
    v.head_dim = c.dim;
    v.stride_block = int64_t{kHeads} * c.block_size * c.dim;
    v.stride_head = int64_t{c.block_size} * c.dim;
    v.stride_slot = c.dim;
    return v;
  }
  ScaleView scale_view(Array* data) const {
    ScaleView v;
    if (data == nullptr) return v;
    v.data = static_cast<float*>(data->data());
    v.kind = ScaleKind::kSlot;
    v.stride_block = int64_t{kHeads} * c.block_size;
    v.stride_head = c.block_size;
    return v;
  }

  void fill() {
    const int heads = kHeads * c.group;
    q = array(c.q, tokens * heads * c.dim);
    for (int64_t i = 0; i < tokens * heads * c.dim; ++i) q->set(i, 2 * number());
    for (auto& cache : caches) cache = array(c.cache, num_blocks * kHeads * c.block_size * c.dim);
    if (c.slot_scales)
      for (auto& scale : scales) scale = array(DType::kFloat32, num_blocks * kHeads * c.block_size);
    for (size_t b = 0; b < c.rows.size(); ++b)
      for (int key = 0; key < c.rows[b].kv_len; ++key) fill_key(b, key);
    out = array(c.q, tokens * heads * c.dim);
    lse = array(DType::kFloat32, tokens * heads);
    set_params(heads);
    if (c.sinks) {
      sinks = array(DType::kFloat32, heads);
      for (int h = 0; h < heads; ++h) sinks->set(h, number());
      p.sinks = static_cast<float*>(sinks->data());
    }
  }

  int32_t block_of(size_t b, int key) const { return table[b * max_blocks + key / c.block_size]; }
  int64_t key_index(size_t b, int key, int head) const {  // of a slot and head
    return (int64_t{block_of(b, key)} * kHeads + head) * c.block_size + key % c.block_size;
  }
  void fill_key(size_t b, int key) {
    if (block_of(b, key) < 0) return;
    for (int side = 0; side < 2; ++side)
      for (int head = 0; head < kHeads; ++head) {
        const int64_t at = key_index(b, key, head);
        if (scales[side] != nullptr) scales[side]->set(at, 1.0f + 0.5f * number());
        for (int d = 0; d < c.dim; ++d) caches[side]->set(at * c.dim + d, 2 * number());
      }
  }

  void set_params(int heads) {
    p.q = q->data();
    p.q_stride_token = int64_t{heads} * c.dim;
    p.q_stride_head = c.dim;
    p.q_dtype = c.q;
    p.k = view(caches[0]);
    p.v = view(caches[1]);
    p.k_scale = scale_view(scales[0]);
    p.v_scale = scale_view(scales[1]);
    p.block_table = int_data(table);
    p.block_table_stride = max_blocks;
    p.seq_lens = int_data(lengths);
    p.cu_seqlens_q = int_data(starts);
    p.out = out->data();
    p.lse = static_cast<float*>(lse->data());
    p.batch = static_cast<int64_t>(c.rows.size());
    p.num_tokens = tokens;
    p.num_heads = heads;
    p.num_kv_heads = kHeads;
    p.head_dim = p.v_head_dim = c.dim;
    p.block_size = c.block_size;
    p.scale = 0.2f;
    p.softcap = c.softcap;
    p.window = c.window;
    p.deterministic = c.deterministic;
  }

  float element(int side, size_t b, int key, int head, int d) const {
    const int64_t at = key_index(b, key, head);
    const float scale = scales[side] == nullptr ? 1.0f : scales[side]->get(at);
    return caches[side]->get(at * c.dim + d) * scale;
  }

  // The largest difference of a query's output from a computation in double.
  double error_of(size_t b, int query, int head) const {
    const int heads = kHeads * c.group, kv_head = head / c.group;
    const int position = c.rows[b].kv_len - c.rows[b].q_len + query;
    const int64_t place = int64_t{starts[b] + query} * heads + head;
    std::vector<double> values(c.dim, 0.0);
    double total = sinks == nullptr ? 0.0 : std::exp(double{sinks->get(head)});
    for (int key = 0; key <= position; ++key) {
      if (block_of(b, key) < 0 || (c.window > 0 && key <= position - c.window)) continue;
      double score = 0.0;
      for (int d = 0; d < c.dim; ++d)
        score += double{q->get(place * c.dim + d)} * element(0, b, key, kv_head, d);
      score *= p.scale;
      if (c.softcap > 0) score = c.softcap * std::tanh(score / c.softcap);
      total += std::exp(score);
      for (int d = 0; d < c.dim; ++d) values[d] += std::exp(score) * element(1, b, key, kv_head, d);
    }
    double worst = 0.0;
    for (int d = 0; d < c.dim; ++d) {
      const double wanted = total > 0 ? values[d] / total : 0.0;
      worst = worse(worst, std::abs(out->get(place * c.dim + d) - wanted));
    }
    const double lse_error = total > 0 ? std::abs(lse->get(place) - std::log(total))
                                       : (lse->get(place) == -INFINITY ? 0.0 : 1.0);
    return worse(worst, lse_error);
  }
};

}  // namespace pykvcache::cuda
