// Sparse outliers beside a packed weight, for many tokens: they are put where they belong in a sheet of numbers that is zero
// elsewhere, and added to the fragments that the codes decode to.
//
// A sheet is 64 rows x 64 columns in fragments: one vector load gives a lane what it adds in a step. Each has a twin: while a
// warpgroup reads one, a warp that decodes nothing, a filler, takes out of the other what stood there and puts in what comes next,
// about 41 outliers where one weight in a hundred is one, two for each lane. Each pair of sheets has its own filler: two are warps
// that the producing warpgroup has left, more are a warpgroup, one on each scheduler. Those who multiply have nothing to do with
// outliers but that load and a barrier for each sheet. Were they to put them in themselves, it would be 20 instructions beside 68,
// but each waits for the one before: 300 cycles of their 700 for two sheets.
//
// The outliers of all sheets are one list, in their order, which a filler copies into a ring of LINES lines for each pair of sheets:
// a line is asked for as soon as another one is used up, as far ahead as codes are, since memory that is busy with codes answers
// late. (Not by the copy engine: it would take the lines after all the codes that wait for it.) Nothing says where a sheet's words
// end, so nothing is asked on the way: each has the number of its sheet modulo 8, and every sheet has so many words at least
// (zeros, where it has fewer outliers) that of the 64 words that a filler looks at none is taken for one of another sheet.
//
// OUTLIERS: 0 or 1. LINES: 4 or more. Codes must be multiplied with their scales, not the sums.
// A word: value | sheet % 8 << 16 | (2048 * (row tile % 4) + 512 * (step % 4) + 16 * lane + 4 * register + 2 * half) << 19.

#pragma once
#include "wgmma_work.cuh"

#if OUTLIERS
static_assert(!INT8 || EXACT, "bytes have no sheets: outliers beside them have inputs of their own");

constexpr u32 SHEET_NUMBER = 7u << 16, NEXT_SHEET = 1u << 16;
static_assert(UNITS <= FILLERS, "each pair of sheets has a warp of its own");

// The warp that fills the pair of sheets `unit`, counted from the block's first.
struct Filler {
    const Arguments& p;
    const Barriers& barriers;
    const Work& work;
    int unit, lane;
    u32 odd = 1;            // which time the barriers are waited for
    u32 next = 0, end = 0;  // which word of the list is the first that no sheet has had; which is behind the tile's last
    u32 words[2];           // 64 from there on
    u32 held[2][2];         // those before, some of which stand in the two sheets
    u32 number = 0;         // the sheet's, where words have it
    bool crowded[2] = {};   // more stands in the sheet than that

    FN u8* sheet(int which) const { return memory + AT_SHEETS + (unit * 2 + which) * SHEET_BYTES; }
    FN u8* ring() const { return memory + AT_SHEETS + UNITS * 2 * SHEET_BYTES + unit * RING * 4; }
    FN void wipe(u8* sheet) const {
#pragma unroll 1
        for (int i = lane; i < SHEET_BYTES / 16; i += 32) ((uint4*)sheet)[i] = make_uint4(0, 0, 0, 0);
    }

    // Four words of the list, `word` the first, to their place in the ring; none of a line that nobody looks at.
    FN void copy_four(u32 word) const {
        if (word < end + LINE) copy_async(shared_address(ring()) + word % RING * 4, p.outlier + word);
    }
    // Words have been put in since `was` was next. A line of them makes room for another one.
    FN void ask(u32 was) const {
        if ((next ^ was) >= LINE && lane < LINE / 4) copy_four(was / LINE * LINE + RING + 4 * lane);
    }
    // What was asked for LINES - 3 times before is there. That is soon enough: a line is asked for when its place is free, with next at
    // most 64 words into the line behind that, and looked at when next is within 63 words of it, at least 64 * (LINES - 2) - 62 words
    // later; a time puts in no more than 64.
    FN void await() const { copies_commit(), copies_wait<LINES - 3>(), __syncwarp(); }
    FN void look() {
#pragma unroll
        for (int pass = 0; pass < 2; pass++) words[pass] = ((const u32*)ring())[(next + 32 * pass + lane) % RING];
    }

    // Where the outliers of a tile begin and end; rows beyond the last have the last one's.
    FN void find(int index) {
        const int first = work.tile(index).row_tile / 4, last = (p.row_tiles + 3) / 4 - 1;
        const int* starts = p.outlier_start + (size_t)min(first + unit, last) * p.k_tiles;
        next = __ldg(starts + work.k_first), end = __ldg(starts + work.k_last);
    }
    // Asks for the tile's first lines, where none is on its way any more.
    FN void fill_ring() const {
#pragma unroll
        for (int four = 0; four < RING / 4; four += 32) copy_four(next / LINE * LINE + 4 * (four + lane));
        copies_commit();
    }
    // Before the tile's first sheet.
    FN void begin() {
        copies_wait<0>();
        __syncwarp();
        look();
        number = __shfl_sync(~0u, words[0], 0);
    }

