// Pages of the pool's memory.
#pragma once

#include <cstdint>

namespace pykvcache {

// Asks for huge pages wherever whole ones fit into [address, address + bytes), which should not
// have been touched. Whether the system listened; false where there are none.
bool prefer_huge_pages(int64_t address, int64_t bytes);

}  // namespace pykvcache
