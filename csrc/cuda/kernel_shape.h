#pragma once

namespace pykvcache::cuda {

// What a CTA of a kernel works on at once.
struct KernelShape {
  int rows;    // query rows
  int keys;    // of a tile
  int stages;  // tiles in its ring
  int threads;
  int shared_bytes;
};

}  // namespace pykvcache::cuda
