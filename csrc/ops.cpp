// Schemas, checks, allocation and dispatch of every operator. One host function serves both
// devices: it turns tensors into the plain structs of include/operators.h and calls the CPU kernel
// or the CUDA launcher. (Gradients are in autograd.cpp, shapes for tracing in latentguard/ops.)
#include "ops.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "include/operators.h"

#ifdef LATENTGUARD_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/launchers.h"
#endif

namespace latentguard {
namespace {

Type type_of(const Tensor& tensor) {
  if (tensor.scalar_type() == at::kHalf) return Type::float16;
  return tensor.scalar_type() == at::kBFloat16 ? Type::bfloat16 : Type::float32;
}

// Keeps contiguous copies alive while their pointers are in use. Kernels read 16 bytes at a time: a
// view that starts elsewhere is copied too.
class Contiguous {
 public:
  const void* operator()(const Tensor& tensor) {
    held_.push_back(tensor.contiguous());
    if (reinterpret_cast<uintptr_t>(held_.back().const_data_ptr()) % 16 != 0) {
      held_.back() = held_.back().clone();
    }
    return held_.back().const_data_ptr();
  }
  template <typename T = void>
  const T* operator()(const MaybeTensor& tensor) {
    return tensor ? static_cast<const T*>((*this)(*tensor)) : nullptr;
  }

