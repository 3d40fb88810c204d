// From a tile's sums to y: scales and bias, then through shared memory, where rows become runs of columns. With SPLIT blocks of a
// cluster first send each other what is theirs.
//
// While results are made nothing multiplies, so every wait counts. The scales of integer sums are fetched before the products
// begin, a token's by one lane and handed round by shuffles. So are those of rows beside tables of rows, but where two blocks of 32
// tokens multiply: there the registers are worth more. And what is written are whole lines of the cache: a warp has 16 rows,
// 32 bytes of a token, so its warpgroup gathers 64 rows first; of two places one is filled while the other is emptied, and the
// sums that come next are finished meanwhile.

#pragma once
#include "kept_columns.cuh"
#include "wgmma_work.cuh"

// Of the lane's two rows: what multiplies their sums (a scale per channel, or what all scales of a byte lack), and their bias.
struct Rows {
    float factor[2], bias[2];
};

constexpr bool EARLY = INT8 || (BY_ROWS && !GROUPED && BLOCKS * TOKENS <= 128 && (BLOCKS == 1 || TOKENS > 32));

struct Results {
    const Arguments& p;
    const Barriers& barriers;
    const Work& work;
    const Tile& at;
    int warp, lane;
    float scales[INT8 ? (TOKENS + 31) / 32 : 1];  // of tokens lane, lane + 32, ...
    Rows early[BLOCKS];

    FN Results(const Arguments& p, const Barriers& barriers, const Work& work, const Tile& at, int warp, int lane)
        : p(p), barriers(barriers), work(work), at(at), warp(warp), lane(lane) {
#pragma unroll
        for (int i = 0; INT8 && i < (TOKENS + 31) / 32; i++) {
            const int t = at.token + 32 * i + lane;
            scales[i] = t < at.end ? __ldcg(p.token_scale + t) : 0.0f;
        }
#pragma unroll
        for (int b = 0; EARLY && b < BLOCKS; b++) early[b] = read_rows(b);
    }

    FN Rows rows_of(int block) const {
        if constexpr (!EARLY) return read_rows(block);
        Rows rows = early[0];
#pragma unroll
        for (int b = 1; b < BLOCKS; b++)
            if (b == block) rows = early[b];
        return rows;
    }

    FN int row_tile(int block) const { return at.row_tile + row_tile_of(warp, block); }

