// info_loss on the CPU. The mathematics is in info_loss.h; here are the loops.
//
// Rows are handled in blocks of `lanes`, columns in tiles; a tile is copied transposed into a local
// array of the accumulator type, so any strides and dtypes meet one vectorised loop over the lanes.
#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "dispatch.h"
#include "info_loss.h"

namespace gan_kernels {
namespace {

constexpr int64_t lanes = 32, tile_columns = 64;

// A two-dimensional tensor as a pointer, its dtype and its strides in elements.
struct Matrix {
  void* data;
  ScalarType type;
  int64_t row_stride, column_stride;

  explicit Matrix(const Tensor& tensor)
      : data(const_cast<void*>(tensor.const_data_ptr())),
        type(tensor.scalar_type()),
        row_stride(tensor.stride(0)),
        column_stride(tensor.stride(1)) {}
};

template <class T>
constexpr ScalarType native_type =
    std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;

// A full block of the accumulator's own type can be copied by the vectorised loop itself.
template <class T>
GK_INLINE bool is_native_block(const Matrix& m, int64_t rows) {
  return m.type == native_type<T> && rows == lanes;
}

template <class T>
void load_any(const Matrix& m, int64_t row, int64_t rows, int64_t column, int64_t columns, T* tile) {
  with_type(m.type, [&](auto zero) {
    using S = decltype(zero);
    const S* source = static_cast<const S*>(m.data) + row * m.row_stride + column * m.column_stride;
    for (int64_t r = 0; r < rows; ++r) {
      const S* from = source + r * m.row_stride;
      for (int64_t c = 0; c < columns; ++c) tile[c * lanes + r] = T(from[c * m.column_stride]);
    }
  });
}

template <class T>
void store_any(const Matrix& m, int64_t row, int64_t rows, int64_t column, int64_t columns, T* tile) {
  with_type(m.type, [&](auto zero) {
    using S = decltype(zero);
    S* to = static_cast<S*>(m.data) + row * m.row_stride + column;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) to[r * m.row_stride + c] = S(tile[c * lanes + r]);
    }
  });
}

// tile[c][r] = matrix[row + r][column + c]; lanes beyond `rows` are left as they are.
template <class T>
GK_INLINE void load(
    const Matrix& m, int64_t row, int64_t rows, int64_t column, int64_t columns, T* tile) {
  if (!is_native_block<T>(m, rows)) return load_any(m, row, rows, column, columns, tile);
  const int64_t row_stride = m.row_stride, column_stride = m.column_stride;
  const T* from = static_cast<const T*>(m.data) + row * row_stride + column * column_stride;
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < lanes; ++r) {
      tile[c * lanes + r] = from[r * row_stride + c * column_stride];
    }
  }
}

// matrix[row + r][column + c] = tile[c][r]; the matrix's rows are contiguous.
template <class T>
GK_INLINE void store(
    const Matrix& m, int64_t row, int64_t rows, int64_t column, int64_t columns, T* tile) {
  if (!is_native_block<T>(m, rows)) return store_any(m, row, rows, column, columns, tile);
  T* to = static_cast<T*>(m.data) + row * m.row_stride + column;
  for (int64_t r = 0; r < lanes; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[r * m.row_stride + c] = tile[c * lanes + r];
  }
}

template <class T>
struct Call {
  InfoShape shape;
  const std::vector<int64_t>& sizes;
  Matrix q, category, code;
  Matrix* gradient = nullptr;  // of q; null in the forward
  T categorical_scale = 0, continuous_scale = 0;  // gradients of the losses over the batch
  std::atomic<bool> out_of_range = false;
};

// The rows [begin, end) and, after a forward, the sums of their two losses.
template <class T>
struct Chunk {
  Call<T>& call;
  int64_t begin, end;
  double categorical = 0, continuous = 0;
};

template <class T>
struct Softmax {
  T maximum[lanes], sum[lanes], picked[lanes];
  int64_t index[lanes];
};

// Folds `columns` logits of a tile into the running maximum and sum; leaves exp(x - max) in the tile.
template <class T>
GK_INLINE void fold(Softmax<T>& softmax, T* tile, int64_t columns) {
  T maximum[lanes];
  for (int64_t r = 0; r < lanes; ++r) maximum[r] = softmax.maximum[r];
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < lanes; ++r) {
      // Written so that NaN stays: a comparison with it is false.
      const T x = tile[c * lanes + r];
      maximum[r] = maximum[r] > x ? maximum[r] : x;
    }
  }
  T sum[lanes];
  for (int64_t r = 0; r < lanes; ++r) {
    sum[r] = softmax.sum[r] * exponential(softmax.maximum[r] - maximum[r]);
    softmax.maximum[r] = maximum[r];
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < lanes; ++r) {
      const T e = exponential(tile[c * lanes + r] - maximum[r]);
      tile[c * lanes + r] = e;
      sum[r] += e;
    }
  }
  for (int64_t r = 0; r < lanes; ++r) softmax.sum[r] = sum[r];
}

