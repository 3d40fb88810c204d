// A few columns that are kept beside codes whose inputs are rounded to bytes: their product, added at the matmul's end.
//
// When the sums of a tile are complete, they are scaled, in the registers where they are, and integers become floats; then the kept
// columns are some steps more of 16-bit numbers, 2 % of the time of all others at 1 % of the columns. Their weights lie as
// fragments, 16 rows x 16 columns a step. Their inputs, 16 bits and exact, were written side by side by the kernel that rounds all
// others; they come as further stages of the ring of x, four steps each, zeros beyond the last. Of SPLIT blocks the first adds them.

#pragma once
#include "mma.cuh"
#include "wgmma_work.cuh"

#if KEPT
// Of one warp, for BLOCKS row tiles.
struct KeptColumns {
    static constexpr int STAGE = 4;  // steps
    u32 weights[BLOCKS][STAGE][4];

    // Asks for the weights of the stage that begins with step `first`.
    FN void fetch(const Arguments& p, const int (&row_tile)[BLOCKS], int first, int lane) {
#pragma unroll
        for (int i = 0; i < BLOCKS * STAGE; i++) {
            const int step = first + i % STAGE;
            const uint4* from = p.kept + ((size_t)row_tile[i / STAGE] * p.kept_steps + step) * 32 + lane;
            const uint4 v = step < p.kept_steps ? __ldg(from) : make_uint4(0, 0, 0, 0);
            u32(&a)[4] = weights[i / STAGE][i % STAGE];
            a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
        }
    }
    // sums += the product of the stage of x at `tokens`; sums are floats by now, with INT8 as bits.
    FN void multiply(Sum (&sums)[BLOCKS][TOKENS / 2], u64 tokens) {
#pragma unroll
        for (int i = 0; i < BLOCKS * STAGE * 4; i++)
            asm volatile("" : "+r"(weights[i / (4 * STAGE)][i / 4 % STAGE][i % 4])::"memory");
#pragma unroll
        for (int i = 0; i < BLOCKS * TOKENS / 2; i++) asm volatile("" : IN_REGISTER(sums[i / (TOKENS / 2)][i % (TOKENS / 2)])::"memory");
        mma_fence();
#pragma unroll
        for (int i = 0; i < BLOCKS * STAGE; i++) {
            Sum(&to)[TOKENS / 2] = sums[i % BLOCKS];
            u32(&a)[4] = weights[i % BLOCKS][i / BLOCKS];
#if INT8
            mma_floats(to, a, tokens + 2 * (i / BLOCKS), 1);
#else
            mma(to, a, tokens + 2 * (i / BLOCKS), 1);
#endif
        }
        mma_commit();
        mma_wait<0>();
    }
};

// The sums become floats in their places, bias and kept columns included. `of`: the `Consumer` of wgmma.cu, and its `Results`.
template <typename Consumer, typename Results>
FN void add_kept(Consumer& of, const Results& results, Sum (&acc)[BLOCKS][TOKENS / 2]) {
    const bool first = of.work.split == 0;
    int tile[BLOCKS];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) tile[b] = min(of.at.row_tile + of.row_tile(b), of.p.row_tiles - 1);
    KeptColumns kept;
    if (first) kept.fetch(of.p, tile, 0, of.lane);
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        auto rows = results.rows_of(b);
        if (!first) rows.bias[0] = rows.bias[1] = 0.0f;
#pragma unroll
        for (int t = 0; t < TOKENS; t += 16) {
            float finished[8];
            results.finish(&acc[b][t / 2], t, rows, finished);
#pragma unroll
            for (int i = 0; i < 8; i++) acc[b][t / 2 + i] = sum_of(finished[i]);
        }
    }
    if (!first) return;
    for (int step = 0; step < of.p.kept_steps; step += KeptColumns::STAGE, of.x.advance()) {
        if (step > 0) kept.fetch(of.p, tile, step, of.lane);
        kept.multiply(acc, of.wait_x());
        of.release_x(of.x.slot);
    }
}
#endif
