// What the host side of every operator (csrc/ops/X.cpp) is made of: pointers to contiguous memory,
// the choice of the device's kernel, gradients, registration. The schemas stand in latentguard/ops.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <tuple>

#include "checks.h"
#include "include/kernel.h"

#ifdef LATENTGUARD_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace latentguard {

// --- kernels --------------------------------------------------------------------------------

inline Type type_of(const Tensor& tensor) {
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
#define LG_RUN(tensor, function, args)                                                  \
  do {                                                                                  \
    if ((tensor).is_cuda()) {                                                           \
      const c10::cuda::CUDAGuard guard((tensor).device());                              \
      C10_CUDA_CHECK(cuda::function(args, c10::cuda::getCurrentCUDAStream().stream())); \
    } else {                                                                            \
      cpu::function(args);                                                              \
    }                                                                                   \
  } while (false)
#else
#define LG_RUN(tensor, function, args) cpu::function(args)
#endif

// --- gradients ------------------------------------------------------------------------------
// In C++, as an operator at batch 1 takes less time than a Python function around it would.

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Guard = at::AutoDispatchBelowADInplaceOrView;

// The operator itself, through the dispatcher: a kernel, a fake kernel while tracing.
template <typename Signature>
auto operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline Tensor or_undefined(const MaybeTensor& tensor) { return tensor.value_or(Tensor()); }
inline MaybeTensor maybe(const Tensor& tensor) {
  return tensor.defined() ? MaybeTensor(tensor) : std::nullopt;
}

// Gradients are wanted of `inputs`, which have them. Of `weights` they are refused: no kernel
// computes those.
inline bool wants_gradient(const char* name, std::initializer_list<Tensor> inputs,
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
inline variable_list only_first(const Tensor& gradient, size_t arguments) {
  variable_list out(arguments);
  out[0] = gradient;
  return out;
}

// --- registration ---------------------------------------------------------------------------

// Runs kernels(library) for every device that was compiled, and gradients(library) for autograd.
#define LG_REGISTER(kernels, gradients)                   \
  TORCH_LIBRARY_IMPL(latentguard, CPU, m) { kernels(m); } \
  LG_REGISTER_CUDA(kernels)                               \
  TORCH_LIBRARY_IMPL(latentguard, Autograd, m) { gradients(m); }
#ifdef LATENTGUARD_CUDA
#define LG_REGISTER_CUDA(kernels) \
  TORCH_LIBRARY_IMPL(latentguard, CUDA, m) { kernels(m); }
#else
#define LG_REGISTER_CUDA(kernels)
#endif

}  // namespace latentguard
