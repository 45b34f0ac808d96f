// The second derivative of layer, group, instance and batch normalisation in one go, shared by
// norm.cpp and norm_cuda.cu.
//
// Each group of D elements is normalised for itself: with its mean m and r = 1 / sqrt(variance +
// eps), n = (x - m) r and y = n w + b. With <v> the mean over the group, u = g w and P(v) = v - <v> -
// n <v n>, the gradient of x is r P(u). Given h, the gradient of that gradient:
//
//   of g      w r P(h)
//   of w      the sum of g r P(h) over the elements that share a weight
//   of x      -r^2 (<u n> (h - <h>) + <h n> (u - <u>) + n (<h u> - <h> <u> - 3 <h n> <u n>))
#pragma once

#include <optional>

#include "common.h"

namespace gan_kernels {

template <class T>
struct Means {
  T h, u, hn, un, hu;
};

template <class T>
GK_INLINE T projected(T h, T n, const Means<T>& mean) {
  return h - mean.h - n * mean.hn;
}

template <class T>
GK_INLINE T second_gradient(T h, T u, T n, const Means<T>& mean) {
  const T curvature = mean.hu - mean.h * mean.u - 3 * mean.hn * mean.un;
  return mean.un * (h - mean.h) + mean.hn * (u - mean.u) + n * curvature;
}

// Where the groups and their weights lie. A group is `segments` runs of `length` neighbours; each
// element has a weight of its own (layer norm), or each segment (group norm), or the whole group.
struct Groups {
  int64_t count, segments, length, group_stride, segment_stride;
  int64_t weight_groups, weights;  // groups that differ in their weights; weights of one group

  GK_INLINE int64_t begin(int64_t group, int64_t segment) const {
    return group * group_stride + segment * segment_stride;
  }
  GK_INLINE int64_t size() const { return segments * length; }
  GK_INLINE bool elementwise() const { return weights == size() && length > 1; }
  GK_INLINE int64_t weight(int64_t segment) const { return weights == 1 ? 0 : segment; }
};

// strided: the groups alternate in memory, as channels do in a batch.
inline Groups check_norm(
    const Tensor& h,
    const Tensor& g,
    const Tensor& x,
    const Tensor& mean,
    const Tensor& rstd,
    const std::optional<Tensor>& weight,
    int64_t weight_groups,
    int64_t segments,
    bool strided) {
  const ScalarType type = x.scalar_type();
  require(
      type == ScalarType::Float || type == ScalarType::Double,
      "norm_double_backward: x must be float32 or float64");
  const int64_t count = mean.numel();
  require(segments > 0 && weight_groups > 0, "norm_double_backward: counts must be positive");
  const int64_t length = count > 0 ? x.numel() / count / segments : 0;
  require(
      length * segments * count == x.numel() && segments <= std::max<int64_t>(x.numel(), 1),
      "norm_double_backward: mean and segments do not fit x");
  const auto check = [&](const Tensor& tensor, int64_t numel, const char* name) {
    require(
        tensor.scalar_type() == type && tensor.numel() == numel && tensor.is_contiguous() &&
            same_device(tensor, x),
        "norm_double_backward: ",
        name,
        " must be contiguous, with the size, dtype and device that x asks for");
  };
  check(h, x.numel(), "h");
  check(g, x.numel(), "g");
  check(x, x.numel(), "x");
  check(mean, count, "mean");
  check(rstd, count, "rstd");
  const int64_t weights = weight ? weight->numel() / weight_groups : 1;
  if (weight) {
    check(*weight, weight_groups * weights, "weight");
    require(
        count % weight_groups == 0 && weights > 0 &&
            (weights == 1 || weights == segments || (segments == 1 && weights == length)),
        "norm_double_backward: weight does not fit the groups");
  }
  return {
      count, segments, length, strided ? length : segments * length,
      strided ? count * length : length, weight_groups, weights};
}

// One call: the arguments and the results, and how they lie.
template <class T>
struct NormCall {
  Groups groups;
  const T *h, *g, *x, *mean, *rstd, *weight;  // weight may be null
  T *to_g, *to_x, *to_weight;
};

// Checks the arguments, makes the results and lets compute(call), the device's part, fill them.
template <class Compute>
std::tuple<Tensor, Tensor, Tensor> with_norm_call(
    const Tensor& h,
    const Tensor& g,
    const Tensor& x,
    const Tensor& mean,
    const Tensor& rstd,
    const std::optional<Tensor>& weight,
    int64_t weight_groups,
    int64_t segments,
    bool strided,
    const Compute& compute) {
  const Groups groups =
      check_norm(h, g, x, mean, rstd, weight, weight_groups, segments, strided);
  Tensor to_g = torch::stable::empty_like(x), to_x = torch::stable::empty_like(x);
  Tensor to_weight = new_tensor(x, {groups.count, groups.weights}, x.scalar_type());
  with_type(x.scalar_type(), [&](auto zero) {
    using T = Accumulator<decltype(zero)>;
    const auto in = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
    const auto out = [](const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
    compute(NormCall<T>{
        groups, in(h), in(g), in(x), in(mean), in(rstd), weight ? in(*weight) : nullptr, out(to_g),
        out(to_x), out(to_weight)});
  });
  return {to_g, to_x, to_weight};
}

}  // namespace gan_kernels
