// The host side of patch_embed: checks, allocation, dispatch, gradients.
#include "include/patch_embed.h"

#include "host.h"

namespace latentguard {
namespace {

// The embedding's own arguments. A backward reads neither `class_embedding` nor `ln_bias`.
struct Embedding {
  Tensor weight, class_embedding, positional_embedding, ln_weight, ln_bias;
  double eps;
};

// The optional end of the arguments: x = (latents - sigma * noise) / alpha * scale + shift.
struct Conversion {
  MaybeTensor scale, shift, noise, alpha, sigma;
};

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

PatchEmbed arguments(const Checker& check, Contiguous& pointer, const Tensor& latents,
                     const Embedding& embedding, const Conversion& conversion) {
  PatchEmbed args{};
  check.shape("latents", latents, {-1, -1, -1, -1});
  args.type = type_of(latents);
  args.batch = latents.size(0);
  args.channels = latents.size(1);
  args.height = latents.size(2);
  args.width = latents.size(3);
  const Tensor& weight = embedding.weight;
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
  check.like("positional_embedding", embedding.positional_embedding,
             {1 + args.tokens_per_image(), args.dim});
  check.like("ln_weight", embedding.ln_weight, {args.dim});
  const auto& [scale, shift, noise, alpha, sigma] = conversion;
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
  args.eps = static_cast<float>(embedding.eps);
  args.latents = pointer(latents);
  args.weight = pointer(weight);
  args.positional_embedding = pointer(embedding.positional_embedding);
  args.ln_weight = pointer(embedding.ln_weight);
  args.noise = pointer(noise);
  args.scale = pointer.operator()<float>(scale);
  args.shift = pointer.operator()<float>(shift);
  args.alpha = pointer.operator()<float>(alpha);
  args.sigma = pointer.operator()<float>(sigma);
  return args;
}

Tensor patch_embed(const Tensor& latents, const Embedding& embedding,
                   const Conversion& conversion) {
  const Checker check("patch_embed", "latents", latents);
  Contiguous pointer;
  PatchEmbed args = arguments(check, pointer, latents, embedding, conversion);
  check.like("class_embedding", embedding.class_embedding, {args.dim});
  check.like("ln_bias", embedding.ln_bias, {args.dim});
  args.class_embedding = pointer(embedding.class_embedding);
  args.ln_bias = pointer(embedding.ln_bias);
  Tensor tokens = at::empty({args.batch, 1 + args.tokens_per_image(), args.dim}, latents.options());
  args.tokens = tokens.mutable_data_ptr();
  if (tokens.numel() > 0) LG_RUN(latents, patch_embed, args);
  return tokens;
}

Tensor patch_embed_backward(const Tensor& grad, const Tensor& latents, const Embedding& embedding,
                            const Conversion& conversion) {
  const Checker check("patch_embed_backward", "latents", latents);
  Contiguous pointer;
  PatchEmbed args = arguments(check, pointer, latents, embedding, conversion);
  check.like("grad", grad, {args.batch, 1 + args.tokens_per_image(), args.dim});
  args.grad = pointer(grad);
  Tensor out = at::empty(latents.sizes(), latents.options());
  args.grad_latents = out.mutable_data_ptr();
  if (out.numel() > 0) LG_RUN(latents, patch_embed_backward, args);
  return out;
}

// Between the flat arguments of the schemas and the structures above.

using Forward = Tensor (*)(const Tensor&, const Embedding&, const Conversion&);

template <Forward function>
Tensor flat(const Tensor& latents, const Tensor& weight, const Tensor& class_embedding,
            const Tensor& positional_embedding, const Tensor& ln_weight, const Tensor& ln_bias,
            double eps, const MaybeTensor& scale, const MaybeTensor& shift,
            const MaybeTensor& noise, const MaybeTensor& alpha, const MaybeTensor& sigma) {
  return function(latents, {weight, class_embedding, positional_embedding, ln_weight, ln_bias, eps},
                  {scale, shift, noise, alpha, sigma});
}

Tensor call(const Tensor& latents, const Embedding& e, const Conversion& c) {
  static const auto below = operation<decltype(flat<patch_embed>)>("latentguard::patch_embed");
  const Guard guard;
  return below.call(latents, e.weight, e.class_embedding, e.positional_embedding, e.ln_weight,
                    e.ln_bias, e.eps, c.scale, c.shift, c.noise, c.alpha, c.sigma);
}

Tensor flat_backward(const Tensor& grad, const Tensor& latents, const Tensor& weight,
                     const Tensor& positional_embedding, const Tensor& ln_weight, double eps,
                     const MaybeTensor& scale, const MaybeTensor& shift, const MaybeTensor& noise,
                     const MaybeTensor& alpha, const MaybeTensor& sigma) {
  return patch_embed_backward(grad, latents, {weight, {}, positional_embedding, ln_weight, {}, eps},
                              {scale, shift, noise, alpha, sigma});
}

Tensor call_backward(const Tensor& grad, const Tensor& latents, const Embedding& e,
                     const Conversion& c) {
  static const auto below = operation<decltype(flat_backward)>("latentguard::patch_embed_backward");
  return below.call(grad, latents, e.weight, e.positional_embedding, e.ln_weight, e.eps, c.scale,
                    c.shift, c.noise, c.alpha, c.sigma);
}

// `noise` stands beside its structure because it has a gradient: autograd looks for tensors among
// the arguments of apply, not inside them.
struct PatchEmbedGrad : torch::autograd::Function<PatchEmbedGrad> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& latents, const MaybeTensor& noise,
                        const Embedding& e, const Conversion& c) {
    ctx->saved_data["eps"] = e.eps;
    ctx->saved_data["noise"] = noise && noise->requires_grad();
    ctx->save_for_backward({latents, e.weight, e.positional_embedding, e.ln_weight,
                            or_undefined(c.scale), or_undefined(c.shift), or_undefined(noise),
                            or_undefined(c.alpha), or_undefined(c.sigma)});
    return call(latents, e, c);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    constexpr size_t kArguments = 4, kNoise = 1;
    if (!grads[0].defined()) return variable_list(kArguments);
    const variable_list s = ctx->get_saved_variables();
    const Embedding embedding{s[1], {}, s[2], s[3], {}, ctx->saved_data["eps"].toDouble()};
    const Conversion conversion{maybe(s[4]), maybe(s[5]), maybe(s[6]), maybe(s[7]), maybe(s[8])};
    const Tensor gradient = call_backward(grads[0].contiguous(), s[0], embedding, conversion);
    variable_list out = only_first(gradient, kArguments);
    if (ctx->saved_data["noise"].toBool()) {
      out[kNoise] = gradient.mul(s[8].view({-1, 1, 1, 1})).neg().to(gradient.scalar_type());
    }
    return out;
  }
};

Tensor patch_embed_autograd(const Tensor& latents, const Embedding& e, const Conversion& c) {
  const bool wanted = wants_gradient(
      "patch_embed", {latents, or_undefined(c.noise)},
      {e.weight, e.class_embedding, e.positional_embedding, e.ln_weight, e.ln_bias,
       or_undefined(c.scale), or_undefined(c.shift), or_undefined(c.alpha), or_undefined(c.sigma)});
  return wanted ? PatchEmbedGrad::apply(latents, c.noise, e, c) : call(latents, e, c);
}

void kernels(torch::Library& library) {
  library.impl("patch_embed", &flat<patch_embed>);
  library.impl("patch_embed_backward", &flat_backward);
}

void gradients(torch::Library& library) {
  library.impl("patch_embed", &flat<patch_embed_autograd>);
}

}  // namespace

LG_REGISTER(kernels, gradients)

}  // namespace latentguard
