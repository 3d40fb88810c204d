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
// Tried with faults put in on purpose: it reports a ring that is filled without waiting for its readers, that fence left out, sums read
// without their barrier, and lanes of a warp that do not meet. It does not see what is copied by tensor maps: a warpgroup that does not
// wait for its weights goes unreported (the results are wrong). Of `wgmma.cu` it checks all but those two rings.

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
