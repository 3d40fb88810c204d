// What the blocks of `wgmma.cu` agree on: the cut of a block, the places in shared memory, the barriers, and who computes what.
//
// Set from outside: TOKENS, WARPGROUPS, BLOCKS, BATCH: a block's tile. SHARE, SPLIT: its cluster. X_STAGES, W_STAGES, W_TILES:
// its rings. LEAD: x stages between the starts of two warpgroups. SHARED_BYTES: what the host computed from all this.
// EXPERTS 1: the weights of many experts lie one after the other, and each run of tokens takes that of its own.
//
// Shape legend: M tokens, N out features, K in features; tiles of 16 rows x 128 columns.

#pragma once
#include "fragment.cuh"

// Activations are 16-bit numbers, or with INT8 bytes: the tensor cores take 32 bytes of each token in a step either way.

#define CLUSTER (SHARE * SPLIT)
#ifndef EXPERTS
#define EXPERTS 0
#endif
#ifndef OUTLIERS
#define OUTLIERS 0
#endif
#ifndef KEPT
#define KEPT 0
#endif
#ifndef EXACT
#define EXACT 0  // 1: outliers have inputs of their own, behind those of the codes in each x stage; with INT8 of 16 bits
#endif
#ifndef LINES
#define LINES 0
#endif

constexpr int CONSUMERS = 128 * WARPGROUPS;
constexpr int WARPS = 4 * WARPGROUPS;
constexpr int ROW_TILES = WARPS * BLOCKS;  // 16 rows each
constexpr int STEP = INT8 ? 32 : 16;       // columns of a step
constexpr int STEPS = 128 / STEP;          // of a 128-column tile
constexpr int PARTS = STEPS / BATCH;       // of a tile
constexpr int TILES_A_TURN = PARTS == 1 ? 2 : 1;  // so that the two sets of fragments can take turns
constexpr bool INTERLEAVED = TOKENS > 128 && BATCH <= 4;
constexpr bool GROUPED = GROUP > 0;
constexpr int SPAN = GROUP > 0 ? GROUP : 128;
constexpr int COLUMNS = 128 * W_TILES;  // of a weight stage; it may touch WINDOW groups
constexpr int WINDOW = 128 % SPAN == 0 ? COLUMNS / SPAN : SPAN % 128 == 0 && W_TILES == 1 ? 1 : (COLUMNS - 1) / SPAN + 2;

constexpr int up_to(int value, int step) { return (value + step - 1) / step * step; }
constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int X_STEPS = BATCH > 4 ? BATCH : 4;  // steps of an x stage
constexpr int X_BOX = TOKENS * 128;             // four steps: 128 bytes of each token
constexpr int X_OF_CODES = X_STEPS / 4 * X_BOX;  // of a stage
constexpr int SIXTEENS = STEP / 16;              // of a step; sheets of outliers take each by itself
constexpr int X_STAGE = (1 + EXACT * SIXTEENS) * X_OF_CODES;
constexpr int FACTORS = (1 + EXACT * SIXTEENS) * BLOCKS;  // fragments of a step: decoded codes, with EXACT also the sheets of outliers
constexpr bool APART = INT8 && EXACT;  // sums of outliers are no integers: they have registers of their own until the end
constexpr bool FINISHED = KEPT || APART;  // sums are scaled before they are gathered for the store
static_assert(!EXACT || (OUTLIERS && !KEPT), "inputs apart are those of outliers, and take the place of kept columns");
constexpr int CODES_STAGE = ROW_TILES * W_TILES * TILE_BYTES;
constexpr int SCALES_STAGE = GROUPED ? ROW_TILES * WINDOW * SCALE_BYTES : 0;
constexpr int ZEROS_STAGE = GROUPED ? ROW_TILES * WINDOW * ZERO_BYTES : 0;
constexpr int AT_SCALES = CODES_STAGE, AT_ZEROS = AT_SCALES + up_to(SCALES_STAGE, 128);

constexpr int W_STAGE = AT_ZEROS + up_to(ZEROS_STAGE, 128);
// Outliers (`tile_outliers.cuh`) of four row tiles stand in a pair of sheets, behind which lie rings of words that come next.
// Who fills them are the two warps that the producing warpgroup has left, or for more than two pairs a warpgroup of its own.
constexpr int UNITS = OUTLIERS ? ROW_TILES / 4 : 0, FILLERS = UNITS > 2 ? 4 : UNITS;
constexpr bool FILLERS_APART = FILLERS > 2;
constexpr int FIRST_FILLER = WARPS + (FILLERS_APART ? 4 : 2), THREADS = CONSUMERS + (FILLERS_APART ? 256 : 128);
// Whether a whole sheet fits into a consumer's registers, and is worth it: not where products are started with a tile's fragments.
constexpr bool SHEETS_AT_ONCE = !EXACT && BATCH == 4 && MIN_BLOCKS == 1 && TOKENS * ROW_TILES <= 1024;
constexpr int SHEET_STEPS = 64 / STEP, SHEET_BYTES = 2048 * 4, LINE = 64, RING = LINES * LINE;

