// The full recount: what the arrays claim against what the tables, pins and free ids add up to.
#include "allocator/inspector.h"

namespace pykvcache {

void Inspector::check_slots() const {
  require(store_.tag_ > 0 && store_.tag_ <= SequenceStore::kMaxTag, "the tag is ", store_.tag_);
  require(store_.next_generation_ > 0 && store_.next_generation_ <= SequenceStore::kMaxGeneration,
          "the next generation is ", store_.next_generation_);
  std::vector<bool> free(store_.num_slots());
  for (const uint32_t slot : store_.free_slots_) {
    require(slot < store_.num_slots(), "free slot ", slot, " of ", store_.num_slots());
    require(!free[slot], "sequence slot ", slot, " is free twice");
    free[slot] = true;
  }
  for (uint32_t slot = 0; slot < store_.num_slots(); ++slot) {
    const Sequence& sequence = store_.sequence(slot);
    uint32_t found;
    require(free[slot] == (sequence.handle == 0), "sequence slot ", slot, " has handle ",
            sequence.handle, " but is ", free[slot] ? "" : "not ", "listed as free");
    require(free[slot] || (store_.find(sequence.handle, &found) && found == slot), "sequence slot ",
            slot, " has handle ", sequence.handle, " of another slot");
  }
}

void Inspector::check_tables() const {
  const int64_t block_size = allocator_.block_size_;
  for (uint32_t slot = 0; slot < store_.num_slots(); ++slot) {
    const Sequence& sequence = store_.sequence(slot);
    for (int32_t group = 0; group < store_.groups(); ++group) {
      const Table& table = store_.table(slot, group);
      const auto entries = static_cast<int64_t>(table.blocks.size());
      if (sequence.handle == 0) {
        require(entries == 0, "free sequence slot ", slot, " has ", entries, " blocks");
        continue;
      }
      require(sequence.length >= 0 && entries >= allocator_.block_size_.count(sequence.length),
              "sequence ", sequence.handle, " has ", sequence.length, " tokens in ", entries,
              " blocks of ", block_size, " in group ", group);
      require(table.dead >= 0 && table.dead <= sequence.length, "sequence ", sequence.handle,
              " released ", table.dead, " of ", sequence.length, " tokens in group ", group);
      for (int64_t i = 0; i < entries; ++i) {
        const int32_t block = table.blocks[i];
        const bool released = i < table.dead / block_size;
        require(released ? block == -1 : block >= 0 && block < pool_.fresh_, "sequence ",
                sequence.handle, " has block ", block, " at entry ", i, " of group ", group,
                released ? ", which was released" : "");
      }
    }
  }
}

void Inspector::check_references() const {
  std::vector<Use> uses = count_uses();
  for (uint32_t slot = 0; slot < store_.num_slots(); ++slot) {
    for (int32_t group = 0; group < store_.groups(); ++group) {
      const Table& table = store_.table(slot, group);
      for (size_t i = allocator_.block_size_.index(table.dead); i < table.blocks.size(); ++i) {
        const Use& use = uses[table.blocks[i]];
        require(use.group == group && use.index == static_cast<int32_t>(i), "block ",
                table.blocks[i], " is entry ", i, " of group ", group, " and entry ", use.index,
                " of group ", use.group);
      }
    }
  }
  for (const auto& [block, pins] : pool_.pins_) {
    require(block >= 0 && block < pool_.fresh_ && pins > 0, "block ", block, " has ", pins,
            " pins in a pool of ", pool_.num_blocks());
    uses[block].refs += pins;
  }
  for (int64_t block = 0; block < pool_.num_blocks(); ++block) {
    require(uses[block].refs == pool_.refs_[block], "block ", block, " has a reference count of ",
            pool_.refs_[block], ", but ", uses[block].refs, " references");
  }
}

void Inspector::check_free_list() const {
  require(pool_.fresh_ >= 0 && pool_.fresh_ <= pool_.num_blocks() && pool_.num_freed_ >= 0 &&
              pool_.num_freed_ <= pool_.fresh_,
          pool_.num_freed_, " freed and ", pool_.fresh_, " touched blocks in a pool of ",
          pool_.num_blocks());
  std::vector<bool> free(pool_.num_blocks());
  for (int64_t i = 0; i < pool_.num_freed_; ++i) {
    const int32_t block = pool_.free_[i];
    require(block >= 0 && block < pool_.fresh_, "block ", block, " is free, but the pool has ",
            pool_.num_blocks(), " of which ", pool_.fresh_, " were used");
    require(!free[block], "block ", block, " is free twice");
    require(pool_.refs_[block] == 0, "block ", block, " is free, but has ", pool_.refs_[block],
            " references");
    free[block] = true;
  }
  for (int64_t block = 0; block < pool_.fresh_; ++block) {
    const bool cached = allocator_.prefixes_ && allocator_.prefixes_->is_cached(block, pool_);
    require(!(free[block] && cached), "block ", block, " is free, but also cached");
    require(free[block] || cached || pool_.refs_[block] > 0, "block ", block,
            " is lost: not free, no owner");
  }
}

void Inspector::check() const {
  check_slots();
  check_tables();
  check_references();
  check_free_list();
  if (allocator_.prefixes_) check_prefixes();
}

void Allocator::check_integrity() const { Inspector(*this).check(); }

}  // namespace pykvcache
