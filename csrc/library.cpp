// The operators' schemas, and what this library was built with.
#include <string>

#include <torch/headeronly/version.h>

#include "common.h"
#include "dispatch.h"

#if defined(__clang__)
#define GK_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define GK_COMPILER "gcc " __VERSION__
#else
#define GK_COMPILER "C++"
#endif

namespace gan_kernels {
namespace {

std::string cpu_build() {
  return std::string("CPU (" GK_COMPILER ", running ") + (has_avx2() ? "AVX2" : "baseline") +
      ", built with PyTorch " TORCH_VERSION ")";
}

}  // namespace

STABLE_TORCH_LIBRARY(gan_kernels, m) {
  m.def("info_loss(Tensor q, Tensor category, Tensor code, int[] sizes) -> (Tensor, Tensor)");
  m.def(
      "info_loss_backward(Tensor categorical_gradient, Tensor continuous_gradient, Tensor q, "
      "Tensor category, Tensor code, int[] sizes) -> Tensor");
  m.def("penalty(Tensor gradient, float target) -> (Tensor, Tensor)");
  m.def(
      "penalty_backward(Tensor penalty_gradient, Tensor gradient, Tensor norms, float target) "
      "-> Tensor");
  m.def(
      "norm_double_backward(Tensor h, Tensor g, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
      "int weight_groups, int segments, bool strided) -> (Tensor, Tensor, Tensor)");
  m.def("cpu_build() -> str");
  m.def("cuda_build() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(gan_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_build", TORCH_BOX(&cpu_build));
}

}  // namespace gan_kernels
