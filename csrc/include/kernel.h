// What the kernels' arguments have in common: element types, and the two declarations that a kernel
// has, cpu::X(args) and cuda::X(args, stream). Each operator's own header stands beside this one.
//
// Every pointer is to contiguous memory of the stated shape, on a 16-byte boundary. T is the
// element type named by `type`; null marks an argument that was not given. Sizes are checked by
// csrc/ops.
#pragma once

#include <cstdint>

// For the few functions that kernels call too.
#ifdef __CUDACC__
#define LG_HOST_DEVICE __host__ __device__
#else
#define LG_HOST_DEVICE
#endif

// A launcher enqueues its kernels on a stream and returns; it neither synchronizes nor allocates,
// so it may be captured in a CUDA graph.
#if defined(__CUDACC__) || defined(LATENTGUARD_CUDA)
#include <cuda_runtime_api.h>
#else  // the names that launchers use, for the host execution layer (csrc/testing)
using cudaError_t = int;
using cudaStream_t = void*;
#endif

namespace latentguard {

enum class Type : int { float32, float16, bfloat16 };

}  // namespace latentguard
