// patch_embed in one launch: a block takes 16 tokens of one image, gathers and cleans their
// patches, projects them on tensor cores into float rows in shared memory, and writes
// layer_norm(row + position). Global memory is read and written in 16-byte pieces (shorter where a
// patch's row is), the weight once per block through the second-level cache.
#include "cuda/patches.h"

namespace latentguard::cuda {
namespace {

// One warp: out = layer_norm(row + position), where the row may be in shared memory already.
template <typename T>
__device__ void finish_row(const PatchEmbed& args, Shared<float> row, const T* first,
                           const T* position, T* out, int lane) {
  constexpr int N = kVector<T>;
  using Vec = Vector<T, N>;
  const int dim = static_cast<int>(args.dim);
  for (int i = lane * N; i < dim; i += kWarp * N) {
    const Vec place = *reinterpret_cast<const Vec*>(position + i);
    Vec start = place;
    if (first) start = *reinterpret_cast<const Vec*>(first + i);
    for (int j = 0; j < N; ++j) {
      const float base = first ? to_float(start.value[j]) : row.get(i + j);
      row.set(i + j, base + to_float(place.value[j]));
    }
  }
  const Moments m = warp_moments<N>(row, dim, args.eps, lane);
  const auto* weight = static_cast<const T*>(args.ln_weight);
  const auto* bias = static_cast<const T*>(args.ln_bias);
  for (int i = lane * N; i < dim; i += kWarp * N) {
    const Vec w = *reinterpret_cast<const Vec*>(weight + i);
    const Vec b = *reinterpret_cast<const Vec*>(bias + i);
    Vec result;
    for (int j = 0; j < N; ++j) {
      const float normal = (row.get(i + j) - m.mean) * m.rstd;
      result.value[j] = from_float<T>(normal * to_float(w.value[j]) + to_float(b.value[j]));
    }
    *reinterpret_cast<Vec*>(out + i) = result;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) patch_embed_kernel(PatchEmbed args) {
  const PatchMemory<T> memory(args);
  const Place place = place_of(args, blockIdx.x);
  project_patches<T>(args, place, memory);
  const Shared<float> rows(0);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto* positions = static_cast<const T*>(args.positional_embedding);
  T* image = static_cast<T*>(args.tokens) + place.image * (1 + args.tokens_per_image()) * args.dim;
  for (int r = warp; r < place.count; r += kWarps) {
    const int64_t token = 1 + place.first + r;
    finish_row<T>(args, rows.at(r * memory.row_stride), nullptr, positions + token * args.dim,
                  image + token * args.dim, lane);
  }
  // The first tile's first warp also writes the class token, over its own finished row 0.
  if (place.first == 0 && warp == 0) {
    __syncwarp();
    finish_row<T>(args, rows, static_cast<const T*>(args.class_embedding), positions, image, lane);
  }
}

}  // namespace

cudaError_t patch_embed(const PatchEmbed& args, cudaStream_t stream) {
  const int64_t tiles = (args.tokens_per_image() + kRows - 1) / kRows;
  return for_type(args.type, [&](auto zero) {
    using T = decltype(zero);
    const int bytes = PatchMemory<T>(args).total;
    return launch(patch_embed_kernel<T>, args.batch * tiles, kThreads, bytes, stream, args);
  });
}

}  // namespace latentguard::cuda
