#include "cpu/launches.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cpu/numeric.h"

namespace pykvcache {
namespace {

using Table = std::vector<LaunchEntry>;
std::atomic<const Table*> current{nullptr};

void check(const char* name, int64_t value, int64_t most) {
  if (value < 0 || value > most)
    throw std::invalid_argument(std::string(name) + " must be 0 to " + std::to_string(most) +
                                ", got " + std::to_string(value));
}

}  // namespace

void set_launches(std::vector<LaunchEntry> entries) {
  for (const LaunchEntry& entry : entries) {
    check("tile", entry.launch.tile, 64);
    check("stages", entry.launch.stages, 3);
    check("splits", entry.launch.splits, 64);
    check("rows", entry.launch.rows, 4096);
  }
  // Calls in other threads may be reading an older table, so none is ever deleted.
  static std::mutex mutex;
  static auto& kept = *new std::deque<Table>;
  const std::lock_guard lock(mutex);
  const auto same = [&](const Table& table) {
    return table.size() == entries.size() &&
           std::equal(table.begin(), table.end(), entries.begin(),
                      [](const LaunchEntry& a, const LaunchEntry& b) {
                        return __builtin_memcmp(&a, &b, sizeof(a)) == 0;
                      });
  };
  auto found = std::find_if(kept.begin(), kept.end(), same);
  if (found == kept.end()) found = kept.insert(kept.end(), std::move(entries));
  current.store(&*found, std::memory_order_release);
}

Launch choose_launch(const AttentionParams& p) {
  Launch chosen;
  const Table* table = current.load(std::memory_order_acquire);
  if (table == nullptr) return chosen;
  bool found[2] = {};
  for (const LaunchEntry& entry : *table) {
    const int64_t bytes = element_size(p.k.dtype);
    if (found[entry.phase] || p.head_dim < entry.min_dim || p.head_dim > entry.max_dim ||
        bytes < entry.min_bytes || bytes > entry.max_bytes)
      continue;
    found[entry.phase] = true;
    if (entry.phase == LaunchEntry::kPrefill) {
      chosen.rows = entry.launch.rows;
    } else {
      chosen.tile = entry.launch.tile;
      chosen.stages = entry.launch.stages;
      chosen.splits = entry.launch.splits;
    }
  }
  return chosen;
}

}  // namespace pykvcache
