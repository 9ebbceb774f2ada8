// Adds to pykvcache._C the type LayerStep, which pykvcache/layer_step.py wraps, and read_regions.
#pragma once

#include <Python.h>

int pykvcache_add_cpu(PyObject* module);  // 0, or -1 with a Python error set
