// Sparse outliers beside a packed weight, for many tokens: they are put where they belong in a sheet of numbers that is zero
// elsewhere, and added to the fragments that the codes decode to.
//
// A warpgroup has two sheets in shared memory, of SHEET_STEPS steps each, in fragments: one vector load gives a lane what it adds
// in a step. While the warpgroup reads one, a warp that decodes nothing, a filler, takes out of the other what stood there and
// puts in what comes next. Those who multiply have nothing to do with outliers but that load and a barrier for each sheet. A filler
// takes 300 cycles for the two sheets of a tile: what it can know before a sheet is free, it asks for before.
//
// Four row tiles x 128 columns are a unit: its outliers are one list, in the order of steps, behind a head that says how many there
// are up to the end of each step. Lists come with the codes of their stage. What is longer than the room there is read where it
// lies.
//
// OUTLIERS: words that a stage has room for in each list, a multiple of 4; 0 where there are none. Codes must be multiplied with
// their scales, not the sums. A word: value << 16 | 2048 * step + 512 * (row tile % 4) + 16 * lane + 4 * register + 2 * half.

#pragma once
#include "wgmma_work.cuh"

#if OUTLIERS
static_assert(!INT8 && STEPS == 2 * SHEET_STEPS, "a tile has two sheets");

constexpr int EACH = (WARPGROUPS + FILLERS - 1) / FILLERS;  // warpgroups that a filler serves
constexpr int SERVED = EACH * BLOCKS;                       // units
constexpr int PASSES = larger(smaller(OUTLIERS / 64, 4 / SERVED), 1);  // of 32 lanes, for nearly every sheet
constexpr u32 NONE = ~0u;                                   // no word: places have 14 bits

FN u8* sheet_of(int unit, int sheet) { return memory + AT_SHEETS + (sheet * UNITS + unit) * SHEET_BYTES; }
// Where the lists of a block's unit begin along K, in words; rows beyond the last have the last one's.
FN const int* starts_of(const Arguments& p, const Work& work, int index, int unit) {
    return p.outlier_start + (size_t)min(work.tile(index).row_tile / 4 + unit, (p.row_tiles + 3) / 4 - 1) * p.k_tiles;
}

// ---- the copy engine's part, by one lane for each unit -----------------------------------------------------------------------

struct Lists {
    const int* starts;
    int begin, end;

    FN void begin_at(const Arguments& p, const Work& work, int index, int lane) {
        starts = starts_of(p, work, index, lane);
        begin = __ldg(starts + work.k_first), end = __ldg(starts + min(work.k_first + W_TILES, work.k_last));
    }
    // Those of the stage at `stage`, which begins with tile `k`.
    FN void ask(const Arguments& p, const Work& work, u32 stage, int lane, int k, u32 full, u64 policy) {
        const u32 bytes = 4 * min(end - begin, LIST_WORDS);
        barrier_expect(full, bytes);
        copy_bytes_once(stage + AT_LISTS + lane * LIST_WORDS * 4, p.outlier + begin, bytes, full, policy);
        begin = end, end = __ldg(starts + min(k + 2 * W_TILES, work.k_last));
    }
};

// ---- fillers ---------------------------------------------------------------------------------------------------------------

FN void wipe(u8* sheet, int lane) {
#pragma unroll 1
    for (int i = lane; i < SHEET_BYTES / 16; i += 32) ((uint4*)sheet)[i] = make_uint4(0, 0, 0, 0);
}
FN void put(u8* sheet, u32 word, u16 value) {
    if (word != NONE) *(u16*)(sheet + (word & (SHEET_BYTES - 1))) = value;
}

// What a list has up to the end of each step, in a vector of eight 16-bit numbers.
struct Ends {
    u32 first, all;  // up to the end of the first sheet, and of both
    FN Ends(const u32* list) { first = list[SHEET_STEPS / 2 - 1] >> 16, all = list[STEPS / 2 - 1] >> 16; }
    FN int begin(int sheet) const { return sheet > 0 ? first : 0; }
    FN int end(int sheet) const { return sheet > 0 ? all : first; }
};

// A filler serves every FILLERS-th warpgroup. It remembers what stands in the two sheets of each unit.
struct Filler {
    const Arguments& p;
    const Barriers& barriers;
    const Work& work;
    int filler, lane;
    int index, k;  // the tile
    u32 odd = 0;
    u32 coming[SERVED][2][PASSES], held[SERVED][2][PASSES];
    u32 longer = 0, overfull = 0;  // a bit for each sheet: more comes than that; more stands there

    // Unit `i` of the filler's, counted from the block's first, and the list of all its outliers.
    FN int unit(int i) const { return smaller((filler + i / BLOCKS * FILLERS) * BLOCKS + i % BLOCKS, UNITS - 1); }
    FN const u32* far(int i) const { return p.outlier + __ldg(starts_of(p, work, index, unit(i)) + k); }

