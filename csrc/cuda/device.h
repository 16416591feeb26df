// What every kernel file includes: the CUDA headers under nvcc, and under a C++ compiler the host
// execution layer of csrc/testing, which runs the same kernels thread by thread on the CPU.
//
// Kernels keep to what both offer: one-dimensional blocks of whole warps, dynamic shared memory
// through Shared<T>, __syncthreads, __syncwarp, the shuffles and reductions below, atomicMax and
// atomicAdd, and the matrix tiles of tile.h.
#pragma once

#include <cstdint>

#include "include/kernel.h"

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace latentguard::cuda {

extern __shared__ __align__(128) unsigned char shared_memory[];

// Typed view of the block's dynamic shared memory. On the device it is a pointer and nothing
// else; in the host layer every access is checked (bounds, written before read, no race).
template <typename T>
class Shared {
 public:
  __device__ explicit Shared(int byte_offset)
      : data_(reinterpret_cast<T*>(shared_memory + byte_offset)) {}
  __device__ T get(int i) const { return data_[i]; }
  __device__ void set(int i, T value) const { data_[i] = value; }
  // 16-byte (or shorter) vectors; i is a multiple of the vector's length.
  template <typename V>
  __device__ V get_vector(int i) const {
    return *reinterpret_cast<const V*>(data_ + i);
  }
  template <typename V>
  __device__ void set_vector(int i, V value) const {
    *reinterpret_cast<V*>(data_ + i) = value;
  }
  __device__ void max(int i, T value) const { atomicMax(data_ + i, value); }
  __device__ Shared at(int i) const { return Shared(data_ + i, 0); }
  __device__ T* tile(int i) const { return data_ + i; }

 private:
  __device__ Shared(T* data, int) : data_(data) {}
  T* data_;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
__device__ inline T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Lets a launch configuration be set and started without a word of CUDA in the callers.
template <typename Args>
cudaError_t launch(void (*kernel)(Args), int64_t blocks, int threads, int shared_bytes,
                   cudaStream_t stream, const Args& args) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace latentguard::cuda

#else
#include "testing/host_device.h"
#endif

namespace latentguard::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
// Blocks that shared memory leaves room for on a multiprocessor; told to the compiler, which would
// else spill to fit more.
constexpr int kBlocks = 2;
constexpr unsigned kAllLanes = 0xffffffffu;
// Rows of a block's tile: the height of a tensor-core tile.
constexpr int kRows = 16;

// N neighboring elements, moved as one access.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T value[N];
};
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

__device__ inline float warp_sum(float value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

__host__ __device__ constexpr int round_up(int value, int unit) {
  return (value + unit - 1) / unit * unit;
}

// Calls function(zero of T) for the element type of a call.
template <typename Function>
cudaError_t for_type(Type type, Function function) {
  if (type == Type::float32) return function(float{});
  if (type == Type::float16) return function(__half{});
  return function(__nv_bfloat16{});
}

}  // namespace latentguard::cuda
