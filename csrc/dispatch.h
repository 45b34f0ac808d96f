// Run-time choice of the instruction set: one loop, compiled for the baseline and for AVX2.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define GK_AVX2 __attribute__((target("avx2,fma")))
#else
#define GK_AVX2
#endif

namespace gan_kernels {

inline bool has_avx2() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

template <class Loop, class Arguments>
GK_AVX2 void run_avx2(Arguments& arguments) {
  Loop::run(arguments);
}

// Loop::run must be marked GK_INLINE: what is inlined here is compiled for either instruction set.
template <class Loop, class Arguments>
void run_widest(Arguments& arguments) {
  if (has_avx2()) return run_avx2<Loop>(arguments);
  Loop::run(arguments);
}

}  // namespace gan_kernels
