// patch_embed on the CPU. Tokens are taken in tiles that stay in the second-level cache: gather
// and clean the patches, multiply by the packed weight on top of the position, layer norm, done.
// Half types are computed in float.
#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/gemm.h"
#include "include/patch_embed.h"

namespace latentguard::cpu {
namespace {

constexpr int64_t kTile = 64;

// Tokens of one image.
struct Tile {
  int64_t image, begin, count;
};

// An image's tokens in equal tiles of at most kTile; more, where one image is all that there is
// for the threads to share.
class Tiles {
 public:
  explicit Tiles(const PatchEmbed& args)
      : tokens_(args.tokens_per_image()), images_(args.batch), per_image_(1) {
    if (images_ == 0 || tokens_ == 0) return;
    const int64_t wanted = (at::get_num_threads() + images_ - 1) / images_;
    per_image_ = std::clamp(wanted, (tokens_ + kTile - 1) / kTile, tokens_);
  }
  int64_t count() const { return images_ * per_image_; }
  Tile operator[](int64_t index) const {
    const int64_t part = index % per_image_;
    const int64_t begin = part * tokens_ / per_image_;
    return {index / per_image_, begin, (part + 1) * tokens_ / per_image_ - begin};
  }

 private:
  int64_t tokens_, images_, per_image_;
};

// The affine of each run of P neighboring cells: [channels][row parity][P].
template <int P>
class Affine {
 public:
  explicit Affine(const PatchEmbed& args)
      : factor_(buffer(args.channels * 2 * P)), shift_(buffer(args.channels * 2 * P)) {
    const auto value = [](const float* values, int phases, int64_t i) {
      return values[phases == 1 ? i / (2 * P) : i / (2 * P) * 4 + i / P % 2 * 2 + i % 2];
    };
    for (int64_t i = 0; i < args.channels * 2 * P; ++i) {
      factor_[i] = args.scale ? value(args.scale, args.scale_phases, i) : 1.f;
      shift_[i] = args.shift ? value(args.shift, args.shift_phases, i) : 0.f;
    }
  }
  const float* factor(int64_t channel, int64_t y) const { return at(factor_, channel, y); }
  const float* shift(int64_t channel, int64_t y) const { return at(shift_, channel, y); }

