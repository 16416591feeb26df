// Row-wise helpers of the CPU kernels: conversion, layer norm, matrix products on raw memory.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "include/operators.h"

namespace latentguard::cpu {

using Vec = at::vec::Vectorized<float>;

// Scratch memory that is not zeroed first.
using Buffer = std::unique_ptr<float[]>;
inline Buffer buffer(int64_t size) { return Buffer(new float[size > 0 ? size : 1]); }

template <typename Function>
void for_type(Type type, Function function) {
  if (type == Type::float32) {
    function(float{});
  } else if (type == Type::float16) {
    function(c10::Half{});
  } else {
    function(c10::BFloat16{});
  }
}

template <typename T>
inline void to_float(const T* from, float* to, int64_t size) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(to, from, size * sizeof(float));
  } else {
    at::vec::convert(from, to, size);
  }
}

template <typename T>
inline void from_float(const float* from, T* to, int64_t size) {
  if constexpr (std::is_same_v<T, float>) {
    if (from != to) std::memcpy(to, from, size * sizeof(float));
  } else {
    at::vec::convert(from, to, size);
  }
}

// The same memory where T is float, else a converted copy held by `held`.
template <typename T>
inline const float* as_float(const void* from, int64_t size, Buffer& held) {
  if (from == nullptr) return nullptr;
  if constexpr (std::is_same_v<T, float>) {
    return static_cast<const float*>(from);
  } else {
    held = buffer(size);
    to_float(static_cast<const T*>(from), held.get(), size);
    return held.get();
  }
}

// f(index, lanes) over [0, size) in whole vectors, then once more with the rest.
template <typename Function>
inline void for_lanes(int64_t size, Function function) {
  int64_t i = 0;
  for (; i + Vec::size() <= size; i += Vec::size()) function(i, Vec::size());
  if (i < size) function(i, size - i);
}

inline float sum(Vec values) {
  float lanes[Vec::size()];
  values.store(lanes);
  float total = 0;
  for (float lane : lanes) total += lane;
  return total;
}

inline float dot(const float* a, const float* b, int64_t size) {
  Vec total(0.f);
  for_lanes(size, [&](int64_t i, int64_t n) {
    total = at::vec::fmadd(Vec::loadu(a + i, n), Vec::loadu(b + i, n), total);
  });
  return sum(total);
}

struct Moments {
  float mean, rstd;
};

// Two passes: a row stays in the first-level cache, and the variance loses no digits.
inline Moments moments(const float* row, int64_t size, float eps) {
  Vec total(0.f);
  for_lanes(size, [&](int64_t i, int64_t n) { total = total + Vec::loadu(row + i, n); });
  const float mean = sum(total) / size;
  Vec squares(0.f);
  int64_t i = 0;
  for (; i + Vec::size() <= size; i += Vec::size()) {
    const Vec d = Vec::loadu(row + i) - Vec(mean);
    squares = at::vec::fmadd(d, d, squares);
  }
  float rest = sum(squares);
  for (; i < size; ++i) rest += (row[i] - mean) * (row[i] - mean);
  return {mean, 1.f / std::sqrt(rest / size + eps)};
}

// In place on a float row, or into another one.
inline void layer_norm(const float* row, float* out, const float* weight, const float* bias,
                       int64_t size, float eps) {
  const Moments m = moments(row, size, eps);
  for_lanes(size, [&](int64_t i, int64_t n) {
    const Vec normal = (Vec::loadu(row + i, n) - Vec(m.mean)) * Vec(m.rstd);
    at::vec::fmadd(normal, Vec::loadu(weight + i, n), Vec::loadu(bias + i, n)).store(out + i, n);
  });
}

// Gradient of a layer norm with respect to its input: `grad` in, result into `row`.
inline void layer_norm_backward(const float* grad, float* row, const float* weight, int64_t size,
                                float eps) {
  const Moments m = moments(row, size, eps);
  Vec first(0.f), second(0.f);
  for_lanes(size, [&](int64_t i, int64_t n) {
    const Vec g = Vec::loadu(grad + i, n) * Vec::loadu(weight + i, n);
    const Vec normal = (Vec::loadu(row + i, n) - Vec(m.mean)) * Vec(m.rstd);
    first = first + g;
    second = at::vec::fmadd(g, normal, second);
  });
  const Vec mean_g(sum(first) / size), mean_gn(sum(second) / size);
  for_lanes(size, [&](int64_t i, int64_t n) {
    const Vec g = Vec::loadu(grad + i, n) * Vec::loadu(weight + i, n);
    const Vec normal = (Vec::loadu(row + i, n) - Vec(m.mean)) * Vec(m.rstd);
    (Vec(m.rstd) * (g - mean_g - normal * mean_gn)).store(row + i, n);
  });
}

// Row-major out [m, n] = a [m, k] times b, which is [k, n], or [n, k] where `transposed`.
inline void product(const float* a, const float* b, float* out, int64_t m, int64_t n, int64_t k,
                    bool transposed) {
  if (m == 0 || n == 0) return;
  const auto view = [](const float* data, int64_t rows, int64_t columns, int64_t row,
                       int64_t column) {
    // mm_out reads its operands only; from_blob has no const form.
    return at::from_blob(const_cast<float*>(data), {rows, columns}, {row, column}, at::kFloat);
  };
  at::Tensor result = view(out, m, n, n, 1);
  const at::Tensor right = transposed ? view(b, k, n, 1, k) : view(b, k, n, n, 1);
  at::cpu::mm_out(result, view(a, m, k, k, 1), right);
}

}  // namespace latentguard::cpu
