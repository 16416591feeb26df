// Gradient of concept_similarity and concept_heatmap with respect to the features, in one launch:
// a block takes 16 rows as the forward projected them, adds up the prompts that reached each
// maximum, and takes the sum back through norm, projection and layer norm.
#include "cuda/concepts.h"
#include "cuda/launchers.h"

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

// One warp: the gradient with respect to the projected row, through put(index, value).
template <typename T, typename Put>
__device__ void unit_gradient(const Concepts& args, int64_t row, Shared<float> projected, int lane,
                              Put put) {
  const int width = static_cast<int>(args.width);
  const float inverse = 1.f / row_norm(projected, width, lane);
  const auto total = [&](int i) {
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
  };
  float along = 0;
  for (int i = lane; i < width; i += kWarp) along += total(i) * projected.get(i) * inverse;
  along = warp_sum(along);
  // The sum over the concepts is taken twice rather than kept: the prompts are in the cache.
  for (int i = lane; i < width; i += kWarp) {
    put(i, (total(i) - along * projected.get(i) * inverse) * inverse);
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
  load_rows(static_cast<const T*>(args.saved_projected) + first * width, count, memory, at, width);
  const bool project = args.projection != nullptr;
  for (int r = at.warp; r < kRows; r += kWarps) {
    const Shared<T> target = operands.at(r * memory.operand_stride);
    const Shared<float> row = rows.at(r * memory.row_stride);
    if (r < count) {
      // Each lane overwrites only what it alone reads, so the row may be its own target.
      unit_gradient<T>(args, first + r, row, at.lane, [&](int i, float x) {
        if (project) {
          target.set(i, from_float<T>(x));
        } else {
          row.set(i, x);
        }
      });
    }
    if (project) {
      for (int i = at.lane + (r < count ? width : 0); i < round_up(width, 16); i += kWarp) {
        target.set(i, from_float<T>(0.f));
      }
    }
  }
  __syncthreads();
  if (project) {
    // The transposed projection: its rows [dim, width] are the columns of this product.
    const Shared<T> area(memory.areas + at.warp * kStageBytes);
    for (int column = at.warp * 16; column < args.dim; column += kWarps * 16) {
      TileC<T> sum;
      sum.clear();
      warp_product<Columns>(sum, operands, memory.operand_stride,
                            static_cast<const T*>(args.projection), width, 0, args.dim, column,
                            width, area, at.lane);
      sum.store(rows, column, memory.row_stride);
    }
    __syncthreads();
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
