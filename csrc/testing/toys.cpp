#include "testing/toys.h"

#include <cstring>
#include <vector>

#include "cuda/tile.h"

namespace latentguard::testing {
namespace {

using cuda::kAllLanes;
using cuda::kThreads;
using cuda::kWarp;
using cuda::Shared;

struct Toy {
  const float* in;  // [kThreads]
  float* out;       // [kThreads]
};

// A sum over the block by shuffles and one barrier: correct.
void reduction(Toy toy) {
  const Shared<float> sums(0);
  const int thread = threadIdx.x;
  const float sum = cuda::warp_sum(toy.in[thread]);
  if (thread % kWarp == 0) sums.set(thread / kWarp, sum);
  __syncthreads();
  float total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) total += sums.get(w);
  toy.out[thread] = total;
}

void uninitialized(Toy toy) {
  const Shared<float> values(0);
  const int thread = threadIdx.x;
  if (thread != 77) values.set(thread, toy.in[thread]);
  __syncthreads();
  toy.out[thread] = values.get(thread);
}

void shared_bounds(Toy toy) {
  const Shared<float> values(0);
  const int thread = threadIdx.x;
  values.set(thread + 1, toy.in[thread]);  // the last thread leaves the block's memory
  __syncthreads();
  toy.out[thread] = 0;
}

void global_read(Toy toy) {
  const int thread = threadIdx.x;
  toy.out[thread] = toy.in[thread + 1];
}

void global_write(Toy toy) {
  const int thread = threadIdx.x;
  toy.out[thread + 1] = toy.in[thread];
}

void early_return(Toy toy) {
  const int thread = threadIdx.x;
  if (thread == 5) return;
  __syncthreads();
  toy.out[thread] = toy.in[thread];
}

void two_barriers(Toy toy) {
  const int thread = threadIdx.x;
  if (thread < kThreads / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  toy.out[thread] = toy.in[thread];
}

void divergent_shuffle(Toy toy) {
  const int thread = threadIdx.x;
  float value = toy.in[thread];
  if (thread % kWarp < 16) value = __shfl_xor_sync(kAllLanes, value, 1);
  toy.out[thread] = value;
}

void missing_barrier(Toy toy) {
  const Shared<float> values(0);
  const int thread = threadIdx.x;
  values.set(thread, toy.in[thread]);
  toy.out[thread] = values.get(kThreads - 1 - thread);
}

void missing_warp_barrier(Toy toy) {
  const Shared<float> values(0);
  const int thread = threadIdx.x;
  values.set(thread, toy.in[thread]);
  toy.out[thread] = values.get(thread ^ 1);
}

void overwritten_too_early(Toy toy) {
  const Shared<float> values(0);
  const int thread = threadIdx.x;
  values.set(thread, toy.in[thread]);
  __syncthreads();
  const float other = values.get((thread + 40) % kThreads);
  values.set(thread, other);
  toy.out[thread] = other;
}

void misaligned_vector(Toy toy) {
  const int thread = threadIdx.x;
  const auto* at = reinterpret_cast<const cuda::Vector<float, 4>*>(toy.in + 1);
  toy.out[thread] = at[0].value[0];
}

struct Named {
  const char* name;
  void (*kernel)(Toy);
};
constexpr Named kToys[] = {
    {"reduction", reduction},
    {"uninitialized", uninitialized},
    {"shared_bounds", shared_bounds},
    {"global_read", global_read},
    {"global_write", global_write},
    {"early_return", early_return},
    {"two_barriers", two_barriers},
    {"divergent_shuffle", divergent_shuffle},
    {"missing_barrier", missing_barrier},
    {"missing_warp_barrier", missing_warp_barrier},
    {"overwritten_too_early", overwritten_too_early},
    {"misaligned_vector", misaligned_vector},
};

}  // namespace

bool run_toy(const char* name) {
  for (const Named& toy : kToys) {
    if (std::strcmp(toy.name, name) != 0) continue;
    std::vector<float> in(kThreads, 1.f), out(kThreads);
    cuda::launch(toy.kernel, 3, kThreads, kThreads * 4, nullptr, Toy{in.data(), out.data()});
    return true;
  }
  return false;
}

}  // namespace latentguard::testing
