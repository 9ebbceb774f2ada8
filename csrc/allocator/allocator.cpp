#include "allocator/allocator.h"

#include <limits>

namespace pykvcache {

namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxGroups = 1024;

std::vector<int32_t> checked_layers(Ints layers) {
  if (layers.empty() || static_cast<int64_t>(layers.size()) > kMaxGroups) {
    bad_argument("groups must be 1 to ", kMaxGroups, ", got ", layers.size());
  }
  for (const int64_t count : layers) {
    if (count < 1 || count > kMaxInt32) {
      bad_argument("groups must have at least one layer each, got ", count);
    }
  }
  return {layers.begin(), layers.end()};
}

int64_t checked_num_blocks(int64_t num_blocks, int64_t least) {
  if (num_blocks < least || num_blocks > kMaxInt32) {
    bad_argument("num_blocks must be ", least, " to ", kMaxInt32, ", got ", num_blocks);
  }
  return num_blocks;
}

int32_t checked_block_size(int64_t block_size) {
  if (block_size < 1 || block_size > 65536) {
    bad_argument("block_size must be 1 to 65536, got ", block_size);
  }
  return static_cast<int32_t>(block_size);
}

}  // namespace

void check_width(const char* op, int64_t width) {
  if (width < 0 || width > kMaxInt32) {
    bad_argument(op, ": width must be 0 to ", kMaxInt32, ", got ", width);
  }
}

void check_counts(const char* op, const char* name, Ints values, size_t rows, int64_t max) {
  if (values.size() != rows) {
    bad_argument(op, ": ", name, " must have one entry for each of ", rows, " rows, got ",
                 values.size());
  }
  for (size_t row = 0; row < rows; ++row) {
    if (values[row] < 0 || values[row] > max) [[unlikely]] {
      bad_argument(op, ": ", name, "[", row, "] must be 0 to ", max, ", got ", values[row]);
    }
  }
}

Allocator::Allocator(int64_t num_blocks, int64_t block_size, Ints layers, uint32_t tag)
    : block_size_(checked_block_size(block_size)),
      layers_(checked_layers(layers)),
      pool_(checked_num_blocks(num_blocks, 1)),
      store_(static_cast<int32_t>(layers.size()), tag) {}

void Allocator::check_group(int64_t group) const {
  if (group < 0 || group >= groups()) {
    bad_argument("group must be 0 to ", groups() - 1, ", got ", group);
  }
}

void Allocator::check_available(int64_t needed, int64_t available, const char* op) {
  if (needed > available) [[unlikely]] {
    if (needed <= num_blocks()) refused_ = std::max(refused_, needed);
    ++counters_.refusals;
    throw OutOfBlocks(message(op, " needs ", needed, " new blocks, but only ", available, " of ",
                              num_blocks(), " are free"),
                      needed, available, num_blocks());
  }
  if (needed >= refused_) refused_ = 0;
}

uint32_t Allocator::open_sequence(int64_t salt) {
  const uint32_t slot = store_.open();
  if (prefixes_) {
    if (slot >= traces_.size()) traces_.resize(slot + 1);
    traces_[slot].begin(salt, prefixes_->epoch());
  }
  return slot;
}

void Allocator::allocate(Ints lengths, int64_t* handles) {
  check_counts("allocate", "lengths", lengths, lengths.size(), kMaxInt32);
  int64_t needed = 0;
  for (const int64_t length : lengths) needed += block_size_.count(length) * groups();
  check_available(needed, num_free(), "allocate");
  store_.reserve(static_cast<int64_t>(lengths.size()));
  make_room(needed);
  for (size_t row = 0; row < lengths.size(); ++row) {
    const uint32_t slot = open_sequence();
    store_.sequence(slot).length = static_cast<int32_t>(lengths[row]);
    handles[row] = store_.sequence(slot).handle;
    const int64_t blocks = block_size_.count(lengths[row]);
    for (int32_t group = 0; group < groups(); ++group) {
      std::vector<int32_t>& table = store_.table(slot, group).blocks;
      table.resize(blocks);
      pool_.take(blocks, table.data());
    }
  }
}

