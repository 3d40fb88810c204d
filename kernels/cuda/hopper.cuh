// The words of Hopper's machine language that the warpgroup kernel speaks, one function each.
//
// Three engines work at once and meet only at barriers in shared memory:
//   the copy engine   writes tiles into shared memory and counts the bytes it delivered on an "mbarrier";
//   the tensor cores  read activations from shared memory and weights from registers ("wgmma", 128 threads together);
//   the ordinary ALUs turn packed codes into those registers.
// An mbarrier has phases. A phase ends when every expected arrival has come and every expected byte has landed; a
// waiter names the parity (0, 1, 0, ...) of the phase whose end it awaits. A ring of buffers needs two such barriers a
// slot: `full` (producer to consumers) and `empty` (back). No toolkit header is needed: everything is inline PTX.

#pragma once

#include "sanitize.cuh"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define FN __device__ __forceinline__

struct alignas(64) TensorMap { u64 opaque[16]; };  // made by cuTensorMapEncodeTiled on the host

extern __shared__ __align__(1024) u8 memory[];  // all of a block's shared memory; the swizzle wants such a boundary

FN u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// ---- mbarriers -----------------------------------------------------------------------------------------------------

FN void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
FN void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

FN void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
FN void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives on the barrier at the same place in the shared memory of block `rank` of the cluster. Orders nothing but what the
// thread has finished reading; a release at cluster scope would make every warp wait for all its stores to reach the L2.
FN void barrier_arrive_at(u32 barrier, u32 rank) {
    asm volatile(
        "{\n .reg .b32 there;\n mapa.shared::cluster.u32 there, %0, %1;\n"
        " mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(rank) : "memory");
}
FN void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n .reg .pred done;\nAGAIN:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        " @done bra READY;\n bra AGAIN;\nREADY:\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// ---- clusters ------------------------------------------------------------------------------------------------------

FN u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
FN u32 address_in(u32 address, u32 rank) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
// Waits for all threads of the cluster; says nothing about what they wrote.
FN void cluster_meet() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n barrier.cluster.wait.aligned;" ::: "memory");
}
// Four numbers into another block's shared memory, whose barrier counts their 16 bytes when they are there.
FN void send(u32 to, u32 barrier, const float* v) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to), "f"(v[0]),
        "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier) : "memory");
}

// ---- copies from global to shared memory -----------------------------------------------------------------------------

// A box of a 2-D tensor at (column, row), laid out as its map says, zeros where it hangs over the edge.
FN void copy_box(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
// The same for what no other block will read: the second-level cache may drop it first.
FN void copy_box_once(u32 to, const TensorMap* map, int column, int row, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy) : "memory");
}
// The same into every block of `mask`, each with its own barrier at the same place.
FN void copy_box_multicast(u32 to, const TensorMap* map, int column, int row, u32 barrier, u16 mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(mask) : "memory");
}
// `bytes` that lie in a row, a multiple of 16 from and to such an address.
FN void copy_bytes_once(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}
// 16 bytes, by the thread itself; those copies that it committed together are a group.
FN void copy_async(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
FN void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> FN void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
FN u64 policy_evict_first() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
FN u64 policy_evict_normal() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// ---- warpgroup matrix multiply -----------------------------------------------------------------------------------------

FN void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FN void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> FN void mma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// Where a K-major operand lies: rows of 128 bytes, 128-byte swizzle, 1024 bytes from 8 rows to the next 8.
FN u64 mma_descriptor(u32 address) { return (1ull << 62) | (64ull << 32) | (1ull << 16) | (u64)((address & 0x3FFFF) >> 4); }

// Four 8x8 matrices of 16-bit numbers, transposed on the way to shared memory.
FN void store_transposed(u32 address, const u32 (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]),
                 "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

// Eight 16-bit numbers at a multiple of 16 bytes, in one piece whatever the compiler knows of the address.
FN void store_eight(u16* to, const uint4& v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// ---- named barriers between warpgroups -------------------------------------------------------------------------------------

FN void meet_arrive(int name, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory"); }
FN void meet_wait(int name, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory"); }

// ---- launches that overlap -----------------------------------------------------------------------------------------------

FN void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
FN void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

template <int COUNT> FN void registers_give() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> FN void registers_take() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
