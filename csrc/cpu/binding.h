// Adds the type LayerStep of pykvcache._C; pykvcache/layer_step.py wraps it.
#pragma once

#include <Python.h>

int pykvcache_add_layer_step(PyObject* module);  // 0, or -1 with a Python error set