constexpr int PIECES = BLOCKS * TOKENS / 16;  // of a warp's sums: 16 rows x 16 tokens
constexpr int SUMS = SPLIT > 1 ? up_to(PIECES, SPLIT) * CONSUMERS * 32 : 0;
constexpr int OUT_TOKENS = TOKENS > 32 && TOKENS % 32 == 0 ? 32 : 16;  // that a warpgroup gathers at a time for the store,
constexpr int OUT_PART = OUT_TOKENS * 128;                             // 64 rows of each, in two places that take turns

// Shared memory: the rings (x first: the swizzle counts from 1024-byte boundaries), whose place the sums take at the end.
constexpr int AT_W = X_STAGES * X_STAGE;
constexpr int AT_OUT = larger(AT_W + W_STAGES * W_STAGE, SUMS);
constexpr int AT_TABLES = AT_OUT + 2 * WARPGROUPS * OUT_PART;
constexpr int AT_SHEETS = AT_TABLES + (MANY_MADE ? ROW_TILES * MADE_BYTES : 0) + (TABLE == UNIFORM ? 0 : TABLE == TABLE_PER_ROW ? ROW_TILES * 16 : TABLES) * TABLE_SIZE;
constexpr int RING_BARRIERS = SANITIZE ? 3 : 2;  // of a stage: full, empty, and with SANITIZE: there
constexpr int AT_BARRIERS = AT_SHEETS + UNITS * (2 * SHEET_BYTES + 4 * RING);

// A warpgroup ahead holds stages that the others have not read. Those of bytes are twice as long and the rings half as deep: too
// short at 3, and at 1 and 2 nothing was won.
static_assert(!INT8 || LEAD == 0, "warpgroups that multiply bytes start together: LEAD must be 0");
static_assert(SHARED_BYTES == AT_BARRIERS + 8 * (RING_BARRIERS * (X_STAGES + W_STAGES) + 2 + (OUTLIERS ? 4 * WARPGROUPS : 0)), "the host counts shared memory otherwise");

struct alignas(64) Arguments {
    TensorMap x;       // [M, K] in boxes of TOKENS / SHARE x 128 bytes, swizzled
    TensorMap codes;   // [row tiles, k tiles * TILE_BYTES] in boxes of ROW_TILES x W_TILES * TILE_BYTES
    TensorMap scales;  // [row tiles, groups * 16] in boxes of ROW_TILES x WINDOW * 16
    TensorMap zeros;   // likewise; or the numbers of the groups' tables
    TensorMap chosen;  // KEPT: the inputs of kept columns, exact, [M, 16 * kept_steps] in boxes of TOKENS / SHARE x 64, swizzled;
                       // EXACT: those of outliers, as x is where that has 16 bits
    const u8 *scale, *zero;
    const u16* table;  // [TABLES, 2^BITS] in the activations' type; TABLES = rows, padded to tiles, where each has its own
    const float* factor;  // of all scales, or null; with EXPERTS one for each, as bias [experts][N]
    const u16* bias;
    u16* y;
    const float *row_scale, *token_scale;  // of integer sums (INT8): W = w8 * row_scale, x = x8 * token_scale
    const int4* runs;  // EXPERTS: {count}, then for each run of tokens {expert, first, end, runs of this expert}
    const int* outlier_start;  // [row tiles / 4 * k tiles + 1], and the outliers themselves: see tile_outliers.cuh
    const u32* outlier;
    const uint4* kept;  // KEPT: weights of kept columns as fragments, [row tiles][kept_steps][32 lanes]
    int M, N, y_stride, row_tiles, k_tiles, token_span, kept_steps;  // N: rows of this launch; row_tiles: of one expert
};

// Sums, and a float in the place of one.
#if INT8
typedef int Sum;
FN Sum sum_of(float v) { return __float_as_int(v); }
FN float float_of(Sum v) { return __int_as_float(v); }
#else
typedef float Sum;
FN Sum sum_of(float v) { return v; }
FN float float_of(Sum v) { return v; }
#endif

// What a thread adds up; outliers beside bytes are floats in the place of integers.
struct Sums {
    Sum of[BLOCKS][TOKENS / 2], apart[APART ? BLOCKS : 1][APART ? TOKENS / 2 : 1];
};

// A position in a ring of STAGES slots. A fresh ring's slots count as emptied once already.
template <int STAGES> struct Ring {
    u32 slot = 0, phase = 0;
    FN void advance() {
        if (++slot == STAGES) slot = 0, phase ^= 1;
    }
};

