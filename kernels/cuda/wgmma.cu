// y_MN = x_MK w_NK^T (+ bias) for many tokens: packed weights, warpgroup MMA, Hopper.
//
// Computed as y^T = w x^T, so that the weights are the A operand: they go from packed codes to the registers that the
// tensor cores read, and never back to memory. A block computes WARPGROUPS * BLOCKS * 64 out features times TOKENS tokens:
//
//   one warp of the last warpgroup   streams codes, scales, zeros -> weight ring, a stage = W_TILES * 128 columns
//   another one                      streams activations          -> x ring, a stage = 64 columns (128 where BATCH is 8), swizzled
//   a warp for each 64 rows          puts sparse outliers, where there are any, into sheets, which are added to what codes decode to
//   the other warpgroups             decode BATCH k16 steps into registers while the tensor cores still work on the BATCH
//                                    before, then start BATCH * BLOCKS wgmma m64nTOKENSk16, and so on
//
// Two clusterings of neighbouring blocks. SHARE blocks with different rows take the same activations: each fetches a part
// of every x stage and multicasts it to all, which divides the traffic from the second-level cache. SPLIT blocks take
// different columns of the same rows; at the end each sends the others their parts of the partial sums through distributed
// shared memory and adds what it received in the order of ranks: the same bits every time, no atomics, no second kernel.
//
// Count for 64 rows x 16 columns: TOKENS / 2 cycles of the tensor cores against about 16 instructions on each of the four
// schedulers, so that decoding hides behind 64 tokens and more; below, it hides behind the memory.
// Weights are constants: their ring fills before the previous kernel has ended. Only the activations wait for it; with EXPERTS
// everybody does, because who needs which weights is what a previous kernel found out (`experts.cu`).
//
// Shape legend: M tokens, N out features, K in features. Layout of codes and scales: see pack/tiles.py.

#include "hopper.cuh"

#include "fragment.cuh"
#include "wgmma_work.cuh"
#include "tile_outliers.cuh"
#include "wgmma_streams.cuh"
#if INT8
#include "fragment8.cuh"
#endif
#include "mma.cuh"
#include "wgmma_results.cuh"

// Tables of rows, which a warp asks for long before it needs them: of row g, and of one of rows 8 to 15 that the lane lays out.
struct RowsAsked {
    RowNumbers upper[BY_ROWS ? BLOCKS : 1], lower[BY_ROWS ? BLOCKS : 1];

    FN void ask(const Arguments& p, const Tile& at, int warp, int lane) {
#pragma unroll
        for (int b = 0; b < (BY_ROWS ? BLOCKS : 0); b++) {
            const int tile = at.expert * p.row_tiles + min(at.row_tile + row_tile_of(warp, b), p.row_tiles - 1);
            const u16* numbers = p.table + (size_t)tile * 256;
            upper[b] = row_numbers(numbers + lane / 4 * 16), lower[b] = row_numbers(numbers + (8 + lane % 8) * 16);
        }
    }
};

// ---- consumers -----------------------------------------------------------------------------------------------------------

struct Consumer {
    const Arguments& p;
    const Barriers& barriers;
    const Work& work;
    int warp, lane;  // warp 0 .. WARPS-1
    Tile at;
    int lead;  // x stages until the next warpgroup may start
    RowsAsked asked;
    Ring<X_STAGES> x;
    Ring<W_STAGES> w;
    Sheets sheets;

    FN int row_tile(int block) const { return row_tile_of(warp, block); }

    FN u32 x_word(u32 slot) const { return shared_address(memory) + slot * X_STAGE + 4 * (32 * warp + lane) % X_BOX; }
    FN void release_x(u32 slot) const {
        read_too(x_word(slot));
        if constexpr (SHARE == 1 || SANITIZE) {
            if (arrives(lane)) barrier_arrive(barriers.x_empty(slot));
            for (u32 share = 1; share < SHARE; share++)
                barrier_arrive_at(barriers.x_empty(slot), work.split * SHARE + (work.share + share) % SHARE);
        } else if (lane < SHARE) barrier_arrive_at(barriers.x_empty(slot), work.split * SHARE + lane);
    }

