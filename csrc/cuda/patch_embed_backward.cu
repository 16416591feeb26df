// Gradient of patch_embed with respect to the latents, in one launch: a block takes 16 tokens,
// projects their patches again (cheaper than storing the rows), takes the gradient through the
// layer norm in shared memory, multiplies by the weight and writes the cells of its patches.
#include "cuda/patches.h"

namespace latentguard::cuda {
namespace {

// One warp: replaces a row by the gradient before the layer norm, as T at the same place.
template <typename T>
__device__ void row_gradient(const PatchEmbed& args, Shared<float> row, const T* position,
                             const T* grad, Shared<T> inner, int lane) {
  constexpr int N = kVector<T>;
  using Vec = Vector<T, N>;
  const int dim = static_cast<int>(args.dim);
  const auto* weight = static_cast<const T*>(args.ln_weight);
  for (int i = lane * N; i < dim; i += kWarp * N) {
    const Vec place = *reinterpret_cast<const Vec*>(position + i);
    for (int j = 0; j < N; ++j) row.set(i + j, row.get(i + j) + to_float(place.value[j]));
  }
  const Moments m = warp_moments<N>(row, dim, args.eps, lane);
  float mean_g = 0, mean_gn = 0;
  for (int i = lane * N; i < dim; i += kWarp * N) {
    const Vec g = *reinterpret_cast<const Vec*>(grad + i);
    const Vec w = *reinterpret_cast<const Vec*>(weight + i);
    for (int j = 0; j < N; ++j) {
      const float inside = to_float(g.value[j]) * to_float(w.value[j]);
      mean_g += inside;
      mean_gn += inside * (row.get(i + j) - m.mean) * m.rstd;
    }
  }
  mean_g = warp_sum(mean_g) / static_cast<float>(dim);
  mean_gn = warp_sum(mean_gn) / static_cast<float>(dim);
  for (int start = 0; start < dim; start += kWarp * N) {
    const int i = start + lane * N;
    Vec result;
    if (i < dim) {
      const Vec g = *reinterpret_cast<const Vec*>(grad + i);
      const Vec w = *reinterpret_cast<const Vec*>(weight + i);
      for (int j = 0; j < N; ++j) {
        const float inside = to_float(g.value[j]) * to_float(w.value[j]);
        const float normal = (row.get(i + j) - m.mean) * m.rstd;
        result.value[j] = from_float<T>(m.rstd * (inside - mean_g - normal * mean_gn));
      }
    }
    // A half type's row grows over floats that were read: never ahead of this step's reads.
    __syncwarp();
    if (i < dim) inner.set_vector(i, result);
    __syncwarp();
  }
}

// One warp: writes a [16 tokens, 16] tile of patch gradients, which lies in shared memory.
template <typename T, int N>
__device__ void scatter(const PatchEmbed& args, const Place& place, Shared<float> tile, int stride,
                        int from, int lane) {
  auto* out = static_cast<T*>(args.grad_latents);
  const float alpha = args.alpha ? args.alpha[place.image] : 1.f;
  for (int i = lane; i < kRows * (16 / N); i += kWarp) {
    const int token = i % kRows, k = i / kRows * N;
    if (token >= place.count || from + k >= args.patch_size()) continue;
    const Run run = run_of(args, place, token, from + k);
    Vector<T, N> values;
    for (int j = 0; j < N; ++j) {
      float x = tile.get(token * stride + k + j);
      if (args.scale) x *= affine(args.scale, args.scale_phases, run.channel, run.y, run.x + j);
      if (args.alpha) x /= alpha;
      values.value[j] = from_float<T>(x);
    }
    *reinterpret_cast<Vector<T, N>*>(out + run.offset) = values;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) patch_embed_backward_kernel(PatchEmbed args) {
  const PatchMemory<T> memory(args);
  const Place place = place_of(args, blockIdx.x);
  project_patches<T>(args, place, memory);
  const Shared<float> rows(0);
  const Shared<T> inner(0);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int dim = static_cast<int>(args.dim), size = static_cast<int>(args.patch_size());
  const auto* grad =
      static_cast<const T*>(args.grad) + place.image * (1 + args.tokens_per_image()) * args.dim;
  const auto* positions = static_cast<const T*>(args.positional_embedding);
  for (int r = warp; r < kRows; r += kWarps) {
    const Shared<T> target = inner.at(r * memory.inner_stride);
    if (r < place.count) {
      const int64_t token = 1 + place.first + r;
      row_gradient<T>(args, rows.at(r * memory.row_stride), positions + token * args.dim,
                      grad + token * args.dim, target, lane);
    } else {
      for (int i = lane; i < dim; i += kWarp) target.set(i, from_float<T>(0.f));
    }
  }
  __syncthreads();
  const Shared<T> area(memory.areas + warp * kStageBytes);
  const Shared<float> tile(memory.areas + warp * kStageBytes);
  constexpr int kStride = 16 + kPad<float>;
  for (int column = warp * 16; column < size; column += kWarps * 16) {
    TileC<T> sum;
    sum.clear();
    warp_product<Rows>(sum, inner, memory.inner_stride, static_cast<const T*>(args.weight), size, 0,
                       size, column, dim, area, lane);
    sum.store(tile, 0, kStride);
    __syncwarp();
    for_run_length<T>(args.patch, [&](auto length) {
      scatter<T, decltype(length)::value>(args, place, tile, kStride, column, lane);
    });
    __syncwarp();
  }
}

}  // namespace

cudaError_t patch_embed_backward(const PatchEmbed& args, cudaStream_t stream) {
  const int64_t tiles = (args.tokens_per_image() + kRows - 1) / kRows;
  return for_type(args.type, [&](auto zero) {
    using T = decltype(zero);
    const int bytes = PatchMemory<T>(args).total;
    return launch(patch_embed_backward_kernel<T>, args.batch * tiles, kThreads, bytes, stream,
                  args);
  });
}

}  // namespace latentguard::cuda
