// Matrix products of the CPU kernels. The tiles that are multiplied lie in the second-level cache
// and are small: a call into the platform's BLAS would start threads and repack them every time.
//
// Three forms, by how the right-hand side is stored and how often it is read:
//  - product: [depth, columns], packed once per call into panels that every tile then reads;
//  - dots: [columns, depth], as prompt banks are stored, without packing;
//  - stream_product: [depth, columns] read once, in order, for a handful of rows.
#pragma once

#include <algorithm>

#include "cpu/rows.h"

namespace latentguard::cpu {

// Columns of a packed panel: with six rows, twelve sums, which saturate two FMA units and leave
// registers for the operands.
constexpr int64_t kPanel = 2 * Vec::size();
constexpr int64_t kBlockRows = 6;
// Depth of a panel that stays in the first-level cache while all rows of a tile pass over it.
constexpr int64_t kBlockDepth = 256;

// Calls function(integral constant M) for the M that equals `rows`, 1 to kMost.
template <int kMost, typename Function>
inline void for_count(int64_t rows, Function function) {
  if constexpr (kMost > 0) {
    if (rows == kMost) {
      function(std::integral_constant<int, kMost>());
    } else {
      for_count<kMost - 1>(rows, function);
    }
  }
}

// The right-hand side [depth, columns] in panels [depth, kPanel] of neighboring columns, the last
// one padded with zeros.
class Panels {
 public:
  Panels(int64_t depth, int64_t columns)
      : depth_(depth), columns_(columns), data_(buffer(count() * depth * kPanel)) {}

  int64_t count() const { return (columns_ + kPanel - 1) / kPanel; }
  int64_t depth() const { return depth_; }
  int64_t columns() const { return columns_; }
  const float* panel(int64_t index) const { return data_.get() + index * depth_ * kPanel; }

  // Fills rows [first, last) of all panels from a matrix stored as [depth, columns].
  template <typename T>
  void pack(const T* from, int64_t first, int64_t last) {
    constexpr int64_t kRows = 16;
    for (int64_t begin = first; begin < last; begin += kRows) {
      const int64_t end = std::min(begin + kRows, last);
      for (int64_t index = 0; index < count(); ++index) {
        const int64_t column = index * kPanel, width = std::min(kPanel, columns_ - column);
        float* to = data_.get() + (index * depth_ + begin) * kPanel;
        for (int64_t k = begin; k < end; ++k, to += kPanel) {
          const T* row = from + k * columns_ + column;
          __builtin_prefetch(row + kRows * columns_);
          if (width == kPanel) {
            to_float(row, to, kPanel);
          } else {
            to_float(row, to, width);
            std::fill(to + width, to + kPanel, 0.f);
          }
        }
      }
    }
  }

  // Fills panels [first, last) from a matrix stored as [columns, depth].
  template <typename T>
  void pack_transposed(const T* from, int64_t first, int64_t last) {
    constexpr int kSide = Vec::size();
    Buffer held;
    if constexpr (!std::is_same_v<T, float>) held = buffer(kPanel * depth_);
    for (int64_t index = first; index < last; ++index) {
      float* to = data_.get() + index * depth_ * kPanel;
      const int64_t column = index * kPanel, width = std::min(kPanel, columns_ - column);
      const float* rows = held.get();
      if constexpr (std::is_same_v<T, float>) {
        rows = from + column * depth_;
      } else {
        to_float(from + column * depth_, held.get(), width * depth_);
      }
      const int64_t squares = width == kPanel ? depth_ / kSide * kSide : 0;
      for (int64_t k = 0; k < squares; k += kSide) {
        for (int64_t c = 0; c < kPanel; c += kSide) {
          at::vec::transpose_mxn<float, kSide, kSide>(rows + c * depth_ + k, depth_,
                                                      to + k * kPanel + c, kPanel);
        }
      }
      for (int64_t k = squares; k < depth_; ++k) {
        for (int64_t c = 0; c < kPanel; ++c) {
          to[k * kPanel + c] = c < width ? rows[c * depth_ + k] : 0.f;
        }
      }
    }
  }

