// Every instruction that CUDA C++ has no word for: mbarriers, bulk tensor copies, cp.async, proxies, matrices of a
// warp, named barriers, register reallocation, kernels that overlap, wgmma fences. One thin function each, nothing
// else. Addresses named `smem` are 32-bit shared memory addresses. Under JAX_MOE_EMULATION the same functions come from
// tests/emulation, which runs kernels on a CPU.
#pragma once
#ifdef JAX_MOE_EMULATION
#include "emulated_ptx.h"
#else
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace jax_moe::cuda {

#define DEVICE __device__ __forceinline__

// The dynamic shared memory of the CTA, aligned for 128-byte swizzled tiles.
DEVICE uint8_t* dynamic_shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}
DEVICE uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- mbarrier
// --------------------------------------------------------------------------------------------------------
DEVICE void mbarrier_init(uint32_t smem, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the async proxy; a CTA barrier publishes them to the other threads.
DEVICE void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void mbarrier_arrive(uint32_t smem) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem) : "memory");
}
// Arrives and announces bytes that bulk copies will deliver in this phase.
DEVICE void mbarrier_arrive_expect(uint32_t smem, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem), "r"(bytes) : "memory");
}
// Returns when the phase of that parity has completed; a fresh barrier lets parity 1 pass.
DEVICE void mbarrier_wait(uint32_t smem, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(
          smem),
      "r"(parity)
      : "memory");
}
// Whether it has.
DEVICE bool mbarrier_test(uint32_t smem, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(smem), "r"(parity)
      : "memory");
  return done != 0;
}

// ---- copies
// ----------------------------------------------------------------------------------------------------------
DEVICE void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// The box of `map` at element (x, y) to shared memory; its bytes arrive on `barrier`. Elements outside the tensor are
// 0.
DEVICE void tma_load_2d(uint32_t smem, const CUtensorMap* map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          smem),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}
// As tma_load_2d; a box of [depth][height] rows lands in that order, and has what `policy` says become of it in L2.
DEVICE void tma_load_3d(uint32_t smem, const CUtensorMap* map, int x, int y, int z, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(smem),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "l"(policy)
      : "memory");
}
DEVICE void tma_load_4d(uint32_t smem, const CUtensorMap* map, int x, int y, int z, int w, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(smem),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
DEVICE void tma_load_5d(uint32_t smem, const CUtensorMap* map, int x, int y, int z, int w, int v, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(smem),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v)
      : "memory");
}
// For what is read once: it is the first to make room for others.
DEVICE uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// For what is read soon: it is the last to make room for others.
DEVICE uint64_t evict_last_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// `bytes` neighbours; addresses and sizes are multiples of 16.
DEVICE void bulk_load(uint32_t smem, const void* global, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}
// NOTE: an ordinary store of 16 bytes may be compiled to four of 4.
DEVICE void store_global_v4(void* global, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
// The same of what a later kernel of the call reads; `stays`: L2 makes room for others last there, until it is
// discarded.
DEVICE void store_scratch_v4(void* global, const uint4& v, bool stays) {
  if (!stays) return store_global_v4(global, v);
  asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(global), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w), "l"(evict_last_policy())
               : "memory");
}
// 128 aligned bytes that nobody reads any more: L2 need not write them to memory.
DEVICE void discard_line(void* global) { asm volatile("discard.global.L2 [%0], 128;" ::"l"(global) : "memory"); }
DEVICE void cp_async_16(uint32_t smem, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem), "l"(global) : "memory");
}
DEVICE void cp_async_8(uint32_t smem, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(smem), "l"(global) : "memory");
}
DEVICE void cp_async_4(uint32_t smem, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem), "l"(global) : "memory");
}
// Arrives, later, once all cp.async of this thread so far have landed: one of the arrivals that the barrier expects.
DEVICE void cp_async_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// Orders this thread's ordinary shared-memory writes (cp.async included) before reads by wgmma or bulk copies.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Between ordinary writes of global memory and reads of it by bulk copies, on the side of either.
DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- counters in global memory
// ---------------------------------------------------------------------------------------
// Whoever sees what a thread did to a counter after its fence, and has a fence after that, sees all that was written or
// known to be written before the first fence.
DEVICE void fence_memory() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
DEVICE void decrement_relaxed(int32_t* counter) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(-1) : "memory");
}
DEVICE int load_relaxed(const int32_t* counter) {
  int v;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
  return v;
}
// Between two looks at a counter.
DEVICE void back_off() { __nanosleep(32); }

