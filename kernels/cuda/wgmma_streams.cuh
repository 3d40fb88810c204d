// The producing side of `wgmma.cu`: two threads that keep the copy engine busy, one for each ring; in the build for
// racecheck (`sanitize.cuh`) two warps, which pass on what it has copied.

#pragma once
#include "wgmma_work.cuh"

// A stage that has been asked for is there, is written again by all lanes, and is full.
FN void pass_on(u32 there, u32 full, u32 phase, u32 at, u32 bytes, int lane) {
    barrier_wait(there, phase);
    for (u32 to = at + 16 * lane; to < at + bytes; to += 16 * 32) write_again(to);
    fence_loads();  // and stores: tensor cores read them past the order of threads
    barrier_arrive(full);
}

// The stage that begins with tile `k`.
FN void copy_weights(const Arguments& p, const Barriers& barriers, const Tile& tile, int k, u32 slot, u64 policy) {
    const u32 full = barriers.w_there(slot), stage = shared_address(memory + AT_W) + slot * W_STAGE;
    const int row_tile = tile.expert * p.row_tiles + tile.row_tile;
    barrier_expect(full, CODES_STAGE + SCALES_STAGE + ZEROS_STAGE);
    copy_box_once(stage, &p.codes, k * (TILE_BYTES / 8), row_tile, full, policy);
    if (GROUPED) copy_box_once(stage + AT_SCALES, &p.scales, k * 128 / SPAN * 16, row_tile, full, policy);
    if (ZEROS_STAGE > 0) copy_box_once(stage + AT_ZEROS, &p.zeros, k * 128 / SPAN * 16, row_tile, full, policy);
}

FN void stream_weights(const Arguments& p, const Barriers& barriers, const Work& work, int lane) {
    Ring<W_STAGES> ring;
    for (int index = work.cluster; index < work.count(); index += work.clusters) {
        const Tile tile = work.tile(index);
        const u64 policy = tile.shared ? policy_evict_normal() : policy_evict_first();
        for (int k = work.k_first; k < work.k_last; k += W_TILES, ring.advance()) {
            barrier_wait(barriers.w_empty(ring.slot), ring.phase ^ 1);
            BY_ONE(lane) copy_weights(p, barriers, tile, k, ring.slot, policy);
            const u32 stage = shared_address(memory + AT_W) + ring.slot * W_STAGE;
            if (SANITIZE) pass_on(barriers.w_there(ring.slot), barriers.w_full(ring.slot), ring.phase, stage, W_STAGE, lane);
        }
    }
}

// One box of `map` into an x stage, by all blocks that share it.
FN void copy_tokens(const TensorMap* map, const Work& work, const Tile& tile, u32 stage, int column, u32 full) {
    const u32 to = stage + work.share * (X_BOX / SHARE);
    const int row = tile.token + work.share * (TOKENS / SHARE);
    if constexpr (SHARE == 1) copy_box(to, map, column, row, full);
    else copy_box_multicast(to, map, column, row, full, (u16)(((1 << SHARE) - 1) << (work.split * SHARE)));
}

FN void stream_activations(const Arguments& p, const Barriers& barriers, const Work& work, int lane) {
    if (!EXPERTS) wait_for_previous_kernel();
    Ring<X_STAGES> ring;
    auto next_stage = [&](u32 bytes) {
        barrier_wait(barriers.x_empty(ring.slot), ring.phase ^ 1);
        BY_ONE(lane) barrier_expect(barriers.x_there(ring.slot), bytes);
        return shared_address(memory) + ring.slot * X_STAGE;
    };
    for (int index = work.cluster; index < work.count(); index += work.clusters) {
        const Tile tile = work.tile(index);
        for (int k = STEPS * work.k_first; k < STEPS * work.k_last; k += X_STEPS, ring.advance()) {
            const u32 stage = next_stage(X_STAGE);
#pragma unroll
            for (int box = 0; box < X_STEPS / 4; box++) {
                const int column = STEP * (k + 4 * box);
                BY_ONE(lane) copy_tokens(&p.x, work, tile, stage + box * X_BOX, column, barriers.x_there(ring.slot));
            }
#pragma unroll
            for (int box = 0; box < EXACT * SIXTEENS * X_STEPS / 4; box++)
                BY_ONE(lane)
                    copy_tokens(&p.chosen, work, tile, stage + X_OF_CODES + box * X_BOX, STEP * k + 64 * box, barriers.x_there(ring.slot));
            if (SANITIZE) pass_on(barriers.x_there(ring.slot), barriers.x_full(ring.slot), ring.phase, stage, X_STAGE, lane);
        }
        if constexpr (KEPT)
            for (int step = 0; work.split == 0 && step < p.kept_steps; step += 4, ring.advance()) {
                const u32 stage = next_stage(X_BOX);
                BY_ONE(lane) copy_tokens(&p.chosen, work, tile, stage, 16 * step, barriers.x_there(ring.slot));
                if (SANITIZE) pass_on(barriers.x_there(ring.slot), barriers.x_full(ring.slot), ring.phase, stage, X_BOX, lane);
            }
    }
}
