// Which instruction set the CPU kernels run with: decided once, at first use, from CPUID.
// PYKVCACHE_CPU_ISA=avx512bf16|avx512|avx2|portable lowers the choice (tests run every path with
// it).
#pragma once

namespace pykvcache {

enum class CpuIsa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

CpuIsa cpu_isa();
const char* cpu_isa_name();

// AMX for bfloat16, which the kernels do not use and libraries may.
bool has_matrix_tiles();

}  // namespace pykvcache
