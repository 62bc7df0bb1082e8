// One function compiled for several instruction sets, the best of which is chosen at run time. JAX_MOE_DISPATCH defines
// Name(parameters) from the template NameOn<Isa>(parameters).
#pragma once

// NOTE: what NameOn calls in its loops must be JAX_MOE_INLINE, or it is compiled for the oldest machine.
#define JAX_MOE_INLINE inline __attribute__((always_inline))

namespace jax_moe::cpu {

// kRowsAtOnce: rows of a matrix product whose sums, 16 columns each, fit into the registers.
struct Portable {
  typedef float Floats __attribute__((vector_size(16)));
  static constexpr int kRowsAtOnce = 3;
};
struct Avx2 {
  typedef float Floats __attribute__((vector_size(32)));
  static constexpr int kRowsAtOnce = 6;
};
struct Avx512 {
  typedef float Floats __attribute__((vector_size(64)));
  static constexpr int kRowsAtOnce = 8;
};

#if defined(__x86_64__) && defined(__GNUC__)

inline bool HaveAvx2() {
  static const bool have = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return have;
}
inline bool HaveAvx512() {
  static const bool have = HaveAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return have;
}

#define JAX_MOE_DISPATCH(Result, Name, parameters, arguments)                                                    \
  Result Name##Portable parameters { return Name##On<Portable> arguments; }                                      \
  __attribute__((target("avx2,fma"))) Result Name##Avx2 parameters { return Name##On<Avx2> arguments; }          \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) Result Name##Avx512 parameters {        \
    return Name##On<Avx512> arguments;                                                                           \
  }                                                                                                              \
  Result Name parameters {                                                                                       \
    return HaveAvx512() ? Name##Avx512 arguments : HaveAvx2() ? Name##Avx2 arguments : Name##Portable arguments; \
  }

#else

#define JAX_MOE_DISPATCH(Result, Name, parameters, arguments) \
  Result Name parameters { return Name##On<Portable> arguments; }

#endif

}  // namespace jax_moe::cpu
