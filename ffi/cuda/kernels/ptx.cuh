// Every instruction that CUDA C++ has no word for: mbarriers, bulk tensor copies, cp.async, proxies, named barriers,
// register reallocation, wgmma fences. One thin function each, nothing else. Addresses named `smem` are 32-bit shared
// memory addresses. Under JAX_MOE_EMULATION the same functions come from tests/emulation, which runs kernels on a CPU.
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
// The same for a three-dimensional map: element (x, y, z).
DEVICE void tma_load_3d(uint32_t smem, const CUtensorMap* map, int x, int y, int z, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(smem),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}
DEVICE void cp_async_16(uint32_t smem, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem), "l"(global) : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// Orders this thread's ordinary shared-memory writes (cp.async included) before reads by wgmma or bulk copies.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- shared memory
// ---------------------------------------------------------------------------------------------------
DEVICE float load_shared_f32(uint32_t smem) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(smem) : "memory");
  return v;
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
// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
DEVICE void store_matrix_x4(uint32_t smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8. r[j] of lane l becomes
// bytes 4 (l % 4) to + 3 of row l / 4 of matrix j.
DEVICE void load_matrix_x4(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}

// ---- global memory
// ---------------------------------------------------------------------------------------------------
// What another kernel has written while this one may have been running already: not through the read-only path.
DEVICE float4 load_fresh_v4(const float* p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

// ---- kernels in a row, launched with programmatic dependent launch; else both do nothing
// ---------------------------------------------------------------------------------------------------
// Returns when the kernel before has completed and its writes are seen.
DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Lets the next kernel's CTAs start where there is room; they wait for this kernel themselves.
DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- warpgroups
// ------------------------------------------------------------------------------------------------------
DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Counts this thread in without waiting; `threads` counts those that wait too.
DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <int kRegisters>
DEVICE void reduce_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- warp-level matrix product
// -----------------------------------------------------------------------------------------------------------
// Four e4m3 codes to f16, exactly: `lo` has the first two, `hi` the others. NaN stays NaN.
DEVICE void e4m3x4_to_f16x4(uint32_t codes, uint32_t& lo, uint32_t& hi) {
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.rn.f16x2.e4m3x2 %0, a;\ncvt.rn.f16x2.e4m3x2 %1, b;\n}"
      : "=r"(lo), "=r"(hi)
      : "r"(codes));
}
// D[16][8] += A[16][16] B[8][16]^T, f16 operands, float32 sums. With g = lane / 4, q = lane % 4: a0 row g and a1 row g
// + 8 at k = 2 q (+ 1), a2 and a3 at k + 8; b0 row g at k = 2 q (+ 1), b1 at k + 8; d[0, 1] row g, d[2, 3] row g + 8,
// at columns 2 q (+ 1).
DEVICE void mma_m16n8k16_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                             uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- wgmma
// -----------------------------------------------------------------------------------------------------------
// Shared-memory descriptor of a K-major tile of 128-byte rows, 128-byte swizzle, 1024 bytes between 8-row groups.
// Adding n to it moves the tile by 16 n bytes.
DEVICE uint64_t wgmma_descriptor(uint32_t smem) {
  return (uint64_t((smem & 0x3FFFF) >> 4)) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// Keeps the compiler from moving accesses of accumulators across this point.
template <int kCount>
DEVICE void register_fence(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

}  // namespace jax_moe::cuda
#endif
