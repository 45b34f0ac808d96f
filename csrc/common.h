// What the operations need on both devices: qualifiers, dtypes, new tensors, checked errors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#ifdef __CUDACC__
#define GK_INLINE __host__ __device__ __forceinline__
#else
// Inlined by force, so that each copy of a loop compiles it for its own instruction set.
#define GK_INLINE inline __attribute__((always_inline))
#endif

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // before PyTorch 2.13, whose errors also say why
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace gan_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The type sums are kept in: double for double, float for everything shorter.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

inline ScalarType sum_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) {
    std::ostringstream text;
    (text << ... << parts);
    throw std::runtime_error(text.str());
  }
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
      type == ScalarType::Half;
}

inline int32_t device_type(const Tensor& tensor) {
  int32_t type = 0;
  // not the macro of the same name with STABLE_ before it, which is of PyTorch 2.13
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return device_type(a) == device_type(b) && a.get_device_index() == b.get_device_index();
}

// An uninitialised contiguous tensor on `like`'s device. Straight through the C interface: the
// dispatcher's boxed call costs as much as a small kernel.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[4] = {1, 1, 1, 1};
  const int64_t* size = sizes.begin();
  for (int64_t d = int64_t(sizes.size()) - 2; d >= 0; --d) {
    strides[d] = strides[d + 1] * std::max<int64_t>(size[d + 1], 1);
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(),
      size,
      strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      device_type(like),
      like.get_device_index(),
      &handle));
  return Tensor(handle);
}

// Calls body with a value of the C++ type that `type` names.
template <class Body>
void with_type(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float());
    case ScalarType::Double:
      return body(double());
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16());
    case ScalarType::Half:
      return body(torch::headeronly::Half());
    default:
      require(false, "expected a floating-point tensor");
  }
}

}  // namespace gan_kernels
