#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#ifdef KV_X86
#include <cpuid.h>
#endif

namespace pykvcache {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

CpuIsa best_supported() {
#ifdef KV_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"))
    return CpuIsa::kAvx512Bf16;
  if (avx512) return CpuIsa::kAvx512;
  if (avx2) return CpuIsa::kAvx2;
#endif
  return CpuIsa::kPortable;
}

CpuIsa choose() {
  const CpuIsa best = best_supported();
  if (const char* wanted = std::getenv("PYKVCACHE_CPU_ISA"))
    for (int i = 0; i <= static_cast<int>(best); ++i)
      if (std::strcmp(wanted, kNames[i]) == 0) return static_cast<CpuIsa>(i);
  return best;
}

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa chosen = choose();
  return chosen;
}

bool has_matrix_tiles() {
#ifdef KV_X86
  constexpr unsigned kAmxBf16 = 1u << 22;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAmxBf16) != 0;
#else
  return false;
#endif
}

const char* cpu_isa_name() { return kNames[static_cast<int>(cpu_isa())]; }

}  // namespace pykvcache
