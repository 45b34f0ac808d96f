// info_loss on the CPU. The mathematics is in info_loss.h; here are the loops.
//
// Rows are handled in blocks. The arguments of exp in a block are first gathered in a buffer, so that
// any strides and dtypes meet one vectorised loop.
#include <atomic>
#include <bit>
#include <span>

#include "dispatch.h"
#include "info_loss.h"

namespace gan_kernels {
namespace {

// exp(x) without a branch, so that the compiler can vectorise it: x = n ln 2 + r, the Taylor series
// of exp(r), and 2^n in two halves so that overflow gives infinity and underflow zero. Here and
// below comparisons are written so that NaN stays: one with NaN is false.
GK_INLINE float exponential(float x) {
  x = x < -105.0f ? -105.0f : x;
  x = x > 90.0f ? 90.0f : x;
  const float magic = 0x1.8p23f;  // adding it rounds to an integer and leaves that in the low bits
  const float shifted = x * 0x1.715476p0f + magic, n = shifted - magic;
  const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  float series = 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 1.0f / 2;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const uint32_t exponent = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(magic) + 254;
  const uint32_t half = exponent / 2;
  return series * std::bit_cast<float>(half << 23) * std::bit_cast<float>((exponent - half) << 23);
}

struct Exponentials {
  static GK_INLINE void run(std::span<float>& values) {
    for (float& x : values) x = exponential(x);
  }
};

void exponentials(std::span<float> values) {
  run_widest<Exponentials>(values);
}

void exponentials(std::span<double> values) {
  for (double& x : values) x = std::exp(x);
}

template <class S, class C>
struct Call {
  using T = Accumulator<S>;
  InfoShape shape;
  const std::vector<int64_t>& sizes;
  Matrix<const S> q;
  Matrix<const int64_t> category;
  Matrix<const C> code;
  S* gradient = nullptr;  // of q, contiguous; null in the forward
  T categorical_scale = 0, continuous_scale = 0;  // gradients of the losses over the batch
  std::atomic<bool> out_of_range = false;

  // The loss of categorical code k in the rows [begin, end) or, in the backward, its gradient.
  double categorical_loss(int64_t k, int64_t offset, int64_t begin, int64_t end, T* buffer) {
    const int64_t size = sizes[k];
    double loss = 0;
    T* e = buffer;
    for (int64_t row = begin; row < end; ++row, e += size) {
      const int64_t index = category.at(row, k);
      if (index < 0 || index >= size) {
        out_of_range = true;
        return 0;
      }
      T maximum = -INFINITY;
      for (int64_t c = 0; c < size; ++c) {
        const T x = T(q.at(row, offset + c));
        maximum = maximum > x ? maximum : x;
      }
      for (int64_t c = 0; c < size; ++c) e[c] = T(q.at(row, offset + c)) - maximum;
      loss -= e[index];
    }
    exponentials({buffer, e});
    e = buffer;
    for (int64_t row = begin; row < end; ++row, e += size) {
      T sum = 0;
      for (int64_t c = 0; c < size; ++c) sum += e[c];
      if (!gradient) {
        loss += std::log(sum);
        continue;
      }
      S* to = gradient + row * shape.columns + offset;
      const T scale = categorical_scale / sum;
      const int64_t index = category.at(row, k);
      for (int64_t c = 0; c < size; ++c) to[c] = S(scale * e[c]);
      to[index] = S(scale * e[index] - categorical_scale);
    }
    return loss;
  }

