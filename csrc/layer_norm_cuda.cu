// The second derivative of layer normalisation on CUDA: one block a row. The mathematics is in
// layer_norm.h.
#include <optional>

#include "cuda.h"
#include "layer_norm.h"

namespace gan_kernels {
namespace {

template <class T>
__global__ void second_derivative_kernel(
    const T* h,
    const T* g,
    const T* x,
    const T* means,
    const T* rstds,
    const T* weight,
    int64_t rows,
    int64_t size,
    T* to_g,
    T* to_x,
    T* to_weight) {
  __shared__ RowMeans<T> shared;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T mean = means[row], rstd = rstds[row];
    RowMeans<T> sum{};
    for (int64_t j = threadIdx.x; j < size; j += blockDim.x) {
      const int64_t i = row * size + j;
      const T u = weight ? g[i] * weight[j] : g[i], n = (x[i] - mean) * rstd;
      sum.h += h[i];
      sum.u += u;
      sum.hn += h[i] * n;
      sum.un += u * n;
      sum.hu += h[i] * u;
    }
    const RowMeans<T> total{
        block_sum(sum.h), block_sum(sum.u), block_sum(sum.hn), block_sum(sum.un), block_sum(sum.hu)};
    if (threadIdx.x == 0) {
      const T d = T(size);
      shared = {total.h / d, total.u / d, total.hn / d, total.un / d, total.hu / d};
    }
    __syncthreads();
    for (int64_t j = threadIdx.x; j < size; j += blockDim.x) {
      const int64_t i = row * size + j;
      const T w = weight ? weight[j] : T(1), n = (x[i] - mean) * rstd;
      const T p = rstd * projected(h[i], n, shared);
      to_g[i] = w * p;
      to_weight[i] = g[i] * p;
      to_x[i] = -rstd * rstd * second_gradient(h[i], g[i] * w, n, shared);
    }
    __syncthreads();
  }
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_double_backward(
    const Tensor& h,
    const Tensor& g,
    const Tensor& x,
    const Tensor& mean,
    const Tensor& rstd,
    std::optional<Tensor> weight) {
  check_layer_norm(h, g, x, mean, rstd, weight);
  const DeviceGuard guard(x.get_device_index());
  Tensor to_g = torch::stable::empty_like(x), to_x = torch::stable::empty_like(x),
         to_weight = torch::stable::empty_like(x);
  const int64_t rows = mean.numel();
  if (rows == 0) return {to_g, to_x, to_weight};
  with_type(x.scalar_type(), [&](auto zero) {
    using T = Accumulator<decltype(zero)>;
    const auto in = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
    const auto out = [](const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
    second_derivative_kernel<T><<<grid_size(rows, 1), wide_block_threads, 0, current_stream(x)>>>(
        in(h), in(g), in(x), in(mean), in(rstd), weight ? in(*weight) : nullptr, rows,
        x.numel() / rows, out(to_g), out(to_x), out(to_weight));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {to_g, to_x, to_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gan_kernels, CUDA, m) {
  m.impl("layer_norm_double_backward", TORCH_BOX(&layer_norm_double_backward));
}

}  // namespace gan_kernels
