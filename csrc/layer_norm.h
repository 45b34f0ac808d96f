// The second derivative of layer normalisation in one go, shared by layer_norm.cpp and
// layer_norm_cuda.cu.
//
// For a row x of D elements with mean m and r = 1 / sqrt(variance + eps): n = (x - m) r and
// y = n w + b. With <v> the mean over the row, u = g w and P(v) = v - <v> - n <v n>, the gradient of
// x is r P(u). Given h, the gradient of that gradient:
//
//   of g      w r P(h)
//   of w      the sum over the rows of g r P(h)
//   of x      -r^2 (<u n> (h - <h>) + <h n> (u - <u>) + n (<h u> - <h> <u> - 3 <h n> <u n>))
#pragma once

#include "common.h"

namespace gan_kernels {

template <class T>
struct RowMeans {
  T h, u, hn, un, hu;
};

template <class T>
GK_INLINE T projected(T h, T n, const RowMeans<T>& mean) {
  return h - mean.h - n * mean.hn;
}

template <class T>
GK_INLINE T second_gradient(T h, T u, T n, const RowMeans<T>& mean) {
  const T curvature = mean.hu - mean.h * mean.u - 3 * mean.hn * mean.un;
  return mean.un * (h - mean.h) + mean.hn * (u - mean.u) + n * curvature;
}

inline void check_layer_norm(
    const Tensor& h,
    const Tensor& g,
    const Tensor& x,
    const Tensor& mean,
    const Tensor& rstd,
    const std::optional<Tensor>& weight) {
  const ScalarType type = x.scalar_type();
  require(
      type == ScalarType::Float || type == ScalarType::Double,
      "layer_norm_double_backward: x must be float32 or float64");
  const int64_t rows = mean.numel(), size = rows > 0 ? x.numel() / rows : 0;
  require(rows * size == x.numel(), "layer_norm_double_backward: mean does not fit x");
  const auto check = [&](const Tensor& tensor, int64_t numel, const char* name) {
    require(
        tensor.scalar_type() == type && tensor.numel() == numel && tensor.is_contiguous() &&
            same_device(tensor, x),
        "layer_norm_double_backward: ",
        name,
        " must be contiguous, with the size, dtype and device that x asks for");
  };
  check(h, x.numel(), "h");
  check(g, x.numel(), "g");
  check(x, x.numel(), "x");
  check(mean, rows, "mean");
  check(rstd, rows, "rstd");
  if (weight) check(*weight, size, "weight");
}

}  // namespace gan_kernels
