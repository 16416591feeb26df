// concept_similarity on the CPU, which also serves concept_heatmap: rows are taken in tiles,
// prompts in chunks, so that only [tile, chunk] cosines exist at a time. Layer norm, norm and the
// segmented maximum are fused around the products.
//
// Many rows are shared out between the threads. A few rows (pooled features of a small batch) are
// bound by reading the projection and the bank: the threads share those instead.
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/gemm.h"
#include "include/concepts.h"

namespace latentguard::cpu {
namespace {

constexpr int64_t kFewRows = 16;
constexpr int64_t kTile = 64;
constexpr int64_t kChunk = 128;
// Prompts of a chunk, and parts of the projection, where the threads share those.
constexpr int64_t kSmallChunk = 32;
constexpr int64_t kMostParts = 8;
// Multiply-adds of a few rows that are worth waking a thread for.
constexpr int64_t kThreadWork = 1 << 19;

struct Best {
  float value = -std::numeric_limits<float>::infinity();
  int64_t index = -1;

  // The larger value; NaN counts as the largest, as in torch.max, so that a damaged embedding is
  // never outvoted. Candidates come in the order of their indices: ties go to the first.
  void raise(float candidate, int64_t at) {
    if (std::isnan(value)) return;
    if (candidate > value || std::isnan(candidate) || index < 0) *this = {candidate, at};
  }
};

// Maximum of cosine [begin, end), where it stands first, `offset` added.
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
  for (i = begin; i + 1 < end; ++i) {
    if (cosine[i] == value || (std::isnan(value) && std::isnan(cosine[i]))) break;
  }
  best.raise(value, offset + i);
}

// Reciprocal of a row's norm, at least the floor; a NaN norm stays one: max() would hide it.
float inverse_norm(const float* row, int64_t width) {
  const float norm = std::sqrt(dot(row, row, width));
  return 1.f / (norm < kNormFloor ? kNormFloor : norm);
}

// Layer norm's weights as floats.
struct Norm {
  const float *weight, *bias;
  Buffer held[2];
};

template <typename T>
void load_norm(const Concepts& args, Norm& norm) {
  norm.weight = as_float<T>(args.ln_weight, args.dim, norm.held[0]);
  norm.bias = as_float<T>(args.ln_bias, args.dim, norm.held[1]);
}

// rows [count, dim] = layer_norm(features) from row `begin` on.
template <typename T>
void normalize(const Concepts& args, const Norm& norm, int64_t begin, int64_t count, float* rows) {
  const auto* features = static_cast<const T*>(args.features) + begin * args.dim;
  for (int64_t r = 0; r < count; ++r) {
    float* row = rows + r * args.dim;
    const float* from = as_floats(features + r * args.dim, args.dim, row);
    if (norm.weight) {
      layer_norm(from, row, norm.weight, norm.bias, args.dim, args.eps);
    } else if (from != row) {
      std::copy_n(from, args.dim, row);
    }
  }
}

// Keeps projected rows for the backward, where they are not there already.
template <typename T>
void keep(const Concepts& args, int64_t begin, int64_t count, const float* projected) {
  if (args.projected == nullptr) return;
  from_float(projected, static_cast<T*>(args.projected) + begin * args.width, count * args.width);
}

bool valid(const int32_t* segment, int64_t size) {
  return segment[0] >= 0 && segment[0] < segment[1] && segment[1] <= size;
}

// Both banks in chunks of `size` prompts, numbered through.
struct Chunks {
  int64_t size, first_bank, count;
  Chunks(const Concepts& args, int64_t chunk)
      : size(chunk),
        first_bank((args.prompts + chunk - 1) / chunk),
        count(first_bank + (args.contrasts + chunk - 1) / chunk) {}
};

// Cosines (times the norm) of projected rows with chunks [from, to), and the maxima of each
// concept so far: best [count, 2, concepts].
template <typename T>
void match(const Concepts& args, const float* rows, int64_t count, const Chunks& chunks,
           int64_t from, int64_t to, Best* best) {
  const Buffer cosine = buffer(count * chunks.size);
  const Buffer held = buffer(std::is_same_v<T, float> ? 0 : chunks.size * args.width);
  for (int64_t chunk = from; chunk < to; ++chunk) {
    const int which = chunk >= chunks.first_bank;
    const int64_t base = (chunk - which * chunks.first_bank) * chunks.size;
    const int64_t size = args.bank_rows(which), width = std::min(chunks.size, size - base);
    const auto* bank = static_cast<const T*>(args.bank[which]) + base * args.width;
    const float* prompts = as_floats(bank, width * args.width, held.get());
    dots(rows, count, prompts, width, args.width, cosine.get(), width);
    for (int64_t r = 0; r < count; ++r) {
      Best* of_row = best + (r * 2 + which) * args.concepts;
      for (int64_t k = 0; k < args.concepts; ++k) {
        const int32_t* segment = args.segments[which] + 2 * k;
        // Concepts that share their contrast prompts share the result.
        if (k > 0 && segment[0] == segment[-2] && segment[1] == segment[-1]) {
          of_row[k] = of_row[k - 1];
          continue;
        }
        const int64_t begin = std::max<int64_t>(segment[0], base);
        const int64_t end = std::min<int64_t>(segment[1], base + width);
        if (begin < end && valid(segment, size)) {
          take_best(cosine.get() + r * width, begin - base, end - base, base, of_row[k]);
        }
      }
    }
  }
}

// Results of rows [begin, begin + count) from their maxima and the reciprocals of their norms.
void write_results(const Concepts& args, int64_t begin, int64_t count, const float* inverse,
                   const Best* best) {
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

// Calls function(first, count) for tiles of rows, in parallel: as many for each thread.
template <typename Function>
void over_tiles(int64_t rows, Function function) {
  const int64_t threads = at::get_num_threads(), least = (rows + kTile - 1) / kTile;
  const int64_t tiles = std::min((least + threads - 1) / threads * threads, rows);
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * rows / tiles;
      function(first, (tile + 1) * rows / tiles - first);
    }
  });
}

