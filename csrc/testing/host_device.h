// CUDA's language and functions, as far as the kernels use them, on the host execution layer.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "include/kernel.h"
#include "testing/host_runtime.h"

#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)

// Each call tells where in the source it stands.
#define LG_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidConfiguration = 9;
constexpr cudaError_t cudaErrorLaunchFailure = 719;

namespace latentguard::host {
// threadIdx.x and blockIdx.x are read through conversions, so that each fiber sees its own.
struct ThreadX {
  operator unsigned() const { return static_cast<unsigned>(thread_index()); }
};
struct BlockX {
  operator unsigned() const { return static_cast<unsigned>(block_index()); }
};
}  // namespace latentguard::host

inline const struct {
  latentguard::host::ThreadX x;
} threadIdx;
inline const struct {
  latentguard::host::BlockX x;
} blockIdx;

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// IEEE binary16, converted with round to nearest even.
struct __half {
  uint16_t bits;
};
inline float __half2float(__half h) {
  const uint32_t sign = (h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31,
                 part = h.bits & 1023u;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | part << 13);
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(part), -24);
    return sign ? -magnitude : magnitude;
  }
  return __uint_as_float(sign | (exponent + 112) << 23 | part << 13);
}
inline __half __float2half_rn(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7fffu;
  } else if (rest >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (rest >= 0x38800000u) {
    half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
  } else {
    half = static_cast<uint32_t>(std::lrint(std::ldexp(__uint_as_float(rest), 24)));
  }
  return {static_cast<uint16_t>(sign | half)};
}

// bfloat16, round to nearest even.
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 h) {
  return __uint_as_float(static_cast<uint32_t>(h.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline void __syncthreads(LG_HERE) { latentguard::host::block_barrier(file, line); }
inline void __syncwarp(LG_HERE) { latentguard::host::warp_barrier(file, line); }
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned, T value, int source, LG_HERE) {
  const unsigned char* slots = latentguard::host::warp_exchange(&value, sizeof(T), file, line);
  std::memcpy(&value, slots + source % 32 * latentguard::host::kSlot, sizeof(T));
  return value;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int step, LG_HERE) {
  return __shfl_sync(mask, value, (latentguard::host::thread_index() % 32) ^ step, file, line);
}
inline unsigned __ballot_sync(unsigned, bool predicate, LG_HERE) {
  const unsigned char* slots = latentguard::host::warp_exchange(&predicate, 1, file, line);
  unsigned out = 0;
  for (int i = 0; i < 32; ++i)
    out |= static_cast<unsigned>(slots[i * latentguard::host::kSlot]) << i;
  return out;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <typename T>
T atomicMax(T* at, T value) {
  const T old = *at;
  *at = std::max(old, value);
  return old;
}
template <typename T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = old + value;
  return old;
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

namespace latentguard::cuda {

using std::max;
using std::min;

template <typename T>
class Shared {
 public:
  explicit Shared(int64_t byte_offset) : offset_(byte_offset) {}
  T get(int i, LG_HERE) const { return get_vector<T>(i, file, line); }
  void set(int i, T value, LG_HERE) const { set_vector(i, value, file, line); }
  template <typename V>
  V get_vector(int i, LG_HERE) const {
    V value;
    std::memcpy(&value, host::shared_read(byte(i, sizeof(V), file, line), sizeof(V), file, line),
                sizeof(V));
    return value;
  }
  template <typename V>
  void set_vector(int i, V value, LG_HERE) const {
    std::memcpy(host::shared_write(byte(i, sizeof(V), file, line), sizeof(V), file, line), &value,
                sizeof(V));
  }
  void max(int i, T value, LG_HERE) const {
    T old;
    unsigned char* at = host::shared_atomic(byte(i, sizeof(T), file, line), sizeof(T), file, line);
    std::memcpy(&old, at, sizeof(T));
    old = std::max(old, value);
    std::memcpy(at, &old, sizeof(T));
  }
  Shared at(int i) const { return Shared(offset_ + int64_t{i} * sizeof(T)); }
  // wmma wants its tiles on 32-byte boundaries and their rows on 16-byte ones.
  void check_tile(int i, int stride, LG_HERE) const {
    if ((offset_ + int64_t{i} * sizeof(T)) % 32 != 0 || stride * sizeof(T) % 16 != 0) {
      host::fail("misaligned matrix tile in shared memory", file, line);
    }
  }

 private:
  int64_t byte(int i, size_t size, const char* file, int line) const {
    const int64_t at = offset_ + int64_t{i} * sizeof(T);
    if (at % static_cast<int64_t>(size) != 0) {
      host::fail("misaligned access to shared memory", file, line);
    }
    return at;
  }
  int64_t offset_;
};

inline float to_float(float x) { return x; }
inline float to_float(__half x) { return __half2float(x); }
inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

template <typename Args>
cudaError_t launch(void (*kernel)(Args), int64_t blocks, int threads, int shared_bytes,
                   cudaStream_t, const Args& args) {
  if (blocks > INT32_MAX || shared_bytes > 163 * 1024) return cudaErrorInvalidConfiguration;
  const bool fine = host::run(blocks, threads, shared_bytes, [&] { kernel(args); });
  return fine ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace latentguard::cuda