    // Where the lane's tables begin, or the first of those that groups pick from.
    FN u32 tables() const { return AT_TABLES + (PAIRED || COPIED ? shared_address(memory) + 4 * lane : 0); }

    // What does not change along the columns: tables of rows; per channel, zero points too (the scale waits for the end).
    FN void read_rows(Group (&group)[BLOCKS]) const {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const int tile = at.expert * p.row_tiles + min(at.row_tile + row_tile(b), p.row_tiles - 1), row = lane / 4;
#if INT8
            read_rows_of(group[b], p.row_scale + tile * 16 + row);
#endif
            if (!GROUPED) read_group(group[b], p.scale, p.zero + (size_t)tile * ZERO_BYTES, tables(), row, false);
#if !INT8
            if (TABLE == ONE_TABLE) group[b].table[0] = group[b].table[1] = tables();
            if constexpr (BY_ROWS) {
                const u32 room = shared_address(memory + AT_TABLES + row_tile(b) * 16 * TABLE_SIZE);
                group[b].own = row_table(asked.upper[b]);
#pragma unroll
                for (int i = 0; i < 4; i++) asm volatile("" : "+r"(group[b].own.low[i]), "+r"(group[b].own.high[i]));  // once, not in the loop
                group[b].table[1] = room + place_of_row(row, lane);
                lay_out_eight(asked.lower[b], room, lane);
            } else if (TABLE == TABLE_PER_ROW) {
                const int first = AT_TABLES + row_tile(b) * 16 * TABLE_SIZE;
                const uint4* from = (const uint4*)(p.table + (size_t)tile * 16 * (TABLE_SIZE / 2));
                for (int i = lane; i < TABLE_SIZE; i += 32) ((uint4*)(memory + first))[i] = from[i];
                group[b].table[0] = first + row * TABLE_SIZE, group[b].table[1] = group[b].table[0] + 8 * TABLE_SIZE;
            }
#endif
        }
        __syncwarp();
    }

    // The tables of bit planes that the warp makes of tile `k` in one of its row tiles.
    FN u8* made(int tile) const { return memory + AT_TABLES + tile * MADE_BYTES; }
    FN void make_planes(int tile, const u8* scales, int k0, int k) const {
        __syncwarp();
        for (int i = lane; i < MADE_TABLES; i += 32) {
            const int group = (k * 128 + i / 16 * MADE_RUN) / SPAN - k0 * 128 / SPAN;
            make_plane_table(made(tile), i, ((const uint2*)(scales + group * SCALE_BYTES))[i % 16]);
        }
        __syncwarp();
    }

    // The fragment of step `step` of tile `k` for every block of 64 rows; the stage begins with tile `k0`. Without `there` it is of
    // no use: the run of tiles has ended.
    FN void decode_step(u32 (&a)[FACTORS][BATCH][4], Codes (&codes)[BLOCKS], Group (&group)[BLOCKS], int k0, int k, int step,
                        bool there = true) {
        const u8* stage = memory + AT_W + w.slot * W_STAGE;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const int tile = row_tile(b);
            constexpr int HALF = STEPS / 2;
            if (step % HALF == 0) read_codes(codes[b], stage + (tile * W_TILES + k - k0) * TILE_BYTES, step / HALF, lane);
            if (GROUPED && (step == 0 || (SPAN % 128 != 0 && (128 % SPAN != 0 || STEP * step % SPAN == 0)))) {
                const int at = tile * WINDOW + (k * 128 + STEP * step) / SPAN - k0 * 128 / SPAN;
                if (MANY_MADE && step == 0) make_planes(tile, stage + AT_SCALES + tile * WINDOW * SCALE_BYTES, k0, k);
                const u8* scales = MANY_MADE ? made(tile) + STEP * step / MADE_RUN * 256 : stage + AT_SCALES + at * SCALE_BYTES;
                read_group(group[b], scales, stage + AT_ZEROS + at * ZERO_BYTES, tables(), lane / 4,
                           true);
            }
#if !OUTLIERS || EXACT
            decode(a[b][step % BATCH], codes[b], step % HALF, group[b], GROUPED);
#endif
        }
