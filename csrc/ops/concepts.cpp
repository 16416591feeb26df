// The host side of concept_similarity and concept_heatmap, which share their kernels: checks,
// allocation, dispatch, gradients.
#include "include/concepts.h"

#include "host.h"

namespace latentguard {
namespace {

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// From features to the joint space. A backward does not read `ln_bias`.
struct Head {
  MaybeTensor ln_weight, ln_bias;
  double eps;
  MaybeTensor projection;
};

// The embedded prompts, and each concept's range of them. A backward does not read the ranges.
struct Bank {
  Tensor concepts, segments, contrast, contrast_segments;
};

// What a forward keeps for its backward besides the inputs.
struct Saved {
  Tensor best_prompt, best_contrast, projected;
};

Concepts arguments(const Checker& check, Contiguous& pointer, const Tensor& features,
                   const Head& head, const Bank& bank) {
  Concepts args{};
  args.type = type_of(features);
  args.dim = features.size(-1);
  args.width = args.dim;
  args.positions = features.dim() == 3 ? features.size(1) : 1;
  args.rows = features.size(0) * args.positions;
  if (head.ln_weight) check.like("ln_weight", *head.ln_weight, {args.dim});
  if (head.projection) {
    check.like("projection", *head.projection, {args.dim, -1});
    args.width = head.projection->size(1);
  }
  check.like("concepts", bank.concepts, {-1, args.width});
  check.like("contrast", bank.contrast, {-1, args.width});
  args.prompts = bank.concepts.size(0);
  args.contrasts = bank.contrast.size(0);
  args.eps = static_cast<float>(head.eps);
  args.features = pointer(features);
  args.ln_weight = pointer(head.ln_weight);
  args.projection = pointer(head.projection);
  args.bank[0] = pointer(bank.concepts);
  args.bank[1] = pointer(bank.contrast);
  return args;
}

Concepts forward_arguments(const Checker& check, Contiguous& pointer, const Tensor& features,
                           const Head& head, const Bank& bank) {
  check.require(head.ln_weight.has_value() == head.ln_bias.has_value(), "ln_bias",
                "given together with `ln_weight`", "one without the other");
  Concepts args = arguments(check, pointer, features, head, bank);
  if (head.ln_bias) check.like("ln_bias", *head.ln_bias, {args.dim});
  args.ln_bias = pointer(head.ln_bias);
  check.typed("segments", bank.segments, at::kInt);
  check.shape("segments", bank.segments, {-1, 2});
  args.concepts = bank.segments.size(0);
  check.typed("contrast_segments", bank.contrast_segments, at::kInt);
  check.shape("contrast_segments", bank.contrast_segments, {args.concepts, 2});
  args.segments[0] = static_cast<const int32_t*>(pointer(bank.segments));
  args.segments[1] = static_cast<const int32_t*>(pointer(bank.contrast_segments));
  return args;
}

// The layer norm's bias is not looked at: no gradient depends on it.
Concepts backward_arguments(const Checker& check, Contiguous& pointer, const Tensor& features,
                            const Head& head, const Bank& bank, const Saved& saved) {
  Concepts args = arguments(check, pointer, features, head, bank);
  check.shape("best_prompt", saved.best_prompt,
              features.dim() == 3 ? at::IntArrayRef{features.size(0), -1, args.positions}
                                  : at::IntArrayRef{args.rows, -1});
  args.concepts = saved.best_prompt.size(1);
  for (const auto& [name, best] : {std::pair("best_prompt", &saved.best_prompt),
                                   std::pair("best_contrast", &saved.best_contrast)}) {
    check.typed(name, *best, at::kLong);
    check.shape(name, *best, saved.best_prompt.sizes());
  }
  auto rows = features.sizes().vec();
  rows.back() = args.width;
  check.like("projected", saved.projected, rows);
  args.saved_best[0] = static_cast<const int64_t*>(pointer(saved.best_prompt));
  args.saved_best[1] = static_cast<const int64_t*>(pointer(saved.best_contrast));
  args.saved_projected = pointer(saved.projected);
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

Five concept_similarity(const Tensor& features, const Head& head, const Bank& bank,
                        double logit_scale, bool save) {
  const Checker check("concept_similarity", "features", features);
  check.shape("features", features, {-1, -1});
  Contiguous pointer;
  Concepts args = forward_arguments(check, pointer, features, head, bank);
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

Tensor concept_similarity_backward(const MaybeTensor& grad_probability,
                                   const MaybeTensor& grad_margin, const Tensor& features,
                                   const Head& head, const Bank& bank, const Tensor& probability,
                                   const Saved& saved, double logit_scale) {
  const Checker check("concept_similarity_backward", "features", features);
  check.shape("features", features, {-1, -1});
  Contiguous pointer;
  Concepts args = backward_arguments(check, pointer, features, head, bank, saved);
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

Four concept_heatmap(const Tensor& tokens, const Head& head, const Bank& bank, bool save) {
  const Checker check("concept_heatmap", "tokens", tokens);
  check.shape("tokens", tokens, {-1, -1, -1});
  Contiguous pointer;
  Concepts args = forward_arguments(check, pointer, tokens, head, bank);
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

Tensor concept_heatmap_backward(const Tensor& grad, const Tensor& tokens, const Head& head,
                                const Bank& bank, const Saved& saved) {
  const Checker check("concept_heatmap_backward", "tokens", tokens);
  check.shape("tokens", tokens, {-1, -1, -1});
  Contiguous pointer;
  Concepts args = backward_arguments(check, pointer, tokens, head, bank, saved);
  check.typed("grad", grad, at::kFloat);
  check.shape("grad", grad, saved.best_prompt.sizes());
  args.grad_margin = static_cast<const float*>(pointer(grad));
  Tensor out = at::empty(tokens.sizes(), tokens.options());
  args.grad_features = out.mutable_data_ptr();
  if (out.numel() > 0) LG_RUN(tokens, concept_similarity_backward, args);
  return out;
}

// Between the flat arguments of the schemas and the structures above. Head and bank stand in both
// schemas in the same places, so one pair of functions serves both operators: Rest is what follows.

template <auto function, typename Result, typename... Rest>
Result flat(const Tensor& rows, const MaybeTensor& ln_weight, const MaybeTensor& ln_bias,
            double eps, const MaybeTensor& projection, const Tensor& concepts,
            const Tensor& segments, const Tensor& contrast, const Tensor& contrast_segments,
            Rest... rest) {
  return function(rows, {ln_weight, ln_bias, eps, projection},
                  {concepts, segments, contrast, contrast_segments}, rest...);
}

template <auto function>
constexpr auto similarity_flat = &flat<function, Five, double, bool>;
template <auto function>
constexpr auto heatmap_flat = &flat<function, Four, bool>;

template <typename Operation, typename... Rest>
auto call(const Operation& below, const Tensor& rows, const Head& h, const Bank& b, Rest... rest) {
  const Guard guard;
  return below.call(rows, h.ln_weight, h.ln_bias, h.eps, h.projection, b.concepts, b.segments,
                    b.contrast, b.contrast_segments, rest...);
}

Tensor similarity_backward_flat(const MaybeTensor& grad_probability, const MaybeTensor& grad_margin,
                                const Tensor& features, const MaybeTensor& ln_weight, double eps,
                                const MaybeTensor& projection, const Tensor& concepts,
                                const Tensor& contrast, const Tensor& probability,
                                const Tensor& best_prompt, const Tensor& best_contrast,
                                const Tensor& projected, double logit_scale) {
  return concept_similarity_backward(grad_probability, grad_margin, features,
                                     {ln_weight, {}, eps, projection}, {concepts, {}, contrast, {}},
                                     probability, {best_prompt, best_contrast, projected},
                                     logit_scale);
}

Tensor heatmap_backward_flat(const Tensor& grad, const Tensor& tokens, const MaybeTensor& ln_weight,
                             double eps, const MaybeTensor& projection, const Tensor& concepts,
                             const Tensor& contrast, const Tensor& best_prompt,
                             const Tensor& best_contrast, const Tensor& projected) {
  return concept_heatmap_backward(grad, tokens, {ln_weight, {}, eps, projection},
                                  {concepts, {}, contrast, {}},
                                  {best_prompt, best_contrast, projected});
}

// Inputs as a context keeps them, `eps` beside the tensors.
variable_list kept(AutogradContext* ctx, const Tensor& rows, const Head& head, const Bank& bank,
                   std::initializer_list<Tensor> results) {
  ctx->saved_data["eps"] = head.eps;
  variable_list out{rows,
                    or_undefined(head.ln_weight),
                    or_undefined(head.ln_bias),
                    or_undefined(head.projection),
                    bank.concepts,
                    bank.segments,
                    bank.contrast,
                    bank.contrast_segments};
  out.insert(out.end(), results);
  return out;
}
constexpr size_t kInputs = 8;  // how many come before the results
Head kept_head(AutogradContext* ctx, const variable_list& s) {
  return {maybe(s[1]), maybe(s[2]), ctx->saved_data["eps"].toDouble(), maybe(s[3])};
}
Bank kept_bank(const variable_list& s) { return {s[4], s[5], s[6], s[7]}; }

MaybeTensor maybe_contiguous(const Tensor& tensor) {
  return tensor.defined() ? MaybeTensor(tensor.contiguous()) : std::nullopt;
}

struct SimilarityGrad : torch::autograd::Function<SimilarityGrad> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& features, const Head& head,
                               const Bank& bank, double logit_scale, bool save) {
    const auto [probability, margin, prompt, against, projected] =
        below(features, head, bank, logit_scale, save);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({prompt, against, projected});
    ctx->saved_data["logit_scale"] = logit_scale;
    ctx->saved_data["save"] = save;
    ctx->save_for_backward(
        kept(ctx, features, head, bank, {probability, prompt, against, projected}));
    return {probability, margin, prompt, against, projected};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto operation_backward =
        operation<decltype(similarity_backward_flat)>("latentguard::concept_similarity_backward");
    constexpr size_t kArguments = 5;
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(kArguments);
    const variable_list s = ctx->get_saved_variables();
    const Head head = kept_head(ctx, s);
    const Bank bank = kept_bank(s);
    const double logit_scale = ctx->saved_data["logit_scale"].toDouble();
    const Tensor probability = s[kInputs], prompt = s[kInputs + 1], against = s[kInputs + 2];
    Tensor projected = s[kInputs + 3];
    if (!ctx->saved_data["save"].toBool()) {  // a direct call that kept nothing: once more
      projected = std::get<4>(below(s[0], head, bank, logit_scale, true));
    }
    return only_first(operation_backward.call(
                          maybe_contiguous(grads[0]), maybe_contiguous(grads[1]), s[0],
                          head.ln_weight, head.eps, head.projection, bank.concepts, bank.contrast,
                          probability, prompt, against, projected, logit_scale),
                      kArguments);
  }

  static Five below(const Tensor& features, const Head& head, const Bank& bank, double logit_scale,
                    bool save) {
    using Signature = std::remove_pointer_t<decltype(similarity_flat<concept_similarity>)>;
    static const auto found = operation<Signature>("latentguard::concept_similarity");
    return call(found, features, head, bank, logit_scale, save);
  }
};

bool wanted_of(const char* name, const Tensor& rows, const Head& head, const Bank& bank) {
  return wants_gradient(name, {rows},
                        {or_undefined(head.ln_weight), or_undefined(head.ln_bias),
                         or_undefined(head.projection), bank.concepts, bank.contrast});
}

Five similarity_autograd(const Tensor& features, const Head& head, const Bank& bank,
                         double logit_scale, bool save) {
  if (!wanted_of("concept_similarity", features, head, bank)) {
    return SimilarityGrad::below(features, head, bank, logit_scale, save);
  }
  const variable_list out = SimilarityGrad::apply(features, head, bank, logit_scale, save);
  return {out[0], out[1], out[2], out[3], out[4]};
}

struct HeatmapGrad : torch::autograd::Function<HeatmapGrad> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& tokens, const Head& head,
                               const Bank& bank, bool save) {
    const auto [margin, prompt, against, projected] = below(tokens, head, bank, save);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({prompt, against, projected});
    ctx->saved_data["save"] = save;
    ctx->save_for_backward(kept(ctx, tokens, head, bank, {prompt, against, projected}));
    return {margin, prompt, against, projected};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto operation_backward =
        operation<decltype(heatmap_backward_flat)>("latentguard::concept_heatmap_backward");
    constexpr size_t kArguments = 4;
    if (!grads[0].defined()) return variable_list(kArguments);
    const variable_list s = ctx->get_saved_variables();
    const Head head = kept_head(ctx, s);
    const Bank bank = kept_bank(s);
    Tensor prompt = s[kInputs], against = s[kInputs + 1], projected = s[kInputs + 2];
    if (!ctx->saved_data["save"].toBool()) {  // a direct call that kept nothing: once more
      std::tie(std::ignore, prompt, against, projected) = below(s[0], head, bank, true);
    }
    return only_first(operation_backward.call(grads[0].contiguous(), s[0], head.ln_weight, head.eps,
                                              head.projection, bank.concepts, bank.contrast, prompt,
                                              against, projected),
                      kArguments);
  }

  static Four below(const Tensor& tokens, const Head& head, const Bank& bank, bool save) {
    using Signature = std::remove_pointer_t<decltype(heatmap_flat<concept_heatmap>)>;
    static const auto found = operation<Signature>("latentguard::concept_heatmap");
    return call(found, tokens, head, bank, save);
  }
};

Four heatmap_autograd(const Tensor& tokens, const Head& head, const Bank& bank, bool save) {
  if (!wanted_of("concept_heatmap", tokens, head, bank)) {
    return HeatmapGrad::below(tokens, head, bank, save);
  }
  const variable_list out = HeatmapGrad::apply(tokens, head, bank, save);
  return {out[0], out[1], out[2], out[3]};
}

void kernels(torch::Library& library) {
  library.impl("concept_similarity", similarity_flat<concept_similarity>);
  library.impl("concept_similarity_backward", &similarity_backward_flat);
  library.impl("concept_heatmap", heatmap_flat<concept_heatmap>);
  library.impl("concept_heatmap_backward", &heatmap_backward_flat);
}

void gradients(torch::Library& library) {
  library.impl("concept_similarity", similarity_flat<similarity_autograd>);
  library.impl("concept_heatmap", heatmap_flat<heatmap_autograd>);
}

}  // namespace

LG_REGISTER(kernels, gradients)

}  // namespace latentguard
