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
  // float rows that are kept for the backward are computed where they are kept.
  if constexpr (std::is_same_v<T, float>) {
    if (args.projected) unit = static_cast<float*>(args.projected) + begin * args.width;
  }
  project<T>(args, head, begin, count, rows, unit, inverse);
  if constexpr (!std::is_same_v<T, float>) {
    if (args.projected) {
      from_float(unit, static_cast<T*>(args.projected) + begin * args.width, count * args.width);
    }
  }
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

// A prompt's row of the bank and what it weighs in the gradient.
struct Term {
  const void* prompt;
  float weight;
};

// The prompts that reached row r's maxima; neighbouring concepts that share one share the term.
template <typename T>
void gather_terms(const Concepts& args, int64_t r, std::vector<Term>& terms) {
  terms.clear();
  for (int which = 0; which < 2; ++which) {
    int64_t last = -1;
    for (int64_t k = 0; k < args.concepts; ++k) {
      const int64_t at = args.result_index(r, k);
      const int64_t index = args.saved_best[which][at];
      if (index < 0) continue;
      float share = args.grad_margin ? args.grad_margin[at] : 0.f;
      if (args.grad_probability) {
        const float p = args.saved_probability[at];
        share += args.grad_probability[at] * args.logit_scale * p * (1 - p);
      }
      if (which == 1) share = -share;
      if (index == last) {
        terms.back().weight += share;
      } else {
        terms.push_back({static_cast<const T*>(args.bank[which]) + index * args.width, share});
        last = index;
      }
    }
  }
}

// total [width] = the weighted sum of the terms, in pieces that stay in registers.
template <typename T>
void add_terms(const std::vector<Term>& terms, int64_t width, float* total) {
  constexpr int64_t kPiece = 8 * Vec::size();
  int64_t from = 0;
  for (; from + kPiece <= width; from += kPiece) {
    Vec sums[8];
    for (Vec& sum : sums) sum = Vec(0.f);
    float held[kPiece];
    for (const Term& term : terms) {
      const auto* prompt = static_cast<const T*>(term.prompt) + from;
      const float* values = held;
      if constexpr (std::is_same_v<T, float>) {
        values = prompt;
      } else {
        to_float(prompt, held, kPiece);
      }
      const Vec weight(term.weight);
      for (int j = 0; j < 8; ++j) {
        sums[j] = at::vec::fmadd(weight, Vec::loadu(values + j * Vec::size()), sums[j]);
      }
    }
    for (int j = 0; j < 8; ++j) sums[j].store(total + from + j * Vec::size());
  }
  for (int64_t i = from; i < width; ++i) {
    float sum = 0;
    for (const Term& term : terms) {
      sum += term.weight * static_cast<float>(static_cast<const T*>(term.prompt)[i]);
    }
    total[i] = sum;
  }
}

// In place: the gradient of a unit vector becomes that of the row before its norm.
void norm_backward(float* grad, const float* row, int64_t width) {
  const float norm = std::sqrt(dot(row, row, width));
  const float inverse = 1.f / (norm < kNormFloor ? kNormFloor : norm);
  const Vec along(dot(row, grad, width) * inverse * inverse), factor(inverse);
  for_lanes(width, [&](int64_t i, int64_t n) {
    const Vec g = Vec::loadu(grad + i, n) - along * Vec::loadu(row + i, n);
    (g * factor).store(grad + i, n);
  });
}

template <typename T>
void backward(const Concepts& args) {
  Buffer held[2];
  const float* ln_weight = as_float<T>(args.ln_weight, args.dim, held[0]);
  const float* projection = as_float<T>(args.projection, args.dim * args.width, held[1]);
  const int64_t width = args.width, dim = args.dim;
  over_tiles(args.rows, [&](int64_t first, int64_t last) {
    const int64_t tile = std::min(kTile, last - first);
    const Buffer outer = buffer(tile * width), inner = buffer(projection ? tile * dim : 0);
    const Buffer row = buffer(std::max(width, dim));
    std::vector<Term> terms;
    for (int64_t begin = first; begin < last; begin += tile) {
      const int64_t count = std::min(tile, last - begin);
      for (int64_t r = 0; r < count; ++r) {
        gather_terms<T>(args, begin + r, terms);
        float* grad = outer.get() + r * width;
        add_terms<T>(terms, width, grad);
        to_float(static_cast<const T*>(args.saved_projected) + (begin + r) * width, row.get(),
                 width);
        norm_backward(grad, row.get(), width);
      }
      float* grads = outer.get();
      if (projection) {
        grads = inner.get();
        product(outer.get(), projection, grads, count, dim, width, true);
      }
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = (begin + r) * dim;
        float* grad = grads + r * dim;
        if (ln_weight) {
          to_float(static_cast<const T*>(args.features) + at, row.get(), dim);
          layer_norm_backward(grad, row.get(), ln_weight, dim, args.eps);
          grad = row.get();
        }
        from_float(grad, static_cast<T*>(args.grad_features) + at, dim);
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
