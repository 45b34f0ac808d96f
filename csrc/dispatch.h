// Run-time choice of the instruction set: one loop, compiled for the baseline and for wider vectors.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define GK_X86 1
#endif

namespace gan_kernels {

enum class Level { baseline, avx2, avx512 };

inline Level machine_level() {
#ifdef GK_X86
  static const Level level = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      return Level::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Level::avx2;
    return Level::baseline;
  }();
  return level;
#else
  return Level::baseline;
#endif
}

// Loop::run must be marked GK_INLINE: what is inlined here is compiled for this instruction set.
template <class Loop, class Arguments>
void run_baseline(Arguments& arguments) {
  Loop::run(arguments);
}

#ifdef GK_X86
template <class Loop, class Arguments>
__attribute__((target("avx2,fma"))) void run_avx2(Arguments& arguments) {
  Loop::run(arguments);
}

template <class Loop, class Arguments>
__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512"))) void
run_avx512(Arguments& arguments) {
  Loop::run(arguments);
}
#endif

template <class Loop, class Arguments>
void run_widest(Arguments& arguments) {
#ifdef GK_X86
  if (machine_level() == Level::avx512) return run_avx512<Loop>(arguments);
  if (machine_level() == Level::avx2) return run_avx2<Loop>(arguments);
#endif
  run_baseline<Loop>(arguments);
}

}  // namespace gan_kernels
