// The second derivative of normalisation on CUDA: one block a group. The mathematics is in norm.h.
#include "cuda.h"
#include "norm.h"

namespace gan_kernels {
namespace {

// The block works on a group of one segment as a whole; of several, each warp takes its own.
template <class T>
__global__ void second_derivative_kernel(
    const Groups groups,
    const T* h,
    const T* g,
    const T* x,
    const T* means,
    const T* rstds,
    const T* weight,
    T* to_g,
    T* to_x,
    T* to_weight) {
  __shared__ Means<T> shared;
  const bool whole = groups.segments == 1, elementwise = groups.elementwise();
  const int64_t first = whole ? 0 : threadIdx.x / warp, step = whole ? 1 : blockDim.x / warp;
  const int64_t start = whole ? threadIdx.x : threadIdx.x % warp, width = whole ? blockDim.x : warp;
  for (int64_t group = blockIdx.x; group < groups.count; group += gridDim.x) {
    const T mean = means[group], rstd = rstds[group], size = T(groups.size());
    const T* weights = weight ? weight + group % groups.weight_groups * groups.weights : nullptr;
    T* group_weight = to_weight + group * groups.weights;
    Means<T> sum{};
    for (int64_t segment = first; segment < groups.segments; segment += step) {
      const int64_t at = groups.begin(group, segment);
      const T shared_weight = weights ? weights[groups.weight(segment)] : T(1);
      for (int64_t i = start; i < groups.length; i += width) {
        const T u = g[at + i] * (elementwise ? weights[i] : shared_weight);
        const T n = (x[at + i] - mean) * rstd;
        sum.h += h[at + i];
        sum.u += u;
        sum.hn += h[at + i] * n;
        sum.un += u * n;
        sum.hu += h[at + i] * u;
      }
    }
    const Means<T> total{
        block_sum(sum.h), block_sum(sum.u), block_sum(sum.hn), block_sum(sum.un), block_sum(sum.hu)};
    if (threadIdx.x == 0) {
      shared = {
          total.h / size, total.u / size, total.hn / size, total.un / size, total.hu / size};
    }
    __syncthreads();
    T products = 0;
    for (int64_t segment = first; segment < groups.segments; segment += step) {
      const int64_t at = groups.begin(group, segment);
      const T shared_weight = weights ? weights[groups.weight(segment)] : T(1);
      T of_segment = 0;
      for (int64_t i = start; i < groups.length; i += width) {
        const T w = elementwise ? weights[i] : shared_weight, n = (x[at + i] - mean) * rstd;
        const T p = rstd * projected(h[at + i], n, shared);
        to_g[at + i] = w * p;
        to_x[at + i] = -rstd * rstd * second_gradient(h[at + i], g[at + i] * w, n, shared);
        if (elementwise) {
          group_weight[i] = g[at + i] * p;
        } else {
          of_segment += g[at + i] * p;
        }
      }
      if (groups.weights == 1) {
        products += of_segment;
      } else if (!elementwise) {  // several segments, so that a warp has one to itself
        of_segment = group_sum<warp>(of_segment);
        if (start == 0) group_weight[segment] = of_segment;
      }
    }
    if (groups.weights == 1) {
      products = block_sum(products);
      if (threadIdx.x == 0) *group_weight = products;
    }
    __syncthreads();
  }
}

std::tuple<Tensor, Tensor, Tensor> norm_double_backward(
    const Tensor& h,
    const Tensor& g,
    const Tensor& x,
    const Tensor& mean,
    const Tensor& rstd,
    std::optional<Tensor> weight,
    int64_t weight_groups,
    int64_t segments,
    bool strided) {
  const Groups groups =
      check_norm(h, g, x, mean, rstd, weight, weight_groups, segments, strided);
  const DeviceGuard guard(x.get_device_index());
  Tensor to_g = torch::stable::empty_like(x), to_x = torch::stable::empty_like(x);
  Tensor to_weight = new_tensor(x, {groups.count, groups.weights}, x.scalar_type());
  if (groups.count == 0) return {to_g, to_x, to_weight};
  with_type(x.scalar_type(), [&](auto zero) {
    using T = Accumulator<decltype(zero)>;
    const auto in = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
    const auto out = [](const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
    second_derivative_kernel<T>
        <<<grid_size(groups.count, 1), wide_block_threads, 0, current_stream(x)>>>(
            groups, in(h), in(g), in(x), in(mean), in(rstd), weight ? in(*weight) : nullptr,
            out(to_g), out(to_x), out(to_weight));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {to_g, to_x, to_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gan_kernels, CUDA, m) {
  m.impl("norm_double_backward", TORCH_BOX(&norm_double_backward));
}

}  // namespace gan_kernels
