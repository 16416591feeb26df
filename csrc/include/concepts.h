// Arguments and kernels of concept_similarity and concept_heatmap, and of their backward passes.
#pragma once

#include "include/kernel.h"

namespace latentguard {

// Norms below this count as zero, as in latentguard/ops/reference.py.
constexpr float kNormFloor = 1e-12f;

// concept_similarity (positions 1) and concept_heatmap (positions N). Row r of `features` is
// position r % positions of image r / positions; results are [images, concepts, positions].
struct Concepts {
  Type type;
  // CUDA only: up to this many rows, two launches share the work: a few tiles of 16 rows would
  // leave the GPU idle. More rows would write more workspace than the launch saves.
  int64_t split_rows = 64;
  int64_t rows, positions, dim, width, prompts, contrasts, concepts;
  float eps, logit_scale;
  const void* features;            // T [rows, dim]
  const void* ln_weight;           // T [dim] or null
  const void* ln_bias;             // T [dim] or null
  const void* projection;          // T [dim, width] or null (width is dim)
  const void* bank[2];             // T [prompts, width], T [contrasts, width]
  const int32_t* segments[2];      // [concepts, 2] begin and end in each bank
  float* probability;              // [images, concepts, positions] or null
  float* margin;                   // [images, concepts, positions]
  int64_t* best[2];                // [images, concepts, positions] each, or null
  void* projected;                 // T [rows, width], rows before their norm, or null
  void* workspace;                 // CUDA only, see concept_workspace_bytes
  const float* grad_probability;   // like margin, or null; backward only
  const float* grad_margin;        // like margin, or null; backward only
  const float* saved_probability;  // like margin, with grad_probability
  const int64_t* saved_best[2];    // like margin; backward only
  const void* saved_projected;     // T [rows, width]; backward only
  void* grad_features;             // T [rows, dim]; backward only

  LG_HOST_DEVICE int64_t bank_rows(int which) const { return which == 0 ? prompts : contrasts; }
  LG_HOST_DEVICE int64_t result_index(int64_t row, int64_t concept_index) const {
    return (row / positions * concepts + concept_index) * positions + row % positions;
  }
};

namespace cpu {
void concept_similarity(const Concepts& args);
void concept_similarity_backward(const Concepts& args);
}  // namespace cpu

namespace cuda {
// Widest features and embeddings whose tile fits in shared memory.
constexpr int64_t kLargestWidth = 1536;

cudaError_t concept_similarity(const Concepts& args, cudaStream_t stream);
cudaError_t concept_similarity_backward(const Concepts& args, cudaStream_t stream);

// Bytes that concept_similarity wants in args.workspace, or 0 where one launch does it all.
int64_t concept_workspace_bytes(const Concepts& args);
}  // namespace cuda

}  // namespace latentguard
