// What patch_embed and its backward share: gathering cleaned patches, the projection of a tile of
// 16 tokens, positions. A block owns the tile; all its threads call these together.
#pragma once

#include "cuda/tile.h"
#include "include/patch_embed.h"

namespace latentguard::cuda {

// Depth of the patches held in shared memory at a time.
template <typename T>
constexpr int kPatchDepth = 1024 / static_cast<int>(sizeof(T));

// Shared memory of a block, by byte offset: rows [16, dim] float, patches [16, kPatchDepth] T,
// one staging area per warp. The backward turns each row into T at its own place.
template <typename T>
struct PatchMemory {
  int row_stride, inner_stride, patch_stride, patches, areas, total;
  __host__ __device__ explicit PatchMemory(const PatchEmbed& args) {
    const int64_t size = args.patch_size();
    const int depth = size < kPatchDepth<T> ? static_cast<int>(size) : kPatchDepth<T>;
    row_stride = tile_stride<float>(static_cast<int>(args.dim));
    inner_stride = row_stride * static_cast<int>(sizeof(float) / sizeof(T));
    patch_stride = tile_stride<T>(depth);
    patches = kRows * row_stride * 4;
    areas = patches + round_up(kRows * patch_stride * static_cast<int>(sizeof(T)), 128);
    total = areas + kWarps * kStageBytes;
  }
};

struct Place {
  int64_t image;
  int first, count;
};

__device__ inline Place place_of(const PatchEmbed& args, int64_t block) {
  const int tokens = static_cast<int>(args.tokens_per_image());
  const int tiles = (tokens + kRows - 1) / kRows;
  const int first = static_cast<int>(block % tiles) * kRows;
  return {block / tiles, first, min(kRows, tokens - first)};
}

__device__ inline float affine(const float* values, int phases, int64_t channel, int y, int x) {
  return values[phases == 1 ? channel : channel * 4 + (y & 1) * 2 + (x & 1)];
}

// Where a run of N neighboring cells of a patch lies: element `depth` of token `token`.
struct Run {
  int64_t offset, channel;
  int y, x;
};
__device__ inline Run run_of(const PatchEmbed& args, const Place& place, int token, int depth) {
  const int p = static_cast<int>(args.patch), columns = static_cast<int>(args.columns());
  const int cell = place.first + token;
  const int channel = depth / (p * p);
  const int y = cell / columns * p + depth / p % p, x = cell % columns * p + depth % p;
  const int64_t plane = (place.image * args.channels + channel) * args.height;
  return {(plane + y) * args.width + x, channel, y, x};
}

// Cleaned patches [16, from .. from + depth) of the tile as T; zero for tokens beyond the image
// and up to a multiple of 16 in depth. Neighboring threads take neighboring tokens, whose runs
// are neighbors in a row of the latent.
template <typename T, int N>
__device__ inline void gather_runs(const PatchEmbed& args, const Place& place, Shared<T> to,
                                   int stride, int from, int depth) {
  const auto* latents = static_cast<const T*>(args.latents);
  const auto* noise = static_cast<const T*>(args.noise);
  const float sigma = args.sigma ? args.sigma[place.image] : 0.f;
  const float alpha = args.alpha ? args.alpha[place.image] : 1.f;
  const int runs = round_up(depth, 16) / N;
  for (int i = static_cast<int>(threadIdx.x); i < runs * kRows; i += kThreads) {
    const int token = i % kRows, k = i / kRows * N;
    Vector<T, N> out;
    for (int j = 0; j < N; ++j) out.value[j] = from_float<T>(0.f);
    if (token < place.count && k < depth) {
      const Run run = run_of(args, place, token, from + k);
      const auto values = *reinterpret_cast<const Vector<T, N>*>(latents + run.offset);
      Vector<T, N> noises = out;
      if (noise) noises = *reinterpret_cast<const Vector<T, N>*>(noise + run.offset);
      for (int j = 0; j < N; ++j) {
        float x = to_float(values.value[j]);
        if (noise) x -= sigma * to_float(noises.value[j]);
        if (args.alpha) x /= alpha;
        if (args.scale) x *= affine(args.scale, args.scale_phases, run.channel, run.y, run.x + j);
        if (args.shift) x += affine(args.shift, args.shift_phases, run.channel, run.y, run.x + j);
        out.value[j] = from_float<T>(x);
      }
    }
    to.set_vector(token * stride + k, out);
  }
}

// A run is a row of a patch, at most 16 bytes of it.
template <typename T, typename Function>
__device__ inline void for_run_length(int64_t patch, Function function) {
  if (patch == 2) {
    function(std::integral_constant<int, 2>{});
  } else if (patch == 4 || kVector<T> == 4) {
    function(std::integral_constant<int, 4>{});
  } else {
    function(std::integral_constant<int, kVector<T>>{});
  }
}

// rows [16, dim] = patches * weight^T. Ends with all threads past a barrier.
template <typename T>
__device__ inline void project_patches(const PatchEmbed& args, const Place& place,
                                       const PatchMemory<T>& memory) {
  const Shared<float> rows(0);
  const Shared<T> patches(memory.patches);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Shared<T> area(memory.areas + warp * kStageBytes);
  const int size = static_cast<int>(args.patch_size());
  for (int from = 0; from < size; from += kPatchDepth<T>) {
    const int depth = min(kPatchDepth<T>, size - from);
    for_run_length<T>(args.patch, [&](auto length) {
      gather_runs<T, decltype(length)::value>(args, place, patches, memory.patch_stride, from,
                                              depth);
    });
    __syncthreads();
    for (int column = warp * 16; column < args.dim; column += kWarps * 16) {
      TileC<T> sum;
      if (from == 0) {
        sum.clear();
      } else {
        sum.load(rows, column, memory.row_stride);
      }
      warp_product<Columns>(sum, patches, memory.patch_stride, static_cast<const T*>(args.weight),
                            size, from, args.dim, column, depth, area, lane);
      sum.store(rows, column, memory.row_stride);
    }
    __syncthreads();
  }
}

// Mean and reciprocal deviation of a row of shared memory that this warp's lanes wrote, each its
// own vectors of kVector<T>.
struct Moments {
  float mean, rstd;
};
template <int N>
__device__ inline Moments warp_moments(Shared<float> row, int size, float eps, int lane) {
  float total = 0;
  for (int i = lane * N; i < size; i += kWarp * N) {
    for (int j = 0; j < N; ++j) total += row.get(i + j);
  }
  const float mean = warp_sum(total) / static_cast<float>(size);
  float squares = 0;
  for (int i = lane * N; i < size; i += kWarp * N) {
    for (int j = 0; j < N; ++j) {
      const float d = row.get(i + j) - mean;
      squares += d * d;
    }
  }
  return {mean, rsqrtf(warp_sum(squares) / static_cast<float>(size) + eps)};
}

}  // namespace latentguard::cuda
