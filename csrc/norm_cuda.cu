// The second derivative of normalisation on CUDA: one block a group. The mathematics is in norm.h.
#include "cuda.h"
#include "norm.h"

namespace gan_kernels {
namespace {

// The block works on a group of one segment as a whole; of several, each warp takes its own.
template <class T>
__global__ void second_derivative_kernel(const NormCall<T> call) {
  const Groups& groups = call.groups;
  const T *h = call.h, *g = call.g, *x = call.x;
  __shared__ Means<T> shared;
  const bool whole = groups.segments == 1, elementwise = groups.elementwise();
  const int64_t first = whole ? 0 : threadIdx.x / warp, step = whole ? 1 : blockDim.x / warp;
  const int64_t start = whole ? threadIdx.x : threadIdx.x % warp, width = whole ? blockDim.x : warp;
  for (int64_t group = blockIdx.x; group < groups.count; group += gridDim.x) {
    const T mean = call.mean[group], rstd = call.rstd[group], size = T(groups.size());
    const T* weights =
        call.weight ? call.weight + group % groups.weight_groups * groups.weights : nullptr;
    T* group_weight = call.to_weight + group * groups.weights;
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
        block_sum(sum.h), block_sum(sum.u), block_sum(sum.hn), block_sum(sum.un),
        block_sum(sum.hu)};
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
        call.to_g[at + i] = w * p;
        call.to_x[at + i] = -rstd * rstd * second_gradient(h[at + i], g[at + i] * w, n, shared);
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
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  return with_norm_call(
      h, g, x, mean, rstd, weight, weight_groups, segments, strided, [&](const auto& call) {
        if (call.groups.count == 0) return;
        const int blocks = grid_size(call.groups.count, 1);
        second_derivative_kernel<<<blocks, wide_block_threads, 0, stream>>>(call);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gan_kernels, CUDA, m) {
  m.impl("norm_double_backward", TORCH_BOX(&norm_double_backward));
}

}  // namespace gan_kernels