 private:
  int64_t depth_, columns_;
  Buffer data_;
};

// out [M, kPanel] = start + a [M, depth] * panel [depth, kPanel]; start may be out, or null for 0.
template <int M>
inline void panel_block(const float* a, int64_t a_stride, const float* panel, int64_t depth,
                        const float* start, int64_t start_stride, float* out, int64_t out_stride) {
  Vec sums[M][2];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = r * start_stride + half * Vec::size();
      sums[r][half] = start ? Vec::loadu(start + at) : Vec(0.f);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vec left = Vec::loadu(panel + k * kPanel);
    const Vec right = Vec::loadu(panel + k * kPanel + Vec::size());
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      const Vec x(a[r * a_stride + k]);
      sums[r][0] = at::vec::fmadd(x, left, sums[r][0]);
      sums[r][1] = at::vec::fmadd(x, right, sums[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
    sums[r][0].store(out + r * out_stride);
    sums[r][1].store(out + r * out_stride + Vec::size());
  }
}

// out [rows, b.columns()] = start + a [rows, b.depth()] * b. All matrices have rows of the given
// strides; `start` is null for zero.
inline void product(const float* a, int64_t a_stride, int64_t rows, const Panels& b,
                    const float* start, int64_t start_stride, float* out, int64_t out_stride) {
  const int64_t groups = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t from = 0; from < b.depth(); from += kBlockDepth) {
    const int64_t depth = std::min(kBlockDepth, b.depth() - from);
    const float* base = from == 0 ? start : out;
    const int64_t base_stride = from == 0 ? start_stride : out_stride;
    for (int64_t index = 0; index < b.count(); ++index) {
      const int64_t column = index * kPanel, width = std::min(kPanel, b.columns() - column);
      const float* panel = b.panel(index) + from * kPanel;
      for (int64_t group = 0; group < groups; ++group) {
        // Groups of nearly equal height: a last one of a single row would cost as much as six.
        const int64_t row = group * rows / groups, end = (group + 1) * rows / groups;
        for_count<kBlockRows>(end - row, [&](auto count) {
          constexpr int M = decltype(count)::value;
          const float* left = a + row * a_stride + from;
          const float* first = base ? base + row * base_stride + column : nullptr;
          float* to = out + row * out_stride + column;
          if (width == kPanel) {
            panel_block<M>(left, a_stride, panel, depth, first, base_stride, to, out_stride);
            return;
          }
          float edge[M * kPanel];
          for (int r = 0; r < M && first; ++r) {
            std::copy_n(first + r * base_stride, width, edge + r * kPanel);
          }
          panel_block<M>(left, a_stride, panel, depth, first ? edge : nullptr, kPanel, edge,
                         kPanel);
          for (int r = 0; r < M; ++r) std::copy_n(edge + r * kPanel, width, to + r * out_stride);
        });
      }
    }
  }
}

// out [M, N] = a [M, depth] * b [N, depth] transposed.
template <int M, int N>
inline void dots_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                       int64_t depth, float* out, int64_t out_stride) {
  Vec sums[M][N];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) sums[r][c] = Vec(0.f);
  }
  const auto step = [&](auto load) {
    Vec left[M];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) left[r] = load(a + r * a_stride);
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) {
      const Vec right = load(b + c * b_stride);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) sums[r][c] = at::vec::fmadd(left[r], right, sums[r][c]);
    }
  };
  int64_t k = 0;
  for (; k + Vec::size() <= depth; k += Vec::size()) {
    step([k](const float* row) { return Vec::loadu(row + k); });
  }
  if (k < depth) step([k, depth](const float* row) { return Vec::loadu(row + k, depth - k); });
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) out[r * out_stride + c] = sum(sums[r][c]);
  }
}

// out [rows, columns] = a [rows, depth] * b [columns, depth] transposed.
inline void dots(const float* a, int64_t rows, const float* b, int64_t columns, int64_t depth,
                 float* out, int64_t out_stride) {
  constexpr int kRows = 3, kColumns = 4;
  const int64_t groups = (rows + kRows - 1) / kRows;
  for (int64_t column = 0; column < columns; column += kColumns) {
    for_count<kColumns>(std::min<int64_t>(kColumns, columns - column), [&](auto wide) {
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t row = group * rows / groups, end = (group + 1) * rows / groups;
        for_count<kRows>(end - row, [&](auto high) {
          dots_block<decltype(high)::value, decltype(wide)::value>(
              a + row * depth, depth, b + column * depth, depth, depth,
              out + row * out_stride + column, out_stride);
        });
      }
    });
  }
}

// out [rows, columns] += a [rows, depth] (rows a_stride apart) * b [depth, columns].
template <typename T>
inline void stream_product(const float* a, int64_t a_stride, int64_t rows, const T* b,
                           int64_t columns, int64_t depth, float* out) {
  constexpr int64_t kSteps = 8;
  const Buffer held = buffer(std::is_same_v<T, float> ? 0 : kSteps * columns);
  for (int64_t from = 0; from < depth; from += kSteps) {
    for_count<kSteps>(std::min(kSteps, depth - from), [&](auto count) {
      constexpr int S = decltype(count)::value;
      const float* right = as_floats(b + from * columns, S * columns, held.get());
      for_lanes(columns, [&](int64_t i, auto n) {
        Vec steps[S];
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) steps[s] = Vec::loadu(right + s * columns + i, n);
        for (int64_t r = 0; r < rows; ++r) {
          Vec total = Vec::loadu(out + r * columns + i, n);
#pragma GCC unroll 8
          for (int s = 0; s < S; ++s) {
            total = at::vec::fmadd(Vec(a[r * a_stride + from + s]), steps[s], total);
          }
          total.store(out + r * columns + i, n);
        }
      });
    });
  }
}

}  // namespace latentguard::cpu
