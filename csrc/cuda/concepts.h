// What concept_similarity, concept_heatmap and their backward share: a block's tile of 16 rows in
// shared memory, layer norm, projection, unit vectors. All threads of a block call these together.
#pragma once

#include "cuda/tile.h"
#include "include/concepts.h"

namespace latentguard::cuda {

// Shared memory that every architecture from sm_80 on grants a block: 8.6, 8.9 and 12.0 no more.
constexpr int kSharedLimit = 99 * 1024;
// Prompts whose cosines a block holds at a time: 16 per warp.
constexpr int kChunk = kWarps * 16;
using Key = unsigned long long;

// Depth of the operands held in shared memory at a time.
template <typename T>
constexpr int kOperandDepth = 1024 / static_cast<int>(sizeof(T));

// Shared memory of a block, by byte offset: rows [16, max(dim, width)] float, or in the same place
// and with inner_stride as T; a part of a product's left side [16, kOperandDepth] T, and when it
// is done the cosines of a chunk [16, kChunk] float; one staging area per warp; two scalars per row
// [16, 2] float; the best keys [16, 2, concepts] where they fit.
template <typename T>
struct ConceptMemory {
  int row_stride, inner_stride, operand_stride, operands, cosine_stride, cosines, areas, scalars,
      keys, total;
  bool keys_fit;
  __host__ __device__ explicit ConceptMemory(const Concepts& args) {
    const int widest = static_cast<int>(args.dim > args.width ? args.dim : args.width);
    row_stride = tile_stride<float>(widest);
    inner_stride = row_stride * static_cast<int>(sizeof(float) / sizeof(T));
    operand_stride = tile_stride<T>(kOperandDepth<T>);
    operands = kRows * row_stride * 4;
    cosine_stride = tile_stride<float>(kChunk);
    cosines = operands;
    areas = operands + kRows * operand_stride * static_cast<int>(sizeof(T));
    scalars = areas + kWarps * kStageBytes;
    keys = scalars + kRows * 2 * static_cast<int>(sizeof(float));
    const int64_t bytes = kRows * 2 * args.concepts * static_cast<int64_t>(sizeof(Key));
    keys_fit = keys + bytes <= kSharedLimit;
    total = keys_fit ? keys + static_cast<int>(bytes) : keys;
  }
};
static_assert(tile_stride<float>(kChunk) * 4 <= kOperandDepth<float> * 4);

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

// Two numbers per row that a warp finds once and reads again in each part of the depth. In shared
// memory: an array of a thread's own, indexed by the row, would be local memory.
struct RowScalars {
  Shared<float> values;
  __device__ float get(int row, int which) const { return values.get(row * 2 + which); }
  // Called by all lanes of the warp that owns the row.
  __device__ void set(int row, float first, float second, int lane) const {
    if (lane == 0) {
      values.set(row * 2, first);
      values.set(row * 2 + 1, second);
    }
    __syncwarp();
  }
};

// Mean and reciprocal deviation of each row of the tile, by the warp that reads them later.
template <typename T>
__device__ inline RowScalars tile_moments(const Concepts& args, int64_t first, int count,
                                          const ConceptMemory<T>& memory, const Lane& at) {
  const RowScalars out{Shared<float>(memory.scalars)};
  for (int r = at.warp; r < count; r += kWarps) {
    const T* row = static_cast<const T*>(args.features) + (first + r) * args.dim;
    RowMoments m{0.f, 1.f};
    if (args.ln_weight) m = row_moments(row, static_cast<int>(args.dim), args.eps, at.lane);
    out.set(r, m.mean, m.rstd, at.lane);
  }
  return out;
}

// The tile's features [from, from + depth) after the layer norm: through put(row, index, value)
// for index 0 up to a multiple of 16 past depth, zero beyond the tile's rows and beyond dim.
template <typename T, typename Put>
__device__ inline void normalized_features(const Concepts& args, int64_t first, int count,
                                           const Lane& at, const RowScalars& moments, int from,
                                           int depth, Put put) {
  constexpr int N = kVector<T>;
  const int dim = static_cast<int>(args.dim);
  const auto* weight = static_cast<const T*>(args.ln_weight);
  const auto* bias = static_cast<const T*>(args.ln_bias);
  for (int r = at.warp; r < kRows; r += kWarps) {
    if (r >= count) {
      for (int i = at.lane; i < round_up(depth, 16); i += kWarp) put(r, i, 0.f);
      continue;
    }
    const T* row = static_cast<const T*>(args.features) + (first + r) * args.dim;
    RowMoments m{0.f, 1.f};
    if (weight) m = {moments.get(r, 0), moments.get(r, 1)};
    for (int i = at.lane * N; i < round_up(depth, 16); i += kWarp * N) {
      const auto piece = read_row(row, from + i, dim);
      Vector<T, N> w = piece, b = piece;
      if (weight) {
        w = read_row(weight, from + i, dim);
        b = read_row(bias, from + i, dim);
      }
      for (int l = 0; l < N; ++l) {
        float x = to_float(piece.value[l]);
        if (weight) x = (x - m.mean) * m.rstd * to_float(w.value[l]) + to_float(b.value[l]);
        put(r, i + l, from + i + l < dim ? x : 0.f);
      }
    }
  }
}

// rows [16, columns] += operands [16, depth] * part of the projection. Order says which way the
// projection is read, as in warp_product, `from` where its part begins. Starts and ends past a
// barrier; a first part finds no sum in rows.
template <typename Order, typename T>
__device__ inline void add_product(const Concepts& args, const ConceptMemory<T>& memory,
                                   const Lane& at, int from, int depth, int64_t columns) {
  const Shared<float> rows(0);
  const Shared<T> operands(memory.operands), area(memory.areas + at.warp * kStageBytes);
  for (int column = at.warp * 16; column < columns; column += kWarps * 16) {
    TileC<T> sum;
    if (from == 0) {
      sum.clear();
    } else {
      sum.load(rows, column, memory.row_stride);
    }
    warp_product<Order>(sum, operands, memory.operand_stride,
                        static_cast<const T*>(args.projection), args.width, from, columns, column,
                        depth, area, at.lane);
    sum.store(rows, column, memory.row_stride);
  }
  __syncthreads();
}

// rows [16, width] (float) = layer_norm(features) * projection. Ends with all threads past a
// barrier.
template <typename T>
__device__ inline void project_rows(const Concepts& args, int64_t first, int count,
                                    const ConceptMemory<T>& memory, const Lane& at) {
  const Shared<float> rows(0);
  const Shared<T> operands(memory.operands);
  const RowScalars moments = tile_moments<T>(args, first, count, memory, at);
  const int dim = static_cast<int>(args.dim);
  if (args.projection == nullptr) {
    normalized_features<T>(args, first, count, at, moments, 0, dim,
                           [&](int r, int i, float x) { rows.set(r * memory.row_stride + i, x); });
    __syncthreads();
    return;
  }
  for (int from = 0; from < dim; from += kOperandDepth<T>) {
    const int depth = min(kOperandDepth<T>, dim - from);
    normalized_features<T>(args, first, count, at, moments, from, depth,
                           [&](int r, int i, float x) {
                             operands.set(r * memory.operand_stride + i, from_float<T>(x));
                           });
    __syncthreads();
    add_product<Rows>(args, memory, at, from, depth, args.width);
  }
}

// One warp: the norm of a row, read by get(index), at least kNormFloor; NaN stays NaN.
template <typename Get>
__device__ inline float row_norm(int width, int lane, Get get) {
  float squares = 0;
  for (int i = lane; i < width; i += kWarp) squares += get(i) * get(i);
  const float norm = sqrtf(warp_sum(squares));
  return norm < kNormFloor ? kNormFloor : norm;
}

// inner [16, width] = rows / norm as T in the rows' own place, zero up to a multiple of 16. Starts
// and ends past a barrier.
template <typename T>
__device__ inline void unit_rows(const Concepts& args, const ConceptMemory<T>& memory,
                                 const Lane& at) {
  const Shared<T> inner(0);
  const int width = static_cast<int>(args.width);
  for (int r = at.warp; r < kRows; r += kWarps) {
    const Shared<float> row = Shared<float>(0).at(r * memory.row_stride);
    const float inverse = 1.f / row_norm(width, at.lane, [&](int i) { return row.get(i); });
    for (int start = 0; start < round_up(width, 16); start += kWarp) {
      const int i = start + at.lane;
      const float x = i < width ? row.get(i) * inverse : 0.f;
      // A half type's row grows over floats that were read: never ahead of this step's reads.
      __syncwarp();
      if (i < round_up(width, 16)) inner.set(r * memory.inner_stride + i, from_float<T>(x));
      __syncwarp();
    }
  }
  __syncthreads();
}

}  // namespace latentguard::cuda