    // What comes into the sheets of unit `i`; its list lies at `place` + `before` if there was room. Returns its words.
    FN int read(int i, const u32* place, int before) {
        const u32* list = before + HEAD <= LIST_WORDS ? place + before : far(i);
        const Ends ends(list);
#pragma unroll
        for (int sheet = 0; sheet < 2; sheet++) {
            if (ends.end(sheet) - ends.begin(sheet) > 32 * PASSES) longer |= 1u << (2 * i + sheet);
#pragma unroll
            for (int pass = 0; pass < PASSES; pass++) {
                const int e = ends.begin(sheet) + 32 * pass + lane;
                coming[i][sheet][pass] = e < ends.end(sheet) && before + HEAD + e < LIST_WORDS ? place[before + HEAD + e] : NONE;
            }
        }
        if (before + HEAD + (int)ends.all > LIST_WORDS)
#pragma unroll
            for (int n = 0; n < 2 * PASSES; n++) {
                const int sheet = n / PASSES, e = ends.begin(sheet) + n % PASSES * 32 + lane;
                if (e < ends.end(sheet)) coming[i][sheet][n % PASSES] = __ldg(far(i) + HEAD + e);
            }
        return HEAD + up_to(ends.all, 4);
    }
    FN void take_out(int i, int sheet) const {
        u8* from = sheet_of(unit(i), sheet);
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) put(from, held[i][sheet][pass], 0);
        if (overfull >> (2 * i + sheet) & 1) wipe(from, lane);
    }
    FN void put_in(int i, int sheet) {
        u8* to = sheet_of(unit(i), sheet);
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const u32 word = coming[i][sheet][pass];
            put(to, word, word >> 16), held[i][sheet][pass] = word;
        }
        if (!(longer >> (2 * i + sheet) & 1)) return;
        const u32* list = far(i);
        const Ends ends(list);
#pragma unroll 1
        for (int e = ends.begin(sheet) + 32 * PASSES + lane; e < ends.end(sheet); e += 32) put(to, list[HEAD + e], list[HEAD + e] >> 16);
    }
    // Sheet `sheet` of the tile for warpgroup number `g` of the filler's.
    FN void change(int sheet, int g) {
        const int group = filler + g * FILLERS;
        if (group >= WARPGROUPS) return;
        barrier_wait(barriers.sheet_empty(group, sheet), odd ^ 1);
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) take_out(g * BLOCKS + b, sheet);
        __syncwarp();
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) put_in(g * BLOCKS + b, sheet);
        __syncwarp();
        if (lane == 0) barrier_arrive(barriers.sheet_full(group, sheet));
    }
    FN void run() {
#pragma unroll
        for (int i = 0; i < 2 * SERVED * PASSES; i++) (&held[0][0][0])[i] = NONE;
        for (int i = filler; i < 2 * UNITS; i += FILLERS) wipe(sheet_of(i, 0), lane);
        meet_wait(8, 32 * FILLERS);
        Ring<W_STAGES> w;
        for (index = work.cluster; index < work.count(); index += work.clusters)
#pragma unroll 1
            for (int k0 = work.k_first; k0 < work.k_last; k0 += W_TILES, w.advance()) {
                const u32* lists = (const u32*)(memory + AT_W + w.slot * W_STAGE + AT_LISTS);
                int before[SERVED] = {};
                barrier_wait(barriers.w_full(w.slot), w.phase);
#pragma unroll 1
                for (k = k0; k < min(k0 + W_TILES, work.k_last); k++, odd ^= 1) {
                    longer = 0;
#pragma unroll
                    for (int i = 0; i < SERVED; i++) before[i] += read(i, lists + unit(i) * LIST_WORDS, before[i]);
                    if (k + 1 == min(k0 + W_TILES, work.k_last)) {
                        __syncwarp();
                        if (lane == 0) barrier_arrive(barriers.w_empty(w.slot));
                    }
#pragma unroll
                    for (int i = 0; i < 2 * EACH; i++) change(i / EACH, i % EACH);
                    overfull = longer;
                }
            }
        __syncwarp();
    }
};

// ---- consumers -------------------------------------------------------------------------------------------------------------

// A warp's reading of its warpgroup's two sheets.
struct Sheets {
    u32 full;     // barrier of the first
    int at;       // the lane's part of the first step
    u32 odd = 0;  // the tile

    FN Sheets(const Barriers& barriers, int warp, int lane)
        : full(barriers.sheet_full(warp / 4, 0)), at(AT_SHEETS + warp / 4 * BLOCKS * SHEET_BYTES + warp % 4 * 512 + lane * 16) {}

    // Before a step's first look.
    FN void before(int step) const {
        if (step % SHEET_STEPS == 0) barrier_wait(full + 8 * (step / SHEET_STEPS), odd);
    }
    FN uint4 of_step(int b, int step) const {
        return *(const uint4*)(memory + at + (step / SHEET_STEPS * UNITS + b) * SHEET_BYTES + step % SHEET_STEPS * 2048);
    }
    // After a step's last look.
    FN void after(int step, int lane) {
        if ((step + 1) % SHEET_STEPS != 0) return;
        __syncwarp();
        if (lane == 0) barrier_arrive(full + 16 + 8 * (step / SHEET_STEPS));
        if (step == STEPS - 1) odd ^= 1;
    }
};
#endif
