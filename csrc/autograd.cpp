// Gradients: what each operator's forward keeps, and the fused backward that reads it. In C++, as
// an operator at batch 1 takes less time than a Python function around it would.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops.h"

namespace latentguard {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Guard = at::AutoDispatchBelowADInplaceOrView;

// The operator itself, through the dispatcher: a kernel, a fake kernel while tracing.
template <typename Signature>
auto operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor or_undefined(const MaybeTensor& tensor) { return tensor.value_or(Tensor()); }
MaybeTensor maybe(const Tensor& tensor) {
  return tensor.defined() ? MaybeTensor(tensor) : std::nullopt;
}
MaybeTensor maybe_contiguous(const Tensor& tensor) {
  return tensor.defined() ? MaybeTensor(tensor.contiguous()) : std::nullopt;
}

// Gradients are wanted of `inputs`, which have them. Of `weights` they are refused: no kernel
// computes those.
bool wants_gradient(const char* name, std::initializer_list<Tensor> inputs,
                    std::initializer_list<Tensor> weights) {
  if (!at::GradMode::is_enabled()) return false;
  const auto needs = [](const Tensor& tensor) {
    return tensor.defined() && tensor.requires_grad();
  };
  TORCH_CHECK_NOT_IMPLEMENTED(
      std::none_of(weights.begin(), weights.end(), needs), "`", name,
      "`: weights get no gradient from the compiled kernel; call latentguard.ops.", name,
      ", which takes the reference for them");
  return std::any_of(inputs.begin(), inputs.end(), needs);
}

// A list of gradients, as many as the forward has arguments; all but the first are none.
variable_list only_first(const Tensor& gradient, size_t arguments) {
  variable_list out(arguments);
  out[0] = gradient;
  return out;
}

struct PatchEmbedGrad : torch::autograd::Function<PatchEmbedGrad> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& latents, const Tensor& weight,
                        const Tensor& class_embedding, const Tensor& positional_embedding,
                        const Tensor& ln_weight, const Tensor& ln_bias, double eps,
                        const MaybeTensor& scale, const MaybeTensor& shift,
                        const MaybeTensor& noise, const MaybeTensor& alpha,
                        const MaybeTensor& sigma) {
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["noise"] = noise && noise->requires_grad();
    ctx->save_for_backward({latents, weight, positional_embedding, ln_weight, or_undefined(scale),
                            or_undefined(shift), or_undefined(noise), or_undefined(alpha),
                            or_undefined(sigma)});
    return call(latents, weight, class_embedding, positional_embedding, ln_weight, ln_bias, eps,
                scale, shift, noise, alpha, sigma);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto operation_backward =
        operation<decltype(patch_embed_backward)>("latentguard::patch_embed_backward");
    constexpr size_t kArguments = 12, kNoise = 9;
    if (!grads[0].defined()) return variable_list(kArguments);
    const variable_list s = ctx->get_saved_variables();
    const Tensor gradient = operation_backward.call(
        grads[0].contiguous(), s[0], s[1], s[2], s[3], ctx->saved_data["eps"].toDouble(),
        maybe(s[4]), maybe(s[5]), maybe(s[6]), maybe(s[7]), maybe(s[8]));
    variable_list out = only_first(gradient, kArguments);
    if (ctx->saved_data["noise"].toBool()) {
      out[kNoise] = gradient.mul(s[8].view({-1, 1, 1, 1})).neg().to(gradient.scalar_type());
    }
    return out;
  }

  static Tensor call(const Tensor& latents, const Tensor& weight, const Tensor& class_embedding,
                     const Tensor& positional_embedding, const Tensor& ln_weight,
                     const Tensor& ln_bias, double eps, const MaybeTensor& scale,
                     const MaybeTensor& shift, const MaybeTensor& noise, const MaybeTensor& alpha,
                     const MaybeTensor& sigma) {
    static const auto below = operation<decltype(patch_embed)>("latentguard::patch_embed");
    const Guard guard;
    return below.call(latents, weight, class_embedding, positional_embedding, ln_weight, ln_bias,
                      eps, scale, shift, noise, alpha, sigma);
  }
};