    FN Rows read_rows(int block) const {
        const float common = (SCALED_FLOATS ? 1 << SCALED_SHRINK : 1) * (SCALE >= E5M3 && p.factor ? p.factor[at.expert] : 1.0f);
        Rows rows;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = row_tile(block) * 16 + lane / 4 + 8 * h, stored = at.expert * p.row_tiles * 16 + row;
            float& factor = rows.factor[h];
            factor = row >= p.N ? 1.0f : INT8 ? p.row_scale[stored] : GROUPED ? common : stored_number(p.scale, stored);
            if (TABLE == TABLE_PER_GROUP && !GROUPED && row < p.N && p.zero[stored] & 0x80) factor = -factor;
            rows.bias[h] = p.bias && row < p.N ? low_of(p.bias[at.expert * p.N + row]) : 0.0f;
        }
        return rows;
    }

    // Of the 32 tokens among which the tile's token `first` is, the lane's scale; `first` need not be known when this is compiled.
    // Chosen among registers: chosen by address, all of this struct would stand in local memory.
    FN float scale_near(int first) const {
        float mine = scales[0];
#pragma unroll
        for (int i = 1; INT8 && i < (TOKENS + 31) / 32; i++) {
            float other = scales[i];
            asm("" : "+f"(other));
            if (i == first / 32) mine = other;
        }
        return mine;
    }

    // What the sums of 16 tokens (two fragments of 8), the first the tile's token `first`, come to: scaled, with the bias.
    FN void finish(const Sum* v, int first, const Rows& rows, float (&to)[8]) const {
        const float near = INT8 ? scale_near(first) : 1.0f;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float scale[2] = {1.0f, 1.0f};
#pragma unroll
            for (int i = 0; INT8 && i < 2; i++) scale[i] = __shfl_sync(0xFFFFFFFFu, near, first % 32 + 8 * j + 2 * (lane % 4) + i);
#pragma unroll
            for (int i = 4 * j; i < 4 * j + 4; i++)
                to[i] = fmaf((float)v[i], rows.factor[i / 2 % 2] * scale[i % 2], rows.bias[i / 2 % 2]);
        }
    }

    // The sums become floats in their places, with those of outliers; of SPLIT blocks the first adds the bias.
    FN void join(Sums& sums) const {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            Rows rows = early[b];
            if (work.split > 0) rows.bias[0] = rows.bias[1] = 0.0f;
#pragma unroll
            for (int t = 0; t < TOKENS; t += 16) {
                float finished[8];
                finish(&sums.of[b][t / 2], t, rows, finished);
#pragma unroll
                for (int i = 0; i < 8; i++) sums.of[b][t / 2 + i] = sum_of(finished[i] + float_of(sums.apart[b][t / 2 + i]));
            }
        }
    }

    // The same as pairs of 16-bit numbers; FINISHED are the sums already.
    FN void pack(const Sum* v, int first, const Rows& rows, u32 (&pairs)[4]) const {
        float finished[8];
        if constexpr (!FINISHED) finish(v, first, rows, finished);
#pragma unroll
        for (int i = 0; i < 4; i++)
            pairs[i] = FINISHED ? pair_of(float_of(v[2 * i]), float_of(v[2 * i + 1]))
                            : pair_of(finished[2 * i], finished[2 * i + 1]);
    }

    // They are put in the warpgroup's place at `to`, as its tokens `slot` .. `slot` + 15. Of a token's 128 bytes piece i lies at
    // i ^ token, so that no bank is asked twice.
    FN void put(u8* to, int slot, const u32 (&pairs)[4]) const {
        const int t = slot + 8 * (lane / 16) + lane % 8, piece = 2 * (warp % 4) + lane / 8 % 2;
        store_transposed(shared_address(to) + t * 128 + 16 * (piece ^ t % 8), pairs);
    }

    // 8 rows of one token from the place at `from`: of its tokens `slot` .. `slot` + 15 a warp takes four, a lane piece lane % 8.
    FN int my_token() const { return 4 * (warp % 4) + lane / 8; }
    FN uint4 take(const u8* from, int slot) const {
        const int t = slot + my_token();
        return *(const uint4*)(from + t * 128 + 16 * (lane % 8 ^ t % 8));
    }
    FN int my_row(int block) const { return (at.row_tile + row_tile_of(warp / 4 * 4, block)) * 16 + 8 * (lane % 8); }
    FN u16* place_in_y(int block, int token) const {
        return p.y + (size_t)(at.token + token + my_token()) * p.y_stride + my_row(block);
    }
    FN bool in_pieces() const { return p.N % 8 == 0 && p.y_stride % 8 == 0; }

    // They go to y, where there is such a token and there are such rows; the lane's token is `token` + `my_token`.
    FN void write(const uint4& v, int block, int token) const {
        if (at.token + token + my_token() >= at.end) return;
        u16* to = place_in_y(block, token);
        const int rows = p.N - my_row(block);
        if (in_pieces()) {
            if (rows > 0) store_eight(to, v);
        } else {
            const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int e = 0; e < 8; e++)
                if (e < rows) to[e] = (u16)(words[e / 2] >> (16 * (e % 2)));
        }
    }

    // The place in shared memory whose turn it is.
    FN u8* place(int turn) const { return memory + AT_OUT + (warp / 4 * 2 + turn % 2) * OUT_PART; }
    FN void meet() const { meet_wait(4 + warp / 4, 128); }  // the four warps of a warpgroup

    // OUT_TOKENS tokens a turn. While what others put there comes from the place of one turn, the sums of the next are finished.
    FN void store(const Sum (&acc)[BLOCKS][TOKENS / 2]) const {
        constexpr int EACH = OUT_TOKENS / 16, TURNS = TOKENS / OUT_TOKENS;
        const size_t step = 16 * (size_t)p.y_stride;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const Rows rows = rows_of(b);
            const bool whole = in_pieces() && at.token + TOKENS <= at.end && my_row(b) + 8 <= p.N;
            u16* to = place_in_y(b, 0);
            u32 pairs[EACH][4];
#pragma unroll
            for (int turn = 0; turn <= TURNS; turn++) {
                uint4 v[EACH];
                if (turn > 0) {
                    meet();
#pragma unroll
                    for (int i = 0; i < EACH; i++) v[i] = take(place(b * TURNS + turn - 1), 16 * i);
                }
                const int first = turn * OUT_TOKENS;
#pragma unroll
                for (int i = 0; turn < TURNS && i < EACH; i++) pack(&acc[b][(first + 16 * i) / 2], first + 16 * i, rows, pairs[i]);
                if (turn > 0 && whole) {
#pragma unroll
                    for (int i = 0; i < EACH; i++, to += step) store_eight(to, v[i]);
                } else if (turn > 0) {
#pragma unroll
                    for (int i = 0; i < EACH; i++) write(v[i], b, first - OUT_TOKENS + 16 * i);
                }
#pragma unroll
                for (int i = 0; turn < TURNS && i < EACH; i++) put(place(b * TURNS + turn), 16 * i, pairs[i]);
            }
        }
        if (BLOCKS * TURNS % 2) meet();  // the next tile begins in the place that was just emptied
    }

    FN static Sum joined(Sum a, Sum b) { return FINISHED ? sum_of(float_of(a) + float_of(b)) : a + b; }

    // Piece i of the sums belongs to the block of rank i % SPLIT: send them all to their owners, add up one's own.
    FN void store_split(const Sum (&acc)[BLOCKS][TOKENS / 2]) const {
        const u32 mine = shared_address(memory) + (warp * 32 + lane) * 16;  // of a half piece: 16 bytes for each thread
        __syncwarp();
        if (lane < SPLIT) barrier_arrive_at(barriers.rings_idle(), lane * SHARE + work.share);
        barrier_wait(barriers.rings_idle(), 0);
#pragma unroll
        for (int owner = 0; owner < SPLIT; owner++) {
            const u32 rank = owner * SHARE + work.share, there = address_in(mine, rank), full = address_in(barriers.sums_full(), rank);
#pragma unroll
            for (int i = owner; i < PIECES; i += SPLIT) {
                const u32 place = there + (i / SPLIT * SPLIT + work.split) * CONSUMERS * 32;
                const float* sums = (const float*)&acc[0][0] + 8 * i;  // as bits, whatever they are
                send(place, full, sums), send(place + CONSUMERS * 16, full, sums + 4);
            }
        }
        barrier_wait(barriers.sums_full(), 0);
        for (int i = work.split; i < PIECES; i += SPLIT) {
            Sum sum[8] = {};
#pragma unroll
            for (int from = 0; from < 2 * SPLIT; from++) {
                const u8* at = memory + (warp * 32 + lane) * 16 + (2 * (i / SPLIT * SPLIT) + from) * CONSUMERS * 16;
#pragma unroll
                for (int j = 0; j < 4; j++) sum[4 * (from % 2) + j] = joined(sum[4 * (from % 2) + j], ((const Sum*)at)[j]);
            }
            const int block = i / (TOKENS / 16), t = i % (TOKENS / 16) * 16;
            u8* to = place(i / SPLIT);
            u32 pairs[4];
            pack(sum, t, rows_of(block), pairs);
            put(to, 0, pairs);
            meet();
            write(take(to, 0), block, t);
        }
    }
};
