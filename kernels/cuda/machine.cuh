// The machine's own words: what the kernels say to an NVIDIA GPU that C++ has no expression for.
//
// No header of the toolkit is included, so that nothing but the compiler itself is needed. Each function is one PTX
// instruction (or two) and carries its name. Compute capability 8.0 has mma, ldmatrix and cp.async; 9.0 adds barriers that
// count bytes, the bulk copy engine, clusters of blocks that see each other's shared memory, and early launch.

#pragma once

#include "sanitize.cuh"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define INLINE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif

INLINE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// ---- Matrix products -------------------------------------------------------------------------------------------------
// D (16 x 8) = A (16 x 16) B (16 x 8) + C. With g = lane / 4 and t = lane % 4 a lane holds
//   A  registers 0..3   rows g, g+8, g, g+8   columns 2t, 2t+1 (registers 0, 1) and 2t+8, 2t+9 (registers 2, 3)
//   B  registers 0, 1   column g              rows 2t, 2t+1 and 2t+8, 2t+9
//   C, D  floats 0..3      rows g, g, g+8, g+8   columns 2t, 2t+1, 2t, 2t+1
INLINE void matrix_multiply(float* d, const u32* a, u32 b0, u32 b1, const float* c) {
#if FP16
#define AEROGEL_MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define AEROGEL_MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif
  asm(AEROGEL_MMA " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// D (16 x 8) = A (16 x 32) B (32 x 8) + C, where of every four columns of A only two are not zero. `a` holds those two, as
// many registers as above; `places` where they lie, two bits each, the lower one first: of columns 0..15 in lane 4g + 2 SELECTOR,
// of 16..31 in the lane behind it, row g in the lower half, g + 8 in the upper one. B has registers 2, 3 for rows 2t + 16 and 2t + 24.
template <int SELECTOR> INLINE void matrix_multiply_chosen(float* d, const u32* a, const u32* b, u32 places, const float* c) {
#if FP16
#define AEROGEL_MMA_CHOSEN "mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32"
#else
#define AEROGEL_MMA_CHOSEN "mma.sp.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32"
#endif
  asm(AEROGEL_MMA_CHOSEN " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%12,%13,%14,%15}, %16, %17;"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]), "r"(places), "n"(SELECTOR));
}

// Four 8 x 8 matrices of 16-bit numbers; lane 8i + r gives the address of row r of matrix i.
INLINE void load_matrices(u32* r, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix across its diagonal.
INLINE void load_matrices_across(u32* r, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// An 8 x 8 matrix of 16-bit numbers in registers, of which lane 4g + t has columns 2t, 2t + 1 of row g, across its diagonal.
INLINE u32 across(u32 matrix) {
  u32 d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(matrix));
  return d;
}

// v, of which the compiler then knows nothing: else it finds out anew what fits into a register.
INLINE u32 kept_in_register(u32 v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Two halves side by side, by the multiplier: logic and permutations have another pipe, which is busy with codes.
INLINE u32 joined(u32 low, u32 high) {
  u32 d;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(high), "r"(kept_in_register(65536)), "r"(low));
  return d;
}

// Twice the lower half of v, plus `base`, in one instruction.
INLINE u32 twice_lower_half(u32 v, u32 base) {
  u32 d;
  asm("dp2a.lo.u32.u32 %0, %1, 2, %2;" : "=r"(d) : "r"(v), "r"(base));
  return d;
}

// ---- 16-bit numbers --------------------------------------------------------------------------------------------------
// (v & mask) | bits in one instruction; written in C++ it becomes two.
INLINE u32 and_or(u32 v, u32 mask, u32 bits) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(v), "r"(mask), "r"(bits));
  return d;
}

// (v & mask) ^ bits.
INLINE u32 and_xor(u32 v, u32 mask, u32 bits) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(d) : "r"(v), "r"(mask), "r"(bits));
  return d;
}

// Both halves of a + b.
INLINE u32 add_pairs(u32 a, u32 b) {
  u32 d;
#if FP16
  asm("add.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#elif __CUDA_ARCH__ >= 900
  asm("add.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3F803F80u), "r"(b));
#endif
  return d;
}

// Both halves of a * b, one rounding each.
INLINE u32 multiply_pairs(u32 a, u32 b) {
  u32 d;
#if FP16
  asm("mul.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#elif __CUDA_ARCH__ >= 900
  asm("mul.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));  // plus -0 keeps the sign of 0
#endif
  return d;
}

INLINE float from_bf16(u16 v) { return __uint_as_float((u32)v << 16); }
INLINE float from_fp16(u16 v) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(v));
  return d;
}
INLINE float from_half(u16 v) { return FP16 ? from_fp16(v) : from_bf16(v); }
INLINE u16 to_half(float v) {
  u16 d;
#if FP16
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d) : "f"(v));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(v));
#endif
  return d;
}
INLINE u32 to_pair(float low, float high) {
  u32 d;
#if FP16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#endif
  return d;
}

INLINE float low_of(u32 pair) { return from_half((u16)pair); }
INLINE float high_of(u32 pair) { return FP16 ? from_fp16((u16)(pair >> 16)) : __uint_as_float(pair & 0xFFFF0000u); }

