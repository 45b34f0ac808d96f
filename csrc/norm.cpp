// The second derivative of normalisation on the CPU. The mathematics is in norm.h.
#include "dispatch.h"
#include "norm.h"

namespace gan_kernels {
namespace {

constexpr int64_t lanes = 32;

template <class T>
struct Part {
  const NormCall<T>& call;
  int64_t first, last;
};

template <class T>
GK_INLINE T total(T (&sums)[lanes]) {
  for (int64_t half = lanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

// Calls body(i, lane) for i in [0, length); neighbouring i have different lanes.
template <class Body>
GK_INLINE void in_lanes(int64_t length, const Body& body) {
  int64_t i = 0;
  for (; i + lanes <= length; i += lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane) body(i + lane, lane);
  }
  for (int64_t lane = 0; lane < length - i; ++lane) body(i + lane, lane);
}

template <class T>
struct SecondDerivative {
  static GK_INLINE void run(Part<T>& part) {
    for (int64_t group = part.first; group < part.last; ++group) {
      if (part.call.groups.elementwise()) {
        both_passes<true>(part.call, group);
      } else {
        both_passes<false>(part.call, group);
      }
    }
  }

  template <bool elementwise>
  static GK_INLINE void both_passes(const NormCall<T>& call, int64_t group) {
    const Groups& groups = call.groups;
    const T mean = call.mean[group], rstd = call.rstd[group], size = T(groups.size());
    const T* weights =
        call.weight ? call.weight + group % groups.weight_groups * groups.weights : nullptr;
    T sums[5][lanes] = {};
    for (int64_t segment = 0; segment < groups.segments; ++segment) {
      const int64_t at = groups.begin(group, segment);
      const T *h = call.h + at, *g = call.g + at, *x = call.x + at;
      const T shared = weights ? weights[groups.weight(segment)] : T(1);
      in_lanes(groups.length, [&](int64_t i, int64_t lane) __attribute__((always_inline)) {
        const T u = g[i] * (elementwise ? weights[i] : shared), n = (x[i] - mean) * rstd;
        sums[0][lane] += h[i];
        sums[1][lane] += u;
        sums[2][lane] += h[i] * n;
        sums[3][lane] += u * n;
        sums[4][lane] += h[i] * u;
      });
    }
    const Means<T> means{
        total(sums[0]) / size, total(sums[1]) / size, total(sums[2]) / size, total(sums[3]) / size,
        total(sums[4]) / size};
    T* to_weight = call.to_weight + group * groups.weights;
    if (!elementwise) std::fill_n(to_weight, groups.weights, T(0));
    for (int64_t segment = 0; segment < groups.segments; ++segment) {
      const int64_t at = groups.begin(group, segment);
      const T *h = call.h + at, *g = call.g + at, *x = call.x + at;
      T *to_g = call.to_g + at, *to_x = call.to_x + at;
      const T shared = weights ? weights[groups.weight(segment)] : T(1);
      T products[lanes] = {};
      in_lanes(groups.length, [&](int64_t i, int64_t lane) __attribute__((always_inline)) {
        const T w = elementwise ? weights[i] : shared, n = (x[i] - mean) * rstd;
        const T p = rstd * projected(h[i], n, means);
        to_g[i] = w * p;
        to_x[i] = -rstd * rstd * second_gradient(h[i], g[i] * w, n, means);
        if (elementwise) {
          to_weight[i] = g[i] * p;
        } else {
          products[lane] += g[i] * p;
        }
      });
      if (!elementwise) to_weight[groups.weight(segment)] += total(products);
    }
  }
};

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
  return with_norm_call(
      h, g, x, mean, rstd, weight, weight_groups, segments, strided, [](const auto& call) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(call.h)>>;
        const int64_t size = std::max<int64_t>(1, call.groups.size());
        const int64_t grain = std::max<int64_t>(1, 16384 / size);
        torch::stable::parallel_for(0, call.groups.count, grain, [&](int64_t first, int64_t last) {
          Part<T> part{call, first, last};
          run_widest<SecondDerivative<T>>(part);
        });
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gan_kernels, CPU, m) {
  m.impl("norm_double_backward", TORCH_BOX(&norm_double_backward));
}

}  // namespace gan_kernels
