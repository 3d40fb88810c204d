// A few columns that are kept beside codes whose inputs are rounded to bytes: their product, added at the matmul's end.
//
// Their weights lie as fragments of the ordinary matrix instruction, 16 rows x 16 columns a step, and its sums lie in a warp as
// those of the warpgroup's do. The inputs, 16 bits and exact, are written side by side by the kernel that rounds all others, which
// the activations have waited for; they are read past the first-level cache, as `read_run` does.

#pragma once
#include "wgmma_work.cuh"

// The product of one warp: D (16 x 8) += A (16 x 16) B (16 x 8), float32 sums of 16-bit numbers, FP16 or else bfloat16.
template <bool FP16> FN void warp_mma(float* d, const uint4& a, u32 b0, u32 b1) {
    if constexpr (FP16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Adds what the columns come to for row tile `tile` and 16 tokens from `first` on, in the order of the sums; `last` is a token.
FN void kept_product(float (&sums)[8], const Arguments& p, int tile, int first, int last, int lane) {
    for (int s = 0; s < p.kept_steps; s++) {
        const uint4 a = __ldg(p.kept + ((size_t)tile * p.kept_steps + s) * 32 + lane);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int t = min(first + 8 * j + lane / 4, last);
            const u32* b = (const u32*)(p.chosen + ((size_t)t * p.kept_steps + s) * 16) + lane % 4;
            warp_mma<ACTIVATION == 1>(sums + 4 * j, a, __ldcg(b), __ldcg(b + 4));
        }
    }
}
