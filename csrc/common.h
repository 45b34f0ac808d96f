// What both operations need on both devices: qualifiers, exp and log, dtypes, checked errors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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
#define GK_UNROLL
#else
// Inlined by force, so that each copy of a loop compiles it for its own instruction set.
#define GK_INLINE inline __attribute__((always_inline))
// A loop around this one is vectorised only once this one is unrolled: ten times faster.
#define GK_UNROLL _Pragma("GCC unroll 16")
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
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
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

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using type = uint32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float exp_low = -105.0f, exp_high = 90.0f;
  static constexpr int exp_terms = 7, log_terms = 5;
};
template <>
struct Bits<double> {
  using type = uint64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double ln2_high = 0x1.62e42fefa38p-1, ln2_low = 0x1.ef35793c7673p-45;
  static constexpr double exp_low = -750.0, exp_high = 715.0;
  static constexpr int exp_terms = 13, log_terms = 11;
};

template <class To, class From>
GK_INLINE To bit_copy(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

constexpr double inverse_factorial(int k) {
  double product = 1;
  for (int i = 2; i <= k; ++i) product *= i;
  return 1 / product;
}

// exp(x). On the CPU: x = n ln 2 + r, the Taylor series of exp(r), and 2^n in two halves so that
// overflow gives infinity and underflow zero. Branch-free, so the compiler can vectorise it.
template <class T>
GK_INLINE T exponential(T x) {
#ifdef __CUDA_ARCH__
  return exp(x);
#else
  using B = Bits<T>;
  using U = typename B::type;
  // Adding this number rounds to an integer and leaves it in the low bits.
  const T magic = T(1.5) * T(U(1) << B::mantissa);
  x = x < B::exp_low ? B::exp_low : x;
  x = x > B::exp_high ? B::exp_high : x;
  const T shifted = x * T(1.44269504088896340736) + magic;
  const T n = shifted - magic;
  const T r = (x - n * B::ln2_high) - n * B::ln2_low;
  T sum = T(inverse_factorial(B::exp_terms));
  GK_UNROLL
  for (int k = B::exp_terms - 1; k >= 0; --k) sum = sum * r + T(inverse_factorial(k));
  const U whole = bit_copy<U>(shifted) - bit_copy<U>(magic) + U(2 * B::bias);
  const U half = whole >> 1;
  const T first = bit_copy<T>(half << B::mantissa);
  const T second = bit_copy<T>((whole - half) << B::mantissa);
  return sum * first * second;
#endif
}

// log(x) for x in [1, infinity), NaN for NaN. On the CPU: x = 2^n m with m near 1 and the series of
// log m = 2 artanh((m - 1) / (m + 1)).
template <class T>
GK_INLINE T logarithm(T x) {
#ifdef __CUDA_ARCH__
  return log(x);
#else
  using B = Bits<T>;
  using U = typename B::type;
  // Subtracting the bits of sqrt(1/2) puts m into [sqrt(1/2), sqrt(2)).
  const U root = bit_copy<U>(T(0.70710678118654752440));
  const U bits = bit_copy<U>(x);
  const U exponent = (bits - root) >> B::mantissa;
  const T m = bit_copy<T>(bits - (exponent << B::mantissa));
  const T magic = T(U(1) << B::mantissa);
  const T n = bit_copy<T>(bit_copy<U>(magic) + exponent) - magic;
  const T s = (m - 1) / (m + 1);
  const T square = s * s;
  T sum = T(1) / T(2 * B::log_terms + 1);
  GK_UNROLL
  for (int k = B::log_terms - 1; k >= 0; --k) sum = sum * square + T(1) / T(2 * k + 1);
  const T result = 2 * s * sum + n * B::ln2_low + n * B::ln2_high;
  return x - x == 0 ? result : x;
#endif
}

}  // namespace gan_kernels
