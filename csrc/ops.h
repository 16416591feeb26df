// The operators as ops.cpp defines them; autograd.cpp calls them by these signatures. What each
// argument is stands in latentguard/ops.
#pragma once

#include <tuple>

#include "checks.h"

namespace latentguard {

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor patch_embed(const Tensor& latents, const Tensor& weight, const Tensor& class_embedding,
                   const Tensor& positional_embedding, const Tensor& ln_weight,
                   const Tensor& ln_bias, double eps, const MaybeTensor& scale,
                   const MaybeTensor& shift, const MaybeTensor& noise, const MaybeTensor& alpha,
                   const MaybeTensor& sigma);

Tensor patch_embed_backward(const Tensor& grad, const Tensor& latents, const Tensor& weight,
                            const Tensor& positional_embedding, const Tensor& ln_weight, double eps,
                            const MaybeTensor& scale, const MaybeTensor& shift,
                            const MaybeTensor& noise, const MaybeTensor& alpha,
                            const MaybeTensor& sigma);

Five concept_similarity(const Tensor& features, const MaybeTensor& ln_weight,
                        const MaybeTensor& ln_bias, double eps, const MaybeTensor& projection,
                        const Tensor& concepts, const Tensor& segments, const Tensor& contrast,
                        const Tensor& contrast_segments, double logit_scale, bool save);

Tensor concept_similarity_backward(const MaybeTensor& grad_probability,
                                   const MaybeTensor& grad_margin, const Tensor& features,
                                   const MaybeTensor& ln_weight, double eps,
                                   const MaybeTensor& projection, const Tensor& concepts,
                                   const Tensor& contrast, const Tensor& probability,
                                   const Tensor& best_prompt, const Tensor& best_contrast,
                                   const Tensor& projected, double logit_scale);

Four concept_heatmap(const Tensor& tokens, const MaybeTensor& ln_weight, const MaybeTensor& ln_bias,
                     double eps, const MaybeTensor& projection, const Tensor& concepts,
                     const Tensor& segments, const Tensor& contrast,
                     const Tensor& contrast_segments, bool save);

Tensor concept_heatmap_backward(const Tensor& grad, const Tensor& tokens,
                                const MaybeTensor& ln_weight, double eps,
                                const MaybeTensor& projection, const Tensor& concepts,
                                const Tensor& contrast, const Tensor& best_prompt,
                                const Tensor& best_contrast, const Tensor& projected);

}  // namespace latentguard
