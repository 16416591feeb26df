// patch_embed on the CPU. Tokens are taken in tiles that stay in the second-level cache: gather
// and clean the patches, one matrix product of the platform's BLAS, then position and layer norm
// in the same pass that writes the output. Half types are computed in float.
#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/rows.h"

namespace latentguard::cpu {
namespace {

constexpr int64_t kTile = 64;

struct Tile {
  int64_t image, begin, count;
};

Tile tile_of(const PatchEmbed& args, int64_t index) {
  const int64_t tokens = args.tokens_per_image();
  const int64_t per_image = (tokens + kTile - 1) / kTile;
  const int64_t begin = index % per_image * kTile;
  return {index / per_image, begin, std::min(kTile, tokens - begin)};
}

int64_t tile_count(const PatchEmbed& args) {
  return args.batch * ((args.tokens_per_image() + kTile - 1) / kTile);
}

int phase(int64_t y, int64_t x) { return static_cast<int>((y & 1) * 2 + (x & 1)); }

// Calls f(pointer into the tile's patches, offset into the latents, channel, row) for each run of
// `patch` neighbouring cells.
template <typename Function>
void for_runs(const PatchEmbed& args, const Tile& tile, Function function) {
  const int64_t p = args.patch, size = args.patch_size(), columns = args.columns();
  for (int64_t t = 0; t < tile.count; ++t) {
    const int64_t token = tile.begin + t;
    const int64_t top = token / columns * p, left = token % columns * p;
    for (int64_t c = 0; c < args.channels; ++c) {
      const int64_t plane = (tile.image * args.channels + c) * args.height;
      for (int64_t y = 0; y < p; ++y) {
        function(t * size + (c * p + y) * p, (plane + top + y) * args.width + left, c, top + y);
      }
    }
  }
}

// Patches of the cleaned, unscaled latent: [tile.count, patch_size].
template <typename T>
void gather(const PatchEmbed& args, const Tile& tile, float* patches) {
  const auto* latents = static_cast<const T*>(args.latents);
  const auto* noise = static_cast<const T*>(args.noise);
  const float alpha = args.alpha ? args.alpha[tile.image] : 1.f;
  const float sigma = args.sigma ? args.sigma[tile.image] : 0.f;
  const int64_t p = args.patch;
  for_runs(args, tile, [&](int64_t to, int64_t from, int64_t c, int64_t y) {
    float* out = patches + to;
    for (int64_t x = 0; x < p; ++x) out[x] = static_cast<float>(latents[from + x]);
    if (noise) {
      for (int64_t x = 0; x < p; ++x) out[x] -= sigma * static_cast<float>(noise[from + x]);
    }
    if (args.alpha) {
      for (int64_t x = 0; x < p; ++x) out[x] /= alpha;
    }
    if (args.scale) {
      for (int64_t x = 0; x < p; ++x) {
        out[x] *= args.scale[args.scale_phases == 1 ? c : c * 4 + phase(y, x)];
      }
    }
    if (args.shift) {
      for (int64_t x = 0; x < p; ++x) {
        out[x] += args.shift[args.shift_phases == 1 ? c : c * 4 + phase(y, x)];
      }
    }
  });
}

// The reverse of gather for gradients.
template <typename T>
void scatter(const PatchEmbed& args, const Tile& tile, const float* patches) {
  auto* out = static_cast<T*>(args.grad_latents);
  const float alpha = args.alpha ? args.alpha[tile.image] : 1.f;
  for_runs(args, tile, [&](int64_t from, int64_t to, int64_t c, int64_t y) {
    for (int64_t x = 0; x < args.patch; ++x) {
      float value = patches[from + x];
      if (args.scale) value *= args.scale[args.scale_phases == 1 ? c : c * 4 + phase(y, x)];
      if (args.alpha) value /= alpha;
      out[to + x] = static_cast<T>(value);
    }
  });
}

template <typename T>
void forward(const PatchEmbed& args) {
  const int64_t dim = args.dim, size = args.patch_size(), tokens = args.tokens_per_image();
  Buffer held[5];
  const float* weight = as_float<T>(args.weight, dim * size, held[0]);
  const float* first = as_float<T>(args.class_embedding, dim, held[1]);
  const float* position = as_float<T>(args.positional_embedding, (1 + tokens) * dim, held[2]);
  const float* ln_weight = as_float<T>(args.ln_weight, dim, held[3]);
  const float* ln_bias = as_float<T>(args.ln_bias, dim, held[4]);
  auto* out = static_cast<T*>(args.tokens);

  const Buffer class_row = buffer(dim);
  for_lanes(dim, [&](int64_t i, int64_t n) {
    (Vec::loadu(first + i, n) + Vec::loadu(position + i, n)).store(class_row.get() + i, n);
  });
  layer_norm(class_row.get(), class_row.get(), ln_weight, ln_bias, dim, args.eps);
  for (int64_t b = 0; b < args.batch; ++b) {
    from_float(class_row.get(), out + b * (1 + tokens) * dim, dim);
  }
  at::parallel_for(0, tile_count(args), 1, [&](int64_t begin, int64_t end) {
    const Buffer patches = buffer(kTile * size);
    const Buffer scratch = buffer(std::is_same_v<T, float> ? 0 : kTile * dim);
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = tile_of(args, index);
      gather<T>(args, tile, patches.get());
      T* rows = out + (tile.image * (1 + tokens) + 1 + tile.begin) * dim;
      float* result = scratch.get();
      if constexpr (std::is_same_v<T, float>) result = rows;
      product(patches.get(), weight, result, tile.count, dim, size, true);
      for (int64_t t = 0; t < tile.count; ++t) {
        float* row = result + t * dim;
        const float* place = position + (1 + tile.begin + t) * dim;
        for_lanes(dim, [&](int64_t i, int64_t n) {
          (Vec::loadu(row + i, n) + Vec::loadu(place + i, n)).store(row + i, n);
        });
        layer_norm(row, row, ln_weight, ln_bias, dim, args.eps);
        from_float(row, rows + t * dim, dim);
      }
    }
  });
}

template <typename T>
void backward(const PatchEmbed& args) {
  const int64_t dim = args.dim, size = args.patch_size(), tokens = args.tokens_per_image();
  Buffer held[3];
  const float* weight = as_float<T>(args.weight, dim * size, held[0]);
  const float* position = as_float<T>(args.positional_embedding, (1 + tokens) * dim, held[1]);
  const float* ln_weight = as_float<T>(args.ln_weight, dim, held[2]);
  const auto* grad = static_cast<const T*>(args.grad);
  at::parallel_for(0, tile_count(args), 1, [&](int64_t begin, int64_t end) {
    const Buffer patches = buffer(kTile * size);
    const Buffer inner = buffer(kTile * dim);
    const Buffer grad_row = buffer(dim);
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = tile_of(args, index);
      gather<T>(args, tile, patches.get());
      product(patches.get(), weight, inner.get(), tile.count, dim, size, true);
      for (int64_t t = 0; t < tile.count; ++t) {
        float* row = inner.get() + t * dim;
        const int64_t token = 1 + tile.begin + t;
        const float* place = position + token * dim;
        for_lanes(dim, [&](int64_t i, int64_t n) {
          (Vec::loadu(row + i, n) + Vec::loadu(place + i, n)).store(row + i, n);
        });
        to_float(grad + (tile.image * (1 + tokens) + token) * dim, grad_row.get(), dim);
        layer_norm_backward(grad_row.get(), row, ln_weight, dim, args.eps);
      }
      product(inner.get(), weight, patches.get(), tile.count, size, dim, false);
      scatter<T>(args, tile, patches.get());
    }
  });
}

}  // namespace

void patch_embed(const PatchEmbed& args) {
  for_type(args.type, [&](auto zero) { forward<decltype(zero)>(args); });
}

void patch_embed_backward(const PatchEmbed& args) {
  for_type(args.type, [&](auto zero) { backward<decltype(zero)>(args); });
}

}  // namespace latentguard::cpu
