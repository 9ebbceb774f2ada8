// The allocator's state as bytes: magic, version, checksum of the rest, geometry, then the arrays
// in the byte order of the machine. restore() builds a second allocator, checks it in full and only
// then replaces the first. Reference counts are not stored: they follow from tables and pins. Nor
// is the prefix index, so cached blocks are stored as free ones: by the time of a restore they may
// have been written again, and nobody who holds the snapshot could know.
#include <algorithm>
#include <cstring>
#include <map>
#include <utility>

#include "allocator/allocator.h"

namespace pykvcache {

namespace {

constexpr char kMagic[] = "PKVALLOC";  // 8 bytes are written
constexpr uint32_t kVersion = 1;
constexpr size_t kHeader = 8 + sizeof(uint32_t) + sizeof(uint64_t);

uint64_t fnv1a(const char* bytes, size_t size) {
  uint64_t hash = 14695981039346656037ull;
  for (size_t i = 0; i < size; ++i)
    hash = (hash ^ static_cast<uint8_t>(bytes[i])) * 1099511628211ull;
  return hash;
}

class Writer {
 public:
  template <class T>
  void put(const T& value) {
    bytes.append(reinterpret_cast<const char*>(&value), sizeof(T));
  }
  template <class T>
  void put(const T* values, size_t size) {
    put(static_cast<uint64_t>(size));
    bytes.append(reinterpret_cast<const char*>(values), size * sizeof(T));
  }
  std::string bytes;
};

class Reader {
 public:
  Reader(const char* bytes, size_t size) : next_(bytes), left_(size) {}

  template <class T>
  T get() {
    T value;
    read(&value, 1);
    return value;
  }
  template <class T>
  std::vector<T> get_vector() {
    std::vector<T> values(checked_count(get<uint64_t>(), sizeof(T)));
    read(values.data(), values.size());
    return values;
  }
  // Throws unless that many elements can follow, before memory is taken for them.
  size_t checked_count(uint64_t count, size_t element_size) const {
    if (count > left_ / element_size) throw SnapshotError("snapshot is cut off");
    return count;
  }
  size_t left() const { return left_; }

 private:
  template <class T>
  void read(T* values, size_t count) {
    const size_t size = checked_count(count, sizeof(T)) * sizeof(T);
    std::copy_n(next_, size, reinterpret_cast<char*>(values));
    next_ += size;
    left_ -= size;
  }
  const char* next_;
  size_t left_;
};

}  // namespace

class Archive {
 public:
  static std::string write(const Allocator& allocator);
  static Allocator read(const std::string& bytes, const Allocator& model);

