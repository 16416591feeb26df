// Arguments and kernels of `null`, the template operator (docs/ops.md walks through its files).
//
// A struct of raw pointers and sizes is all that a kernel gets: no torch, so that it compiles
// alone, under nvcc and on the host execution layer. Every pointer says its element type and shape.
#pragma once

#include "include/kernel.h"

namespace latentguard {

struct Null {
  Type type;      // what T is
  int64_t size;   // elements; above 0
  float scale;    // what each is multiplied by
  const void* x;  // T [size]
  void* out;      // T [size]
};

namespace cpu {
void null(const Null& args);
}  // namespace cpu

namespace cuda {
cudaError_t null(const Null& args, cudaStream_t stream);
}  // namespace cuda

}  // namespace latentguard
