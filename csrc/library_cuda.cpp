// What the CUDA library was built with.
#include <string>

#include <torch/csrc/stable/library.h>

namespace gan_kernels {
namespace {

std::string cuda_build() {
  return "CUDA " GAN_KERNELS_NVCC " (" GAN_KERNELS_ARCHITECTURES ")";
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gan_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_build", TORCH_BOX(&cuda_build));
}

}  // namespace gan_kernels