struct Barriers {
    u32 base;
    FN u32 x_full(u32 slot) const { return base + 8 * slot; }
    FN u32 x_empty(u32 slot) const { return base + 8 * (X_STAGES + slot); }
    FN u32 w_full(u32 slot) const { return base + 8 * (2 * X_STAGES + slot); }
    FN u32 w_empty(u32 slot) const { return base + 8 * (2 * X_STAGES + W_STAGES + slot); }
    // What copies count on: `full`, or in the build for racecheck one of its own (`pass_on`).
    FN u32 x_there(u32 slot) const { return SANITIZE ? base + 8 * (2 * X_STAGES + 2 * W_STAGES + slot) : x_full(slot); }
    FN u32 w_there(u32 slot) const { return SANITIZE ? x_there(X_STAGES + slot) : w_full(slot); }
    FN u32 rings_idle() const { return base + 8 * RING_BARRIERS * (X_STAGES + W_STAGES); }
    FN u32 sums_full() const { return rings_idle() + 8; }
    FN u32 sheet_full(int group, int sheet) const { return sums_full() + 8 * (1 + 4 * group + sheet); }
    FN u32 sheet_empty(int group, int sheet) const { return sheet_full(group, sheet + 2); }
    // By one thread: by the lanes of a warp it took an H100 up to 1.2 us longer (4096x4096 with 32 tokens 8.4 -> 9.6 us).
    FN void init(u32 split) const {
        for (int i = 0; i < X_STAGES; i++) barrier_init(x_full(i), ARRIVALS), barrier_init(x_empty(i), WARPS * SHARE * ARRIVALS);
        for (int i = 0; i < W_STAGES; i++) barrier_init(w_full(i), ARRIVALS), barrier_init(w_empty(i), WARPS * ARRIVALS);
        for (int i = 0; SANITIZE && i < X_STAGES + W_STAGES; i++) barrier_init(x_there(i), 1);
        for (int i = 0; OUTLIERS && i < 4 * WARPGROUPS; i++) barrier_init(sheet_full(i / 4, i % 4), (i % 4 < 2 ? BLOCKS : 4) * ARRIVALS);
        barrier_init(rings_idle(), WARPS * SPLIT), barrier_init(sums_full(), 1);
        barrier_init_done();
        if (SPLIT > 1) barrier_expect(sums_full(), (PIECES - split + SPLIT - 1) / SPLIT * SPLIT * CONSUMERS * 32);
    }
};

// What a block computes at a time: out features from `row_tile` on with tokens `token` .. `end`.
struct Tile {
    int row_tile, token, end;
    int expert;   // whose weights; row_tile counts inside them
    bool shared;  // other blocks want the same weights
};

// The row tile of a warp in its matrix block `block`, counted from the first of the block of threads.
FN int row_tile_of(int warp, int block) { return (warp / 4 * BLOCKS + block) * 4 + warp % 4; }

// Past the first-level cache, which may still hold the runs of an earlier launch.
FN int4 read_run(const int4* run) {
    int4 v;
    asm volatile("ld.global.cg.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(run));
    return v;
}

// Who this block is, and which tiles its cluster computes: in an order that keeps `token_span` blocks of tokens and a strip
// of weights in cache. With SPLIT > 1 the grid holds a cluster for every tile. How many runs of tokens experts have is known
// on the device only: the grid is large enough for the most there can be, and what is too many has no tile.
struct Work {
    const int4* runs;
    u32 cluster, clusters, share, split;
    int row_blocks, token_blocks, span, k_first, k_last, tokens;

    FN Work(const Arguments& p) {
        const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
        cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER, share = rank % SHARE, split = rank / SHARE;
        row_blocks = (p.row_tiles + ROW_TILES * SHARE - 1) / (ROW_TILES * SHARE);
        runs = p.runs, tokens = p.M;
        token_blocks = EXPERTS ? read_run(runs).x : (p.M + TOKENS - 1) / TOKENS;
        span = p.token_span;
        k_first = (int)(p.k_tiles * split / SPLIT), k_last = (int)(p.k_tiles * (split + 1) / SPLIT);
    }
    FN int count() const { return row_blocks * token_blocks; }
    FN Tile tile(int index) const {
        const int strip = index / (span * row_blocks), first = strip * span;
        const int width = min(span, token_blocks - first), rest = index - first * row_blocks;
        const int row_tile = (rest / width * SHARE + (int)share) * ROW_TILES, block = first + rest % width;
        if (!EXPERTS) return {row_tile, block * TOKENS, tokens, 0, token_blocks > 1};
        const int4 run = read_run(runs + 1 + block);
        return {row_tile, run.y, run.z, run.x, run.w > 1};
    }
};
