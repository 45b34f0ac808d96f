// InfoGAN's information loss (Chen et al. 2016, arXiv 1606.03657, eq. 5-6): the mathematics of one
// row, and the checks of the arguments, shared by info_loss.cpp and info_loss_cuda.cu.
//
// A row of q holds n logits x for each categorical code k, then a mean m and, for learned variance,
// a log variance v for each continuous code c (v = 0 otherwise). In nats:
//
//   categorical   -log softmax(x)_k = log sum_j exp(x_j - x_max) + x_max - x_k
//   continuous    -log N(c; m, e^v) = (log 2 pi + v + (c - m)^2 e^-v) / 2
//
//   d/dx_j = softmax(x)_j - [j = k]     d/dm = -(c - m) e^-v     d/dv = (1 - (c - m)^2 e^-v) / 2
#pragma once

#include "common.h"

namespace gan_kernels {

template <class T>
GK_INLINE T gaussian_nll(T mean, T log_variance, T precision, T code) {
  const T error = code - mean;
  return T(0.5) * (T(1.83787706640934548356) + log_variance + error * error * precision);
}

template <class T>
GK_INLINE T gaussian_mean_gradient(T mean, T precision, T code) {
  return (mean - code) * precision;
}

template <class T>
GK_INLINE T gaussian_log_variance_gradient(T mean, T precision, T code) {
  const T error = code - mean;
  return T(0.5) - T(0.5) * error * error * precision;
}

// A two-dimensional tensor of S and any strides.
template <class S>
struct Matrix {
  S* data;
  int64_t row_stride, column_stride;

  Matrix(const Tensor& tensor)
      : data(static_cast<S*>(tensor.const_data_ptr())),
        row_stride(tensor.stride(0)),
        column_stride(tensor.stride(1)) {}

  GK_INLINE S& at(int64_t row, int64_t column) const {
    return data[row * row_stride + column * column_stride];
  }
};

// The shape of one call. Columns of q: `logits`, then `codes` means, then `codes` log variances if
// `learned`.
struct InfoShape {
  int64_t batch, columns, logits, codes;
  bool learned;
};

inline InfoShape check_info_loss(
    const Tensor& q,
    const Tensor& category,
    const Tensor& code,
    const std::vector<int64_t>& sizes) {
  require(q.defined(), "info_loss: q is None");
  require(category.defined(), "info_loss: category is None");
  require(code.defined(), "info_loss: code is None");
  require(is_floating(q.scalar_type()), "info_loss: q must be float32, float64, bfloat16 or float16");
  require(category.scalar_type() == ScalarType::Long, "info_loss: category must be int64");
  require(
      code.scalar_type() == q.scalar_type() || code.scalar_type() == ScalarType::Float,
      "info_loss: code must be float32 or of q's dtype");
  require(q.dim() == 2, "info_loss: q must have two dimensions, not ", q.dim());
  require(category.dim() == 2, "info_loss: category must have two dimensions, not ", category.dim());
  require(code.dim() == 2, "info_loss: code must have two dimensions, not ", code.dim());
  require(same_device(q, category), "info_loss: category must be on q's device");
  require(same_device(q, code), "info_loss: code must be on q's device");
  InfoShape shape{q.size(0), q.size(1), 0, code.size(1), false};
  require(shape.batch > 0, "info_loss: q has an empty batch");
  require(shape.columns > 0, "info_loss: q has no columns");
  for (int64_t size : sizes) {
    require(size > 0, "info_loss: sizes must be positive, but holds ", size);
    // Compared by subtraction: a sum of absurd sizes could overflow.
    require(
        size <= shape.columns - shape.logits,
        "info_loss: sizes add up to more than the ",
        shape.columns,
        " columns of q");
    shape.logits += size;
  }
  require(
      category.size(0) == shape.batch && category.size(1) == int64_t(sizes.size()),
      "info_loss: category must have the shape (",
      shape.batch,
      ", ",
      sizes.size(),
      "), not (",
      category.size(0),
      ", ",
      category.size(1),
      ")");
  require(
      code.size(0) == shape.batch,
      "info_loss: code must have ",
      shape.batch,
      " rows, not ",
      code.size(0));
  const int64_t rest = shape.columns - shape.logits;
  shape.learned = shape.codes > 0 && rest == 2 * shape.codes;
  require(
      shape.learned || rest == shape.codes,
      "info_loss: q has ",
      shape.columns,
      " columns, but sizes and code ask for ",
      shape.logits + 2 * shape.codes,
      " (or ",
      shape.logits + shape.codes,
      " for unit variance)");
  return shape;
}

// Calls body(S(), C()) with q's dtype and the code's.
template <class Body>
void with_types(const Tensor& q, const Tensor& code, const Body& body) {
  with_type(q.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    code.scalar_type() == q.scalar_type() ? body(S(), S()) : body(S(), float());
  });
}

inline void check_loss_gradient(const Tensor& gradient, const char* name, const Tensor& q) {
  require(
      gradient.dim() == 0 && gradient.scalar_type() == sum_type(q) &&
          same_device(gradient, q),
      "info_loss_backward: ",
      name,
      " must be a scalar of the loss's dtype on q's device");
}

}  // namespace gan_kernels
