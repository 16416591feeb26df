// Gradient of concept_similarity and concept_heatmap with respect to the features, in one launch:
// a block takes 16 rows, adds up the prompts that reached each maximum, and takes the sum back
// through norm (of the rows as the forward projected them), projection and layer norm.
#include "cuda/concepts.h"

namespace latentguard::cuda {
namespace {

// What one concept contributes to a row: the gradient of its margin and the two prompts.
struct Share {
  float value;
  int64_t index[2];
};
__device__ Share share_of(const Concepts& args, int64_t row, int concept_index) {
  const int64_t at = args.result_index(row, concept_index);
  float value = args.grad_margin ? args.grad_margin[at] : 0.f;
  if (args.grad_probability) {
    const float p = args.saved_probability[at];
    value += args.grad_probability[at] * args.logit_scale * p * (1.f - p);
  }
  return {value, {args.saved_best[0][at], args.saved_best[1][at]}};
}

// Element i of the sum over the prompts that reached the maxima of a row.
template <typename T>
__device__ float weighted_prompts(const Concepts& args, int64_t row, int i) {
  float sum = 0;
  for (int k = 0; k < args.concepts; ++k) {
    const Share share = share_of(args, row, k);
    for (int which = 0; which < 2; ++which) {
      if (share.index[which] < 0) continue;
      const float x =
          to_float(static_cast<const T*>(args.bank[which])[share.index[which] * args.width + i]);
      sum += which == 0 ? share.value * x : -share.value * x;
    }
  }
  return sum;
}

// Through the norm: the gradient of a projected row is (sum - along * unit) * inverse. Finds
// `inverse` and `along` of each row of the tile.
template <typename T>
__device__ RowScalars directions_of(const Concepts& args, int64_t first, int count,
                                    const ConceptMemory<T>& memory, const Lane& at) {
  const RowScalars out{Shared<float>(memory.scalars)};
  const int width = static_cast<int>(args.width);
  for (int r = at.warp; r < count; r += kWarps) {
    const T* projected = static_cast<const T*>(args.saved_projected) + (first + r) * width;
    const float inverse =
        1.f / row_norm(width, at.lane, [&](int i) { return to_float(projected[i]); });
    float along = 0;
    for (int i = at.lane; i < width; i += kWarp) {
      along += weighted_prompts<T>(args, first + r, i) * to_float(projected[i]) * inverse;
    }
    out.set(r, inverse, warp_sum(along), at.lane);
  }
  return out;
}

// Elements [from, from + depth) of the tile's gradients of projected rows: through put(row, index,
// value) for index 0 up to a multiple of 16 past depth, zero beyond the tile's rows and the width.
// The sum over the concepts is taken again rather than kept: the prompts are in the cache.
template <typename T, typename Put>
__device__ void projected_gradients(const Concepts& args, int64_t first, int count, const Lane& at,
                                    const RowScalars& directions, int from, int depth, Put put) {
  const int width = static_cast<int>(args.width);
  const T* projected = static_cast<const T*>(args.saved_projected);
  for (int r = at.warp; r < kRows; r += kWarps) {
    for (int i = at.lane; i < round_up(depth, 16); i += kWarp) {
      float x = 0;
      if (r < count && i < depth) {
        const float inverse = directions.get(r, 0);
        const float unit = to_float(projected[(first + r) * width + from + i]) * inverse;
        x = (weighted_prompts<T>(args, first + r, from + i) - directions.get(r, 1) * unit) *
            inverse;
      }
      put(r, i, x);
    }
  }
}

template <typename T>
__device__ void write_row(const Concepts& args, int64_t row, Shared<float> grad, int lane) {
  const int dim = static_cast<int>(args.dim);
  const T* features = static_cast<const T*>(args.features) + row * args.dim;
  const auto* weight = static_cast<const T*>(args.ln_weight);
  T* out = static_cast<T*>(args.grad_features) + row * args.dim;
  if (weight == nullptr) {
    for (int i = lane; i < dim; i += kWarp) out[i] = from_float<T>(grad.get(i));
    return;
  }
  const RowMoments m = row_moments(features, dim, args.eps, lane);
  float mean_g = 0, mean_gn = 0;
  for (int i = lane; i < dim; i += kWarp) {
    const float g = grad.get(i) * to_float(weight[i]);
    mean_g += g;
    mean_gn += g * (to_float(features[i]) - m.mean) * m.rstd;
  }
  mean_g = warp_sum(mean_g) / static_cast<float>(dim);
  mean_gn = warp_sum(mean_gn) / static_cast<float>(dim);
  for (int i = lane; i < dim; i += kWarp) {
    const float normal = (to_float(features[i]) - m.mean) * m.rstd;
    const float g = grad.get(i) * to_float(weight[i]);
    out[i] = from_float<T>(m.rstd * (g - mean_g - normal * mean_gn));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) concept_backward_kernel(Concepts args) {
  const ConceptMemory<T> memory(args);
  const Lane at;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t left = args.rows - first;
  const int count = left < kRows ? static_cast<int>(left) : kRows;
  const Shared<float> rows(0);
  const Shared<T> operands(memory.operands);
  const int width = static_cast<int>(args.width);
  const RowScalars directions = directions_of<T>(args, first, count, memory, at);
  if (args.projection == nullptr) {
    projected_gradients<T>(args, first, count, at, directions, 0, width,
                           [&](int r, int i, float x) { rows.set(r * memory.row_stride + i, x); });
    __syncthreads();
  } else {
    for (int from = 0; from < width; from += kOperandDepth<T>) {
      const int depth = min(kOperandDepth<T>, width - from);
      projected_gradients<T>(args, first, count, at, directions, from, depth,
                             [&](int r, int i, float x) {
                               operands.set(r * memory.operand_stride + i, from_float<T>(x));
                             });
      __syncthreads();
      // The transposed projection: its rows [dim, width] are the columns of this product.
      add_product<Columns>(args, memory, at, from, depth, args.dim);
    }
  }
  for (int r = at.warp; r < count; r += kWarps) {
    write_row<T>(args, first + r, rows.at(r * memory.row_stride), at.lane);
  }
}

}  // namespace

cudaError_t concept_similarity_backward(const Concepts& args, cudaStream_t stream) {
  const int64_t tiles = (args.rows + kRows - 1) / kRows;
  return for_type(args.type, [&](auto zero) {
    using T = decltype(zero);
    Concepts without_keys = args;
    without_keys.concepts = 0;
    const int bytes = ConceptMemory<T>(without_keys).total;
    return launch(concept_backward_kernel<T>, tiles, kThreads, bytes, stream, args);
  });
}

}  // namespace latentguard::cuda