Tensor patch_embed_autograd(const Tensor& latents, const Tensor& weight,
                            const Tensor& class_embedding, const Tensor& positional_embedding,
                            const Tensor& ln_weight, const Tensor& ln_bias, double eps,
                            const MaybeTensor& scale, const MaybeTensor& shift,
                            const MaybeTensor& noise, const MaybeTensor& alpha,
                            const MaybeTensor& sigma) {
  const bool wanted = wants_gradient(
      "patch_embed", {latents, or_undefined(noise)},
      {weight, class_embedding, positional_embedding, ln_weight, ln_bias, or_undefined(scale),
       or_undefined(shift), or_undefined(alpha), or_undefined(sigma)});
  if (!wanted) {
    return PatchEmbedGrad::call(latents, weight, class_embedding, positional_embedding, ln_weight,
                                ln_bias, eps, scale, shift, noise, alpha, sigma);
  }
  return PatchEmbedGrad::apply(latents, weight, class_embedding, positional_embedding, ln_weight,
                               ln_bias, eps, scale, shift, noise, alpha, sigma);
}

struct SimilarityGrad : torch::autograd::Function<SimilarityGrad> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& features,
                               const MaybeTensor& ln_weight, const MaybeTensor& ln_bias, double eps,
                               const MaybeTensor& projection, const Tensor& concepts,
                               const Tensor& segments, const Tensor& contrast,
                               const Tensor& contrast_segments, double logit_scale, bool save) {
    const auto [probability, margin, prompt, against, projected] =
        call(features, ln_weight, ln_bias, eps, projection, concepts, segments, contrast,
             contrast_segments, logit_scale, save);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({prompt, against, projected});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["logit_scale"] = logit_scale;
    ctx->saved_data["save"] = save;
    ctx->save_for_backward({features, or_undefined(ln_weight), or_undefined(ln_bias),
                            or_undefined(projection), concepts, segments, contrast,
                            contrast_segments, probability, prompt, against, projected});
    return {probability, margin, prompt, against, projected};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto operation_backward = operation<decltype(concept_similarity_backward)>(
        "latentguard::concept_similarity_backward");
    constexpr size_t kArguments = 11;
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(kArguments);
    const variable_list s = ctx->get_saved_variables();
    const double eps = ctx->saved_data["eps"].toDouble();
    const double logit_scale = ctx->saved_data["logit_scale"].toDouble();
    Tensor projected = s[11];
    if (!ctx->saved_data["save"].toBool()) {  // a direct call that kept nothing: once more
      projected = std::get<4>(call(s[0], maybe(s[1]), maybe(s[2]), eps, maybe(s[3]), s[4], s[5],
                                   s[6], s[7], logit_scale, true));
    }
    return only_first(operation_backward.call(
                          maybe_contiguous(grads[0]), maybe_contiguous(grads[1]), s[0], maybe(s[1]),
                          eps, maybe(s[3]), s[4], s[6], s[8], s[9], s[10], projected, logit_scale),
                      kArguments);
  }

  static Five call(const Tensor& features, const MaybeTensor& ln_weight, const MaybeTensor& ln_bias,
                   double eps, const MaybeTensor& projection, const Tensor& concepts,
                   const Tensor& segments, const Tensor& contrast, const Tensor& contrast_segments,
                   double logit_scale, bool save) {
    static const auto below =
        operation<decltype(concept_similarity)>("latentguard::concept_similarity");
    const Guard guard;
    return below.call(features, ln_weight, ln_bias, eps, projection, concepts, segments, contrast,
                      contrast_segments, logit_scale, save);
  }
};

