// The penalty and its gradient on CUDA. The mathematics is in penalty.h; here are the launches.
//
// One block takes a piece of one row; a second kernel adds the pieces of all rows in a fixed order.
#include "cuda.h"
#include "penalty.h"

namespace gan_kernels {
namespace {

constexpr int64_t piece = 128 * 64;

template <class S>
__global__ void square_kernel(
    const S* source, int64_t items, int64_t pieces, int64_t size, int64_t stride, double* partial) {
  using T = Accumulator<S>;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t row = item / pieces, begin = (item - row * pieces) * piece;
    const int64_t end = min(size, begin + piece);
    T sum = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      const T x = T(source[row * stride + i]);
      sum += x * x;
    }
    const double total = block_sum(double(sum));
    if (threadIdx.x == 0) partial[item] = total;
  }
}

template <class T>
__global__ void norm_kernel(
    const double* partial, int64_t pieces, int64_t batch, T target, T* norms, T* penalty) {
  double sum = 0;
  for (int64_t row = threadIdx.x; row < batch; row += blockDim.x) {
    double squares = 0;
    for (int64_t i = 0; i < pieces; ++i) squares += partial[row * pieces + i];
    norms[row] = sqrt(T(squares));
    sum += penalty_term(norms[row], target);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) *penalty = T(sum / batch);
}

template <class S>
__global__ void scale_kernel(
    const S* source,
    int64_t items,
    int64_t pieces,
    int64_t size,
    int64_t stride,
    int64_t out_stride,
    const Accumulator<S>* norms,
    const Accumulator<S>* upper,
    Accumulator<S> target,
    Accumulator<S> batch,
    S* out) {
  using T = Accumulator<S>;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t row = item / pieces, begin = (item - row * pieces) * piece;
    const int64_t end = min(size, begin + piece);
    const T scale = penalty_scale(norms[row], target, *upper, batch);
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      out[row * out_stride + i] = S(scale * T(source[row * stride + i]));
    }
  }
}

struct Rows {
  int64_t batch, size, stride, pieces, items;
  explicit Rows(const Tensor& dense)
      : batch(dense.size(0)),
        size(dense.numel() / batch),
        stride(dense.stride(0)),
        pieces(std::max<int64_t>(1, (size + piece - 1) / piece)),
        items(batch * pieces) {}
};

std::tuple<Tensor, Tensor> penalty(const Tensor& gradient, double target) {
  check_gradient(gradient);
  const DeviceGuard guard(gradient.get_device_index());
  const cudaStream_t stream = current_stream(gradient);
  const Tensor dense = with_dense_rows(gradient);
  const Rows rows(dense);
  Tensor value = new_tensor(dense, {}, sum_type(dense));
  Tensor norms = new_tensor(dense, {rows.batch}, sum_type(dense));
  Tensor partial = new_tensor(dense, {rows.items}, ScalarType::Double);
  double* sums = static_cast<double*>(partial.mutable_data_ptr());
  with_type(dense.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = Accumulator<S>;
    square_kernel<S><<<grid_size(rows.items, 1), block_threads, 0, stream>>>(
        static_cast<const S*>(dense.const_data_ptr()), rows.items, rows.pieces, rows.size,
        rows.stride, sums);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    norm_kernel<T><<<1, block_threads, 0, stream>>>(
        sums, rows.pieces, rows.batch, T(target), static_cast<T*>(norms.mutable_data_ptr()),
        static_cast<T*>(value.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {value, norms};
}

Tensor penalty_backward(
    const Tensor& penalty_gradient, const Tensor& gradient, const Tensor& norms, double target) {
  check_penalty_backward(penalty_gradient, gradient, norms);
  const DeviceGuard guard(gradient.get_device_index());
  const cudaStream_t stream = current_stream(gradient);
  const Tensor dense = with_dense_rows(gradient);
  const Rows rows(dense);
  Tensor result = torch::stable::empty_like(dense);
  with_type(dense.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = Accumulator<S>;
    scale_kernel<S><<<grid_size(rows.items, 1), block_threads, 0, stream>>>(
        static_cast<const S*>(dense.const_data_ptr()), rows.items, rows.pieces, rows.size,
        rows.stride, result.stride(0), static_cast<const T*>(norms.const_data_ptr()),
        static_cast<const T*>(penalty_gradient.const_data_ptr()), T(target), T(rows.batch),
        static_cast<S*>(result.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gan_kernels, CUDA, m) {
  m.impl("penalty", TORCH_BOX(&penalty));
  m.impl("penalty_backward", TORCH_BOX(&penalty_backward));
}

}  // namespace gan_kernels