// One categorical code of one block: its softmax over all tiles, and the logit of the category.
template <class T>
GK_INLINE void reduce_code(
    Call<T>& call, int64_t k, int64_t offset, int64_t row, int64_t rows, Softmax<T>& softmax, T* tile) {
  const int64_t size = call.sizes[k];
  const Matrix& m = call.category;
  const int64_t* index =
      static_cast<const int64_t*>(m.data) + row * m.row_stride + k * m.column_stride;
  for (int64_t r = 0; r < lanes; ++r) {
    softmax.maximum[r] = -std::numeric_limits<T>::infinity();
    softmax.sum[r] = softmax.picked[r] = 0;
    softmax.index[r] = r < rows ? index[r * m.row_stride] : 0;
  }
  for (int64_t r = 0; r < rows; ++r) {
    if (softmax.index[r] < 0 || softmax.index[r] >= size) {
      call.out_of_range = true;
      softmax.index[r] = 0;
    }
  }
  for (int64_t start = 0; start < size; start += tile_columns) {
    const int64_t columns = std::min(tile_columns, size - start);
    load(call.q, row, rows, offset + start, columns, tile);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t c = softmax.index[r] - start;
      if (c >= 0 && c < columns) softmax.picked[r] = tile[c * lanes + r];
    }
    fold(softmax, tile, columns);
  }
}

// Loads mean, log variance, its exp(-v), and code of continuous code j.
template <class T>
struct Gaussian {
  T mean[lanes] = {}, log_variance[lanes] = {}, precision[lanes], code[lanes] = {};

  GK_INLINE Gaussian(const Call<T>& call, int64_t j, int64_t row, int64_t rows) {
    const InfoShape& shape = call.shape;
    load(call.q, row, rows, shape.logits + j, 1, mean);
    load(call.code, row, rows, j, 1, code);
    for (int64_t r = 0; r < lanes; ++r) precision[r] = 1;
    if (shape.learned) {
      load(call.q, row, rows, shape.logits + shape.codes + j, 1, log_variance);
      for (int64_t r = 0; r < lanes; ++r) precision[r] = exponential(-log_variance[r]);
    }
  }
};

template <class T>
struct Forward {
  static GK_INLINE void run(Chunk<T>& chunk) {
    Call<T>& call = chunk.call;
    const InfoShape& shape = call.shape;
    T tile[tile_columns * lanes] = {}, categorical[lanes] = {}, continuous[lanes] = {};
    for (int64_t row = chunk.begin; row < chunk.end; row += lanes) {
      const int64_t rows = std::min(lanes, chunk.end - row);
      int64_t offset = 0;
      for (size_t k = 0; k < call.sizes.size(); ++k) {
        Softmax<T> softmax;
        reduce_code(call, k, offset, row, rows, softmax, tile);
        T nll[lanes];
        for (int64_t r = 0; r < lanes; ++r) {
          nll[r] = categorical_nll(softmax.maximum[r], softmax.sum[r], softmax.picked[r]);
        }
        for (int64_t r = 0; r < rows; ++r) categorical[r] += nll[r];
        offset += call.sizes[k];
      }
      for (int64_t j = 0; j < shape.codes; ++j) {
        const Gaussian<T> g(call, j, row, rows);
        T nll[lanes];
        for (int64_t r = 0; r < lanes; ++r) {
          nll[r] = gaussian_nll(g.mean[r], g.log_variance[r], g.precision[r], g.code[r]);
        }
        for (int64_t r = 0; r < rows; ++r) continuous[r] += nll[r];
      }
    }
    for (int64_t r = 0; r < lanes; ++r) {
      chunk.categorical += categorical[r];
      chunk.continuous += continuous[r];
    }
  }
};