 private:
  static const float* at(const Buffer& values, int64_t channel, int64_t y) {
    return values.get() + (channel * 2 + (y & 1)) * P;
  }
  Buffer factor_, shift_;
};

// Calls f(offset into the tile's patches, offset into the latents, channel, row) for each run of
// P neighboring cells.
template <int P, typename Function>
void for_runs(const PatchEmbed& args, const Tile& tile, Function function) {
  const int64_t size = args.patch_size(), columns = args.columns();
  for (int64_t t = 0; t < tile.count; ++t) {
    const int64_t token = tile.begin + t;
    const int64_t top = token / columns * P, left = token % columns * P;
    for (int64_t c = 0; c < args.channels; ++c) {
      const int64_t plane = (tile.image * args.channels + c) * args.height;
      for (int64_t y = 0; y < P; ++y) {
        function(t * size + (c * P + y) * P, (plane + top + y) * args.width + left, c, top + y);
      }
    }
  }
}

float inverse_alpha(const PatchEmbed& args, const Tile& tile) {
  return args.alpha ? 1.f / args.alpha[tile.image] : 1.f;
}

// Patches of the cleaned, unscaled latent: [tile.count, patch_size].
template <typename T, int P>
void gather(const PatchEmbed& args, const Affine<P>& affine, const Tile& tile, float* patches) {
  const auto* latents = static_cast<const T*>(args.latents);
  const auto* noise = static_cast<const T*>(args.noise);
  const float inverse = inverse_alpha(args, tile);
  const float sigma = args.sigma ? args.sigma[tile.image] : 0.f;
  for_runs<P>(args, tile, [&](int64_t to, int64_t from, int64_t c, int64_t y) {
    const float *factor = affine.factor(c, y), *shift = affine.shift(c, y);
    float x[P];
    for (int i = 0; i < P; ++i) x[i] = static_cast<float>(latents[from + i]);
    if (noise) {
      for (int i = 0; i < P; ++i) x[i] -= sigma * static_cast<float>(noise[from + i]);
    }
    for (int i = 0; i < P; ++i) patches[to + i] = x[i] * inverse * factor[i] + shift[i];
  });
}

// The reverse of gather for gradients.
template <typename T, int P>
void scatter(const PatchEmbed& args, const Affine<P>& affine, const Tile& tile,
             const float* patches) {
  auto* out = static_cast<T*>(args.grad_latents);
  const float inverse = inverse_alpha(args, tile);
  for_runs<P>(args, tile, [&](int64_t from, int64_t to, int64_t c, int64_t y) {
    const float* factor = affine.factor(c, y);
    for (int i = 0; i < P; ++i) {
      out[to + i] = static_cast<T>(patches[from + i] * inverse * factor[i]);
    }
  });
}

// The weight [dim, patch_size] as the right-hand side of patches * weight transposed.
template <typename T>
Panels pack_weight(const PatchEmbed& args) {
  Panels weight(args.patch_size(), args.dim);
  at::parallel_for(0, weight.count(), 1, [&](int64_t first, int64_t last) {
    weight.pack_transposed(static_cast<const T*>(args.weight), first, last);
  });
  return weight;
}

template <typename T, int P>
void forward(const PatchEmbed& args) {
  const int64_t dim = args.dim, size = args.patch_size(), tokens = args.tokens_per_image();
  Buffer held[4];
  const float* first = as_float<T>(args.class_embedding, dim, held[0]);
  const float* position = as_float<T>(args.positional_embedding, (1 + tokens) * dim, held[1]);
  const float* ln_weight = as_float<T>(args.ln_weight, dim, held[2]);
  const float* ln_bias = as_float<T>(args.ln_bias, dim, held[3]);
  auto* out = static_cast<T*>(args.tokens);
  const Panels weight = pack_weight<T>(args);
  const Affine<P> affine(args);
  const Tiles tiles(args);

  const Buffer class_row = buffer(dim);
  for_lanes(dim, [&](int64_t i, auto n) {
    (Vec::loadu(first + i, n) + Vec::loadu(position + i, n)).store(class_row.get() + i, n);
  });
  layer_norm(class_row.get(), class_row.get(), ln_weight, ln_bias, dim, args.eps);
  for (int64_t b = 0; b < args.batch; ++b) {
    from_float(class_row.get(), out + b * (1 + tokens) * dim, dim);
  }
  at::parallel_for(0, tiles.count(), 1, [&](int64_t begin, int64_t end) {
    const Buffer patches = buffer(kTile * size);
    const Buffer scratch = buffer(std::is_same_v<T, float> ? 0 : kTile * dim);
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = tiles[index];
      gather<T>(args, affine, tile, patches.get());
      T* rows = out + (tile.image * (1 + tokens) + 1 + tile.begin) * dim;
      float* result = scratch.get();
      if constexpr (std::is_same_v<T, float>) result = rows;
      product(patches.get(), size, tile.count, weight, position + (1 + tile.begin) * dim, dim,
              result, dim);
      for (int64_t t = 0; t < tile.count; ++t) {
        float* row = result + t * dim;
        layer_norm(row, row, ln_weight, ln_bias, dim, args.eps);
        from_float(row, rows + t * dim, dim);
      }
    }
  });
}

template <typename T, int P>
void backward(const PatchEmbed& args) {
  const int64_t dim = args.dim, size = args.patch_size(), tokens = args.tokens_per_image();
  Buffer held[2];
  const float* position = as_float<T>(args.positional_embedding, (1 + tokens) * dim, held[0]);
  const float* ln_weight = as_float<T>(args.ln_weight, dim, held[1]);
  const auto* grad = static_cast<const T*>(args.grad);
  const Panels weight = pack_weight<T>(args);
  Panels across(dim, size);
  at::parallel_for(0, dim, 64, [&](int64_t first, int64_t last) {
    across.pack(static_cast<const T*>(args.weight), first, last);
  });
  const Affine<P> affine(args);
  const Tiles tiles(args);
  at::parallel_for(0, tiles.count(), 1, [&](int64_t begin, int64_t end) {
    const Buffer patches = buffer(kTile * size);
    const Buffer inner = buffer(kTile * dim);
    const Buffer grad_row = buffer(dim);
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = tiles[index];
      gather<T>(args, affine, tile, patches.get());
      product(patches.get(), size, tile.count, weight, position + (1 + tile.begin) * dim, dim,
              inner.get(), dim);
      for (int64_t t = 0; t < tile.count; ++t) {
        const int64_t token = tile.image * (1 + tokens) + 1 + tile.begin + t;
        const float* above = as_floats(grad + token * dim, dim, grad_row.get());
        layer_norm_backward(above, inner.get() + t * dim, ln_weight, dim, args.eps);
      }
      product(inner.get(), dim, tile.count, across, nullptr, 0, patches.get(), size);
      scatter<T>(args, affine, tile, patches.get());
    }
  });
}

// Calls function(zero of T, integral constant P) for the call's dtype and patch.
template <typename Function>
void for_case(const PatchEmbed& args, Function function) {
  for_type(args.type, [&](auto zero) {
    if (args.patch == 2) {
      function(zero, std::integral_constant<int, 2>());
    } else if (args.patch == 4) {
      function(zero, std::integral_constant<int, 4>());
    } else if (args.patch == 8) {
      function(zero, std::integral_constant<int, 8>());
    } else {
      function(zero, std::integral_constant<int, 16>());
    }
  });
}

}  // namespace

void patch_embed(const PatchEmbed& args) {
  for_case(args, [&](auto zero, auto patch) { forward<decltype(zero), patch>(args); });
}

void patch_embed_backward(const PatchEmbed& args) {
  for_case(args, [&](auto zero, auto patch) { backward<decltype(zero), patch>(args); });
}

}  // namespace latentguard::cpu
