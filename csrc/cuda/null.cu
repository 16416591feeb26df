// null in one launch: a thread takes one piece of 16 bytes, which memory gives in a single access.
// The template of a kernel and its launcher. It takes the struct of include/null.h by value and
// includes no torch header, so that csrc/testing can run it on the CPU too, thread by thread.
//
// A kernel whose threads work together keeps what they share in Shared<T> (cuda/device.h): on the
// host execution layer every access to it is checked. Its threads then must all reach each
// __syncthreads: no early return before one.
#include "cuda/device.h"
#include "include/null.h"

namespace latentguard::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) null_kernel(Null args) {
  constexpr int N = kVector<T>;
  using Vec = Vector<T, N>;
  const auto* x = static_cast<const T*>(args.x);
  auto* out = static_cast<T*>(args.out);
  // 64 bits: a tensor may have more elements than an int counts.
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (begin + N <= args.size) {
    Vec piece = *reinterpret_cast<const Vec*>(x + begin);
    for (int j = 0; j < N; ++j)
      piece.value[j] = from_float<T>(to_float(piece.value[j]) * args.scale);
    *reinterpret_cast<Vec*>(out + begin) = piece;
  } else {  // the last piece may be shorter; threads beyond it have none
    for (int64_t i = begin; i < args.size; ++i) out[i] = from_float<T>(to_float(x[i]) * args.scale);
  }
}

}  // namespace

cudaError_t null(const Null& args, cudaStream_t stream) {
  return for_type(args.type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t pieces = (args.size + kVector<T> - 1) / kVector<T>;
    const int64_t blocks = (pieces + kThreads - 1) / kThreads;
    return launch(null_kernel<T>, blocks, kThreads, /*shared_bytes=*/0, stream, args);
  });
}

}  // namespace latentguard::cuda
