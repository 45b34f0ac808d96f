// The gradient penalty's last step: for each of B rows g of the critic's gradient,
//
//   n = |g|_2     penalty = mean (n - target)^2     d penalty / dg = 2 (n - target) / (B n) g
//
// with a zero gradient for a row whose norm is zero. Shared by penalty.cpp and penalty_cuda.cu.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"

namespace gan_kernels {

template <class T>
GK_INLINE T penalty_term(T norm, T target) {
  return (norm - target) * (norm - target);
}

// What a row is multiplied by in the backward; `gradient` is that of the penalty.
template <class T>
GK_INLINE T penalty_scale(T norm, T target, T gradient, T batch) {
  return norm == 0 ? T(0) : 2 * gradient * (norm - target) / (batch * norm);
}

inline void check_gradient(const Tensor& gradient) {
  require(is_floating(gradient.scalar_type()), "penalty: gradient must be a floating-point tensor");
  require(gradient.dim() > 0 && gradient.size(0) > 0, "penalty: gradient has an empty batch");
}

inline void check_penalty_backward(
    const Tensor& penalty_gradient, const Tensor& gradient, const Tensor& norms) {
  check_gradient(gradient);
  for (const Tensor* tensor : {&penalty_gradient, &norms}) {
    require(
        tensor->scalar_type() == sum_type(gradient) && same_device(*tensor, gradient),
        "penalty_backward: penalty_gradient and norms must have the norm's dtype and device");
  }
  require(penalty_gradient.dim() == 0, "penalty_backward: penalty_gradient must be a scalar");
  require(
      norms.dim() == 1 && norms.size(0) == gradient.size(0) && norms.is_contiguous(),
      "penalty_backward: norms must be contiguous, one a row");
}

// True where the elements of every row fill one block of memory in some order, as they do in
// contiguous and channels-last tensors: then a row can be read from end to end.
inline bool rows_are_dense(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;
  for (int64_t d = 1; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) dimensions.push_back({tensor.stride(d), tensor.size(d)});
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != expected) return false;
    expected *= size;
  }
  // empty_like keeps the strides only where rows do not overlap either.
  return tensor.size(0) == 1 || tensor.stride(0) == expected;
}

inline Tensor with_dense_rows(const Tensor& tensor) {
  return rows_are_dense(tensor) ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace gan_kernels
