// A build for racecheck (SANITIZE, tests/kernels/gpu_sanitize.py), which looks for accesses to shared memory that nothing orders.
//
// One lane arrives at an mbarrier for its warp, behind a __syncwarp. That orders what all its lanes did before what they do next, an
// arrival releases whatever is ordered before it, whoever did it, and a wait that sees the phase end acquires all of that (causality
// order in the memory model of the PTX ISA). racecheck follows an arrival back to the thread that arrives and no further. So in its
// build every lane arrives, for what it did itself, and the barrier counts 32 for each warp: a phase then ends when all lanes have
// arrived, where else it ends when they have met in the __syncwarp and one has. What is ordered there is ordered here.
//
// Where the copy engine fills a stage again no fence stands between it and the loads that emptied the stage: what was loaded is in
// registers when its lane arrives, and it is stores whose way to the engine a fence makes sure of. racecheck asks for one behind loads
// too since version 2026.4, from those who loaded, and is given it.
//
// Copies by tensor maps it does not follow, nor what the tensor cores read. So in its build the warps that fill the rings of
// `wgmma.cu` wait for each copy, write what it brought once more in its place, and only then is the stage full; and those who multiply
// read a word of an x stage each where they have waited for it, and another time before they give it back.
//
// Tried with faults put in on purpose: it reports rings that are read without waiting for them, or filled without waiting for their
// readers, that fence left out, sums read without their barrier, and lanes of a warp that do not meet.

#pragma once

#ifndef SANITIZE
#define SANITIZE 0
#endif
constexpr int ARRIVALS = SANITIZE ? 32 : 1;  // of a warp
static __device__ __forceinline__ bool arrives(int lane) { return SANITIZE || lane == 0; }
static __device__ __forceinline__ void fence_loads() {  // from a stage, before it is given back
#if SANITIZE
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// Of a warp that fills a ring by tensor maps: who takes part, and what only one of them does.
static __device__ __forceinline__ bool streams(int lane) { return SANITIZE || lane == 0; }
#if SANITIZE
#define BY_ONE(lane) if ((lane) == 0)
#else
#define BY_ONE(lane)  // who is there is one, and a condition that always holds can change how the rest is compiled
#endif
static __device__ __forceinline__ void read_too(unsigned place) {  // four bytes, where tensor cores read or have read
#if SANITIZE
    asm volatile("{\n .reg .b32 a;\n ld.volatile.shared.b32 a, [%0];\n}" ::"r"(place) : "memory");
#endif
}
static __device__ __forceinline__ void write_again(unsigned place) {  // the 16 bytes that are there
    asm volatile(
        "{\n .reg .b32 a, b, c, d;\n ld.volatile.shared.v4.b32 {a, b, c, d}, [%0];\n"
        " st.volatile.shared.v4.b32 [%0], {a, b, c, d};\n}" ::"r"(place) : "memory");
}