// ---- arithmetic
// --------------------------------------------------------------------------------------------------------
// Subnormal arguments and results are 0.
DEVICE float approximate_exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
// 1 / x but for the last bit.
DEVICE float approximate_reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// ---- shared memory
// ---------------------------------------------------------------------------------------------------
DEVICE float load_shared_f32(uint32_t smem) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(smem) : "memory");
  return v;
}
DEVICE uint32_t load_shared_u32(uint32_t smem) { return __float_as_uint(load_shared_f32(smem)); }
DEVICE float2 load_shared_f32x2(uint32_t smem) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(smem) : "memory");
  return v;
}
DEVICE uint2 load_shared_v2(uint32_t smem) {
  const float2 v = load_shared_f32x2(smem);
  return make_uint2(__float_as_uint(v.x), __float_as_uint(v.y));
}
DEVICE uint4 load_shared_v4(uint32_t smem) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(smem)
               : "memory");
  return v;
}
DEVICE void store_shared_u16(uint32_t smem, uint16_t v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(smem), "h"(v) : "memory");
}
DEVICE void store_shared_u32(uint32_t smem, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(smem), "r"(v) : "memory");
}
DEVICE void store_shared_v2(uint32_t smem, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(smem), "r"(v.x), "r"(v.y) : "memory");
}
DEVICE void store_shared_v4(uint32_t smem, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
DEVICE void store_shared_f32(uint32_t smem, float v) { store_shared_u32(smem, __float_as_uint(v)); }
// Four 8x8 matrices of 16-bit elements; lane i gives the 16-byte aligned address of row i % 8 of matrix i / 8, and
// holds of each matrix elements 2 (i % 4) and 2 (i % 4) + 1 (in the high half) of row i / 4.
DEVICE void store_matrix_x4(uint32_t smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}
// The same, transposed: lane i gives the 16-byte aligned address of column i % 8 of matrix
// i / 8, and holds of each matrix columns 2 (i % 4) and 2 (i % 4) + 1 (in the high half) of row i / 4.
DEVICE void store_transposed_x4(uint32_t smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// ---- matrices of a warp
// ----------------------------------------------------------------------------------------------
// Four 8x8 matrices of 16-bit elements; lane i gives the 16-byte aligned address of row i % 8 of matrix i / 8, and gets
// in r[j] elements 2 (i % 4) and 2 (i % 4) + 1 of row i / 4 of matrix j.
DEVICE void load_matrix_x4(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}
// D[16][8] += A[16][16] B[16][8], f16 operands. With g = lane / 4, k = 2 (lane % 4): d are D[g][k, k + 1] and D[g + 8]
// [k, k + 1]; a0, a1, a2, a3 hold A[g][k ...], A[g + 8][k ...], A[g][k + 8 ...], A[g + 8][k + 8 ...], two neighbours
// each; b0 and b1 hold B[k, k + 1][g] and B[k + 8, k + 9][g]. The first of two is in the low half.
DEVICE void mma_m16n8k16_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                             uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Exact; `lo` gets the codes of the low two bytes, the first of them in its low half.
DEVICE void e4m3x4_to_f16x4(uint32_t codes, uint32_t& lo, uint32_t& hi) {
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}"
      : "=r"(lo), "=r"(hi)
      : "r"(codes));
}
// Byte i of the result is the byte that bits 4 i to 4 i + 2 of `which` name, 4 to 7 a zero, or with bit 4 i + 3 the
// sign of one of the four, eight times.
DEVICE uint32_t permute_bytes(uint32_t bytes, uint32_t which) {
  uint32_t r;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(r) : "r"(bytes), "r"(which));
  return r;
}
// Two products, rounded to nearest even, subnormals included.
DEVICE uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// ---- kernels that overlap (programmatic dependent launch)
// ------------------------------------------------------------
// Returns when the kernels before this one have completed and their writes can be read. Until then a kernel that was
// launched to overlap them may not read what they write, nor write what they read or write.
DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next kernel may start once every CTA has said so or has exited; it says nothing about what is written by then.
DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// Reads global memory in L2, not through L1 nor the read-only path: what an overlapped kernel has written.
DEVICE uint4 load_fresh_v4(const void* global) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global)
               : "memory");
  return v;
}

// ---- warpgroups
// ------------------------------------------------------------------------------------------------------
DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Counts this thread in, if it arrives, without waiting; `threads` counts those that wait too. NOTE: predicated, since
// a branch may be in the way of what is around.
DEVICE void named_barrier_arrive(int id, int threads, bool arrives = true) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n@p bar.arrive %0, %1;\n}" ::"r"(id), "r"(threads),
               "r"(int(arrives))
               : "memory");
}
template <int kRegisters>
DEVICE void reduce_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- wgmma
// -----------------------------------------------------------------------------------------------------------
// Shared-memory descriptor of a K-major tile of 128-byte rows, 128-byte swizzle, so many bytes from one 8-row group to
// the next. Adding n to it moves the tile by 16 n bytes.
DEVICE uint64_t wgmma_descriptor(uint32_t smem, uint32_t group_stride = 1024) {
  return (uint64_t((smem & 0x3FFFF) >> 4)) | (1ull << 16) | (uint64_t(group_stride >> 4) << 32) | (1ull << 62);
}
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending of the committed groups are in flight.
template <int kPending = 0>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from computing ahead of a loop, and holding in registers, what depends on x.
DEVICE void hide(int& x) { asm volatile("" : "+r"(x)); }
// Likewise computed once and held, instead of in a loop again and again.
DEVICE void hold(uint32_t& x) { asm volatile("" : "+r"(x)); }
DEVICE void hide(const uint8_t*& x) { asm volatile("" : "+l"(x)); }
template <class T>
DEVICE void hide(const T*& x) {
  asm volatile("" : "+l"(x));
}
// Keeps the compiler from moving accesses of accumulators across this point.
template <int kCount>
DEVICE void register_fence(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

}  // namespace jax_moe::cuda
#endif