 private:
  c10::SmallVector<Tensor, 16> held_;
};

// Calls the kernel of the tensor's device; the CUDA one on the current stream of that device.
#ifdef LATENTGUARD_CUDA
#define LG_RUN(tensor, function, args)                                                \
  if ((tensor).is_cuda()) {                                                           \
    const c10::cuda::CUDAGuard guard((tensor).device());                              \
    C10_CUDA_CHECK(cuda::function(args, c10::cuda::getCurrentCUDAStream().stream())); \
  } else {                                                                            \
    cpu::function(args);                                                              \
  }
#else
#define LG_RUN(tensor, function, args) cpu::function(args);
#endif

int phases(const Checker& check, const char* name, const MaybeTensor& affine, int64_t channels) {
  if (!affine) return 1;
  check.typed(name, *affine, at::kFloat);
  const bool packed = affine->dim() == 1 && affine->size(0) == 4 * channels;
  if (!packed && (affine->dim() != 1 || affine->size(0) != channels)) {
    const std::string want = "of shape [" + std::to_string(channels) + "] or, packed 2x2, [" +
                             std::to_string(4 * channels) + "]";
    LG_CHECK(false, check.operation(), name, want, affine->sizes());
  }
  return packed ? 4 : 1;
}

PatchEmbed patch_embed_args(const Checker& check, Contiguous& pointer, const Tensor& latents,
                            const Tensor& weight, const Tensor& positional_embedding,
                            const Tensor& ln_weight, double eps, const MaybeTensor& scale,
                            const MaybeTensor& shift, const MaybeTensor& noise,
                            const MaybeTensor& alpha, const MaybeTensor& sigma) {
  PatchEmbed args{};
  check.shape("latents", latents, {-1, -1, -1, -1});
  args.type = type_of(latents);
  args.batch = latents.size(0);
  args.channels = latents.size(1);
  args.height = latents.size(2);
  args.width = latents.size(3);
  check.like("weight", weight, {-1, args.channels, -1, -1});
  args.dim = weight.size(0);
  args.patch = weight.size(2);
  const int64_t p = args.patch;
  LG_CHECK((p == 2 || p == 4 || p == 8 || p == 16) && weight.size(3) == p, check.operation(),
           "weight", "a square patch of 2, 4, 8 or 16", weight.sizes());
  check.require(args.dim > 0 && args.dim % 64 == 0 && args.dim <= kLargestDim, "weight",
                "of a width that is a multiple of 64 up to 1536", std::to_string(args.dim));
  LG_CHECK(args.height % p == 0 && args.width % p == 0, check.operation(), "latents",
           "a multiple of the patch (" + std::to_string(p) + ") high and wide", latents.sizes());
  check.like("positional_embedding", positional_embedding, {1 + args.tokens_per_image(), args.dim});
  check.like("ln_weight", ln_weight, {args.dim});
  args.scale_phases = phases(check, "scale", scale, args.channels);
  args.shift_phases = phases(check, "shift", shift, args.channels);
  if (noise) check.like("noise", *noise, latents.sizes());
  check.require(noise.has_value() == sigma.has_value(), "sigma", "given together with `noise`",
                "one without the other");
  for (const auto& [name, level] : {std::pair("alpha", &alpha), std::pair("sigma", &sigma)}) {
    if (!*level) continue;
    check.typed(name, **level, at::kFloat);
    check.shape(name, **level, {args.batch});
  }
  args.eps = static_cast<float>(eps);
  args.latents = pointer(latents);
  args.weight = pointer(weight);
  args.positional_embedding = pointer(positional_embedding);
  args.ln_weight = pointer(ln_weight);
  args.noise = pointer(noise);
  args.scale = pointer.operator()<float>(scale);
  args.shift = pointer.operator()<float>(shift);
  args.alpha = pointer.operator()<float>(alpha);
  args.sigma = pointer.operator()<float>(sigma);
  return args;
}

}  // namespace

Tensor patch_embed(const Tensor& latents, const Tensor& weight, const Tensor& class_embedding,
                   const Tensor& positional_embedding, const Tensor& ln_weight,
                   const Tensor& ln_bias, double eps, const MaybeTensor& scale,
                   const MaybeTensor& shift, const MaybeTensor& noise, const MaybeTensor& alpha,
                   const MaybeTensor& sigma) {
  const Checker check("patch_embed", "latents", latents);
  Contiguous pointer;
  PatchEmbed args = patch_embed_args(check, pointer, latents, weight, positional_embedding,
                                     ln_weight, eps, scale, shift, noise, alpha, sigma);
  check.like("class_embedding", class_embedding, {args.dim});
  check.like("ln_bias", ln_bias, {args.dim});
  args.class_embedding = pointer(class_embedding);
  args.ln_bias = pointer(ln_bias);
  Tensor tokens = at::empty({args.batch, 1 + args.tokens_per_image(), args.dim}, latents.options());
  args.tokens = tokens.mutable_data_ptr();
  if (tokens.numel() > 0) LG_RUN(latents, patch_embed, args);
  return tokens;
}

Tensor patch_embed_backward(const Tensor& grad, const Tensor& latents, const Tensor& weight,
                            const Tensor& positional_embedding, const Tensor& ln_weight, double eps,
                            const MaybeTensor& scale, const MaybeTensor& shift,
                            const MaybeTensor& noise, const MaybeTensor& alpha,
                            const MaybeTensor& sigma) {
  const Checker check("patch_embed_backward", "latents", latents);
  Contiguous pointer;
  PatchEmbed args = patch_embed_args(check, pointer, latents, weight, positional_embedding,
                                     ln_weight, eps, scale, shift, noise, alpha, sigma);
  check.like("grad", grad, {args.batch, 1 + args.tokens_per_image(), args.dim});
  args.grad = pointer(grad);
  Tensor out = at::empty(latents.sizes(), latents.options());
  args.grad_latents = out.mutable_data_ptr();
  if (out.numel() > 0) LG_RUN(latents, patch_embed_backward, args);
  return out;
}

namespace {

Concepts concept_args(const Checker& check, Contiguous& pointer, const Tensor& features,
                      const MaybeTensor& ln_weight, double eps, const MaybeTensor& projection,
                      const Tensor& concepts, const Tensor& contrast) {
  Concepts args{};
  args.type = type_of(features);
  args.dim = features.size(-1);
  args.width = args.dim;
  args.positions = features.dim() == 3 ? features.size(1) : 1;
  args.rows = features.size(0) * args.positions;
  if (ln_weight) check.like("ln_weight", *ln_weight, {args.dim});
  if (projection) {
    check.like("projection", *projection, {args.dim, -1});
    args.width = projection->size(1);
  }
  check.like("concepts", concepts, {-1, args.width});
  check.like("contrast", contrast, {-1, args.width});
  args.prompts = concepts.size(0);
  args.contrasts = contrast.size(0);
  args.eps = static_cast<float>(eps);
  args.features = pointer(features);
  args.ln_weight = pointer(ln_weight);
  args.projection = pointer(projection);
  args.bank[0] = pointer(concepts);
  args.bank[1] = pointer(contrast);
  return args;
}

Concepts concept_forward_args(const Checker& check, Contiguous& pointer, const Tensor& features,
                              const MaybeTensor& ln_weight, const MaybeTensor& ln_bias, double eps,
                              const MaybeTensor& projection, const Tensor& concepts,
                              const Tensor& segments, const Tensor& contrast,
                              const Tensor& contrast_segments) {
  check.require(ln_weight.has_value() == ln_bias.has_value(), "ln_bias",
                "given together with `ln_weight`", "one without the other");
  Concepts args =
      concept_args(check, pointer, features, ln_weight, eps, projection, concepts, contrast);
  if (ln_bias) check.like("ln_bias", *ln_bias, {args.dim});
  args.ln_bias = pointer(ln_bias);
  check.typed("segments", segments, at::kInt);
  check.shape("segments", segments, {-1, 2});
  args.concepts = segments.size(0);
  check.typed("contrast_segments", contrast_segments, at::kInt);
  check.shape("contrast_segments", contrast_segments, {args.concepts, 2});
  args.segments[0] = static_cast<const int32_t*>(pointer(segments));
  args.segments[1] = static_cast<const int32_t*>(pointer(contrast_segments));
  return args;
}

// Memory between the two launches of a call with few rows; stream-ordered, so free to drop here.
Tensor workspace_for(const Tensor& features, Concepts& args) {
#ifdef LATENTGUARD_CUDA
  if (features.is_cuda()) {
    const int64_t bytes = cuda::concept_workspace_bytes(args);
    Tensor out = at::empty({bytes}, features.options().dtype(at::kByte));
    args.workspace = bytes > 0 ? out.mutable_data_ptr() : nullptr;
    return out;
  }
#endif
  return {};
}

// What the backward reads besides the inputs: the rows before their norm. Empty where not asked.
Tensor projected_for(const Tensor& features, Concepts& args, bool save) {
  if (!save) return at::empty({0}, features.options());
  auto shape = features.sizes().vec();
  shape.back() = args.width;
  Tensor out = at::empty(shape, features.options());
  args.projected = out.mutable_data_ptr();
  return out;
}

}  // namespace

Five concept_similarity(const Tensor& features, const MaybeTensor& ln_weight,
                        const MaybeTensor& ln_bias, double eps, const MaybeTensor& projection,
                        const Tensor& concepts, const Tensor& segments, const Tensor& contrast,
                        const Tensor& contrast_segments, double logit_scale, bool save) {
  const Checker check("concept_similarity", "features", features);
  check.shape("features", features, {-1, -1});
  Contiguous pointer;
  Concepts args = concept_forward_args(check, pointer, features, ln_weight, ln_bias, eps,
                                       projection, concepts, segments, contrast, contrast_segments);
  args.logit_scale = static_cast<float>(logit_scale);
  const auto floats = features.options().dtype(at::kFloat);
  const auto integers = features.options().dtype(at::kLong);
  Five out(at::empty({args.rows, args.concepts}, floats),
           at::empty({args.rows, args.concepts}, floats),
           at::empty({args.rows, args.concepts}, integers),
           at::empty({args.rows, args.concepts}, integers), projected_for(features, args, save));
  args.probability = std::get<0>(out).mutable_data_ptr<float>();
  args.margin = std::get<1>(out).mutable_data_ptr<float>();
  args.best[0] = std::get<2>(out).mutable_data_ptr<int64_t>();
  args.best[1] = std::get<3>(out).mutable_data_ptr<int64_t>();
  if (args.rows == 0 || (args.concepts == 0 && !save)) return out;
  const Tensor workspace = workspace_for(features, args);
  LG_RUN(features, concept_similarity, args);
  return out;
}

namespace {

// The arguments of a backward. It takes the layer norm's weight but not its bias, which no gradient
// depends on.
Concepts concept_backward_args(const Checker& check, Contiguous& pointer, const Tensor& features,
                               const MaybeTensor& ln_weight, double eps,
                               const MaybeTensor& projection, const Tensor& concepts,
                               const Tensor& contrast, const Tensor& best_prompt,
                               const Tensor& best_contrast, const Tensor& projected) {
  Concepts args =
      concept_args(check, pointer, features, ln_weight, eps, projection, concepts, contrast);
  check.shape("best_prompt", best_prompt,
              features.dim() == 3 ? at::IntArrayRef{features.size(0), -1, args.positions}
                                  : at::IntArrayRef{args.rows, -1});
  args.concepts = best_prompt.size(1);
  for (const auto& [name, best] :
       {std::pair("best_prompt", &best_prompt), std::pair("best_contrast", &best_contrast)}) {
    check.typed(name, *best, at::kLong);
    check.shape(name, *best, best_prompt.sizes());
  }
  auto rows = features.sizes().vec();
  rows.back() = args.width;
  check.like("projected", projected, rows);
  args.saved_best[0] = static_cast<const int64_t*>(pointer(best_prompt));
  args.saved_best[1] = static_cast<const int64_t*>(pointer(best_contrast));
  args.saved_projected = pointer(projected);
  return args;
}

}  // namespace

Tensor concept_similarity_backward(const MaybeTensor& grad_probability,
                                   const MaybeTensor& grad_margin, const Tensor& features,
                                   const MaybeTensor& ln_weight, double eps,
                                   const MaybeTensor& projection, const Tensor& concepts,
                                   const Tensor& contrast, const Tensor& probability,
                                   const Tensor& best_prompt, const Tensor& best_contrast,
                                   const Tensor& projected, double logit_scale) {
  const Checker check("concept_similarity_backward", "features", features);
  check.shape("features", features, {-1, -1});
  Contiguous pointer;
  Concepts args = concept_backward_args(check, pointer, features, ln_weight, eps, projection,
                                        concepts, contrast, best_prompt, best_contrast, projected);
  args.logit_scale = static_cast<float>(logit_scale);
  check.typed("probability", probability, at::kFloat);
  check.shape("probability", probability, {args.rows, args.concepts});
  for (const auto& [name, grad] :
       {std::pair("grad_probability", &grad_probability), std::pair("grad_margin", &grad_margin)}) {
    if (!*grad) continue;
    check.typed(name, **grad, at::kFloat);
    check.shape(name, **grad, {args.rows, args.concepts});
  }
  args.grad_probability = pointer.operator()<float>(grad_probability);
  args.grad_margin = pointer.operator()<float>(grad_margin);
  args.saved_probability = static_cast<const float*>(pointer(probability));
  Tensor out = at::empty(features.sizes(), features.options());
  args.grad_features = out.mutable_data_ptr();
  if (out.numel() > 0) LG_RUN(features, concept_similarity_backward, args);
  return out;
}

Four concept_heatmap(const Tensor& tokens, const MaybeTensor& ln_weight, const MaybeTensor& ln_bias,
                     double eps, const MaybeTensor& projection, const Tensor& concepts,
                     const Tensor& segments, const Tensor& contrast,
                     const Tensor& contrast_segments, bool save) {
  const Checker check("concept_heatmap", "tokens", tokens);
  check.shape("tokens", tokens, {-1, -1, -1});
  Contiguous pointer;
  Concepts args = concept_forward_args(check, pointer, tokens, ln_weight, ln_bias, eps, projection,
                                       concepts, segments, contrast, contrast_segments);
  const int64_t shape[] = {tokens.size(0), args.concepts, args.positions};
  const int64_t nothing[] = {0};
  const auto saved = save ? at::IntArrayRef(shape) : at::IntArrayRef(nothing);
  const auto integers = tokens.options().dtype(at::kLong);
  Four out(at::empty(shape, tokens.options().dtype(at::kFloat)), at::empty(saved, integers),
           at::empty(saved, integers), projected_for(tokens, args, save));
  args.margin = std::get<0>(out).mutable_data_ptr<float>();
  if (save) {
    args.best[0] = std::get<1>(out).mutable_data_ptr<int64_t>();
    args.best[1] = std::get<2>(out).mutable_data_ptr<int64_t>();
  }
  if (args.rows == 0 || (args.concepts == 0 && !save)) return out;
  const Tensor workspace = workspace_for(tokens, args);
  LG_RUN(tokens, concept_similarity, args);
  return out;
}

Tensor concept_heatmap_backward(const Tensor& grad, const Tensor& tokens,
                                const MaybeTensor& ln_weight, double eps,
                                const MaybeTensor& projection, const Tensor& concepts,
                                const Tensor& contrast, const Tensor& best_prompt,
                                const Tensor& best_contrast, const Tensor& projected) {
  const Checker check("concept_heatmap_backward", "tokens", tokens);
  check.shape("tokens", tokens, {-1, -1, -1});
  Contiguous pointer;
  Concepts args = concept_backward_args(check, pointer, tokens, ln_weight, eps, projection,
                                        concepts, contrast, best_prompt, best_contrast, projected);
  check.typed("grad", grad, at::kFloat);
  check.shape("grad", grad, best_prompt.sizes());
  args.grad_margin = static_cast<const float*>(pointer(grad));
  Tensor out = at::empty(tokens.sizes(), tokens.options());
  args.grad_features = out.mutable_data_ptr();
  if (out.numel() > 0) LG_RUN(tokens, concept_similarity_backward, args);
  return out;
}

#define LG_HEAD "Tensor? ln_weight, Tensor? ln_bias, float eps, Tensor? projection"
#define LG_BANK "Tensor concepts, Tensor segments, Tensor contrast, Tensor contrast_segments"
#define LG_BACK "Tensor? ln_weight, float eps, Tensor? projection, Tensor concepts, Tensor contrast"
#define LG_SAVED "Tensor best_prompt, Tensor best_contrast, Tensor projected"
#define LG_CLEAN                                                                     \
  "Tensor? scale=None, Tensor? shift=None, Tensor? noise=None, Tensor? alpha=None, " \
  "Tensor? sigma=None"

TORCH_LIBRARY(latentguard, m) {
  m.def(
      "patch_embed(Tensor latents, Tensor weight, Tensor class_embedding, "
      "Tensor positional_embedding, Tensor ln_weight, Tensor ln_bias, float eps, " LG_CLEAN
      ") -> Tensor");
  m.def(
      "patch_embed_backward(Tensor grad, Tensor latents, Tensor weight, "
      "Tensor positional_embedding, Tensor ln_weight, float eps, " LG_CLEAN ") -> Tensor");
  m.def("concept_similarity(Tensor features, " LG_HEAD ", " LG_BANK
        ", float logit_scale, bool save=False) -> (Tensor probability, Tensor margin, "
        "Tensor best_prompt, Tensor best_contrast, Tensor projected)");
  m.def(
      "concept_similarity_backward(Tensor? grad_probability, Tensor? grad_margin, "
      "Tensor features, " LG_BACK ", Tensor probability, " LG_SAVED
      ", float logit_scale) -> Tensor");
  m.def("concept_heatmap(Tensor tokens, " LG_HEAD ", " LG_BANK
        ", bool save=False) -> (Tensor margin, " LG_SAVED ")");
  m.def("concept_heatmap_backward(Tensor grad, Tensor tokens, " LG_BACK ", " LG_SAVED
        ") -> Tensor");
}

#define LG_IMPLEMENT(m)                                                \
  m.impl("patch_embed", &patch_embed);                                 \
  m.impl("patch_embed_backward", &patch_embed_backward);               \
  m.impl("concept_similarity", &concept_similarity);                   \
  m.impl("concept_similarity_backward", &concept_similarity_backward); \
  m.impl("concept_heatmap", &concept_heatmap);                         \
  m.impl("concept_heatmap_backward", &concept_heatmap_backward)

TORCH_LIBRARY_IMPL(latentguard, CPU, m) { LG_IMPLEMENT(m); }
#ifdef LATENTGUARD_CUDA
TORCH_LIBRARY_IMPL(latentguard, CUDA, m) { LG_IMPLEMENT(m); }
#endif

}  // namespace latentguard