void Allocator::copy_tables(uint32_t from, uint32_t to) {
  const int32_t length = store_.sequence(from).length;
  const int64_t blocks = block_size_.count(length);
  store_.sequence(to).length = length;
  for (int32_t group = 0; group < groups(); ++group) {
    const Table& source = store_.table(from, group);
    Table& copy = store_.table(to, group);
    copy.dead = source.dead;
    copy.blocks.assign(source.blocks.begin(), source.blocks.begin() + blocks);
    for (int64_t i = block_size_.index(source.dead); i < blocks; ++i) pool_.share(copy.blocks[i]);
  }
  if (prefixes_) traces_[to] = traces_[from];
  ++counters_.forks;
}

void Allocator::fork(Ints handles, int64_t n, int64_t* children) {
  if (n < 0 || n > kMaxInt32) bad_argument("fork: n must be 0 to ", kMaxInt32, ", got ", n);
  store_.resolve(handles, false, "fork", slots_);
  store_.reserve(static_cast<int64_t>(handles.size()) * n);
  for (const uint32_t parent : slots_) {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t child = open_sequence();
      copy_tables(parent, child);
      *children++ = store_.sequence(child).handle;
    }
  }
}

void Allocator::select(Ints handles, Ints index, int64_t* selected) {
  store_.resolve(handles, true, "select", slots_);
  const auto rows = static_cast<int64_t>(handles.size());
  check_counts("select", "index", index, index.size(), rows - 1);
  store_.reserve(static_cast<int64_t>(index.size()));
  // The first taker of a row inherits its tables, later ones share its blocks.
  std::vector<bool> taken(rows);
  for (size_t i = 0; i < index.size(); ++i) {
    const uint32_t from = slots_[index[i]];
    if (!taken[index[i]]) {
      taken[index[i]] = true;
      selected[i] = store_.sequence(from).handle;
      continue;
    }
    const uint32_t child = open_sequence();
    copy_tables(from, child);
    selected[i] = store_.sequence(child).handle;
  }
  for (int64_t row = rows - 1; row >= 0; --row) {
    if (!taken[row]) drop_sequence(slots_[row]);
  }
  taken.assign(rows, false);
  for (size_t i = 0; i < index.size(); ++i) {
    if (taken[index[i]]) continue;
    taken[index[i]] = true;
    selected[i] = store_.renew(slots_[index[i]]);
  }
}

void Allocator::drop_block(int32_t block) {
  if (prefixes_) {
    prefixes_->drop(block, pool_);
  } else {
    pool_.drop(block);
  }
}

void Allocator::drop_blocks(Table& table, int64_t begin, int64_t end) {
  if (prefixes_) {
    for (int64_t i = end - 1; i >= begin; --i) prefixes_->drop(table.blocks[i], pool_);
  } else {
    for (int64_t i = end - 1; i >= begin; --i) pool_.drop(table.blocks[i]);
  }
}

void Allocator::drop_sequence(uint32_t slot) {
  if (prefixes_) {
    end_trace(slot);
    drop_nodes(slot);
  } else {
    for (int32_t group = groups() - 1; group >= 0; --group) {
      Table& table = store_.table(slot, group);
      drop_blocks(table, block_size_.index(table.dead), static_cast<int64_t>(table.blocks.size()));
    }
  }
  store_.close(slot);
}

void Allocator::free(Ints handles) {
  for (size_t row = 0; row < handles.size(); ++row) {
    if (store_.is_stale(handles[row])) [[unlikely]] {
      throw DoubleFree(message("free: sequence ", handles[row], " in row ", row,
                               " was freed or replaced before"));
    }
  }
  store_.resolve(handles, true, "free", slots_);
  for (size_t row = slots_.size(); row-- > 0;) drop_sequence(slots_[row]);
}

