// The penalty and its gradient on the CPU. The mathematics is in penalty.h; here are the loops.
#include "penalty.h"

namespace gan_kernels {
namespace {

// In pieces, summed in double, so that a huge row keeps its precision; in lanes, so that the compiler
// can vectorise the sum.
template <class S, class T = Accumulator<S>>
T sum_of_squares(const S* row, int64_t size) {
  constexpr int64_t lanes = 32, piece = 4096;
  if (size < lanes) {  // adding the lanes takes far longer than a row of points
    T sum = 0;
    for (int64_t i = 0; i < size; ++i) sum += T(row[i]) * T(row[i]);
    return sum;
  }
  double total = 0;
  for (int64_t begin = 0; begin < size; begin += piece) {
    const int64_t end = std::min(size, begin + piece);
    T sum[lanes] = {};
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) {
      for (int64_t lane = 0; lane < lanes; ++lane) sum[lane] += T(row[i + lane]) * T(row[i + lane]);
    }
    for (; i < end; ++i) sum[0] += T(row[i]) * T(row[i]);
    for (T part : sum) total += part;
  }
  return T(total);
}

// Rows worth one thread's while.
int64_t grain(int64_t row_size) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, row_size));
}

std::tuple<Tensor, Tensor> penalty(const Tensor& gradient, double target) {
  check_gradient(gradient);
  const Tensor dense = with_dense_rows(gradient);
  const int64_t batch = dense.size(0), size = dense.numel() / batch, stride = dense.stride(0);
  Tensor value = new_tensor(dense, {}, sum_type(dense));
  Tensor norms = new_tensor(dense, {batch}, sum_type(dense));
  with_type(dense.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = Accumulator<S>;
    const S* source = static_cast<const S*>(dense.const_data_ptr());
    T* norm = static_cast<T*>(norms.mutable_data_ptr());
    torch::stable::parallel_for(0, batch, grain(size), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        norm[b] = std::sqrt(sum_of_squares(source + b * stride, size));
      }
    });
    double sum = 0;
    for (int64_t b = 0; b < batch; ++b) sum += penalty_term(norm[b], T(target));
    *static_cast<T*>(value.mutable_data_ptr()) = T(sum / batch);
  });
  return {value, norms};
}

Tensor penalty_backward(
    const Tensor& penalty_gradient, const Tensor& gradient, const Tensor& norms, double target) {
  check_penalty_backward(penalty_gradient, gradient, norms);
  const Tensor dense = with_dense_rows(gradient);
  const int64_t batch = dense.size(0), size = dense.numel() / batch, stride = dense.stride(0);
  Tensor result = torch::stable::empty_like(dense);
  with_type(dense.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = Accumulator<S>;
    const S* source = static_cast<const S*>(dense.const_data_ptr());
    S* out = static_cast<S*>(result.mutable_data_ptr());
    const T* norm = static_cast<const T*>(norms.const_data_ptr());
    const T upper = *static_cast<const T*>(penalty_gradient.const_data_ptr());
    const int64_t out_stride = result.stride(0);
    torch::stable::parallel_for(0, batch, grain(size), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const S* from = source + b * stride;
        S* to = out + b * out_stride;
        const T scale = penalty_scale(norm[b], T(target), upper, T(batch));
        for (int64_t i = 0; i < size; ++i) to[i] = S(scale * T(from[i]));
      }
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gan_kernels, CPU, m) {
  m.impl("penalty", TORCH_BOX(&penalty));
  m.impl("penalty_backward", TORCH_BOX(&penalty_backward));
}

}  // namespace gan_kernels
