// The host side of null, the template operator: what stands between torch and a kernel. From top to
// bottom: checks, allocation and dispatch, the gradient, registration.
#include "include/null.h"

#include <cmath>

#include "host.h"

namespace latentguard {
namespace {

// One host function serves every device: LG_RUN calls the kernel of the tensor's own. `check` has
// looked at dtype and layout of `x` already; what else can be wrong is said in the same words.
Tensor scaled(const Checker& check, const Tensor& x, double scale) {
  check.require(std::isfinite(scale), "scale", "a finite number", std::to_string(scale));
  Contiguous pointer;  // any strides come in; holds what it copies until the kernel has run
  Null args{};
  args.type = type_of(x);
  args.size = x.numel();
  args.scale = static_cast<float>(scale);
  args.x = pointer(x);
  Tensor out = at::empty(x.sizes(), x.options());
  args.out = out.mutable_data_ptr();
  if (out.numel() > 0) LG_RUN(x, null, args);  // an empty batch starts no kernel
  return out;
}

Tensor null(const Tensor& x, double scale) { return scaled(Checker("null", "x", x), x, scale); }

// The gradient of x * scale is grad * scale: another name, the same kernel.
Tensor null_backward(const Tensor& grad, double scale) {
  return scaled(Checker("null_backward", "grad", grad), grad, scale);
}

struct NullGrad : torch::autograd::Function<NullGrad> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, double scale) {
    ctx->saved_data["scale"] = scale;  // tensors go into ctx->save_for_backward
    return call(x, scale);
  }

  // One gradient for each argument of forward; the scale, being a number, has none.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto operation_backward =
        operation<decltype(null_backward)>("latentguard::null_backward");
    constexpr size_t kArguments = 2;
    if (!grads[0].defined()) return variable_list(kArguments);
    return only_first(operation_backward.call(grads[0], ctx->saved_data["scale"].toDouble()),
                      kArguments);
  }

  // Through the dispatcher rather than straight to null(), so that tracing sees the operator.
  static Tensor call(const Tensor& x, double scale) {
    static const auto below = operation<decltype(null)>("latentguard::null");
    const Guard guard;
    return below.call(x, scale);
  }
};

Tensor null_autograd(const Tensor& x, double scale) {
  const bool wanted = wants_gradient("null", {x}, {});
  return wanted ? NullGrad::apply(x, scale) : NullGrad::call(x, scale);
}

void kernels(torch::Library& library) {
  library.impl("null", &null);
  library.impl("null_backward", &null_backward);
}

void gradients(torch::Library& library) { library.impl("null", &null_autograd); }

}  // namespace

LG_REGISTER(kernels, gradients)

}  // namespace latentguard