template <class T>
struct Backward {
  static GK_INLINE void run(Chunk<T>& chunk) {
    Call<T>& call = chunk.call;
    const InfoShape& shape = call.shape;
    T tile[tile_columns * lanes] = {};
    for (int64_t row = chunk.begin; row < chunk.end; row += lanes) {
      const int64_t rows = std::min(lanes, chunk.end - row);
      int64_t offset = 0;
      for (size_t k = 0; k < call.sizes.size(); ++k) {
        const int64_t size = call.sizes[k];
        Softmax<T> softmax;
        reduce_code(call, k, offset, row, rows, softmax, tile);
        T scale[lanes];
        for (int64_t r = 0; r < lanes; ++r) scale[r] = call.categorical_scale / softmax.sum[r];
        for (int64_t start = 0; start < size; start += tile_columns) {
          const int64_t columns = std::min(tile_columns, size - start);
          if (size > tile_columns) {  // otherwise the one tile still holds exp(x - max)
            load(call.q, row, rows, offset + start, columns, tile);
            for (int64_t c = 0; c < columns; ++c) {
              for (int64_t r = 0; r < lanes; ++r) {
                tile[c * lanes + r] = exponential(tile[c * lanes + r] - softmax.maximum[r]);
              }
            }
          }
          for (int64_t c = 0; c < columns; ++c) {
            for (int64_t r = 0; r < lanes; ++r) tile[c * lanes + r] *= scale[r];
          }
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t c = softmax.index[r] - start;
            if (c >= 0 && c < columns) tile[c * lanes + r] -= call.categorical_scale;
          }
          store(*call.gradient, row, rows, offset + start, columns, tile);
        }
        offset += size;
      }
      for (int64_t j = 0; j < shape.codes; ++j) {
        const Gaussian<T> g(call, j, row, rows);
        const T scale = call.continuous_scale;
        T slope[lanes];
        for (int64_t r = 0; r < lanes; ++r) {
          slope[r] = scale * gaussian_mean_gradient(g.mean[r], g.precision[r], g.code[r]);
        }
        store(*call.gradient, row, rows, shape.logits + j, 1, slope);
        if (!shape.learned) continue;
        for (int64_t r = 0; r < lanes; ++r) {
          slope[r] = scale * gaussian_log_variance_gradient(g.mean[r], g.precision[r], g.code[r]);
        }
        store(*call.gradient, row, rows, shape.logits + shape.codes + j, 1, slope);
      }
    }
  }
};

// Runs Loop over chunks whose bounds depend on the shape alone, so that the sums do not depend on
// the number of threads.
template <template <class> class Loop, class T>
std::pair<double, double> run(Call<T>& call) {
  const int64_t batch = call.shape.batch;
  const int64_t per_chunk =
      std::clamp<int64_t>(16384 / call.shape.columns / lanes, 1, 32) * lanes;
  const int64_t chunks = (batch + per_chunk - 1) / per_chunk;
  std::vector<std::pair<double, double>> sums(chunks);
  torch::stable::parallel_for(0, chunks, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Chunk<T> chunk{call, i * per_chunk, std::min(batch, (i + 1) * per_chunk)};
      run_widest<Loop<T>>(chunk);
      sums[i] = {chunk.categorical, chunk.continuous};
    }
  });
  require(!call.out_of_range, "info_loss: category holds an index outside its code's size");
  std::pair<double, double> total{0, 0};
  for (const auto& sum : sums) {
    total.first += sum.first;
    total.second += sum.second;
  }
  return total;
}

// Asks for huge pages under a large new tensor. glibc returns freed blocks of 32 MiB to the system, so
// every call would meet fresh pages; in pages of 4 KiB the faults took a third of the backward.
void ask_for_huge_pages(const Tensor& tensor) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t bytes = tensor.numel() * tensor.element_size();
  if (bytes < 32 << 20) return;
  const uintptr_t data = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t begin = (data + page - 1) / page * page, end = (data + bytes) / page * page;
  // Advice alone: where the system does not take it, nothing changes.
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

std::tuple<Tensor, Tensor> info_loss(
    const Tensor& q, const Tensor& category, const Tensor& code, std::vector<int64_t> sizes) {
  const InfoShape shape = check_info_loss(q, category, code, sizes);
  Tensor categorical = new_tensor(q, {}, loss_type(q));
  Tensor continuous = new_tensor(q, {}, loss_type(q));
  with_type(loss_type(q), [&](auto zero) {
    using T = Accumulator<decltype(zero)>;
    Call<T> call{shape, sizes, Matrix(q), Matrix(category), Matrix(code)};
    const auto sums = run<Forward>(call);
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
  Tensor result = new_tensor(q, {shape.batch, shape.columns}, q.scalar_type());
  ask_for_huge_pages(result);
  Matrix gradient(result);
  with_type(loss_type(q), [&](auto zero) {
    using T = Accumulator<decltype(zero)>;
    Call<T> call{shape, sizes, Matrix(q), Matrix(category), Matrix(code), &gradient};
    call.categorical_scale =
        *static_cast<const T*>(categorical_gradient.const_data_ptr()) / T(shape.batch);
    call.continuous_scale =
        *static_cast<const T*>(continuous_gradient.const_data_ptr()) / T(shape.batch);
    run<Backward>(call);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gan_kernels, CPU, m) {
  m.impl("info_loss", TORCH_BOX(&info_loss));
  m.impl("info_loss_backward", TORCH_BOX(&info_loss_backward));
}

}  // namespace gan_kernels
