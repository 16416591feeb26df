// What an operator's host code hands to its kernels: raw pointers, sizes, no torch.
//
// Every pointer is to contiguous memory of the stated shape. T is the element type named by
// `type`; null marks an argument that was not given. Sizes are checked by ops.cpp.
#pragma once

#include <cstdint>

// For the few functions that kernels call too.
#ifdef __CUDACC__
#define LG_HOST_DEVICE __host__ __device__
#else
#define LG_HOST_DEVICE
#endif

namespace latentguard {

enum class Type : int { float32, float16, bfloat16 };

constexpr int64_t kLargestDim = 1536;
// Norms below this count as zero, as in latentguard/ops/reference.py.
constexpr float kNormFloor = 1e-12f;

struct PatchEmbed {
  Type type;
  int64_t batch, channels, height, width, patch, dim;
  // 1: one value per channel; 4: one per channel and cell of a 2x2 packing, index
  // c * 4 + (y % 2) * 2 + x % 2.
  int scale_phases, shift_phases;
  float eps;
  const void* latents;               // T [batch, channels, height, width]
  const void* noise;                 // T [batch, channels, height, width] or null
  const void* weight;                // T [dim, channels, patch, patch]
  const void* class_embedding;       // T [dim]; unused by the backward
  const void* positional_embedding;  // T [1 + tokens, dim]
  const void* ln_weight;             // T [dim]
  const void* ln_bias;               // T [dim]; unused by the backward
  const float* scale;                // [channels * scale_phases] or null
  const float* shift;                // [channels * shift_phases] or null
  const float* alpha;                // [batch] or null
  const float* sigma;                // [batch] or null
  void* tokens;                      // T [batch, 1 + tokens, dim]; forward only
  const void* grad;                  // T [batch, 1 + tokens, dim]; backward only
  void* grad_latents;                // T [batch, channels, height, width]; backward only

  LG_HOST_DEVICE int64_t rows() const { return height / patch; }
  LG_HOST_DEVICE int64_t columns() const { return width / patch; }
  LG_HOST_DEVICE int64_t tokens_per_image() const { return rows() * columns(); }
  LG_HOST_DEVICE int64_t patch_size() const { return channels * patch * patch; }
};

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
void patch_embed(const PatchEmbed& args);
void patch_embed_backward(const PatchEmbed& args);
void concept_similarity(const Concepts& args);
void concept_similarity_backward(const Concepts& args);
}  // namespace cpu

}  // namespace latentguard