 private:
  static void write_store(const SequenceStore& store, Writer& out);
  static void read_store(Reader& in, SequenceStore& store);
  static void count_references(Allocator& allocator);
};

void Archive::write_store(const SequenceStore& store, Writer& out) {
  out.put(store.tag_);
  out.put(store.next_generation_);
  out.put(store.free_slots_.data(), store.free_slots_.size());
  out.put(static_cast<uint64_t>(store.sequences_.size()));
  for (const Sequence& sequence : store.sequences_) {
    out.put(sequence.handle);
    out.put(sequence.length);
  }
  for (const Table& table : store.tables_) {
    out.put(table.dead);
    out.put(table.blocks.data(), table.blocks.size());
  }
}

void Archive::read_store(Reader& in, SequenceStore& store) {
  store.tag_ = in.get<uint32_t>();
  store.next_generation_ = in.get<int64_t>();
  store.free_slots_ = in.get_vector<uint32_t>();
  const size_t slots = in.checked_count(in.get<uint64_t>(), sizeof(int64_t));
  store.sequences_.resize(slots);
  store.tables_.resize(slots * store.groups_);
  store.free_slots_.reserve(slots);
  for (Sequence& sequence : store.sequences_) {
    sequence.handle = in.get<int64_t>();
    sequence.length = in.get<int32_t>();
  }
  for (Table& table : store.tables_) {
    table.dead = in.get<int32_t>();
    table.blocks = in.get_vector<int32_t>();
  }
}

void Archive::count_references(Allocator& allocator) {
  BlockPool& pool = allocator.pool_;
  const auto count = [&](int32_t block, uint32_t references) {
    if (block < 0 || block >= pool.num_blocks()) {
      throw SnapshotError(
          message("snapshot has block ", block, " in a pool of ", pool.num_blocks()));
    }
    pool.refs_[block] += references;
  };
  for (const Table& table : allocator.store_.tables_) {
    for (const int32_t block : table.blocks) {
      if (block != -1) count(block, 1);
    }
  }
  for (const auto& [block, pins] : pool.pins_) count(block, pins);
}

std::string Archive::write(const Allocator& allocator) {
  const BlockPool& pool = allocator.pool_;
  Writer out;
  out.bytes.append(kMagic, 8);
  out.put(kVersion);
  out.put(uint64_t{0});
  out.put(pool.num_blocks());
  out.put(int32_t{allocator.block_size_});
  out.put(allocator.layers_.data(), allocator.layers_.size());
  out.put(pool.fresh_);
  std::vector<int32_t> free(pool.free_.begin(), pool.free_.begin() + pool.num_freed_);
  for (int32_t block = 0; allocator.prefixes_ && block < pool.fresh_; ++block) {
    if (allocator.prefixes_->is_cached(block, pool)) free.push_back(block);
  }
  out.put(free.data(), free.size());
  out.put(static_cast<uint64_t>(pool.pins_.size()));
  const std::map<int32_t, uint32_t> sorted_pins(pool.pins_.begin(), pool.pins_.end());
  for (const auto& [block, pins] : sorted_pins) {
    out.put(block);
    out.put(pins);
  }
  out.put(allocator.counters_);
  out.put(allocator.refused_);
  write_store(allocator.store_, out);
  const uint64_t checksum = fnv1a(out.bytes.data() + kHeader, out.bytes.size() - kHeader);
  std::memcpy(out.bytes.data() + kHeader - sizeof(checksum), &checksum, sizeof(checksum));
  return std::move(out.bytes);
}

Allocator Archive::read(const std::string& bytes, const Allocator& model) {
  if (bytes.size() < kHeader || std::memcmp(bytes.data(), kMagic, 8) != 0) {
    throw SnapshotError(message("not a snapshot of a block allocator: ", bytes.size(), " bytes"));
  }
  Reader header(bytes.data() + 8, kHeader - 8);
  const auto version = header.get<uint32_t>();
  if (version != kVersion) {
    throw SnapshotError(message("snapshot has version ", version, ", expected ", kVersion));
  }
  if (header.get<uint64_t>() != fnv1a(bytes.data() + kHeader, bytes.size() - kHeader)) {
    throw SnapshotError("snapshot is damaged: its checksum does not match");
  }
  Reader in(bytes.data() + kHeader, bytes.size() - kHeader);
  const auto num_blocks = in.get<int64_t>();
  const auto block_size = in.get<int32_t>();
  const auto layers = in.get_vector<int32_t>();
  if (block_size != model.block_size_ || layers != model.layers_) {
    bad_argument("snapshot has block_size ", block_size, " and ", layers.size(),
                 " groups, the allocator has block_size ", model.block_size_, " and ",
                 model.layers_.size(), layers.size() == model.layers_.size() ? " other" : "",
                 " groups");
  }
  if (num_blocks < 1 || num_blocks > model.num_blocks()) {
    bad_argument("snapshot has ", num_blocks, " blocks, the pool ", model.num_blocks(),
                 ": grow() it first");
  }
  Allocator allocator(model.num_blocks(), block_size,
                      std::vector<int64_t>(layers.begin(), layers.end()), 0);
  BlockPool& pool = allocator.pool_;
  pool.fresh_ = in.get<int64_t>();
  const auto free = in.get_vector<int32_t>();
  if (static_cast<int64_t>(free.size()) > pool.num_blocks()) {
    throw SnapshotError("snapshot has more free blocks than blocks");
  }
  std::copy(free.begin(), free.end(), pool.free_.begin());
  pool.num_freed_ = static_cast<int64_t>(free.size());
  for (auto pinned = in.get<uint64_t>(); pinned > 0; --pinned) {
    const auto block = in.get<int32_t>();
    pool.pins_[block] = in.get<uint32_t>();
  }
  allocator.counters_ = in.get<Allocator::Counters>();
  allocator.refused_ = in.get<int64_t>();
  read_store(in, allocator.store_);
  if (in.left() != 0) throw SnapshotError(message("snapshot has ", in.left(), " bytes too many"));
  count_references(allocator);
  try {
    allocator.check_integrity();
  } catch (const IntegrityError& error) {
    throw SnapshotError(message("snapshot is damaged: ", error.what()));
  }
  allocator.restores_ = model.restores_ + 1;
  if (model.prefixes_) allocator.start_without_prefixes(*model.prefixes_);
  return allocator;
}

std::string Allocator::snapshot() const { return Archive::write(*this); }

// Sequences are there, but what they hold is not known.
void Allocator::start_without_prefixes(const PrefixCache& old) {
  const std::vector<int32_t>& windows = old.windows();
  cache_prefixes(std::vector<int64_t>(windows.begin(), windows.end()));
  prefixes_->counters = old.counters;
  traces_.resize(store_.num_slots());
}

// Handles made since the snapshot stay unknown: generations go on from the higher of both counts.
void Allocator::restore(const std::string& bytes) {
  Allocator restored = Archive::read(bytes, *this);
  restored.store_.continue_after(store_);
  *this = std::move(restored);
}

}  // namespace pykvcache
