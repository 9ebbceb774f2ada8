#include "cpu/linear.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "cpu/thread_buffer.h"

namespace pykvcache {
namespace {

constexpr int64_t kOutputs = 16;                   // that the kernel does at a time
constexpr int64_t kThreadWork = int64_t{1} << 19;  // products that are worth a thread

// With more rows a library that has matrix tiles needs less time for packing and product together;
// an estimate, not measured.
constexpr int64_t kRowsBesideTiles = 16;

}  // namespace

int64_t linear_rows() {
  static const int64_t most = std::min(
      kernels().linear_rows(), has_matrix_tiles() ? kRowsBesideTiles : kernels().linear_rows());
  return most;
}

void linear(const LinearParams& p) {
  if (p.rows < 1 || p.rows > linear_rows() || p.outputs < 1 || p.inputs < kLinearInputs ||
      p.inputs % kLinearInputs != 0)
    throw std::invalid_argument("linear takes 1 to linear_rows() rows of a multiple of " +
                                std::to_string(kLinearInputs) + " inputs");
  thread_local ThreadBuffer buffer;
  auto* panel = static_cast<float*>(buffer.at_least(p.inputs * kLinearPanelBytes));
  const KernelTable& table = kernels();
  table.linear_pack(p, panel);
  const int64_t groups = (p.outputs + kOutputs - 1) / kOutputs;
  const auto run = [&](int64_t begin, int64_t end) {
    table.linear_outputs(p, panel, begin * kOutputs, std::min(end * kOutputs, p.outputs));
  };
  const int64_t work = p.rows * p.inputs * kOutputs;  // of a group
  const int64_t grain = std::max<int64_t>(1, kThreadWork / work);
  if (groups <= grain || torch::stable::get_num_threads() == 1)
    run(0, groups);
  else
    torch::stable::parallel_for(0, groups, grain, run);
}

}  // namespace pykvcache
