// What the CUDA files share: the current stream, launch checks, reductions in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "common.h"

namespace gan_kernels {

using torch::stable::accelerator::DeviceGuard;

constexpr int block_threads = 128, wide_block_threads = 512, warp = 32;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Enough blocks to fill any GPU; each then strides over what is left.
inline int grid_size(int64_t work_items, int64_t per_block) {
  return int(std::min<int64_t>((work_items + per_block - 1) / per_block, 8192));
}

// Sum over `width` neighbouring lanes (1 or a warp), the same in each of them.
template <int width, class T>
__device__ T group_sum(T value) {
  for (int step = width / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

template <int width, class T>
__device__ T group_max(T value) {
  for (int step = width / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(~0u, value, step);
    value = value > other ? value : other;
  }
  return value;
}

// Sum over the block, in thread 0.
template <class T>
__device__ T block_sum(T value) {
  __shared__ T sums[wide_block_threads / warp];
  value = group_sum<warp>(value);
  __syncthreads();
  if (threadIdx.x % warp == 0) sums[threadIdx.x / warp] = value;
  __syncthreads();
  T total = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < int(blockDim.x) / warp; ++i) total += sums[i];
  }
  return total;
}

}  // namespace gan_kernels
