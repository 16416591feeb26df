// null on the CPU: out = x * scale. The template of a kernel: threads share the elements, half
// types are computed in float and rounded once.
#include "include/null.h"

#include <ATen/Parallel.h>

#include "cpu/rows.h"

namespace latentguard::cpu {
namespace {

// Elements that one thread takes at least: to wake another costs more than fewer are worth.
constexpr int64_t kGrain = 32768;

template <typename T>
void run(const Null& args) {
  const auto* x = static_cast<const T*>(args.x);
  auto* out = static_cast<T*>(args.out);
  at::parallel_for(0, args.size, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = static_cast<T>(static_cast<float>(x[i]) * args.scale);
    }
  });
}

}  // namespace

void null(const Null& args) {
  for_type(args.type, [&](auto zero) { run<decltype(zero)>(args); });
}

}  // namespace latentguard::cpu
