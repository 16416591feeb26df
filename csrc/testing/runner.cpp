// Runs CUDA kernels on the host execution layer, outside Python, so that the sanitizers see only
// them. `runner toy NAME`, or `runner CASES RESULTS`: both files hold little-endian records.
//
// A case: operator (int64: 0 patch_embed, 1 its backward, 2 concept_similarity, 3 its backward,
// 4 null), count of numbers, the numbers (double), count of arrays, and for each its size in bytes
// (-1 for null) and its bytes. Outputs come as arrays too and start as the poison that the case
// gives. A result: status (int64), size and bytes of the message, then every array again.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "include/concepts.h"
#include "include/null.h"
#include "include/patch_embed.h"
#include "testing/host_runtime.h"
#include "testing/toys.h"

namespace {

using namespace latentguard;

struct Array {
  int64_t size = -1;
  std::unique_ptr<char, decltype(&std::free)> bytes{nullptr, std::free};
  char* data() const { return bytes.get(); }
};

class File {
 public:
  File(const char* path, const char* mode) : file_(std::fopen(path, mode)) {
    if (file_ == nullptr) throw std::runtime_error(std::string("cannot open ") + path);
  }
  ~File() { std::fclose(file_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  bool read(void* to, size_t size) { return std::fread(to, 1, size, file_) == size; }
  void write(const void* from, size_t size) {
    if (std::fwrite(from, 1, size, file_) != size) throw std::runtime_error("cannot write");
  }
  int64_t integer() {
    int64_t value;
    if (!read(&value, 8)) throw std::runtime_error("truncated case");
    return value;
  }

 private:
  std::FILE* file_;
};

PatchEmbed patch_embed_of(const std::vector<double>& n, const std::vector<Array>& a) {
  PatchEmbed args{};
  args.type = static_cast<Type>(n.at(0));
  args.batch = static_cast<int64_t>(n.at(1));
  args.channels = static_cast<int64_t>(n.at(2));
  args.height = static_cast<int64_t>(n.at(3));
  args.width = static_cast<int64_t>(n.at(4));
  args.patch = static_cast<int64_t>(n.at(5));
  args.dim = static_cast<int64_t>(n.at(6));
  args.scale_phases = static_cast<int>(n.at(7));
  args.shift_phases = static_cast<int>(n.at(8));
  args.eps = static_cast<float>(n.at(9));
  args.latents = a.at(0).data();
  args.noise = a.at(1).data();
  args.weight = a.at(2).data();
  args.class_embedding = a.at(3).data();
  args.positional_embedding = a.at(4).data();
  args.ln_weight = a.at(5).data();
  args.ln_bias = a.at(6).data();
  args.scale = reinterpret_cast<const float*>(a.at(7).data());
  args.shift = reinterpret_cast<const float*>(a.at(8).data());
  args.alpha = reinterpret_cast<const float*>(a.at(9).data());
  args.sigma = reinterpret_cast<const float*>(a.at(10).data());
  args.grad = a.at(11).data();
  args.tokens = a.at(12).data();
  args.grad_latents = a.at(13).data();
  return args;
}

Concepts concepts_of(const std::vector<double>& n, const std::vector<Array>& a) {
  Concepts args{};
  args.type = static_cast<Type>(n.at(0));
  args.rows = static_cast<int64_t>(n.at(1));
  args.positions = static_cast<int64_t>(n.at(2));
  args.dim = static_cast<int64_t>(n.at(3));
  args.width = static_cast<int64_t>(n.at(4));
  args.prompts = static_cast<int64_t>(n.at(5));
  args.contrasts = static_cast<int64_t>(n.at(6));
  args.concepts = static_cast<int64_t>(n.at(7));
  args.eps = static_cast<float>(n.at(8));
  args.logit_scale = static_cast<float>(n.at(9));
  if (n.at(10) >= 0) args.split_rows = static_cast<int64_t>(n.at(10));
  args.features = a.at(0).data();
  args.ln_weight = a.at(1).data();
  args.ln_bias = a.at(2).data();
  args.projection = a.at(3).data();
  for (int which = 0; which < 2; ++which) {
    args.bank[which] = a.at(4 + which).data();
    args.segments[which] = reinterpret_cast<const int32_t*>(a.at(6 + which).data());
    args.best[which] = reinterpret_cast<int64_t*>(a.at(10 + which).data());
    args.saved_best[which] = args.best[which];
  }
  args.probability = reinterpret_cast<float*>(a.at(8).data());
  args.saved_probability = args.probability;
  args.margin = reinterpret_cast<float*>(a.at(9).data());
  args.grad_probability = reinterpret_cast<const float*>(a.at(12).data());
  args.grad_margin = reinterpret_cast<const float*>(a.at(13).data());
  args.grad_features = a.at(14).data();
  args.projected = a.at(15).data();
  args.saved_projected = args.projected;
  return args;
}

Null null_of(const std::vector<double>& n, const std::vector<Array>& a) {
  Null args{};
  args.type = static_cast<Type>(n.at(0));
  args.size = static_cast<int64_t>(n.at(1));
  args.scale = static_cast<float>(n.at(2));
  args.x = a.at(0).data();
  args.out = a.at(1).data();
  return args;
}

cudaError_t run(int64_t operation, const std::vector<double>& n, const std::vector<Array>& a) {
  if (operation == 0) return cuda::patch_embed(patch_embed_of(n, a), nullptr);
  if (operation == 1) return cuda::patch_embed_backward(patch_embed_of(n, a), nullptr);
  if (operation == 4) return cuda::null(null_of(n, a), nullptr);
  Concepts args = concepts_of(n, a);
  if (operation == 3) return cuda::concept_similarity_backward(args, nullptr);
  const int64_t bytes = cuda::concept_workspace_bytes(args);
  const std::unique_ptr<char, decltype(&std::free)> workspace(
      static_cast<char*>(bytes > 0 ? std::malloc(bytes) : nullptr), std::free);
  if (bytes > 0) std::memset(workspace.get(), 0xff, bytes);
  args.workspace = workspace.get();
  return cuda::concept_similarity(args, nullptr);
}

void run_cases(const char* from, const char* to) {
  File cases(from, "rb"), results(to, "wb");
  int64_t operation;
  while (cases.read(&operation, 8)) {
    std::vector<double> numbers(cases.integer());
    cases.read(numbers.data(), numbers.size() * 8);
    std::vector<Array> arrays(cases.integer());
    for (Array& array : arrays) {
      array.size = cases.integer();
      if (array.size < 0) continue;
      // Exactly as large as the array, so that AddressSanitizer sees the first byte beyond.
      array.bytes.reset(static_cast<char*>(std::malloc(array.size)));
      cases.read(array.data(), array.size);
    }
    const int64_t status = run(operation, numbers, arrays);
    const std::string& message = host::failure();
    const auto length = static_cast<int64_t>(message.size());
    results.write(&status, 8);
    results.write(&length, 8);
    results.write(message.data(), message.size());
    for (const Array& array : arrays) {
      if (array.size > 0) results.write(array.data(), array.size);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: runner CASES RESULTS | runner toy NAME\n");
    return 2;
  }
  try {
    if (std::strcmp(argv[1], "toy") == 0) {
      if (!testing::run_toy(argv[2])) throw std::runtime_error("no such toy");
      std::printf("%s\n", host::failure().c_str());
    } else {
      run_cases(argv[1], argv[2]);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "runner: %s\n", error.what());
    return 2;
  }
  return 0;
}
