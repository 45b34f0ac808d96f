// info_loss on CUDA. The mathematics is in info_loss.h; here are the loops and the launches.
//
// Narrow rows: a block copies 128 rows of q to shared memory, coalesced, and one thread takes each.
// Wide rows: one warp takes each, straight from global memory.
#include "cuda.h"
#include "info_loss.h"

namespace gan_kernels {
namespace {

constexpr int max_categorical = 256;  // their sizes travel as a kernel argument
constexpr int64_t shared_bytes = 48 * 1024;

template <class S, class C>
struct Call {
  InfoShape shape;
  Matrix<const S> q;
  Matrix<const int64_t> category;
  Matrix<const C> code;
  int categorical_codes;
  int64_t sizes[max_categorical];

  Call(
      const InfoShape& shape,
      const Tensor& q,
      const Tensor& category,
      const Tensor& code,
      const std::vector<int64_t>& list)
      : shape(shape), q(q), category(category), code(code), categorical_codes(list.size()) {
    std::copy(list.begin(), list.end(), sizes);
  }
};

// A row of q, read in the accumulator type from shared memory or from the tensor itself.
template <class T>
struct SharedRow {
  T* values;
  __device__ T get(int64_t column) const { return values[column]; }
  __device__ void set(int64_t column, T value) const { values[column] = value; }
};

template <class S, class T>
struct GlobalRow {
  const Matrix<const S>& source;
  S* target;
  int64_t row;
  __device__ T get(int64_t column) const { return T(source.at(row, column)); }
  __device__ void set(int64_t column, T value) const { target[column] = S(value); }
};

template <class T>
struct Softmax {
  T maximum, sum, picked;
};

template <int width, class T, class Row>
__device__ Softmax<T> reduce_code(Row values, int64_t offset, int64_t size, int64_t index, int lane) {
  T maximum = -INFINITY;
  for (int64_t c = lane; c < size; c += width) {
    const T x = values.get(offset + c);
    maximum = maximum > x ? maximum : x;
  }
  maximum = group_max<width>(maximum);
  T sum = 0;
  for (int64_t c = lane; c < size; c += width) {
    sum += std::exp(values.get(offset + c) - maximum);
  }
  sum = group_sum<width>(sum);
  // A category outside its range makes the loss NaN and reads nothing.
  const bool inside = index >= 0 && index < size;
  return {maximum, sum, inside ? values.get(offset + index) : T(NAN)};
}

// Both losses of one row, the same in each lane of the group.
template <int width, class T, class S, class C, class Row>
__device__ void row_forward(
    const Call<S, C>& call, Row values, int64_t row, int lane, T& categorical, T& continuous) {
  const InfoShape& shape = call.shape;
  int64_t offset = 0;
  for (int k = 0; k < call.categorical_codes; ++k) {
    const auto s =
        reduce_code<width, T>(values, offset, call.sizes[k], call.category.at(row, k), lane);
    categorical += std::log(s.sum) + (s.maximum - s.picked);
    offset += call.sizes[k];
  }
  T sum = 0;
  for (int64_t j = lane; j < shape.codes; j += width) {
    const T log_variance = shape.learned ? values.get(shape.logits + shape.codes + j) : T(0);
    const T precision = shape.learned ? std::exp(-log_variance) : T(1);
    sum += gaussian_nll(
        values.get(shape.logits + j), log_variance, precision, T(call.code.at(row, j)));
  }
  continuous += group_sum<width>(sum);
}

template <int width, class T, class S, class C, class Row>
__device__ void row_backward(
    const Call<S, C>& call, Row values, int64_t row, int lane, T categorical, T continuous) {
  const InfoShape& shape = call.shape;
  int64_t offset = 0;
  for (int k = 0; k < call.categorical_codes; ++k) {
    const int64_t size = call.sizes[k], index = call.category.at(row, k);
    const auto s = reduce_code<width, T>(values, offset, size, index, lane);
    if (width > 1) __syncwarp();
    const T upper = s.picked == s.picked ? categorical : T(NAN);
    for (int64_t c = lane; c < size; c += width) {
      const T share = std::exp(values.get(offset + c) - s.maximum) / s.sum;
      values.set(offset + c, upper * (share - T(c == index)));
    }
    offset += size;
  }
  for (int64_t j = lane; j < shape.codes; j += width) {
    const int64_t mean_at = shape.logits + j, variance_at = mean_at + shape.codes;
    const T mean = values.get(mean_at), code = T(call.code.at(row, j));
    const T precision = shape.learned ? std::exp(-values.get(variance_at)) : T(1);
    values.set(mean_at, continuous * gaussian_mean_gradient(mean, precision, code));
    if (shape.learned) {
      values.set(variance_at, continuous * gaussian_log_variance_gradient(mean, precision, code));
    }
  }
}

// Copies rows [first, first + rows) of q to shared memory, neighbouring threads on one row.
template <class T, class S, class C>
__device__ void load_rows(const Call<S, C>& call, int64_t first, int rows, int pitch, T* values) {
  const int columns = int(call.shape.columns);
  for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
    const int r = i / columns, c = i - r * columns;
    values[r * pitch + c] = T(call.q.at(first + r, c));
  }
}

template <bool narrow, class S, class C>
__global__ void forward_kernel(const Call<S, C> call, double* partial) {
  using T = Accumulator<S>;
  extern __shared__ __align__(16) unsigned char memory[];
  T* values = reinterpret_cast<T*>(memory);
  const int64_t batch = call.shape.batch;
  T categorical = 0, continuous = 0;
  if (narrow) {
    const int pitch = int(call.shape.columns) | 1;  // odd, so that threads meet no bank conflict
    for (int64_t first = int64_t(blockIdx.x) * block_threads; first < batch;
         first += int64_t(gridDim.x) * block_threads) {
      const int rows = int(min(int64_t(block_threads), batch - first));
      load_rows(call, first, rows, pitch, values);
      __syncthreads();
      if (int(threadIdx.x) < rows) {
        row_forward<1>(
            call, SharedRow<T>{values + threadIdx.x * pitch}, first + threadIdx.x, 0, categorical,
            continuous);
      }
      __syncthreads();
    }
  } else {
    const int lane = threadIdx.x % warp;
    const int64_t warps = int64_t(gridDim.x) * (block_threads / warp);
    for (int64_t row = int64_t(blockIdx.x) * (block_threads / warp) + threadIdx.x / warp;
         row < batch; row += warps) {
      row_forward<warp>(
          call, GlobalRow<S, T>{call.q, nullptr, row}, row, lane, categorical, continuous);
    }
    if (lane != 0) categorical = continuous = 0;
  }
  const double first_sum = block_sum(double(categorical));
  const double second_sum = block_sum(double(continuous));
  if (threadIdx.x == 0) {
    partial[2 * blockIdx.x] = first_sum;
    partial[2 * blockIdx.x + 1] = second_sum;
  }
}

template <class T>
__global__ void mean_kernel(const double* partial, int blocks, int64_t batch, T* first, T* second) {
  double a = 0, b = 0;
  for (int i = threadIdx.x; i < blocks; i += blockDim.x) {
    a += partial[2 * i];
    b += partial[2 * i + 1];
  }
  a = block_sum(a);
  b = block_sum(b);
  if (threadIdx.x == 0) {
    *first = T(a / batch);
    *second = T(b / batch);
  }
}

template <bool narrow, class S, class C>
__global__ void backward_kernel(
    const Call<S, C> call,
    const Accumulator<S>* categorical_gradient,
    const Accumulator<S>* continuous_gradient,
    S* gradient) {
  using T = Accumulator<S>;
  extern __shared__ __align__(16) unsigned char memory[];
  T* values = reinterpret_cast<T*>(memory);
  const int64_t batch = call.shape.batch, columns = call.shape.columns;
  const T categorical = *categorical_gradient / T(batch);
  const T continuous = *continuous_gradient / T(batch);
  if (narrow) {
    const int pitch = int(columns) | 1;
    for (int64_t first = int64_t(blockIdx.x) * block_threads; first < batch;
         first += int64_t(gridDim.x) * block_threads) {
      const int rows = int(min(int64_t(block_threads), batch - first));
      load_rows(call, first, rows, pitch, values);
      __syncthreads();
      if (int(threadIdx.x) < rows) {
        row_backward<1>(
            call, SharedRow<T>{values + threadIdx.x * pitch}, first + threadIdx.x, 0, categorical,
            continuous);
      }
      __syncthreads();
      for (int i = threadIdx.x; i < rows * int(columns); i += blockDim.x) {
        const int r = i / int(columns), c = i - r * int(columns);
        gradient[first * columns + i] = S(values[r * pitch + c]);
      }
      __syncthreads();
    }
  } else {
    const int64_t warps = int64_t(gridDim.x) * (block_threads / warp);
    for (int64_t row = int64_t(blockIdx.x) * (block_threads / warp) + threadIdx.x / warp;
         row < batch; row += warps) {
      row_backward<warp>(
          call, GlobalRow<S, T>{call.q, gradient + row * columns, row}, row, threadIdx.x % warp,
          categorical, continuous);
    }
  }
}

struct Launch {
  bool narrow;
  int blocks;
  size_t shared;

