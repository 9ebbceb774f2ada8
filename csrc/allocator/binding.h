// Adds the types Allocator and Batch of pykvcache._C; pykvcache/allocator.py and batch.py wrap
// them.
#pragma once

#include <Python.h>

int pykvcache_add_allocator(PyObject* module);  // 0, or -1 with a Python error set
