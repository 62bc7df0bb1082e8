// The functions of ffi/cuda/kernels/ptx.cuh and wgmma_sm90.cuh for the emulated machine, same names and meaning.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>

#define DEVICE inline

namespace emulation {

// barriers.cc
void init_mbarrier(uint32_t smem, uint32_t arrivals);
void arrive_mbarrier(uint32_t smem, uint32_t bytes);
void wait_mbarrier(uint32_t smem, uint32_t parity);
bool test_mbarrier(uint32_t smem, uint32_t parity);
// shared_memory.cc
uint8_t* dynamic_shared();
uint32_t shared_address(const void* p);
const uint8_t* read_shared(uint32_t smem, uint32_t bytes);  // checked, ordinary accesses
void write_shared(uint32_t smem, const void* from, uint32_t bytes);
void publish_to_async_proxy();
// copies.cc
void check_tensor_map(const CUtensorMap* map);
void queue_tensor_load(uint32_t smem, const CUtensorMap* map, std::array<int, 5> at, int rank, uint32_t barrier);
void queue_bulk_load(uint32_t smem, const void* global, uint32_t bytes, uint32_t barrier);
void queue_cp_async(uint32_t smem, const void* global, uint32_t bytes);
void queue_cp_async_arrival(uint32_t barrier);
void commit_cp_async();
void wait_cp_async(int pending);
// warp_matrix.cc
void store_matrix(uint32_t smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d);
void store_transposed(uint32_t smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d);
void load_matrix(uint32_t (&r)[4], uint32_t smem);
void multiply_f16(float (&d)[4], const LanePayload& operands);
void decode_e4m3x4(uint32_t codes, uint32_t& lo, uint32_t& hi);
uint32_t permute_bytes(uint32_t bytes, uint32_t which);
uint32_t multiply_bf16x2(uint32_t a, uint32_t b);
// counters.cc
void decrement_counter(int32_t* counter);
int read_counter(const int32_t* counter);
void wait_for_a_counter();
// overlap.cc
void wait_for_earlier_kernels();
void start_next_kernel();
// wgmma.cc
void fence_wgmma();
void issue_wgmma(float* d, int n, uint64_t a, const uint32_t* a_registers, uint64_t b, int accumulate);
void commit_wgmma();
void wait_wgmma(int pending);
void set_registers(int registers);

}  // namespace emulation