  // The same of all continuous codes.
  double continuous_loss(int64_t begin, int64_t end, T* buffer) {
    const int64_t mean_at = shape.logits, variance_at = mean_at + shape.codes;
    const auto log_variance = [&](int64_t row, int64_t j) {
      return shape.learned ? T(q.at(row, variance_at + j)) : T(0);
    };
    T* precision = buffer;
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t j = 0; j < shape.codes; ++j) *precision++ = -log_variance(row, j);
    }
    exponentials({buffer, precision});
    precision = buffer;
    double loss = 0;
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t j = 0; j < shape.codes; ++j, ++precision) {
        const T mean = T(q.at(row, mean_at + j)), c = T(code.at(row, j));
        if (!gradient) {
          loss += gaussian_nll(mean, log_variance(row, j), *precision, c);
          continue;
        }
        S* to = gradient + row * shape.columns;
        to[mean_at + j] = S(continuous_scale * gaussian_mean_gradient(mean, *precision, c));
        if (shape.learned) {
          to[variance_at + j] =
              S(continuous_scale * gaussian_log_variance_gradient(mean, *precision, c));
        }
      }
    }
    return loss;
  }

  // Runs over blocks whose bounds depend on the shape alone, so that the sums do not depend on the
  // number of threads.
  std::pair<double, double> run() {
    const int64_t batch = shape.batch;
    const int64_t rows = std::clamp<int64_t>(16384 / shape.columns, 1, batch);
    std::vector<std::pair<double, double>> losses((batch + rows - 1) / rows);
    torch::stable::parallel_for(0, losses.size(), 1, [&](int64_t first, int64_t last) {
      std::vector<T> buffer(rows * shape.columns);
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = i * rows, end = std::min(batch, begin + rows);
        int64_t offset = 0;
        for (size_t k = 0; k < sizes.size(); ++k) {
          losses[i].first += categorical_loss(k, offset, begin, end, buffer.data());
          offset += sizes[k];
        }
        losses[i].second = continuous_loss(begin, end, buffer.data());
      }
    });
    require(!out_of_range, "info_loss: category holds an index outside its code's size");
    std::pair<double, double> total{0, 0};
    for (const auto& [categorical, continuous] : losses) {
      total.first += categorical;
      total.second += continuous;
    }
    return total;
  }
};

std::tuple<Tensor, Tensor> info_loss(
    const Tensor& q, const Tensor& category, const Tensor& code, std::vector<int64_t> sizes) {
  const InfoShape shape = check_info_loss(q, category, code, sizes);
  Tensor categorical = new_tensor(q, {}, sum_type(q));
  Tensor continuous = new_tensor(q, {}, sum_type(q));
  with_types(q, code, [&](auto q_zero, auto code_zero) {
    using S = decltype(q_zero);
    using T = Accumulator<S>;
    Call<S, decltype(code_zero)> call{shape, sizes, q, category, code};
    const auto sums = call.run();
    *static_cast<T*>(categorical.mutable_data_ptr()) = T(sums.first / shape.batch);
    *static_cast<T*>(continuous.mutable_data_ptr()) = T(sums.second / shape.batch);
  });
  return {categorical, continuous};
}

Tensor info_loss_backward(
    const Tensor& categorical_gradient,
    const Tensor& continuous_gradient,
    const Tensor& q,
    const Tensor& category,
    const Tensor& code,
    std::vector<int64_t> sizes) {
  const InfoShape shape = check_info_loss(q, category, code, sizes);
  check_loss_gradient(categorical_gradient, "categorical_gradient", q);
  check_loss_gradient(continuous_gradient, "continuous_gradient", q);
  Tensor gradient = new_tensor(q, {shape.batch, shape.columns}, q.scalar_type());
  with_types(q, code, [&](auto q_zero, auto code_zero) {
    using S = decltype(q_zero);
    using T = Accumulator<S>;
    const T first = *static_cast<const T*>(categorical_gradient.const_data_ptr());
    const T second = *static_cast<const T*>(continuous_gradient.const_data_ptr());
    Call<S, decltype(code_zero)> call{
        shape, sizes, q, category, code, static_cast<S*>(gradient.mutable_data_ptr()),
        first / T(shape.batch), second / T(shape.batch)};
    call.run();
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gan_kernels, CPU, m) {
  m.impl("info_loss", TORCH_BOX(&info_loss));
  m.impl("info_loss_backward", TORCH_BOX(&info_loss_backward));
}

}  // namespace gan_kernels