template <typename T>
void forward_tiles(const Concepts& args) {
  Norm norm;
  load_norm<T>(args, norm);
  const auto* projection = static_cast<const T*>(args.projection);
  Panels panels(projection ? args.dim : 0, args.width);
  at::parallel_for(0, panels.depth(), 64,
                   [&](int64_t first, int64_t last) { panels.pack(projection, first, last); });
  const Chunks chunks(args, kChunk);
  over_tiles(args.rows, [&](int64_t first, int64_t count) {
    const Buffer rows = buffer(count * args.dim), inverse = buffer(count);
    const Buffer outer = buffer(projection ? count * args.width : 0);
    std::vector<Best> best(count * 2 * args.concepts);
    normalize<T>(args, norm, first, count, rows.get());
    float* projected = rows.get();
    if (projection) {
      projected = outer.get();
      product(rows.get(), args.dim, count, panels, nullptr, 0, projected, args.width);
    }
    keep<T>(args, first, count, projected);
    for (int64_t r = 0; r < count; ++r) {
      inverse[r] = inverse_norm(projected + r * args.width, args.width);
    }
    match<T>(args, projected, count, chunks, 0, chunks.count, best.data());
    write_results(args, first, count, inverse.get(), best.data());
  });
}

// How many threads should share `work` multiply-adds of a few rows.
int64_t threads_for(int64_t work, int64_t most) {
  const int64_t wanted = std::min<int64_t>(at::get_num_threads(), work / kThreadWork);
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(most, 1));
}

// rows [count, dim] * projection; each thread reads a part of the projection, in order.
template <typename T>
Buffer project_few(const Concepts& args, const float* rows) {
  const int64_t size = args.rows * args.width;
  const int64_t parts = threads_for(size * args.dim, kMostParts);
  Buffer out = buffer(parts * size);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t from = part * args.dim / parts, to = (part + 1) * args.dim / parts;
      float* sums = out.get() + part * size;
      std::fill(sums, sums + size, 0.f);
      stream_product(rows + from, args.dim, args.rows,
                     static_cast<const T*>(args.projection) + from * args.width, args.width,
                     to - from, sums);
    }
  });
  for (int64_t part = 1; part < parts; ++part) {
    const float* more = out.get() + part * size;
    for_lanes(size, [&](int64_t i, auto n) {
      (Vec::loadu(out.get() + i, n) + Vec::loadu(more + i, n)).store(out.get() + i, n);
    });
  }
  return out;
}

template <typename T>
void forward_few(const Concepts& args) {
  Norm norm;
  load_norm<T>(args, norm);
  Buffer rows = buffer(args.rows * args.dim);
  normalize<T>(args, norm, 0, args.rows, rows.get());
  if (args.projection) rows = project_few<T>(args, rows.get());
  keep<T>(args, 0, args.rows, rows.get());
  float inverse[kFewRows];
  for (int64_t r = 0; r < args.rows; ++r) {
    inverse[r] = inverse_norm(rows.get() + r * args.width, args.width);
  }
  const Chunks chunks(args, kSmallChunk);
  const int64_t slots = args.rows * 2 * args.concepts;
  const int64_t work = args.rows * args.width * (args.prompts + args.contrasts);
  const int64_t parts = threads_for(work, chunks.count);
  std::vector<Best> best(parts * slots);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      match<T>(args, rows.get(), args.rows, chunks, part * chunks.count / parts,
               (part + 1) * chunks.count / parts, best.data() + part * slots);
    }
  });
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t i = 0; i < slots; ++i) {
      const Best& candidate = best[part * slots + i];
      if (candidate.index >= 0) best[i].raise(candidate.value, candidate.index);
    }
  }
  write_results(args, 0, args.rows, inverse, best.data());
}