    // The number goes to the word's place, if that is in the sheet `number`. Which lanes' are.
    FN u32 put(u8* sheet, u32 word, u32 number, u32 value) const {
        const bool here = ((word ^ number) & SHEET_NUMBER) == 0;
        if (here) *(u16*)(sheet + (word >> 19)) = (u16)value;
        return __ballot_sync(~0u, here);
    }
    // The words go into the sheet, if they are in it. Whether all are, and there may be more.
    FN bool put_in(int which) {
        const u32 first = put(sheet(which), words[0], number, words[0]);
        const u32 second = put(sheet(which), words[1], number, words[1]);
        next += __popc(first) + __popc(second);
        return second == ~0u;
    }
    FN void take_out(int which) {
        if (crowded[which]) wipe(sheet(which));
        crowded[which] = false;
#pragma unroll
        for (int pass = 0; pass < 2; pass++) put(sheet(which), held[which][pass], number - 2 * NEXT_SHEET, 0);
    }
    FN void change(int which) {
        barrier_wait(barriers.sheet_empty(unit / BLOCKS, which), odd);
        take_out(which);
        __syncwarp();
        u32 was = next;
        bool more = put_in(which);
        held[which][0] = words[0], held[which][1] = words[1];
#pragma unroll 1
        while (more) {
            __syncwarp();  // what was looked at may be in the line that is asked for
            ask(was), await(), look();
            was = next, more = put_in(which), crowded[which] = true;
        }
        __syncwarp();
        if (arrives(lane)) barrier_arrive(barriers.sheet_full(unit / BLOCKS, which));
        ask(was), await(), look();
        number += NEXT_SHEET;
    }
    FN void run() {
        fill_ring();
        wipe(sheet(0)), wipe(sheet(1));
#pragma unroll
        for (int n = 0; n < 4; n++) held[n / 2][n % 2] = 0;  // zeros of whichever sheet
        for (int index = work.cluster; index < work.count(); index += work.clusters) {
            begin();
#pragma unroll 1
            for (int k = work.k_first; k < work.k_last; k++, odd ^= 1) change(0), change(1);
            copies_wait<0>();
            __syncwarp();
            if (index + work.clusters < (u32)work.count()) find(index + work.clusters), fill_ring();
            crowded[0] = crowded[1] = true;  // what is held has other numbers than those to come
        }
    }
};

// A warp's reading of its warpgroup's two sheets: AT_ONCE steps, where registers suffice all of a sheet, which is then waited for once and
// free again at once.
struct Sheets {
    static constexpr int AT_ONCE = SHEETS_AT_ONCE ? SHEET_STEPS : 1;
    u32 full;     // barrier of the first
    int at;       // the lane's part of the first step
    u32 odd = 0;  // the tile
    uint4 held[BLOCKS][AT_ONCE];

    FN Sheets(const Barriers& barriers, int warp, int lane)
        : full(barriers.sheet_full(warp / 4, 0)), at(AT_SHEETS + warp / 4 * BLOCKS * 2 * SHEET_BYTES + warp % 4 * 2048 + lane * 16) {}

    // Of 16 columns, the `part`s of a step.
    FN uint4 read(int b, int step, int part = 0) const {
        const int sixteen = step * SIXTEENS + part;
        return *(const uint4*)(memory + at + (2 * b + sixteen / 4) * SHEET_BYTES + sixteen % 4 * 512);
    }
    // Before a step is looked at. Without `there` it is of no use.
    FN void before(int step, bool there) {
        if (there && step % SHEET_STEPS == 0) barrier_wait(full + 8 * (step / SHEET_STEPS), odd);
        if (AT_ONCE == 1 || step % AT_ONCE != 0) return;
#pragma unroll
        for (int i = 0; i < BLOCKS * AT_ONCE; i++) held[i / AT_ONCE][i % AT_ONCE] = read(i / AT_ONCE, step + i % AT_ONCE);
    }
    FN uint4 of_step(int b, int step) const { return AT_ONCE == 1 ? read(b, step) : held[b][step % AT_ONCE]; }
    // When the products of steps up to this one have been started; a whole sheet that is in registers is left before.
    FN void after(int step, int lane) {
        if (!SHEETS_AT_ONCE) leave(step, lane);
    }
    // When what was found in steps up to this one is in registers.
    FN void leave(int step, int lane) {
        if ((step + 1) % SHEET_STEPS != 0) return;
        __syncwarp();
        if (arrives(lane)) barrier_arrive(full + 16 + 8 * (step / SHEET_STEPS));
        if (step == STEPS - 1) odd ^= 1;
    }
};
#else
struct Sheets {
    FN Sheets(const Barriers&, int, int) {}
    FN void after(int, int) const {}
};
#endif
