// C++ exceptions as the Python ones of pykvcache/errors.py.
#include "allocator/errors.h"

#include "python/types.h"

namespace pykvcache::python {
namespace {

// Raises pykvcache.errors.<name>(message, *numbers).
template <class... Numbers>
void raise(const char* name, const char* text, Numbers... numbers) {
  const char* formats[] = {"s", "sL", "sLL", "sLLL"};
  try {
    const Owned module(PyImport_ImportModule("pykvcache.errors"));
    const Owned type(PyObject_GetAttrString(module.get(), name));
    const Owned error(PyObject_CallFunction(type.get(), formats[sizeof...(numbers)], text,
                                            static_cast<long long>(numbers)...));
    PyErr_SetObject(type.get(), error.get());
  } catch (const ErrorIsSet&) {
  }
}

}  // namespace

void raise_current() {
  try {
    throw;
  } catch (const ErrorIsSet&) {
  } catch (const OutOfBlocks& error) {
    raise("OutOfBlocks", error.what(), error.needed, error.free, error.total);
  } catch (const DoubleFree& error) {
    raise("DoubleFree", error.what());
  } catch (const UnknownSequence& error) {
    raise("UnknownSequence", error.what());
  } catch (const UnknownBlock& error) {
    raise("UnknownBlock", error.what());
  } catch (const IntegrityError& error) {
    raise("IntegrityError", error.what());
  } catch (const SnapshotError& error) {
    raise("SnapshotError", error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

}  // namespace pykvcache::python
