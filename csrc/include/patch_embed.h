// Arguments and kernels of patch_embed and its backward.
#pragma once

#include "include/kernel.h"

namespace latentguard {

constexpr int64_t kLargestDim = 1536;

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

namespace cpu {
void patch_embed(const PatchEmbed& args);
void patch_embed_backward(const PatchEmbed& args);
}  // namespace cpu

namespace cuda {
cudaError_t patch_embed(const PatchEmbed& args, cudaStream_t stream);
cudaError_t patch_embed_backward(const PatchEmbed& args, cudaStream_t stream);
}  // namespace cuda

}  // namespace latentguard
