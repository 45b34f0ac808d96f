// In place of CUDA's header of this name: what the .cu files use of CUDA, for g++ and the CPU.
//
// __init__.py rewrites a copy of the sources where C++ has no such syntax: a launch becomes a
// Launch, a __shared__ variable a reference into the block's shared memory. emulator.cpp says how
// the threads run and what is checked. A feature that is not here does not compile.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <type_traits>

#define EMULATED_ARCHITECTURE 900  // in place of __CUDA_ARCH__
#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __forceinline__ inline
// What the emulation itself reads on the way into a kernel is no business of the kernel's.
#define UNWATCHED __attribute__((no_sanitize("thread")))

enum cudaError_t { cudaSuccess };
using cudaStream_t = struct Stream*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

cudaError_t cudaGetLastError();

namespace emulated {

using Place = std::source_location;

void* shared_memory(const void* variable, size_t bytes);
void* dynamic_shared();
void meet_block(Place place);
void meet_warp(unsigned mask, Place place);
// Posts a value, and once all lanes have, copies to `out` the one of the lane `source`.
void exchange(unsigned mask, const void* value, void* out, size_t bytes, int source, Place place);
int lane();

// The variable that one declaration, whose type is Declaration, makes in each block.
template <class T, class Declaration>
T& shared(Declaration) {
  static char declared;
  return *static_cast<T*>(shared_memory(&declared, sizeof(T)));
}

struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t shared = 0;
  cudaStream_t stream = nullptr;

  void run(void (*start)(const void*), const void* thread) const;

  // A launch evaluates its arguments once, and each thread has a copy.
  template <class Kernel>
  auto operator()(Kernel kernel) const {
    return [=, this](const auto&... arguments) {
      const auto thread = [&]() UNWATCHED { kernel(arguments...); };
      using Thread = decltype(thread);
      const auto start = [](const void* thread)
                             UNWATCHED { (*static_cast<Thread*>(thread))(); };
      run(start, &thread);
    };
  }
};

}  // namespace emulated

extern "C" int planted;  // which fault of a copy with planted faults is in force

inline void __syncthreads(emulated::Place place = emulated::Place::current()) {
  emulated::meet_block(place);
}

inline void __syncwarp(unsigned mask = ~0u, emulated::Place place = emulated::Place::current()) {
  emulated::meet_warp(mask, place);
}

template <class T>
T __shfl_sync(
    unsigned mask, T value, int source, emulated::Place place = emulated::Place::current()) {
  T out;
  emulated::exchange(mask, &value, &out, sizeof(T), source, place);
  return out;
}

template <class T>
T __shfl_xor_sync(
    unsigned mask, T value, int step, emulated::Place place = emulated::Place::current()) {
  return __shfl_sync(mask, value, emulated::lane() ^ step, place);
}

template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}

template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