  Launch(const InfoShape& shape, size_t element) {
    const int64_t bytes = block_threads * (shape.columns | 1) * int64_t(element);
    narrow = shape.columns < shared_bytes && bytes <= shared_bytes;
    blocks = grid_size(shape.batch, narrow ? block_threads : block_threads / warp);
    shared = narrow ? size_t(bytes) : 0;
  }
};

void check_count(const std::vector<int64_t>& sizes) {
  require(
      sizes.size() <= max_categorical,
      "info_loss: sizes may name at most ",
      max_categorical,
      " categorical codes on CUDA, not ",
      sizes.size());
}

std::tuple<Tensor, Tensor> info_loss(
    const Tensor& q, const Tensor& category, const Tensor& code, std::vector<int64_t> sizes) {
  const InfoShape shape = check_info_loss(q, category, code, sizes);
  check_count(sizes);
  const DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  Tensor categorical = new_tensor(q, {}, sum_type(q));
  Tensor continuous = new_tensor(q, {}, sum_type(q));
  with_types(q, code, [&](auto q_zero, auto code_zero) {
    using S = decltype(q_zero);
    using T = Accumulator<S>;
    const Call<S, decltype(code_zero)> call(shape, q, category, code, sizes);
    const Launch launch(shape, sizeof(T));
    Tensor partial = new_tensor(q, {launch.blocks, 2}, ScalarType::Double);
    double* sums = static_cast<double*>(partial.mutable_data_ptr());
    if (launch.narrow) {
      forward_kernel<true><<<launch.blocks, block_threads, launch.shared, stream>>>(call, sums);
    } else {
      forward_kernel<false><<<launch.blocks, block_threads, 0, stream>>>(call, sums);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    mean_kernel<T><<<1, block_threads, 0, stream>>>(
        sums, launch.blocks, shape.batch, static_cast<T*>(categorical.mutable_data_ptr()),
        static_cast<T*>(continuous.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
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
  check_count(sizes);
  check_loss_gradient(categorical_gradient, "categorical_gradient", q);
  check_loss_gradient(continuous_gradient, "continuous_gradient", q);
  const DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  Tensor gradient = new_tensor(q, {shape.batch, shape.columns}, q.scalar_type());
  with_types(q, code, [&](auto q_zero, auto code_zero) {
    using S = decltype(q_zero);
    using T = Accumulator<S>;
    const Call<S, decltype(code_zero)> call(shape, q, category, code, sizes);
    const Launch launch(shape, sizeof(T));
    const T* first = static_cast<const T*>(categorical_gradient.const_data_ptr());
    const T* second = static_cast<const T*>(continuous_gradient.const_data_ptr());
    S* out = static_cast<S*>(gradient.mutable_data_ptr());
    if (launch.narrow) {
      backward_kernel<true>
          <<<launch.blocks, block_threads, launch.shared, stream>>>(call, first, second, out);
    } else {
      backward_kernel<false><<<launch.blocks, block_threads, 0, stream>>>(call, first, second, out);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gan_kernels, CUDA, m) {
  m.impl("info_loss", TORCH_BOX(&info_loss));
  m.impl("info_loss_backward", TORCH_BOX(&info_loss_backward));
}

}  // namespace gan_kernels