Five concept_similarity_autograd(const Tensor& features, const MaybeTensor& ln_weight,
                                 const MaybeTensor& ln_bias, double eps,
                                 const MaybeTensor& projection, const Tensor& concepts,
                                 const Tensor& segments, const Tensor& contrast,
                                 const Tensor& contrast_segments, double logit_scale, bool save) {
  if (!wants_gradient("concept_similarity", {features},
                      {or_undefined(ln_weight), or_undefined(ln_bias), or_undefined(projection),
                       concepts, contrast})) {
    return SimilarityGrad::call(features, ln_weight, ln_bias, eps, projection, concepts, segments,
                                contrast, contrast_segments, logit_scale, save);
  }
  const variable_list out =
      SimilarityGrad::apply(features, ln_weight, ln_bias, eps, projection, concepts, segments,
                            contrast, contrast_segments, logit_scale, save);
  return {out[0], out[1], out[2], out[3], out[4]};
}

struct HeatmapGrad : torch::autograd::Function<HeatmapGrad> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& tokens,
                               const MaybeTensor& ln_weight, const MaybeTensor& ln_bias, double eps,
                               const MaybeTensor& projection, const Tensor& concepts,
                               const Tensor& segments, const Tensor& contrast,
                               const Tensor& contrast_segments, bool save) {
    const auto [margin, prompt, against, projected] =
        call(tokens, ln_weight, ln_bias, eps, projection, concepts, segments, contrast,
             contrast_segments, save);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({prompt, against, projected});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["save"] = save;
    ctx->save_for_backward({tokens, or_undefined(ln_weight), or_undefined(ln_bias),
                            or_undefined(projection), concepts, segments, contrast,
                            contrast_segments, prompt, against, projected});
    return {margin, prompt, against, projected};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto operation_backward =
        operation<decltype(concept_heatmap_backward)>("latentguard::concept_heatmap_backward");
    constexpr size_t kArguments = 10;
    if (!grads[0].defined()) return variable_list(kArguments);
    const variable_list s = ctx->get_saved_variables();
    const double eps = ctx->saved_data["eps"].toDouble();
    Tensor prompt = s[8], against = s[9], projected = s[10];
    if (!ctx->saved_data["save"].toBool()) {  // a direct call that kept nothing: once more
      std::tie(std::ignore, prompt, against, projected) =
          call(s[0], maybe(s[1]), maybe(s[2]), eps, maybe(s[3]), s[4], s[5], s[6], s[7], true);
    }
    return only_first(operation_backward.call(grads[0].contiguous(), s[0], maybe(s[1]), eps,
                                              maybe(s[3]), s[4], s[6], prompt, against, projected),
                      kArguments);
  }

  static Four call(const Tensor& tokens, const MaybeTensor& ln_weight, const MaybeTensor& ln_bias,
                   double eps, const MaybeTensor& projection, const Tensor& concepts,
                   const Tensor& segments, const Tensor& contrast, const Tensor& contrast_segments,
                   bool save) {
    static const auto below = operation<decltype(concept_heatmap)>("latentguard::concept_heatmap");
    const Guard guard;
    return below.call(tokens, ln_weight, ln_bias, eps, projection, concepts, segments, contrast,
                      contrast_segments, save);
  }
};

Four concept_heatmap_autograd(const Tensor& tokens, const MaybeTensor& ln_weight,
                              const MaybeTensor& ln_bias, double eps, const MaybeTensor& projection,
                              const Tensor& concepts, const Tensor& segments,
                              const Tensor& contrast, const Tensor& contrast_segments, bool save) {
  if (!wants_gradient("concept_heatmap", {tokens},
                      {or_undefined(ln_weight), or_undefined(ln_bias), or_undefined(projection),
                       concepts, contrast})) {
    return HeatmapGrad::call(tokens, ln_weight, ln_bias, eps, projection, concepts, segments,
                             contrast, contrast_segments, save);
  }
  const variable_list out =
      HeatmapGrad::apply(tokens, ln_weight, ln_bias, eps, projection, concepts, segments, contrast,
                         contrast_segments, save);
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(latentguard, Autograd, m) {
  m.impl("patch_embed", &patch_embed_autograd);
  m.impl("concept_similarity", &concept_similarity_autograd);
  m.impl("concept_heatmap", &concept_heatmap_autograd);
}

}  // namespace latentguard