void Allocator::truncate(Ints handles, Ints lengths) {
  store_.resolve(handles, true, "truncate", slots_);
  check_counts("truncate", "lengths", lengths, handles.size(), kMaxInt32);
  for (size_t row = 0; row < slots_.size(); ++row) {
    if (lengths[row] > store_.sequence(slots_[row]).length) {
      bad_argument("truncate: lengths[", row, "] is ", lengths[row], ", but the sequence has ",
                   store_.sequence(slots_[row]).length, " tokens");
    }
    for (int32_t group = 0; group < groups(); ++group) {
      const int32_t released = block_size_.index(store_.table(slots_[row], group).dead);
      const int64_t kept_from = int64_t{released} * block_size_;
      if (lengths[row] > 0 && lengths[row] < kept_from) {
        bad_argument("truncate: lengths[", row, "] is ", lengths[row], ", but tokens below ",
                     kept_from, " of group ", group, " were released");
      }
    }
  }
  for (size_t row = slots_.size(); row-- > 0;) {
    const auto length = static_cast<int32_t>(lengths[row]);
    store_.sequence(slots_[row]).length = length;
    if (prefixes_) prefixes_->roll_back(traces_[slots_[row]], length);
    for (int32_t group = groups() - 1; group >= 0; --group) {
      Table& table = store_.table(slots_[row], group);
      const int64_t old_blocks = static_cast<int64_t>(table.blocks.size());
      const int64_t blocks = block_size_.count(length);
      drop_blocks(table, std::max<int64_t>(blocks, block_size_.index(table.dead)), old_blocks);
      table.dead = std::min(table.dead, length);
      table.blocks.resize(blocks);
      if (blocks < old_blocks) ++table.edits;
    }
  }
}

void Allocator::release_before(Ints handles, Ints positions, int64_t group) {
  check_group(group);
  store_.resolve(handles, true, "release_before", slots_);
  if (positions.size() != handles.size()) {
    bad_argument("release_before: positions must have one entry for each of ", handles.size(),
                 " rows, got ", positions.size());
  }
  for (size_t row = 0; row < slots_.size(); ++row) {
    Table& table = store_.table(slots_[row], static_cast<int32_t>(group));
    const int64_t dead = std::min<int64_t>(positions[row], store_.sequence(slots_[row]).length);
    if (dead <= table.dead) continue;
    const int64_t begin = block_size_.index(table.dead), end = block_size_.index(dead);
    drop_blocks(table, begin, end);
    std::fill(table.blocks.begin() + begin, table.blocks.begin() + end, -1);
    table.dead = static_cast<int32_t>(dead);
    if (begin < end) ++table.edits;
  }
}

void Allocator::grow(int64_t num_blocks) {
  pool_.grow(checked_num_blocks(num_blocks, pool_.num_blocks()));
  if (prefixes_) prefixes_->grow(num_blocks);
}

void Allocator::pin(Ints blocks) {
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (blocks[i] < 0 || blocks[i] >= num_blocks()) {
      throw UnknownBlock(
          message("pin: block ", blocks[i], " is not in the pool of ", num_blocks()));
    }
    if (pool_.refs(static_cast<int32_t>(blocks[i])) == 0) {
      throw UnknownBlock(message("pin: block ", blocks[i], " is free"));
    }
  }
  for (const int64_t block : blocks) pool_.pin(static_cast<int32_t>(block));
}

void Allocator::unpin(Ints blocks) {
  std::unordered_map<int64_t, uint32_t> asked;
  for (const int64_t block : blocks) {
    if (block < 0 || block >= num_blocks()) {
      throw UnknownBlock(message("unpin: block ", block, " is not in the pool of ", num_blocks()));
    }
    const uint32_t pins = pool_.pins(static_cast<int32_t>(block));
    if (++asked[block] > pins) {
      throw DoubleFree(
          message("unpin: block ", block, " is pinned ", pins, " times, not ", asked[block]));
    }
  }
  for (const int64_t block : blocks) {
    pool_.unpin(static_cast<int32_t>(block));
    drop_block(static_cast<int32_t>(block));
  }
}

std::vector<int64_t> Allocator::pin_sequences(Ints handles) {
  store_.resolve(handles, true, "pin_sequences", slots_);
  std::vector<int64_t> blocks;
  for (const uint32_t slot : slots_) {
    for (int32_t group = 0; group < groups(); ++group) {
      const Table& table = store_.table(slot, group);
      blocks.insert(blocks.end(), table.blocks.begin() + block_size_.index(table.dead),
                    table.blocks.end());
    }
  }
  pin(blocks);
  return blocks;
}

}  // namespace pykvcache
