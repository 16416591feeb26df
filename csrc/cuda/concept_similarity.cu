// concept_similarity and concept_heatmap. A block takes 16 rows: layer norm, projection on tensor
// cores, unit length, then the prompts in chunks of 128, whose cosines stay in shared memory while
// each concept's maximum is taken.
//
// Many rows: one launch does it all. Few rows (split_rows) would leave most of the GPU idle, so
// two launches share a workspace: the first spreads the projection over its columns, the second
// the prompts over blocks, which meet in atomic maxima; the last block of a tile writes the result.
//
// A maximum is a 64-bit key: the cosine in an order-preserving form above, the complement of its
// index below, so that ties go to the first prompt whatever the order of the blocks.
#include "cuda/concepts.h"

namespace latentguard::cuda {
namespace {

// Columns of the projection per block of the first launch, and warps that share one of them.
constexpr int kColumnTiles = 2;
constexpr int kDepthParts = kWarps / kColumnTiles;

__device__ Key key_of(float value, int index) {
  unsigned bits = __float_as_uint(value);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  if (value != value) bits = 0xffffffffu;  // NaN wins, as in torch.max
  return static_cast<Key>(bits) << 32 | static_cast<unsigned>(~index);
}
__device__ int key_index(Key key) { return static_cast<int>(~static_cast<unsigned>(key)); }
__device__ float key_value(Key key) {
  const unsigned bits = static_cast<unsigned>(key >> 32);
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// The workspace, by byte offset; each part is there only where it is used.
struct Workspace {
  int64_t keys, counters, bytes;
  __host__ __device__ Workspace(const Concepts& args, bool split, bool keys_fit) {
    keys = split && !args.projected ? (args.rows * args.width * 4 + 15) / 16 * 16 : 0;
    counters = keys;
    if (split || !keys_fit) {
      counters += args.rows * 2 * args.concepts * static_cast<int64_t>(sizeof(Key));
    }
    bytes = counters + (split ? (args.rows + kRows - 1) / kRows * 4 : 0);
  }
};

bool splits(const Concepts& args) { return args.rows <= args.split_rows; }

int64_t chunks_of(int64_t rows) { return (rows + kChunk - 1) / kChunk; }

__host__ __device__ int64_t all_chunks(const Concepts& args) {
  return (args.prompts + kChunk - 1) / kChunk + (args.contrasts + kChunk - 1) / kChunk;
}

__device__ unsigned char* workspace_of(const Concepts& args) {
  return static_cast<unsigned char*>(args.workspace);
}

// Where the first of two launches leaves the projected rows: in the output that keeps them for the
// backward, else in the workspace.
template <typename T>
__device__ T* projected_rows(const Concepts& args) {
  return static_cast<T*>(args.projected ? args.projected : args.workspace);
}

// The projected rows of the tile to memory, for the backward. Ends past a barrier.
template <typename T>
__device__ void save_rows(const Concepts& args, int64_t first, int count,
                          const ConceptMemory<T>& memory) {
  const Shared<float> rows(0);
  const int width = static_cast<int>(args.width);
  T* out = static_cast<T*>(args.projected) + first * width;
  for (int i = static_cast<int>(threadIdx.x); i < count * width; i += kThreads) {
    out[i] = from_float<T>(rows.get(i / width * memory.row_stride + i % width));
  }
  __syncthreads();
}

__device__ bool valid(int begin, int end, int64_t size) {
  return begin >= 0 && begin < end && end <= size;
}

// One warp: the maxima of one row over the cosines of one chunk; raise(concept, key) for each.
template <typename Raise>
__device__ void row_maxima(const Concepts& args, int which, int base, Shared<float> cosines,
                           int lane, Raise raise) {
  const int64_t size = args.bank_rows(which);
  const int concepts = static_cast<int>(args.concepts);
  for (int start = 0; start < concepts; start += kWarp) {
    int begin = 0, end = 0;
    if (start + lane < concepts) {
      begin = args.segments[which][2 * (start + lane)];
      end = args.segments[which][2 * (start + lane) + 1];
      if (!valid(begin, end, size)) begin = end = 0;
    }
    begin = max(begin, base) - base;
    end = min(end, base + kChunk) - base;
    unsigned here = __ballot_sync(kAllLanes, begin < end);
    while (here != 0) {
      const int source = __ffs(static_cast<int>(here)) - 1;
      here &= here - 1;
      const int from = __shfl_sync(kAllLanes, begin, source);
      const int to = __shfl_sync(kAllLanes, end, source);
      Key best = 0;
      for (int i = from + lane; i < to; i += kWarp)
        best = max(best, key_of(cosines.get(i), base + i));
      for (int step = kWarp / 2; step > 0; step /= 2) {
        best = max(best, __shfl_xor_sync(kAllLanes, best, step));
      }
      if (lane == 0) raise(start + source, best);
    }
  }
}

// Cosines of chunks [from, to) of both banks and their maxima. Starts and ends past a barrier.
template <typename T, typename Raise>
__device__ void match_chunks(const Concepts& args, int64_t from, int64_t to, int count,
                             const ConceptMemory<T>& memory, const Lane& at, Raise raise) {
  const Shared<T> units(0);
  const Shared<float> cosines(memory.cosines);
  const Shared<T> area(memory.areas + at.warp * kStageBytes);
  const int64_t chunks = (args.prompts + kChunk - 1) / kChunk;
  for (int64_t chunk = from; chunk < to; ++chunk) {
    const int which = chunk >= chunks;
    const int base = static_cast<int>(chunk - which * chunks) * kChunk;
    const int column = base + at.warp * 16;
    if (column < args.bank_rows(which)) {
      TileC<T> sum;
      sum.clear();
      warp_product<Columns>(
          sum, units, memory.inner_stride, static_cast<const T*>(args.bank[which]), args.width, 0,
          args.bank_rows(which), column, static_cast<int>(args.width), area, at.lane);
      sum.store(cosines, at.warp * 16, memory.cosine_stride);
    }
    __syncthreads();
    for (int r = at.warp; r < count; r += kWarps) {
      row_maxima(args, which, base, cosines.at(r * memory.cosine_stride), at.lane,
                 [&](int concept_index, Key key) { raise(r, which, concept_index, key); });
    }
    __syncthreads();
  }
}

// Results of the tile; get(row, which, concept) reads a key. Neighboring threads take
// neighboring rows, which are neighbors in a heat map.
template <typename Get>
__device__ void write_results(const Concepts& args, int64_t first, int count, Get get) {
  for (int i = static_cast<int>(threadIdx.x); i < kRows * args.concepts; i += kThreads) {
    const int r = i % kRows, k = i / kRows;
    if (r >= count) continue;
    const Key prompt = get(r, 0, k), against = get(r, 1, k);
    const bool known = prompt != 0 && against != 0;
    const float margin =
        known ? key_value(prompt) - key_value(against) : __uint_as_float(0x7fc00000u);
    const int64_t at = args.result_index(first + r, k);
    args.margin[at] = margin;
    if (args.probability) args.probability[at] = 1.f / (1.f + expf(-args.logit_scale * margin));
    if (args.best[0]) args.best[0][at] = prompt != 0 ? key_index(prompt) : -1;
    if (args.best[1]) args.best[1][at] = against != 0 ? key_index(against) : -1;
  }
}

__device__ int rows_in_tile(const Concepts& args, int64_t first) {
  const int64_t left = args.rows - first;
  return left < kRows ? static_cast<int>(left) : kRows;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) concept_kernel(Concepts args) {
  const ConceptMemory<T> memory(args);
  const Lane at;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const int count = rows_in_tile(args, first);
  const int concepts = static_cast<int>(args.concepts);
  const Shared<Key> keys(memory.keys);
  Key* far_keys = reinterpret_cast<Key*>(workspace_of(args)) + first * 2 * concepts;
  const auto slot = [&](int r, int which, int k) { return (r * 2 + which) * concepts + k; };
  for (int i = static_cast<int>(threadIdx.x); i < count * 2 * concepts; i += kThreads) {
    if (memory.keys_fit) {
      keys.set(i, 0);
    } else {
      far_keys[i] = 0;
    }
  }
  project_rows<T>(args, first, count, memory, at);
  if (args.projected) save_rows<T>(args, first, count, memory);
  unit_rows<T>(args, memory, at);
  match_chunks<T>(args, 0, all_chunks(args), count, memory, at,
                  [&](int r, int which, int k, Key key) {
                    const int i = slot(r, which, k);
                    if (memory.keys_fit) {
                      keys.set(i, max(keys.get(i), key));
                    } else {
                      far_keys[i] = max(far_keys[i], key);
                    }
                  });
  __syncthreads();
  write_results(args, first, count, [&](int r, int which, int k) {
    return memory.keys_fit ? keys.get(slot(r, which, k)) : far_keys[slot(r, which, k)];
  });
}

// First of two launches: rows [16, 32 columns] of the projection into the workspace, and the keys
// and counters of the second one set to zero.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) concept_project_kernel(Concepts args) {
  const ConceptMemory<T> memory(args);
  const Workspace space(args, true, memory.keys_fit);
  const Lane at;
  const int groups = static_cast<int>((args.width + kColumnTiles * 16 - 1) / (kColumnTiles * 16));
  const int64_t first = static_cast<int64_t>(blockIdx.x) / groups * kRows;
  const int group = static_cast<int>(blockIdx.x % groups);
  const int count = rows_in_tile(args, first);
  const int dim = static_cast<int>(args.dim), width = static_cast<int>(args.width);
  const int begin = group * kColumnTiles * 16;
  T* out = projected_rows<T>(args);
  if (group == 0) {
    auto* keys = reinterpret_cast<Key*>(workspace_of(args) + space.keys);
    auto* counters = reinterpret_cast<unsigned*>(workspace_of(args) + space.counters);
    const int64_t per_row = 2 * args.concepts;
    for (int64_t i = threadIdx.x; i < count * per_row; i += kThreads) keys[first * per_row + i] = 0;
    if (threadIdx.x == 0) counters[first / kRows] = 0;
  }
  const RowScalars moments = tile_moments<T>(args, first, count, memory, at);
  if (args.projection == nullptr) {
    normalized_features<T>(args, first, count, at, moments, 0, dim, [&](int r, int i, float x) {
      if (r < count && i >= begin && i < begin + kColumnTiles * 16 && i < width) {
        out[(first + r) * width + i] = from_float<T>(x);
      }
    });
    return;
  }
  // All of the left side, where other kernels keep their rows.
  const Shared<T> operands(0);
  normalized_features<T>(args, first, count, at, moments, 0, dim, [&](int r, int i, float x) {
    operands.set(r * memory.inner_stride + i, from_float<T>(x));
  });
  __syncthreads();
  // Warps split the depth of each column tile; the parts meet in their staging areas.
  const Shared<float> parts(memory.areas);
  constexpr int kPart = kStageBytes / static_cast<int>(sizeof(float));
  constexpr int kStride = 16 + kPad<float>;
  const int part = at.warp / kColumnTiles, tile = at.warp % kColumnTiles;
  const int share = round_up((dim + kDepthParts - 1) / kDepthParts, 16);
  const int from = min(part * share, dim), depth = min(share, dim - from);
  TileC<T> sum;
  sum.clear();
  warp_product<Rows>(sum, operands.at(from < dim ? from : 0), memory.inner_stride,
                     static_cast<const T*>(args.projection), width, from, width, begin + tile * 16,
                     depth, Shared<T>(memory.areas + at.warp * kStageBytes), at.lane);
  sum.store(parts, at.warp * kPart, kStride);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumnTiles * 16; i += kThreads) {
    const int r = i / (kColumnTiles * 16), c = i % (kColumnTiles * 16);
    if (r >= count || begin + c >= width) continue;
    float total = 0;
    for (int p = 0; p < kDepthParts; ++p) {
      total += parts.get((p * kColumnTiles + c / 16) * kPart + r * kStride + c % 16);
    }
    out[(first + r) * width + begin + c] = from_float<T>(total);
  }
}

// Second of two launches: one chunk of prompts for one tile of rows.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) concept_match_kernel(Concepts args) {
  const ConceptMemory<T> memory(args);
  const Workspace space(args, true, memory.keys_fit);
  const Lane at;
  const int64_t chunks = all_chunks(args) > 0 ? all_chunks(args) : 1;
  const int64_t first = blockIdx.x / chunks * kRows, chunk = blockIdx.x % chunks;
  const int count = rows_in_tile(args, first);
  const int concepts = static_cast<int>(args.concepts), width = static_cast<int>(args.width);
  const T* projected = projected_rows<T>(args) + first * width;
  auto* keys = reinterpret_cast<Key*>(workspace_of(args) + space.keys) + first * 2 * concepts;
  load_rows(projected, count, memory, at, width);
  unit_rows<T>(args, memory, at);
  const auto slot = [&](int r, int which, int k) { return (r * 2 + which) * concepts + k; };
  match_chunks<T>(
      args, chunk, min(chunk + 1, all_chunks(args)), count, memory, at,
      [&](int r, int which, int k, Key key) { atomicMax(keys + slot(r, which, k), key); });
  // The last block of the tile to get here sees every maximum and writes the results.
  const Shared<unsigned> arrived(memory.cosines);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    auto* counters = reinterpret_cast<unsigned*>(workspace_of(args) + space.counters);
    arrived.set(0, atomicAdd(counters + first / kRows, 1u));
  }
  __syncthreads();
  if (arrived.get(0) != chunks - 1) return;
  __threadfence();
  write_results(args, first, count, [&](int r, int which, int k) {
    return atomicMax(keys + slot(r, which, k), Key{0});  // a read past the first-level cache
  });
}

}  // namespace

