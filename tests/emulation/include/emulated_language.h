// The CUDA language for g++: keywords, built-in variables and vector types, and the device functions that need no other
// thread. Functions in which lanes meet are declared in emulated_warp.h.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// NOTE: the section is how shared_memory.cc finds these variables. g++ ignores it inside templates: a template kernel
// has to use dynamic shared memory.
#define __shared__ static __attribute__((section("emulated_shared")))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) ushort4 {
  unsigned short x, y, z, w;
};
struct alignas(4) uchar4 {
  unsigned char x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace emulation {
// Stops the kernel: the launch returns cudaErrorLaunchFailure and cudaGetErrorString gives this text.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void yield();  // lets other threads run

template <class To, class From>
To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof to);
  return to;
}
template <class T>
T load(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T))
    fail("a %d-byte load at %p is misaligned", int(sizeof(T)), (const void*)p);
  return *p;
}
template <class T>
void store(T* p, T v) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) fail("a %d-byte store at %p is misaligned", int(sizeof(T)), (void*)p);
  *p = v;
}
}  // namespace emulation

// ---- memory ---------------------------------------------------------------------------------------------------------
namespace emulation {
void check_read_only_load(const void* address, uint32_t bytes);  // overlap.cc: nobody may write it meanwhile
}
template <class T>
T __ldg(const T* p) {
  emulation::check_read_only_load(p, sizeof(T));
  return emulation::load(p);
}
template <class T>
T __ldca(const T* p) {
  return emulation::load(p);
}
template <class T>
T __ldcg(const T* p) {
  return emulation::load(p);
}
template <class T>
T __ldcs(const T* p) {
  return emulation::load(p);
}
template <class T>
void __stcg(T* p, T v) {
  emulation::store(p, v);
}
template <class T>
void __stcs(T* p, T v) {
  emulation::store(p, v);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Threads take turns only where they wait, so a plain read-modify-write is atomic.
namespace emulation {
void check_atomic(const void* address, uint32_t bytes);  // races.cc: it races with plain accesses only
template <class T, class Change>
__attribute__((no_sanitize_thread, noinline)) T atomic(T* p, Change change) {
  check_atomic(p, sizeof(T));
  const T old = load(p);
  *p = change(old);
  return old;
}
}  // namespace emulation
template <class T, class U>
T atomicAdd(T* p, U v) {
  return emulation::atomic(p, [v](T old) { return T(old + T(v)); });
}
template <class T, class U>
T atomicOr(T* p, U v) {
  return emulation::atomic(p, [v](T old) { return T(old | T(v)); });
}
template <class T, class U>
T atomicMax(T* p, U v) {
  return emulation::atomic(p, [v](T old) { return T(v) > old ? T(v) : old; });
}
template <class T, class U>
T atomicMin(T* p, U v) {
  return emulation::atomic(p, [v](T old) { return T(v) < old ? T(v) : old; });
}
template <class T, class U>
T atomicExch(T* p, U v) {
  return emulation::atomic(p, [v](T) { return T(v); });
}
template <class T, class U, class V>
T atomicCAS(T* p, U expected, V v) {
  return emulation::atomic(p, [expected, v](T old) { return old == T(expected) ? T(v) : old; });
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------
#define MIN_MAX(R, A, B)                                                                                              \
  constexpr R min(A a, B b) { return static_cast<R>(a) < static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); } \
  constexpr R max(A a, B b) { return static_cast<R>(a) > static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); }
MIN_MAX(int, int, int)
MIN_MAX(unsigned, unsigned, unsigned)
MIN_MAX(unsigned, int, unsigned)
MIN_MAX(unsigned, unsigned, int)
MIN_MAX(long, long, long)
MIN_MAX(unsigned long, unsigned long, unsigned long)
MIN_MAX(long long, long long, long long)
MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
MIN_MAX(double, double, double)
#undef MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
using std::fabs;
using std::isnan;
inline float normcdff(float x) { return 0.5f * std::erfc(-x * 0.70710678f); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned which = selector >> 4 * i & 15;
    if (which > 7) emulation::fail("__byte_perm: selector %#x copies signs, which is not emulated", selector);
    result |= unsigned(bytes >> 8 * which & 255) << 8 * i;
  }
  return result;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline unsigned __float_as_uint(float v) { return emulation::bits<unsigned>(v); }
inline int __float_as_int(float v) { return emulation::bits<int>(v); }
inline float __uint_as_float(unsigned v) { return emulation::bits<float>(v); }
inline float __int_as_float(int v) { return emulation::bits<float>(v); }

// ---- time -----------------------------------------------------------------------------------------------------------
inline long long clock64() {
  emulation::yield();
  return 0;
}
inline void __nanosleep(unsigned) { emulation::yield(); }

#include "emulated_warp.h"
