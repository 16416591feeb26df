// concept_similarity on the CPU, which also serves concept_heatmap: rows are taken in tiles,
// prompts in chunks, so that only [kTile, kChunk] cosines exist at a time. The products go to the
// platform's BLAS; layer norm, norm and the segmented maximum are fused around them.
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/rows.h"

namespace latentguard::cpu {
namespace {

constexpr int64_t kTile = 128;
constexpr int64_t kChunk = 256;

struct Best {
  float value;
  int64_t index;
};

// Maximum of [begin, end) and where it stands first; NaN counts as the largest, as in torch.max,
// so that a damaged embedding is never outvoted.
void take_best(const float* cosine, int64_t begin, int64_t end, int64_t offset, Best& best) {
  Vec top(-std::numeric_limits<float>::infinity());
  int64_t i = begin;
  for (; i + Vec::size() <= end; i += Vec::size()) {
    top = at::vec::maximum(top, Vec::loadu(cosine + i));
  }
  float lanes[Vec::size()];
  top.store(lanes);
  float value = -std::numeric_limits<float>::infinity();
  const auto take = [&value](float x) {
    if (x > value || std::isnan(x)) value = x;
  };
  for (float lane : lanes) {
    if (!std::isnan(value)) take(lane);
  }
  for (; i < end; ++i) {
    if (!std::isnan(value)) take(cosine[i]);
  }
  if (std::isnan(best.value) || !(value > best.value || std::isnan(value) || best.index < 0)) {
    return;
  }
  for (i = begin; i < end; ++i) {
    if (cosine[i] == value || (std::isnan(value) && std::isnan(cosine[i]))) break;
  }
  best = {value, offset + i};
}

struct Head {
  const float *ln_weight, *ln_bias, *projection;
  Buffer held[3];
};

template <typename T>
void load_head(const Concepts& args, Head& head) {
  head.ln_weight = as_float<T>(args.ln_weight, args.dim, head.held[0]);
  head.ln_bias = as_float<T>(args.ln_bias, args.dim, head.held[1]);
  head.projection = as_float<T>(args.projection, args.dim * args.width, head.held[2]);
}

// Rows [begin, begin + count) after layer norm and projection into `out` [count, width], and the
// reciprocal of each row's norm.
template <typename T>
void project(const Concepts& args, const Head& head, int64_t begin, int64_t count, float* scratch,
             float* out, float* inverse) {
  const auto* features = static_cast<const T*>(args.features) + begin * args.dim;
  float* rows = head.projection ? scratch : out;
  for (int64_t r = 0; r < count; ++r) {
    float* row = rows + r * args.dim;
    to_float(features + r * args.dim, row, args.dim);
    if (head.ln_weight) layer_norm(row, row, head.ln_weight, head.ln_bias, args.dim, args.eps);
  }
  if (head.projection) {
    product(rows, head.projection, out, count, args.width, args.dim, false);
  }
  for (int64_t r = 0; r < count; ++r) {
    const float* row = out + r * args.width;
    const float norm = std::sqrt(dot(row, row, args.width));
    // A NaN norm stays one: max() with the floor second would hide it.
    inverse[r] = 1.f / (norm < kNormFloor ? kNormFloor : norm);
  }
}

bool valid(const int32_t* segment, int64_t size) {
  return segment[0] >= 0 && segment[0] < segment[1] && segment[1] <= size;
}

template <typename T>
void match(const Concepts& args, const Head& head, int64_t begin, int64_t count, float* cosine,
           float* rows, float* unit, float* inverse, Best* best) {
  project<T>(args, head, begin, count, rows, unit, inverse);
  std::fill(best, best + count * args.concepts * 2,
            Best{-std::numeric_limits<float>::infinity(), -1});
  for (int which = 0; which < 2; ++which) {
    const int64_t size = args.bank_rows(which);
    const auto* bank = static_cast<const T*>(args.bank[which]);
    const int32_t* segments = args.segments[which];
    for (int64_t chunk = 0; chunk < size; chunk += kChunk) {
      const int64_t width = std::min(kChunk, size - chunk);
      Buffer held;
      const float* prompts = as_float<T>(bank + chunk * args.width, width * args.width, held);
      product(unit, prompts, cosine, count, width, args.width, true);
      for (int64_t r = 0; r < count; ++r) {
        Best* of_row = best + (r * 2 + which) * args.concepts;
        for (int64_t k = 0; k < args.concepts; ++k) {
          const int32_t* segment = segments + 2 * k;
          // Concepts that share their contrast prompts share the result.
          if (k > 0 && segment[0] == segment[-2] && segment[1] == segment[-1]) {
            of_row[k] = of_row[k - 1];
            continue;
          }
          const int64_t from = std::max<int64_t>(segment[0], chunk);
          const int64_t to = std::min<int64_t>(segment[1], chunk + width);
          if (from < to && valid(segment, size)) {
            take_best(cosine + r * width, from - chunk, to - chunk, chunk, of_row[k]);
          }
        }
      }
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t k = 0; k < args.concepts; ++k) {
      const Best& prompt = best[r * 2 * args.concepts + k];
      const Best& against = best[(r * 2 + 1) * args.concepts + k];
      const int64_t at = args.result_index(begin + r, k);
      const bool known = prompt.index >= 0 && against.index >= 0;
      const float margin = known ? prompt.value * inverse[r] - against.value * inverse[r]
                                 : std::numeric_limits<float>::quiet_NaN();
      args.margin[at] = margin;
      if (args.probability)
        args.probability[at] = 1.f / (1.f + std::exp(-args.logit_scale * margin));
      if (args.best[0]) args.best[0][at] = prompt.index;
      if (args.best[1]) args.best[1][at] = against.index;
    }
  }
}

// Many rows are shared out between threads; few leave the threads to the matrix products.
template <typename Function>
void over_tiles(int64_t rows, Function function) {
  const int64_t threads = at::get_num_threads();
  const int64_t share = (rows + threads - 1) / threads;
  if (rows < 16 * threads) {
    if (rows > 0) function(0, rows);
    return;
  }
  const int64_t tile = std::min(kTile, share);
  const int64_t tiles = (rows + tile - 1) / tile;
  at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    function(first * tile, std::min(rows, last * tile));
  });
}