namespace jax_moe::cuda {

DEVICE uint8_t* dynamic_shared_memory() { return emulation::dynamic_shared(); }
DEVICE uint32_t smem_address(const void* p) { return emulation::shared_address(p); }

DEVICE void mbarrier_init(uint32_t smem, uint32_t arrivals) { emulation::init_mbarrier(smem, arrivals); }
DEVICE void mbarrier_fence_init() {}
DEVICE void mbarrier_arrive(uint32_t smem) { emulation::arrive_mbarrier(smem, 0); }
DEVICE void mbarrier_arrive_expect(uint32_t smem, uint32_t bytes) { emulation::arrive_mbarrier(smem, bytes); }
DEVICE void mbarrier_wait(uint32_t smem, uint32_t parity) { emulation::wait_mbarrier(smem, parity); }
DEVICE bool mbarrier_test(uint32_t smem, uint32_t parity) { return emulation::test_mbarrier(smem, parity); }

DEVICE void prefetch_tensor_map(const CUtensorMap* map) { emulation::check_tensor_map(map); }
DEVICE void tma_load_2d(uint32_t smem, const CUtensorMap* map, int x, int y, uint32_t barrier) {
  emulation::queue_tensor_load(smem, map, {x, y, 0, 0, 0}, 2, barrier);
}
DEVICE void tma_load_3d(uint32_t smem, const CUtensorMap* map, int x, int y, int z, uint32_t barrier, uint64_t) {
  emulation::queue_tensor_load(smem, map, {x, y, z, 0, 0}, 3, barrier);
}
DEVICE void tma_load_4d(uint32_t smem, const CUtensorMap* map, int x, int y, int z, int w, uint32_t barrier) {
  emulation::queue_tensor_load(smem, map, {x, y, z, w, 0}, 4, barrier);
}
DEVICE void tma_load_5d(uint32_t smem, const CUtensorMap* map, int x, int y, int z, int w, int v, uint32_t barrier) {
  emulation::queue_tensor_load(smem, map, {x, y, z, w, v}, 5, barrier);
}
DEVICE uint64_t evict_first_policy() { return 0; }
DEVICE void bulk_load(uint32_t smem, const void* global, uint32_t bytes, uint32_t barrier) {
  emulation::queue_bulk_load(smem, global, bytes, barrier);
}
DEVICE void store_global_v4(void* global, const uint4& v) { *static_cast<uint4*>(global) = v; }
DEVICE void store_scratch_v4(void* global, const uint4& v, bool) { store_global_v4(global, v); }
DEVICE void discard_line(void* global) {  // lost
  if (reinterpret_cast<uintptr_t>(global) % 128 != 0) emulation::fail("discard_line: an address that is not aligned");
  std::memset(global, 0xFF, 128);
}
DEVICE void cp_async_16(uint32_t smem, const void* global) { emulation::queue_cp_async(smem, global, 16); }
DEVICE void cp_async_8(uint32_t smem, const void* global) { emulation::queue_cp_async(smem, global, 8); }
DEVICE void cp_async_4(uint32_t smem, const void* global) { emulation::queue_cp_async(smem, global, 4); }
DEVICE void cp_async_arrive(uint32_t barrier) { emulation::queue_cp_async_arrival(barrier); }
DEVICE void cp_async_commit() { emulation::commit_cp_async(); }
template <int kPending>
DEVICE void cp_async_wait() {
  emulation::wait_cp_async(kPending);
}
DEVICE void fence_proxy_async() { emulation::publish_to_async_proxy(); }
DEVICE void fence_proxy_async_global() {}

DEVICE void decrement_relaxed(int32_t* counter) { emulation::decrement_counter(counter); }
DEVICE int load_relaxed(const int32_t* counter) { return emulation::read_counter(counter); }
DEVICE void fence_memory() {}
DEVICE void back_off() { emulation::wait_for_a_counter(); }

inline float without_subnormals(float x) { return std::fabs(x) < 0x1p-126f ? 0.f : x; }
DEVICE float approximate_exp2(float x) { return without_subnormals(std::exp2(without_subnormals(x))); }
DEVICE float approximate_reciprocal(float x) { return without_subnormals(1.f / without_subnormals(x)); }

template <class T>
DEVICE T load_shared(uint32_t smem) {
  T v;
  std::memcpy(&v, emulation::read_shared(smem, sizeof v), sizeof v);
  return v;
}
DEVICE float load_shared_f32(uint32_t smem) { return load_shared<float>(smem); }
DEVICE float2 load_shared_f32x2(uint32_t smem) { return load_shared<float2>(smem); }
DEVICE uint32_t load_shared_u32(uint32_t smem) { return load_shared<uint32_t>(smem); }
DEVICE uint2 load_shared_v2(uint32_t smem) { return load_shared<uint2>(smem); }
DEVICE uint4 load_shared_v4(uint32_t smem) { return load_shared<uint4>(smem); }
DEVICE void store_shared_u16(uint32_t smem, uint16_t v) { emulation::write_shared(smem, &v, sizeof v); }
DEVICE void store_shared_f32(uint32_t smem, float v) { emulation::write_shared(smem, &v, sizeof v); }
DEVICE void store_shared_u32(uint32_t smem, uint32_t v) { emulation::write_shared(smem, &v, sizeof v); }
DEVICE void store_shared_v2(uint32_t smem, uint2 v) { emulation::write_shared(smem, &v, sizeof v); }
DEVICE void store_shared_v4(uint32_t smem, uint4 v) { emulation::write_shared(smem, &v, sizeof v); }
DEVICE void store_matrix_x4(uint32_t smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  emulation::store_matrix(smem, a, b, c, d);
}
DEVICE void store_transposed_x4(uint32_t smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  emulation::store_transposed(smem, a, b, c, d);
}
DEVICE void load_matrix_x4(uint32_t (&r)[4], uint32_t smem) { emulation::load_matrix(r, smem); }
DEVICE void mma_m16n8k16_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                             uint32_t b1) {
  emulation::multiply_f16(d, {{a0, a1, a2, a3, b0, b1}});
}
DEVICE void e4m3x4_to_f16x4(uint32_t codes, uint32_t& lo, uint32_t& hi) { emulation::decode_e4m3x4(codes, lo, hi); }
DEVICE uint32_t permute_bytes(uint32_t bytes, uint32_t which) { return emulation::permute_bytes(bytes, which); }
DEVICE uint32_t multiply_bf16x2(uint32_t a, uint32_t b) { return emulation::multiply_bf16x2(a, b); }

DEVICE void wait_for_previous_kernel() { emulation::wait_for_earlier_kernels(); }
DEVICE void let_next_kernel_start() { emulation::start_next_kernel(); }
DEVICE uint4 load_fresh_v4(const void* global) { return __ldcg(static_cast<const uint4*>(global)); }

DEVICE void named_barrier_sync(int id, int threads) { emulation::barrier_sync(id, threads); }
DEVICE void named_barrier_arrive(int id, int threads, bool arrives = true) {
  if (arrives) emulation::barrier_arrive(id, threads);
}
template <int kRegisters>
DEVICE void reduce_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  emulation::set_registers(kRegisters);
}
template <int kRegisters>
DEVICE void raise_registers() {
  reduce_registers<kRegisters>();
}

DEVICE uint64_t wgmma_descriptor(uint32_t smem, uint32_t group_stride = 1024) {
  return (uint64_t((smem & 0x3FFFF) >> 4)) | (1ull << 16) | (uint64_t(group_stride >> 4) << 32) | (1ull << 62);
}
DEVICE void wgmma_fence() { emulation::fence_wgmma(); }
DEVICE void wgmma_commit() { emulation::commit_wgmma(); }
template <int kPending = 0>
DEVICE void wgmma_wait() {
  emulation::wait_wgmma(kPending);
}
DEVICE void hide(int&) {}
DEVICE void hold(uint32_t&) {}
DEVICE void hide(const uint8_t*&) {}
template <class T>
DEVICE void hide(const T*&) {}
template <int kCount>
DEVICE void register_fence(float (&)[kCount]) {}
template <int kCount>
DEVICE void wgmma_m64k32_e4m3(float (&d)[kCount], uint64_t a, uint64_t b, int accumulate) {
  static_assert(kCount % 4 == 0 && kCount <= 64);
  emulation::issue_wgmma(d, 2 * kCount, a, nullptr, b, accumulate);
}
template <int kN>
DEVICE void wgmma_m64k16_bf16(float* d, const uint32_t* a, uint64_t b) {
  emulation::issue_wgmma(d, kN, 0, a, b, 1);
}

}  // namespace jax_moe::cuda