int64_t concept_workspace_bytes(const Concepts& args) {
  bool keys_fit = true;
  const cudaError_t status = for_type(args.type, [&](auto zero) {
    keys_fit = ConceptMemory<decltype(zero)>(args).keys_fit;
    return cudaSuccess;
  });
  return status == cudaSuccess ? Workspace(args, splits(args), keys_fit).bytes : 0;
}

cudaError_t concept_similarity(const Concepts& args, cudaStream_t stream) {
  const int64_t tiles = (args.rows + kRows - 1) / kRows;
  return for_type(args.type, [&](auto zero) {
    using T = decltype(zero);
    const int bytes = ConceptMemory<T>(args).total;
    if (!splits(args)) return launch(concept_kernel<T>, tiles, kThreads, bytes, stream, args);
    const int64_t groups = (args.width + kColumnTiles * 16 - 1) / (kColumnTiles * 16);
    const cudaError_t status =
        launch(concept_project_kernel<T>, tiles * groups, kThreads, bytes, stream, args);
    if (status != cudaSuccess) return status;
    const int64_t chunks = chunks_of(args.prompts) + chunks_of(args.contrasts);
    return launch(concept_match_kernel<T>, tiles * (chunks > 0 ? chunks : 1), kThreads, bytes,
                  stream, args);
  });
}

}  // namespace latentguard::cuda
