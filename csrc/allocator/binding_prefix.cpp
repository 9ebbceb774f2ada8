// The methods of the Python type Allocator that need a prefix cache.
#include "allocator/binding_types.h"

namespace pykvcache::python {

// (tokens, counts, salts) -> (seqs, hits)
PyObject* allocate_cached(AllocatorObject& self, Args args) {
  const IntArgument tokens("prompts", args[0]), counts("counts", args[1]);
  const IntArgument salts("salts", args[2], counts.size());
  ArrayResult<int64_t> seqs(counts.size()), hits(counts.size());
  locked(*self.shared,
         [&](Allocator& a) { a.allocate_cached(tokens, counts, salts, seqs.data(), hits.data()); });
  return Py_BuildValue("NN", seqs.release(), hits.release());
}

PyObject* lookup(AllocatorObject& self, Args args) {
  const IntArgument tokens("prompts", args[0]), counts("counts", args[1]);
  const IntArgument salts("salts", args[2], counts.size());
  ArrayResult<int64_t> hits(counts.size());
  locked(*self.shared, [&](Allocator& a) { a.lookup(tokens, counts, salts, hits.data()); });
  return hits.release();
}

PyObject* record(AllocatorObject& self, Args args) {
  const IntArgument seqs("seqs", args[0]), tokens("tokens", args[1]);
  const IntArgument counts("counts", args[2], seqs.size());
  locked(*self.shared, [&](Allocator& a) { a.record(seqs, tokens, counts); });
  return none();
}

PyObject* set_priority(AllocatorObject& self, Args args) {
  const IntArgument seqs("seqs", args[0]), priorities("priorities", args[1], seqs.size());
  locked(*self.shared, [&](Allocator& a) { a.set_priority(seqs, priorities); });
  return none();
}

PyObject* forget_prefixes(AllocatorObject& self, Args) {
  locked_without_gil(*self.shared, [](Allocator& a) { a.forget_prefixes(); });
  return none();
}

PyObject* collide_hashes(AllocatorObject& self, Args) {
  locked(*self.shared, [](Allocator& a) { a.collide_hashes(); });
  return none();
}

}  // namespace pykvcache::python