#if OUTLIERS
        sheets.before(step, there);
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
#if EXACT
#pragma unroll
            for (int part = 0; part < SIXTEENS; part++) {
                const uint4 sheet = sheets.read(b, step, part);
                u32(&to)[4] = a[BLOCKS * (1 + part) + b][step % BATCH];
                to[0] = sheet.x, to[1] = sheet.y, to[2] = sheet.z, to[3] = sheet.w;
            }
#else
            decode(a[b][step % BATCH], codes[b], step % (STEPS / 2), group[b], GROUPED, sheets.of_step(b, step));
#endif
        }
        if (SHEETS_AT_ONCE) sheets.leave(step, lane);
#endif
    }
    // Operands in registers must be final before the fence that hands them to the tensor cores: steps s .. s + count.
    FN void settle(u32 (&a)[FACTORS][BATCH][4], int s, int count) const {
#pragma unroll
        for (int i = 0; i < 4 * FACTORS * count; i++)
            asm volatile("" : "+r"(a[i / (4 * count)][s + i / 4 % count][i % 4])::"memory");
    }

    FN void wait_weights() const { barrier_wait(barriers.w_full(w.slot), w.phase); }
    FN void release_weights() const {
        __syncwarp();
        if (arrives(lane)) barrier_arrive(barriers.w_empty(w.slot));
    }
    FN u64 wait_x() const {
        barrier_wait(barriers.x_full(x.slot), x.phase);
        read_too(x_word(x.slot));
        return mma_descriptor(shared_address(memory) + x.slot * X_STAGE);
    }
    // The x stage `before` (none: X_STAGES) has been read; what was started since reads the present one.
    FN void next_x(u32& before) {
        if (before != X_STAGES) release_x(before);
        before = x.slot, x.advance();
        if (LEAD > 0 && --lead == 0 && warp / 4 + 1 < WARPGROUPS) meet_arrive(warp / 4 + 1, 256);
    }
    // The products of step `step` of tile `k`, for `tokens` of the x stage in use; with EXACT sheets have products of their own.
    FN void start(Sums& acc, u32 (&a)[FACTORS][BATCH][4], u64 tokens, int k, int step) const {
        const int in_stage = step % X_STEPS, add = step > 0 || k > work.k_first;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
            mma(acc.of[b], a[b][step % BATCH], tokens + in_stage / 4 * (X_BOX >> 4) + 2 * (in_stage % 4), add);
#if EXACT
#pragma unroll
        for (int f = BLOCKS; f < FACTORS; f++) {
            const int b = f % BLOCKS, part = f / BLOCKS - 1, sixteen = in_stage * SIXTEENS + part;
            const u64 inputs = tokens + (X_OF_CODES >> 4) + sixteen / 4 * (X_BOX >> 4) + 2 * (sixteen % 4);
#if INT8
            mma_floats(acc.apart[b], a[f][step % BATCH], inputs, part > 0 || add);
#else
            mma(acc.of[b], a[f][step % BATCH], inputs, 1);
#endif
        }
#endif
    }

    // acc[b] = the block's part of w x^T over the work's tiles. Two sets of BATCH fragments take turns: while the tensor
    // cores work on one, the other is decoded. Each hand-over makes the four warps of a group wait for each other, so the
    // more products it holds the better.
    FN void multiply(Sums& acc) {
        u32 a[2][FACTORS][BATCH][4];
        Codes codes[BLOCKS];
        Group group[BLOCKS];
        if (!GROUPED || TABLE != UNIFORM || INT8) read_rows(group);
        u32 before = X_STAGES;
        for (int k0 = work.k_first; k0 < work.k_last; k0 += W_TILES, w.advance()) {
            wait_weights();
            for (int k = k0; k < min(k0 + W_TILES, work.k_last); k++) {
                u64 tokens = 0;
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
#pragma unroll
                    for (int s = 0; s < BATCH; s++) decode_step(a[part % 2], codes, group, k0, k, part * BATCH + s);
                    settle(a[part % 2], 0, BATCH);
                    const bool new_stage = part * BATCH % X_STEPS == 0;
                    if (new_stage) tokens = wait_x();
                    mma_fence();
#pragma unroll
                    for (int s = 0; s < BATCH; s++) start(acc, a[part % 2], tokens, k, part * BATCH + s);
                    mma_commit();
                    sheets.after(part * BATCH + BATCH - 1, lane);
                    mma_wait<1>();  // of the set before, whose registers come next
                    if (new_stage) next_x(before);
                }
            }
            release_weights();
        }
        mma_wait<0>();
        release_x(before);
    }

    // The same, decoding ahead. Where products are long (INTERLEAVED) a step is decoded beside each of them; where a set holds
    // a whole tile, two tiles make a turn.
    FN void multiply_ahead(Sums& acc) {
        u32 a[2][FACTORS][BATCH][4];
        Codes codes[BLOCKS];
        Group group[BLOCKS];
        if (!GROUPED || TABLE != UNIFORM || INT8) read_rows(group);
        int k0 = work.k_first;  // the first tile of the weight stage in use
        u32 before = X_STAGES;
        u64 tokens = 0;
        wait_weights();
#pragma unroll
        for (int s = 0; s < BATCH; s++) decode_step(a[0], codes, group, k0, k0, s), settle(a[0], s, 1), sheets.after(s, lane);
        for (int pair = work.k_first; pair < work.k_last; pair += TILES_A_TURN)
#pragma unroll
            for (int turn = 0; turn < TILES_A_TURN * PARTS; turn++) {
                const int k = pair + turn / PARTS, part = turn % PARTS;
                if (turn >= PARTS && k >= work.k_last) break;
                const bool new_stage = part * BATCH % X_STEPS == 0;
                if (new_stage) tokens = wait_x();
                const bool there = part < PARTS - 1 || k + 1 < work.k_last;
                int next = k;  // the tile of the next set; after the last one any will do
#pragma unroll
                for (int s = 0; s < BATCH; s++) {
                    const int step = part * BATCH + s;
                    if (INTERLEAVED || s == 0) mma_fence();
                    start(acc, a[turn % 2], tokens, k, step);
                    if (INTERLEAVED || s == BATCH - 1) mma_commit();
                    if (s == (INTERLEAVED ? 0 : BATCH - 1) && part == PARTS - 1 && there) {
                        next = k + 1;
                        if (next - k0 == W_TILES) release_weights(), w.advance(), wait_weights(), k0 = next;
                    }
                    if (INTERLEAVED) {
                        mma_wait<BATCH - 1>();  // step s of the set before is done with its registers
                        decode_step(a[1 - turn % 2], codes, group, k0, next, (step + BATCH) % STEPS, there);
                        settle(a[1 - turn % 2], s, 1);
                        if (there) sheets.after((step + BATCH) % STEPS, lane);
                    }
                }
                if (!INTERLEAVED) mma_wait<1>();
                if (new_stage) next_x(before);
                if (!INTERLEAVED)
#pragma unroll
                    for (int s = 0; s < BATCH; s++) {
                        decode_step(a[1 - turn % 2], codes, group, k0, next, ((part + 1) * BATCH + s) % STEPS, there);
                        settle(a[1 - turn % 2], s, 1);
                        if (there) sheets.after(((part + 1) * BATCH + s) % STEPS, lane);
                    }
            }
        mma_wait<0>();
        release_x(before);
        release_weights(), w.advance();
    }
};

