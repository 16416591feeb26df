// Row-wise helpers of the CPU kernels: conversion, dot product, layer norm on raw memory.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "include/kernel.h"

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

// One row as floats: itself, or converted into `held` [size].
template <typename T>
inline const float* as_floats(const T* from, int64_t size, float* held) {
  if constexpr (std::is_same_v<T, float>) {
    return from;
  } else {
    to_float(from, held, size);
    return held;
  }
}

// f(index, lanes) over [0, size) in whole vectors, whose lanes are a constant, then with the rest.
template <typename Function>
inline void for_lanes(int64_t size, Function function) {
  int64_t i = 0;
  for (; i + Vec::size() <= size; i += Vec::size()) {
    function(i, std::integral_constant<int64_t, Vec::size()>());
  }
  if (i < size) function(i, size - i);
}

inline float sum(Vec values) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, values);
}

// Sum of term(index, lanes) over [0, size), of vectors that are zero in the lanes beyond. Four
// sums, as one would wait for each addition.
template <typename Term>
inline float sum_lanes(int64_t size, Term term) {
  constexpr int64_t kStep = 4 * Vec::size();
  constexpr std::integral_constant<int64_t, Vec::size()> kAll;
  Vec sums[4] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] = sums[j] + term(i + j * Vec::size(), kAll);
  }
  for (; i + Vec::size() <= size; i += Vec::size()) sums[0] = sums[0] + term(i, kAll);
  if (i < size) sums[1] = sums[1] + term(i, size - i);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

inline float dot(const float* a, const float* b, int64_t size) {
  return sum_lanes(size,
                   [&](int64_t i, auto n) { return Vec::loadu(a + i, n) * Vec::loadu(b + i, n); });
}

struct Moments {
  float mean, rstd;
};

// Two passes: a row stays in the first-level cache, and the variance loses no digits.
inline Moments moments(const float* row, int64_t size, float eps) {
  const float mean =
      sum_lanes(size, [&](int64_t i, auto n) { return Vec::loadu(row + i, n); }) / size;
  const float squares = sum_lanes(size, [&](int64_t i, auto n) {
    const Vec d = Vec::loadu(row + i, n) - Vec(mean);
    return Vec::set(Vec(0.f), d * d, n);  // lanes beyond the row are no deviations
  });
  return {mean, 1.f / std::sqrt(squares / size + eps)};
}

// In place on a float row, or into another one.
inline void layer_norm(const float* row, float* out, const float* weight, const float* bias,
                       int64_t size, float eps) {
  const Moments m = moments(row, size, eps);
  for_lanes(size, [&](int64_t i, auto n) {
    const Vec normal = (Vec::loadu(row + i, n) - Vec(m.mean)) * Vec(m.rstd);
    at::vec::fmadd(normal, Vec::loadu(weight + i, n), Vec::loadu(bias + i, n)).store(out + i, n);
  });
}

// Gradient of a layer norm with respect to its input: `grad` in, result into `row`.
inline void layer_norm_backward(const float* grad, float* row, const float* weight, int64_t size,
                                float eps) {
  const Moments m = moments(row, size, eps);
  Vec first(0.f), second(0.f);
  for_lanes(size, [&](int64_t i, auto n) {
    const Vec g = Vec::loadu(grad + i, n) * Vec::loadu(weight + i, n);
    const Vec normal = (Vec::loadu(row + i, n) - Vec(m.mean)) * Vec(m.rstd);
    first = first + g;
    second = at::vec::fmadd(g, normal, second);
  });
  const Vec mean_g(sum(first) / size), mean_gn(sum(second) / size);
  for_lanes(size, [&](int64_t i, auto n) {
    const Vec g = Vec::loadu(grad + i, n) * Vec::loadu(weight + i, n);
    const Vec normal = (Vec::loadu(row + i, n) - Vec(m.mean)) * Vec(m.rstd);
    (Vec(m.rstd) * (g - mean_g - normal * mean_gn)).store(row + i, n);
  });
}

}  // namespace latentguard::cpu
