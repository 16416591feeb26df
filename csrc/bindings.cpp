// pybind11 carries what is not a tensor operator: how the extension was built.
#include <pybind11/pybind11.h>

#ifndef LATENTGUARD_CUDA_VERSION
#define LATENTGUARD_CUDA_VERSION ""
#endif
#ifndef LATENTGUARD_ARCHITECTURES
#define LATENTGUARD_ARCHITECTURES ""
#endif

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#ifdef CPU_CAPABILITY_AVX2
  info["cpu"] = "AVX2";
#else
  info["cpu"] = "baseline";
#endif
#ifdef LATENTGUARD_CUDA
  info["cuda"] = LATENTGUARD_CUDA_VERSION;
#else
  info["cuda"] = "";
#endif
  info["architectures"] = LATENTGUARD_ARCHITECTURES;
  info["torch"] = LATENTGUARD_TORCH_VERSION;
#ifdef __SANITIZE_ADDRESS__
  info["sanitizers"] = "address";
#else
  info["sanitizers"] = "";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "latentguard's compiled operators; the tensor operators are in torch.ops.latentguard";
  m.def("build_info", &build_info, "Compiler, processor features, CUDA toolkit and architectures.");
}
