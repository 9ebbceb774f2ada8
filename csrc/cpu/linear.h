// Linear layers of few rows, for models whose decode steps are ours. No torch header here.
#pragma once

#include "cpu/kernels.h"

namespace pykvcache {

// Most rows that linear() takes with this processor; 0: none.
int64_t linear_rows();

// out = x W^T + bias on torch's threads. Throws std::invalid_argument for sizes it does not take.
void linear(const LinearParams& p);

}  // namespace pykvcache
