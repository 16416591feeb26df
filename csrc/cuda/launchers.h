// The CUDA half of include/operators.h. A launcher enqueues its kernels on `stream` and returns;
// it neither synchronises nor allocates, so it may be captured in a CUDA graph.
#pragma once

#if defined(LATENTGUARD_CUDA) && !defined(__CUDACC__)
// ops.cpp of a build with CUDA: a C++ compiler, but the real runtime's types.
#include <cuda_runtime_api.h>

#include "include/operators.h"
#else
#include "cuda/device.h"
#endif

namespace latentguard::cuda {

// Widest features and embeddings whose tile fits in shared memory.
constexpr int64_t kLargestWidth = 1536;

cudaError_t patch_embed(const PatchEmbed& args, cudaStream_t stream);
cudaError_t patch_embed_backward(const PatchEmbed& args, cudaStream_t stream);
cudaError_t concept_similarity(const Concepts& args, cudaStream_t stream);
cudaError_t concept_similarity_backward(const Concepts& args, cudaStream_t stream);

// Bytes that concept_similarity wants in args.workspace, or 0 where one launch does it all.
int64_t concept_workspace_bytes(const Concepts& args);

}  // namespace latentguard::cuda