// A prompt's row of the bank and what it weighs in the gradient.
struct Term {
  const void* prompt;
  float weight;
};

// The prompts that reached row r's maxima; neighboring concepts that share one share the term.
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

// outer [count, width]: the gradient of the projected rows from `begin` on.
template <typename T>
void outer_gradient(const Concepts& args, int64_t begin, int64_t count, float* outer) {
  const int64_t width = args.width;
  const Buffer held = buffer(std::is_same_v<T, float> ? 0 : width);
  std::vector<Term> terms;
  for (int64_t r = 0; r < count; ++r) {
    gather_terms<T>(args, begin + r, terms);
    float* grad = outer + r * width;
    add_terms<T>(terms, width, grad);
    const auto* row = static_cast<const T*>(args.saved_projected) + (begin + r) * width;
    norm_backward(grad, as_floats(row, width, held.get()), width);
  }
}

// The gradient of features from `begin` on, from that of the normalized rows, inner [count, dim].
template <typename T>
void write_gradient(const Concepts& args, const float* ln_weight, int64_t begin, int64_t count,
                    const float* inner) {
  const int64_t dim = args.dim;
  const Buffer row = buffer(ln_weight ? dim : 0);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = (begin + r) * dim;
    const float* grad = inner + r * dim;
    if (ln_weight) {
      to_float(static_cast<const T*>(args.features) + at, row.get(), dim);
      layer_norm_backward(grad, row.get(), ln_weight, dim, args.eps);
      grad = row.get();
    }
    from_float(grad, static_cast<T*>(args.grad_features) + at, dim);
  }
}

template <typename T>
void backward_tiles(const Concepts& args) {
  Buffer held[2];
  const float* ln_weight = as_float<T>(args.ln_weight, args.dim, held[0]);
  const float* projection = as_float<T>(args.projection, args.dim * args.width, held[1]);
  over_tiles(args.rows, [&](int64_t first, int64_t count) {
    const Buffer outer = buffer(count * args.width);
    const Buffer inner = buffer(projection ? count * args.dim : 0);
    outer_gradient<T>(args, first, count, outer.get());
    if (projection) {
      dots(outer.get(), count, projection, args.dim, args.width, inner.get(), args.dim);
    }
    write_gradient<T>(args, ln_weight, first, count, projection ? inner.get() : outer.get());
  });
}

template <typename T>
void backward_few(const Concepts& args) {
  Buffer held;
  const float* ln_weight = as_float<T>(args.ln_weight, args.dim, held);
  Buffer grads = buffer(args.rows * args.width);
  outer_gradient<T>(args, 0, args.rows, grads.get());
  if (args.projection) {
    Buffer inner = buffer(args.rows * args.dim);
    const int64_t parts = threads_for(args.rows * args.width * args.dim, args.dim / kSmallChunk);
    const int64_t grain = (args.dim + parts - 1) / parts;
    at::parallel_for(0, args.dim, grain, [&](int64_t begin, int64_t end) {
      const Buffer part = buffer(std::is_same_v<T, float> ? 0 : (end - begin) * args.width);
      const auto* rows = static_cast<const T*>(args.projection) + begin * args.width;
      dots(grads.get(), args.rows, as_floats(rows, (end - begin) * args.width, part.get()),
           end - begin, args.width, inner.get() + begin, args.dim);
    });
    grads = std::move(inner);
  }
  write_gradient<T>(args, ln_weight, 0, args.rows, grads.get());
}

}  // namespace

void concept_similarity(const Concepts& args) {
  for_type(args.type, [&](auto zero) {
    args.rows < kFewRows ? forward_few<decltype(zero)>(args) : forward_tiles<decltype(zero)>(args);
  });
}

void concept_similarity_backward(const Concepts& args) {
  for_type(args.type, [&](auto zero) {
    args.rows < kFewRows ? backward_few<decltype(zero)>(args)
                         : backward_tiles<decltype(zero)>(args);
  });
}

}  // namespace latentguard::cpu