FN void consume(const Arguments& p, const Barriers& barriers, const Work& work, const RowsAsked& asked, int warp, int lane) {
    Consumer self{p, barriers, work, warp, lane, {}, LEAD, asked, {}, {}, Sheets(barriers, warp, lane)};
    if (EXPERTS && (int)work.cluster >= work.count()) return;
    if (LEAD > 0 && warp >= 4) meet_wait(warp / 4, 256);  // so that one warpgroup stores while another multiplies
    for (int index = work.cluster; index < work.count(); index += work.clusters) {
        Sums acc;
        self.at = work.tile(index);
        if (INT8) self.wait_x();  // behind which the scales of tokens are there too
        const Results results(p, barriers, work, self.at, warp, lane);
        if constexpr (INTERLEAVED || PARTS == 1) self.multiply_ahead(acc);
        else self.multiply(acc);
#if KEPT
        add_kept(self, results, acc.of);
#endif
        if constexpr (APART) results.join(acc);
        const int next = index + work.clusters;
        if (BY_ROWS && next < work.count()) self.asked.ask(p, work.tile(next), warp, lane);
        if constexpr (SPLIT > 1) results.store_split(acc.of);
        else results.store(acc.of);
    }
}

// What all rows look up, by the consumers, while the producers already stream; `number` is the lane's of pairs.
FN void lay_out_tables(const Arguments& p, u32 number) {
    if constexpr (TABLE == UNIFORM || TABLE == TABLE_PER_ROW) return;
    if constexpr (PAIRED) lay_out_pairs(number, TABLES, memory + AT_TABLES, threadIdx.x, CONSUMERS);
    else if constexpr (COPIED) fetch_entries(p.table, memory + AT_TABLES, threadIdx.x, CONSUMERS);
    else for (int i = threadIdx.x; i < TABLES * TABLE_SIZE / 2; i += CONSUMERS) ((u16*)(memory + AT_TABLES))[i] = p.table[i];
    meet_wait(WARPGROUPS, CONSUMERS);
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, MIN_BLOCKS)
    packed_matmul(const __grid_constant__ Arguments p) {
    const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const u32 number = PAIRED ? number_of_lane(p.table, TABLES, threadIdx.x) : 0;  // asked for before all else
    if (EXPERTS) wait_for_previous_kernel();
    const Work work(p);
    RowsAsked asked;
    if (BY_ROWS && warp < WARPS && (int)work.cluster < work.count()) asked.ask(p, work.tile(work.cluster), warp, lane);
    const Barriers barriers{shared_address(memory + AT_BARRIERS)};
#if OUTLIERS
    Filler filler{p, barriers, work, warp - FIRST_FILLER, lane};
    const bool fills = warp >= FIRST_FILLER && filler.unit < UNITS;
    if (fills) filler.find(work.cluster);
#endif
    if (threadIdx.x == 0) barriers.init(work.split);
    __syncthreads();
    if (CLUSTER > 1) cluster_meet();
    let_next_kernel_start();
#if OUTLIERS
    if (FILLERS_APART && warp >= FIRST_FILLER) {
        registers_give<FILLER_REGISTERS>();
        if (fills) filler.run();
        __syncwarp();
    } else
#endif
    if (warp >= WARPS) {
        if constexpr (PRODUCER_REGISTERS > 0) registers_give<PRODUCER_REGISTERS>();
        if (warp == WARPS && streams(lane)) stream_weights(p, barriers, work, lane);
        if (warp == WARPS + 1 && streams(lane)) stream_activations(p, barriers, work, lane);
#if OUTLIERS
        if (!FILLERS_APART && fills) filler.run();
#endif
        __syncwarp();
    } else {
        if constexpr (PRODUCER_REGISTERS > 0) registers_take<CONSUMER_REGISTERS>();
        lay_out_tables(p, number);
        consume(p, barriers, work, asked, warp, lane);
    }
    if (CLUSTER > 1) cluster_meet();  // a neighbour may still arrive at this block's barriers or read its shared memory
}