template <typename T>
void forward(const Concepts& args) {
  Head head;
  load_head<T>(args, head);
  over_tiles(args.rows, [&](int64_t first, int64_t last) {
    const int64_t tile = std::min(kTile, last - first);
    const Buffer cosine = buffer(tile * kChunk), unit = buffer(tile * args.width);
    const Buffer rows = buffer(head.projection ? tile * args.dim : 0), inverse = buffer(tile);
    std::vector<Best> best(tile * args.concepts * 2);
    for (int64_t begin = first; begin < last; begin += tile) {
      match<T>(args, head, begin, std::min(tile, last - begin), cosine.get(), rows.get(),
               unit.get(), inverse.get(), best.data());
    }
  });
}

template <typename T>
void backward(const Concepts& args) {
  Head head;
  load_head<T>(args, head);
  const int64_t width = args.width;
  over_tiles(args.rows, [&](int64_t first, int64_t last) {
    const int64_t tile = std::min(kTile, last - first);
    const Buffer unit = buffer(tile * width), inverse = buffer(tile);
    const Buffer rows = buffer(tile * args.dim), grads = buffer(tile * args.dim);
    const Buffer sum_row = buffer(width), prompt = buffer(width);
    for (int64_t begin = first; begin < last; begin += tile) {
      const int64_t count = std::min(tile, last - begin);
      project<T>(args, head, begin, count, rows.get(), unit.get(), inverse.get());
      for (int64_t r = 0; r < count; ++r) {
        float* total = sum_row.get();
        std::fill(total, total + width, 0.f);
        for (int64_t k = 0; k < args.concepts; ++k) {
          const int64_t at = args.result_index(begin + r, k);
          float share = args.grad_margin ? args.grad_margin[at] : 0.f;
          if (args.grad_probability) {
            const float p = args.saved_probability[at];
            share += args.grad_probability[at] * args.logit_scale * p * (1 - p);
          }
          for (int which = 0; which < 2; ++which) {
            const int64_t index = args.saved_best[which][at];
            if (index < 0) continue;
            const auto* row = static_cast<const T*>(args.bank[which]) + index * width;
            to_float(row, prompt.get(), width);
            const Vec factor(which == 0 ? share : -share);
            for_lanes(width, [&](int64_t i, int64_t n) {
              at::vec::fmadd(factor, Vec::loadu(prompt.get() + i, n), Vec::loadu(total + i, n))
                  .store(total + i, n);
            });
          }
        }
        float* v = unit.get() + r * width;
        const float scale = inverse[r];
        const Vec along(dot(v, total, width) * scale * scale), factor(scale);
        for_lanes(width, [&](int64_t i, int64_t n) {
          const Vec g = Vec::loadu(total + i, n) - along * Vec::loadu(v + i, n);
          (g * factor).store(v + i, n);
        });
      }
      float* inner = unit.get();
      if (head.projection) {
        product(unit.get(), head.projection, grads.get(), count, args.dim, width, true);
        inner = grads.get();
      }
      auto* out = static_cast<T*>(args.grad_features) + begin * args.dim;
      const auto* features = static_cast<const T*>(args.features) + begin * args.dim;
      for (int64_t r = 0; r < count; ++r) {
        float* row = inner + r * args.dim;
        if (head.ln_weight) {
          float* input = rows.get() + r * args.dim;
          to_float(features + r * args.dim, input, args.dim);
          layer_norm_backward(row, input, head.ln_weight, args.dim, args.eps);
          row = input;
        }
        from_float(row, out + r * args.dim, args.dim);
      }
    }
  });
}

}  // namespace

void concept_similarity(const Concepts& args) {
  for_type(args.type, [&](auto zero) { forward<decltype(zero)>(args); });
}

void concept_similarity_backward(const Concepts& args) {
  for_type(args.type, [&](auto zero) { backward<decltype(zero)>(args); });
}

}  // namespace latentguard::cpu
