// Argument checks: every message names the operator, the argument, what it must be, what it got.
// latentguard/ops/checks.py says the same where no kernel was compiled.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace latentguard {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

#define LG_CHECK(condition, operation, argument, must, ...)                              \
  TORCH_CHECK(condition, "`", operation, "`: `", argument, "` must be ", must, ", got ", \
              __VA_ARGS__)

// Checks the arguments of one call against its first tensor, whose dtype and device all share.
class Checker {
 public:
  Checker(const char* operation, const char* name, const Tensor& first)
      : operation_(operation), name_(name), first_(first) {
    strided(name, first);
    const auto type = first.scalar_type();
    LG_CHECK(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, operation_, name,
             "float32, float16 or bfloat16", type);
  }

  const char* operation() const { return operation_; }

  // Rank and sizes; -1 stands for any size.
  void shape(const char* argument, const Tensor& tensor, at::IntArrayRef sizes) const {
    bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
    for (size_t i = 0; same && i < sizes.size(); ++i) {
      same = sizes[i] < 0 || tensor.size(static_cast<int64_t>(i)) == sizes[i];
    }
    if (same) return;
    std::string want;
    for (const int64_t size : sizes) {
      want += (want.empty() ? "" : ", ") + (size < 0 ? std::string("*") : std::to_string(size));
    }
    LG_CHECK(false, operation_, argument, "of shape [" + want + "]", tensor.sizes());
  }

  // A tensor of the first one's dtype and device.
  void like(const char* argument, const Tensor& tensor, at::IntArrayRef sizes) const {
    typed(argument, tensor, first_.scalar_type());
    shape(argument, tensor, sizes);
  }

  void typed(const char* argument, const Tensor& tensor, at::ScalarType type) const {
    strided(argument, tensor);
    LG_CHECK(tensor.device() == first_.device(), operation_, argument,
             "on the device of `" + std::string(name_) + "` (" + first_.device().str() + ")",
             tensor.device());
    LG_CHECK(tensor.scalar_type() == type, operation_, argument,
             std::string("of dtype ") + at::toString(type), tensor.scalar_type());
  }

  void require(bool condition, const char* argument, const std::string& must,
               const std::string& got) const {
    LG_CHECK(condition, operation_, argument, must, got);
  }

 private:
  void strided(const char* argument, const Tensor& tensor) const {
    LG_CHECK(tensor.layout() == at::kStrided, operation_, argument, "a dense tensor",
             tensor.layout());
  }

  const char* operation_;
  const char* name_;
  const Tensor& first_;
};

}  // namespace latentguard