// ---- Memory ----------------------------------------------------------------------------------------------------------
// Loads of data that is read once: not kept in L1, and the L2 is told to fetch the neighbourhood.
INLINE uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
INLINE uint2 load_once(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
// The last reading of what was written: its lines leave the L2 first, so that others need not be written back for them.
INLINE uint4 load_last(const uint4* p) {
  u64 policy;
  uint4 v;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("ld.global.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(policy)
               : "memory");
  return v;
}
INLINE u32 load_shared_u32(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
INLINE void load_shared_u32x4(u32* v, u32 address) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
}
INLINE void load_shared_u32x2(u32* v, u32 address) {
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(address) : "memory");
}
INLINE void store_shared_u32x4(u32 address, u32 v) {  // the same four times
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(v) : "memory");
}
INLINE void store_shared_u32(u32 address, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory"); }
INLINE u16 load_shared_u16(u32 address) {
  u16 v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
  return v;
}

// 16 bits as the lower half of a register.
INLINE u32 load_shared_half(u32 address) {
  u32 v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

// 16 bytes to shared memory without a register in between; bytes beyond `valid` become zero.
INLINE void copy_async(u32 shared, const void* global, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid) : "memory");
}
INLINE void copy_async_8(u32 shared, const void* global, int valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(global), "r"(valid) : "memory");
}
INLINE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> INLINE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Flags in global memory, between blocks: what came before an addition is seen by whoever has read it.
INLINE void add_released(u32* flag, u32 count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(count) : "memory");
}
INLINE u32 read_acquired(const u32* flag) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory");
  return v;
}
// Counts up to `last` and from there to 0; what the count was.
INLINE u32 increment_wrapping(u32* count, u32 last) {
  u32 v;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(v) : "l"(count), "r"(last) : "memory");
  return v;
}
INLINE void store_relaxed(u32* flag, u32 v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(v) : "memory"); }
INLINE void sleep_a_little() { asm volatile("nanosleep.u32 100;"); }

INLINE void arrive_at(int name, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory"); }
INLINE void barrier_of(int name, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory"); }

// ---- Compute capability 9.0 ------------------------------------------------------------------------------------------
#if __CUDA_ARCH__ >= 900
// Four 8 x 8 matrices to where load_matrices would find them.
INLINE void store_matrices(u32 address, const u32* r) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// The same, each matrix across its diagonal.
INLINE void store_matrices_across(u32 address, const u32* r) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// A barrier in shared memory that completes when its arrivals and its bytes are all in.
INLINE void mbarrier_init(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
INLINE void mbarrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
INLINE void mbarrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
INLINE void mbarrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
INLINE void mbarrier_wait(u32 barrier, u32 phase) {
  asm volatile(
      "{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}"
      ::"r"(barrier), "r"(phase) : "memory");
}

// The copy engine: `bytes` (a multiple of 16) to shared memory, counted by the barrier.
INLINE void bulk_copy(u32 shared, const void* global, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}

// `bytes` (a multiple of 16) into the second-level cache.
INLINE void bulk_prefetch(const void* global, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

// A copy to every block of a cluster of COUNT, at the same place of each and counted by the barrier there.
template <int COUNT> INLINE void bulk_copy_to_all(u32 shared, const void* global, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(
          shared),
      "l"(global), "r"(bytes), "r"(barrier), "h"((u16)((1 << COUNT) - 1))
      : "memory");
}
// Arrives at the barrier of another block of the cluster.
INLINE void mbarrier_arrive_at(u32 barrier, u32 rank) {
  asm volatile(
      "{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}"
      ::"r"(barrier), "r"(rank) : "memory");
}

// Blocks of a cluster: who am I, meet the others, send them something. Arriving tells them nothing of what was written: barriers that have
// just been initialised have a fence of their own (`mbarrier_init_done`), and waiting for all memory took a launch several hundred cycles.
INLINE u32 cluster_rank() {
  u32 r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
INLINE void cluster_arrive() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
INLINE void cluster_wait() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// `values` to the shared memory of another block, where the barrier counts them as eight bytes.
INLINE void send(u32 shared, float2 values, u32 barrier, u32 rank) {
  asm volatile(
      "{\n.reg .u32 there, bell;\nmapa.shared::cluster.u32 there, %0, %4;\nmapa.shared::cluster.u32 bell, %3, %4;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%1, %2}, [bell];\n}" ::"r"(shared),
      "f"(values.x), "f"(values.y), "r"(barrier), "r"(rank)
      : "memory");
}
// Waits for what other blocks have sent.
INLINE void mbarrier_wait_for_cluster(u32 barrier, u32 phase) {
  asm volatile(
      "{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}"
      ::"r"(barrier), "r"(phase) : "memory");
}
#endif

// A warpgroup (four warps) changes how many registers its threads have. Only where the compiler knows a limit at the kernel's entry.
#if __CUDA_ARCH__ >= 900
template <int COUNT> INLINE void registers_give() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> INLINE void registers_take() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
#endif

// Early launch: let the next kernel on the stream begin; wait until everything before this one has ended.
INLINE void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
INLINE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
