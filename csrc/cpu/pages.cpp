#include "cpu/pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pykvcache {

bool prefer_huge_pages(int64_t address, int64_t bytes) {
#ifdef __linux__
  constexpr int64_t kHugePage = 2 << 20;
  const int64_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const int64_t end = (address + bytes) / kHugePage * kHugePage;
  return begin < end && madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin),
                                MADV_HUGEPAGE) == 0;
#else
  static_cast<void>(address), static_cast<void>(bytes);
  return false;
#endif
}

}  // namespace pykvcache
