// What concept_similarity, concept_heatmap and their backward share: a block's tile of 16 rows in
// shared memory, layer norm, projection, unit vectors. All threads of a block call these together.
#pragma once

#include "cuda/tile.h"

namespace latentguard::cuda {

// Shared memory that every architecture from sm_80 on grants a block.
constexpr int kSharedLimit = 163 * 1024;
// Prompts whose cosines a block holds at a time: 16 per warp.
constexpr int kChunk = kWarps * 16;
using Key = unsigned long long;

// Shared memory of a block, by byte offset: rows [16, max(dim, width)] float; the same as T; the
// cosines of a chunk [16, kChunk] float; one staging area per warp; the best keys [16, 2, concepts]
// where they fit.
template <typename T>
struct ConceptMemory {
  int row_stride, operand_stride, operands, cosine_stride, cosines, areas, keys, total;
  bool keys_fit;
  __host__ __device__ explicit ConceptMemory(const Concepts& args) {
    const int widest = static_cast<int>(args.dim > args.width ? args.dim : args.width);
    row_stride = tile_stride<float>(widest);
    operand_stride = tile_stride<T>(widest);
    operands = kRows * row_stride * 4;
    cosine_stride = tile_stride<float>(kChunk);
    cosines = operands + round_up(kRows * operand_stride * static_cast<int>(sizeof(T)), 128);
    areas = cosines + kRows * cosine_stride * 4;
    keys = areas + kWarps * kStageBytes;
    const int64_t bytes = kRows * 2 * args.concepts * static_cast<int64_t>(sizeof(Key));
    keys_fit = keys + bytes <= kSharedLimit;
    total = keys_fit ? keys + static_cast<int>(bytes) : keys;
  }
};

struct Lane {
  int warp = static_cast<int>(threadIdx.x) / kWarp;
  int lane = static_cast<int>(threadIdx.x) % kWarp;
};

// Vector i .. i + kVector<T> of a row, zero beyond its end.
template <typename T>
__device__ inline Vector<T, kVector<T>> read_row(const T* row, int i, int size) {
  Vector<T, kVector<T>> out;
  if (size % kVector<T> == 0) {
    if (i < size) return *reinterpret_cast<const Vector<T, kVector<T>>*>(row + i);
  }
  for (int j = 0; j < kVector<T>; ++j)
    out.value[j] = i + j < size ? row[i + j] : from_float<T>(0.f);
  return out;
}

// rows [16, width] = `from` [count, width] as float, zero beyond the count. Ends past a barrier.
template <typename T>
__device__ inline void load_rows(const T* from, int count, const ConceptMemory<T>& memory,
                                 const Lane& at, int width) {
  constexpr int N = kVector<T>;
  const Shared<float> rows(0);
  for (int r = at.warp; r < kRows; r += kWarps) {
    for (int i = at.lane * N; i < width; i += kWarp * N) {
      Vector<T, N> piece;
      if (r < count) piece = read_row(from + static_cast<int64_t>(r) * width, i, width);
      for (int j = 0; j < N && i + j < width; ++j) {
        rows.set(r * memory.row_stride + i + j, r < count ? to_float(piece.value[j]) : 0.f);
      }
    }
  }
  __syncthreads();
}

struct RowMoments {
  float mean, rstd;
};

// One warp; the row stays in the first-level cache over the two passes.
template <typename T>
__device__ inline RowMoments row_moments(const T* row, int size, float eps, int lane) {
  constexpr int N = kVector<T>;
  float total = 0;
  for (int i = lane * N; i < size; i += kWarp * N) {
    const auto piece = read_row(row, i, size);
    for (int j = 0; j < N; ++j) total += to_float(piece.value[j]);
  }
  const float mean = warp_sum(total) / static_cast<float>(size);
  float squares = 0;
  for (int i = lane * N; i < size; i += kWarp * N) {
    const auto piece = read_row(row, i, size);
    for (int j = 0; j < N; ++j) {
      const float d = to_float(piece.value[j]) - mean;
      squares += i + j < size ? d * d : 0.f;
    }
  }
  return {mean, rsqrtf(warp_sum(squares) / static_cast<float>(size) + eps)};
}

// The tile's features after the layer norm: through put(row, index, value) for index up to a
// multiple of 16 past dim, zero beyond the tile's rows and beyond dim.
template <typename T, typename Put>
__device__ inline void normalised_features(const Concepts& args, int64_t first, int count,
                                           const Lane& at, Put put) {
  constexpr int N = kVector<T>;
  const int dim = static_cast<int>(args.dim);
  const auto* weight = static_cast<const T*>(args.ln_weight);
  const auto* bias = static_cast<const T*>(args.ln_bias);
  for (int r = at.warp; r < kRows; r += kWarps) {
    if (r >= count) {
      for (int i = at.lane; i < round_up(dim, 16); i += kWarp) put(r, i, 0.f);
      continue;
    }
    const T* row = static_cast<const T*>(args.features) + (first + r) * args.dim;
    RowMoments m{0.f, 1.f};
    if (weight) m = row_moments(row, dim, args.eps, at.lane);
    for (int i = at.lane * N; i < round_up(dim, 16); i += kWarp * N) {
      const auto piece = read_row(row, i, dim);
      Vector<T, N> w = piece, b = piece;
      if (weight) {
        w = read_row(weight, i, dim);
        b = read_row(bias, i, dim);
      }
      for (int j = 0; j < N; ++j) {
        float x = to_float(piece.value[j]);
        if (weight) x = (x - m.mean) * m.rstd * to_float(w.value[j]) + to_float(b.value[j]);
        put(r, i + j, i + j < dim ? x : 0.f);
      }
    }
  }
}

// rows [16, width] (float) = layer_norm(features) * projection. Uses `operands` in between. Ends
// with all threads past a barrier.
template <typename T>
__device__ inline void project_rows(const Concepts& args, int64_t first, int count,
                                    const ConceptMemory<T>& memory, const Lane& at) {
  const Shared<float> rows(0);
  const Shared<T> operands(memory.operands);
  if (args.projection == nullptr) {
    normalised_features<T>(args, first, count, at,
                           [&](int r, int i, float x) { rows.set(r * memory.row_stride + i, x); });
    __syncthreads();
    return;
  }
  normalised_features<T>(args, first, count, at, [&](int r, int i, float x) {
    operands.set(r * memory.operand_stride + i, from_float<T>(x));
  });
  __syncthreads();
  const Shared<T> area(memory.areas + at.warp * kStageBytes);
  for (int column = at.warp * 16; column < args.width; column += kWarps * 16) {
    TileC<T> sum;
    sum.clear();
    warp_product<Rows>(sum, operands, memory.operand_stride, static_cast<const T*>(args.projection),
                       args.width, 0, args.width, column, static_cast<int>(args.dim), area,
                       at.lane);
    sum.store(rows, column, memory.row_stride);
  }
  __syncthreads();
}

// One warp: the norm of a row of shared memory, at least kNormFloor; NaN stays NaN.
__device__ inline float row_norm(Shared<float> row, int width, int lane) {
  float squares = 0;
  for (int i = lane; i < width; i += kWarp) squares += row.get(i) * row.get(i);
  const float norm = sqrtf(warp_sum(squares));
  return norm < kNormFloor ? kNormFloor : norm;
}

// operands [16, width] = rows / norm as T, zero up to a multiple of 16. Ends past a barrier.
template <typename T>
__device__ inline void unit_rows(const Concepts& args, const ConceptMemory<T>& memory,
                                 const Lane& at) {
  const Shared<T> operands(memory.operands);
  const int width = static_cast<int>(args.width);
  for (int r = at.warp; r < kRows; r += kWarps) {
    const Shared<float> row = Shared<float>(0).at(r * memory.row_stride);
    const float inverse = 1.f / row_norm(row, width, at.lane);
    for (int i = at.lane; i < round_up(width, 16); i += kWarp) {
      const float x = i < width ? row.get(i) * inverse : 0.f;
      operands.set(r * memory.operand_stride + i, from_float<T>(x));
    }
  }
  __syncthreads();
}

}  // namespace latentguard::cuda
