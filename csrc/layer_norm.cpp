// The second derivative of layer normalisation on the CPU. The mathematics is in layer_norm.h.
#include <optional>

#include "dispatch.h"
#include "layer_norm.h"

namespace gan_kernels {
namespace {

constexpr int64_t lanes = 32;

template <class T>
struct Row {
  const T *h, *g, *x, *weight;  // weight may be null
  T mean, rstd;
  int64_t size;
  T *to_g, *to_x, *to_weight;
};

template <class T>
struct SecondDerivative {
  static GK_INLINE void run(Row<T>& row) {
    if (row.weight) {
      both_passes(row, [&](int64_t i) __attribute__((always_inline)) { return row.weight[i]; });
    } else {
      both_passes(row, [](int64_t) __attribute__((always_inline)) { return T(1); });
    }
  }

  template <class Weight>
  static GK_INLINE void both_passes(Row<T>& row, const Weight& weight) {
    T sums[5][lanes] = {};
    const auto add = [&](int64_t i, int64_t lane) __attribute__((always_inline)) {
      const T h = row.h[i], u = row.g[i] * weight(i), n = (row.x[i] - row.mean) * row.rstd;
      sums[0][lane] += h;
      sums[1][lane] += u;
      sums[2][lane] += h * n;
      sums[3][lane] += u * n;
      sums[4][lane] += h * u;
    };
    int64_t i = 0;
    for (; i + lanes <= row.size; i += lanes) {
      for (int64_t lane = 0; lane < lanes; ++lane) add(i + lane, lane);
    }
    for (; i < row.size; ++i) add(i, 0);
    T total[5];
    for (int k = 0; k < 5; ++k) {
      double sum = 0;
      for (int64_t lane = 0; lane < lanes; ++lane) sum += sums[k][lane];
      total[k] = T(sum / row.size);
    }
    const RowMeans<T> mean{total[0], total[1], total[2], total[3], total[4]};
    const T rstd = row.rstd;
    for (int64_t j = 0; j < row.size; ++j) {
      const T h = row.h[j], g = row.g[j], w = weight(j), n = (row.x[j] - row.mean) * rstd;
      const T p = rstd * projected(h, n, mean);
      row.to_g[j] = w * p;
      row.to_weight[j] = g * p;
      row.to_x[j] = -rstd * rstd * second_gradient(h, g * w, n, mean);
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> layer_norm_double_backward(
    const Tensor& h,
    const Tensor& g,
    const Tensor& x,
    const Tensor& mean,
    const Tensor& rstd,
    std::optional<Tensor> weight) {
  check_layer_norm(h, g, x, mean, rstd, weight);
  Tensor to_g = torch::stable::empty_like(x), to_x = torch::stable::empty_like(x),
         to_weight = torch::stable::empty_like(x);
  const int64_t rows = mean.numel(), size = rows > 0 ? x.numel() / rows : 0;
  with_type(x.scalar_type(), [&](auto zero) {
    using T = Accumulator<decltype(zero)>;
    const auto in = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
    const auto out = [](const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, size));
    const T* weights = weight ? in(*weight) : nullptr;
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = r * size;
        Row<T> row{
            in(h) + at, in(g) + at, in(x) + at, weights, in(mean)[r], in(rstd)[r], size,
            out(to_g) + at, out(to_x) + at, out(to_weight) + at};
        run_widest<SecondDerivative<T>>(row);
      }
    });
  });
  return {to_g, to_x, to_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gan_kernels, CPU, m) {
  m.impl("layer_norm_double_backward", TORCH_BOX(&layer_norm_double_backward));
}

}  // namespace gan_kernels
