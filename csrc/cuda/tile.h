// Tensor-core tiles: C [16, 16] += A [16, step] * B [step, 16], accumulated in float.
//
// fp16 and bf16 use one instruction per step. float keeps float accuracy by three TF32 products
// (each operand is split into a TF32 head and a TF32 remainder; remainder times remainder is below
// float's last bit and left out).
#pragma once

#include "cuda/device.h"

#ifdef __CUDACC__

#include <mma.h>

namespace latentguard::cuda {

namespace wmma = nvcuda::wmma;

struct Rows {
  using Layout = wmma::row_major;
};
struct Columns {
  using Layout = wmma::col_major;
};

template <typename T>
struct Tile {
  static constexpr int kStep = 16;
  static constexpr int kParts = 1;
  using Element = T;
};
template <>
struct Tile<float> {
  static constexpr int kStep = 8;
  static constexpr int kParts = 2;
  using Element = wmma::precision::tf32;
};

template <typename T>
struct TileA {
  wmma::fragment<wmma::matrix_a, 16, 16, Tile<T>::kStep, typename Tile<T>::Element, wmma::row_major>
      part[Tile<T>::kParts];
};
template <typename T, typename Order>
struct TileB {
  wmma::fragment<wmma::matrix_b, 16, 16, Tile<T>::kStep, typename Tile<T>::Element,
                 typename Order::Layout>
      part[Tile<T>::kParts];
};

template <typename T>
struct TileC {
  wmma::fragment<wmma::accumulator, 16, 16, Tile<T>::kStep, float> part;
  __device__ void clear() { wmma::fill_fragment(part, 0.f); }
  __device__ void load(Shared<float> from, int offset, int stride) {
    wmma::load_matrix_sync(part, from.tile(offset), stride, wmma::mem_row_major);
  }
  __device__ void store(Shared<float> to, int offset, int stride) const {
    wmma::store_matrix_sync(to.tile(offset), part, stride, wmma::mem_row_major);
  }
};

template <typename Operand>
__device__ inline void split(Operand& operand) {
  if constexpr (sizeof(operand.part) / sizeof(operand.part[0]) == 2) {
    for (int i = 0; i < operand.part[0].num_elements; ++i) {
      const float x = operand.part[0].x[i];
      const float head = wmma::__float_to_tf32(x);
      operand.part[0].x[i] = head;
      operand.part[1].x[i] = wmma::__float_to_tf32(x - head);
    }
  }
}

// Offsets and strides keep each tile on a 32-byte boundary, as wmma asks.
template <typename T>
__device__ inline void load_tile(TileA<T>& a, Shared<T> from, int offset, int stride) {
  wmma::load_matrix_sync(a.part[0], from.tile(offset), stride);
  split(a);
}
template <typename T, typename Order>
__device__ inline void load_tile(TileB<T, Order>& b, Shared<T> from, int offset, int stride) {
  wmma::load_matrix_sync(b.part[0], from.tile(offset), stride);
  split(b);
}
template <typename T, typename Order>
__device__ inline void multiply(TileC<T>& c, const TileA<T>& a, const TileB<T, Order>& b) {
  if constexpr (Tile<T>::kParts == 2) {
    wmma::mma_sync(c.part, a.part[1], b.part[0], c.part);
    wmma::mma_sync(c.part, a.part[0], b.part[1], c.part);
  }
  wmma::mma_sync(c.part, a.part[0], b.part[0], c.part);
}

}  // namespace latentguard::cuda

#else
#include "testing/host_tile.h"
#endif

namespace latentguard::cuda {

// Depth that a warp stages at a time, and the padding that spreads rows over the banks.
template <typename T>
constexpr int kDepth = 128 / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kPad = 16 / static_cast<int>(sizeof(T));
// One warp's staging area: 16 columns by kDepth (either order), padded.
constexpr int kStageBytes = 3072;

template <typename T>
__host__ __device__ constexpr int tile_stride(int columns) {
  return round_up(columns, 16) + kPad<T>;
}

// Copies the part of a [rows, columns] matrix that starts at (row, column) to shared memory,
// `height` by `width`, zero beyond the matrix. 16-byte accesses where the rows allow them.
template <typename T>
__device__ inline void stage(Shared<T> to, int to_stride, const T* from, int64_t stride,
                             int64_t row, int64_t column, int64_t rows, int64_t columns, int height,
                             int width, int lane) {
  constexpr int kLength = kVector<T>;
  using Vec = Vector<T, kLength>;
  const int per_row = width / kLength;
  const bool aligned = stride % kLength == 0;
  for (int i = lane; i < height * per_row; i += kWarp) {
    const int r = i / per_row, c = i % per_row * kLength;
    const T* source = from + (row + r) * stride + column + c;
    Vec piece;
    if (row + r < rows && column + c + kLength <= columns && aligned) {
      piece = *reinterpret_cast<const Vec*>(source);
    } else {
      for (int j = 0; j < kLength; ++j) {
        const bool inside = row + r < rows && column + c + j < columns;
        piece.value[j] = inside ? source[j] : from_float<T>(0.f);
      }
    }
    to.set_vector(r * to_stride + c, piece);
  }
}

// One warp: c += A [16, depth] * B [depth, 16 columns from `first`]. A lies in shared memory, zero
// beyond `depth` up to a multiple of 16; B in global memory, as [columns, depth] (Columns: one row
// per column of B, as weights and prompt banks are stored) or [depth, columns] (Rows).
template <typename Order, typename T>
__device__ inline void warp_product(TileC<T>& c, Shared<T> a, int a_stride, const T* b,
                                    int64_t b_stride, int b_from, int64_t columns, int64_t first,
                                    int depth, Shared<T> area, int lane) {
  constexpr bool kColumns = std::is_same_v<Order, Columns>;
  constexpr int kStride = (kColumns ? kDepth<T> : 16) + kPad<T>;
  for (int start = 0; start < depth; start += kDepth<T>) {
    __syncwarp();
    if constexpr (kColumns) {
      stage(area, kStride, b, b_stride, first, b_from + start, columns,
            static_cast<int64_t>(b_from) + depth, 16, kDepth<T>, lane);
    } else {
      stage(area, kStride, b, b_stride, b_from + start, first, static_cast<int64_t>(b_from) + depth,
            columns, kDepth<T>, 16, lane);
    }
    __syncwarp();
    const int steps = min(kDepth<T>, round_up(depth - start, 16)) / Tile<T>::kStep;
    for (int step = 0; step < steps; ++step) {
      const int k = step * Tile<T>::kStep;
      TileA<T> left;
      TileB<T, Order> right;
      load_tile(left, a, start + k, a_stride);
      load_tile(right, area, kColumns ? k : k * kStride, kStride);
      multiply(c, left, right);
    }
  }
  __syncwarp();
}

}  // namespace latentguard::cuda
