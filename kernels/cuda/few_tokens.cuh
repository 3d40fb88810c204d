// y_MN = x_MK W_NK^T for up to 16 tokens, W packed: the idea that two kernels share.
//
// With few tokens the time is that of reading W once, if nothing stands in the way of the reading. So W is the LEFT factor
// of the matrix instruction, y^T = W x^T: a lane's bytes become its A fragment in registers (decode.cuh) and are used there;
// the tokens are the instruction's 8 columns, absent ones computed and thrown away. 1 to 8 tokens cost the same, 9 to 16 a
// second product per fragment (TOKEN_TILES). Codes are multiplied as exact integers; a group's sum in float32 is then
// scaled and added up, so that no product is rounded with its scale.
//
//   warp (row w, slice k)     ROW_TILES tiles of 16 rows that share each fragment of x; of the k tiles every K_WARPS-th one
//   block                     ROW_WARPS x K_WARPS warps; the slices are summed once, through shared memory, in a fixed order
//   cluster                   CLUSTER blocks that split K further and sum through each other's shared memory: each block
//                             then needs only its part of x, which matters when the tokens weigh as much as the weights;
//                             or X_SHARE blocks of other rows that fetch x together, each a part of it for all of them
//
// This file is what the two kernels share: few_registers.cu (weights through registers) and few_ring.cu (weights through a
// ring in shared memory). Both ask for weights BEFORE they wait for the previous kernel (early launch), since no kernel of a
// model writes those.
//
// Shape legend: M tokens, N out features, K in features; tiles of 16 rows x 128 columns; s step of 16 columns, 0..7.

#pragma once
#include "decode.cuh"
#include "outliers.cuh"

#ifndef KEPT
#define KEPT 0
#endif

constexpr int BLOCK_TILES = ROW_WARPS * ROW_TILES;
constexpr int BLOCK_ROWS = BLOCK_TILES * 16;
constexpr int WARPS = ROW_WARPS * K_WARPS;
constexpr int THREADS = WARPS * 32;

// How numbers of one to three bits are multiplied: single bits with up to 8 tokens as places (below), else with their powers of two.
// With more tokens the sparse instruction, which takes two thirds longer, costs more than the decoding that it saves.
constexpr bool CHOSEN = FOLDED && BITS == 1 && TOKEN_TILES == 1 && !OUTLIERS_TURNED, FOLDS = FOLDED && !CHOSEN;

// Offsets of four planes go through the sums of x, as zero points do, where enough row tiles share these; fewer would pay more for them
// than four additions a step, and in registers.
constexpr bool OFFSETS_OF_SUMS = PLANES && ZERO && ROW_TILES > TOKEN_TILES;
constexpr bool SUMS_OF_X = PLANES ? OFFSETS_OF_SUMS : ZERO && !ZERO_IN_CODES;

INLINE int table_room(int tables) {
  return MADE ? WARPS * ROW_TILES * MADE_BYTES : PAIRED ? TABLES * PAIR_BYTES : COPIED ? ENTRIES_BYTES : BY_ROWS ? BLOCK_TILES * ROW_TABLE_BYTES : TABLE ? ((TABLE == 2 ? BLOCK_ROWS : tables) * (2 << BITS) + 15) & ~15 : 0;
}
// Where a lane finds the table of `row` in row tile `tile` of the block, or the first of those that groups pick from.
INLINE u32 table_at(u32 room, int tile, int row) {
  if constexpr (BY_ROWS) return room + tile * ROW_TABLE_BYTES + (row < 8 ? AT_ROW_BYTES + row * 32 : place_of_row(row - 8, threadIdx.x & 31));
  return PAIRED || COPIED ? room + (threadIdx.x & 31) * 4 : table_of(room, tile, row);
}

struct Arguments {
  const u8* codes;   // [row tile][k tile][256 * BITS]
  const u8* scale;   // [row tile][group][16]
  const u8* zero;    // the same, or null
  const u16* table;  // [tables][2^BITS] in the activations' type, or null
  const u8* pick;    // [row tile][group][16], or null
  const float* factor;  // of all scales, or null
  const u16* x;      // [M][x_stride], 16-byte aligned, x_stride a multiple of 8; zero in the columns from K to x_columns
  const u16* bias;   // [N] in the activations' type, or null
  u16* y;            // [M][N]
  const int* outlier_start;  // [N + 1], and the outliers themselves: see outliers.cuh
  const u32* outlier;
  const uint4* kept;  // [row tiles][kept_steps][32 lanes], and the inputs of these columns, [M][16 * kept_steps]: see few_kept.cuh
  const u16* chosen;  // with EXACT those of outliers, as x
  const int* apart_start;  // outliers once more, and what blocks that add them tell the others: see few_apart.cuh
  const uint2* apart_units;
  const u8* apart_rows;
  float* apart_sums;
  u32* apart_flags;
  int M, N, x_stride, x_columns, row_tiles, k_tiles, groups, tables, stages, kept_steps, apart_blocks, apart_slices, apart_tiles, apart_round_rows;
};

// Tables for the row tiles from `first_tile` on, by all multiplying threads: what takes long is asked for before all else (a lane's
// number of the tables that all rows share is the result), and laid out when it has come.
INLINE void ask_for_row_tables(const Arguments& p, u8* room, int first_tile) {
  ask_for_row_tables(p.table, first_tile, BLOCK_TILES, p.tables, shared_address(room), threadIdx.x, THREADS);
}
INLINE u32 ask_for_tables(const Arguments& p, u8* room, int first_tile) {
  if constexpr (PAIRED) return number_of_lane(p.table, TABLES, threadIdx.x);
  if constexpr (BY_ROWS) ask_for_row_tables(p, room, first_tile), copies_commit();
  return 0;
}
INLINE void lay_out_tables(const Arguments& p, u8* room, int first_tile, u32 number) {
  if constexpr (PAIRED) {
    lay_out_pairs(number, TABLES, room, threadIdx.x, THREADS);
  } else if constexpr (COPIED) {
    fetch_entries(p.table, room, threadIdx.x, THREADS);
  } else if constexpr (BY_ROWS) {
    copies_wait<0>();
    barrier_of(1, THREADS);
    lay_out_row_tables<BLOCK_TILES, THREADS>(room, threadIdx.x);
  } else
    fetch_tables<BLOCK_ROWS>(p.table, p.tables, (u16*)room, first_tile, threadIdx.x, THREADS);
}

// ---- What lies beside the codes --------------------------------------------------------------------------------------
// The scales, zero points and table numbers of one row tile for a run of TILES k tiles, in shared memory.
template <int TILES> struct Side {
  static constexpr int columns = TILES * 128;
  static constexpr int groups = GROUP == 0                            ? 1
                                : columns % (GROUP ? GROUP : 1) == 0 ? columns / (GROUP ? GROUP : 1)
                                : GROUP % columns == 0               ? 1
                                                                     : columns / (GROUP ? GROUP : 1) + 2;
  static constexpr int zeros = groups * 16 * SCALE_BYTES, picks = zeros + groups * 16 * ZERO_BYTES;
  static constexpr int bytes = picks + groups * 16 * PICK_BYTES;
};

// ---- The tokens' columns of one tile --------------------------------------------------------------------------------
struct Tokens {
  u32 fragments[TOKEN_TILES][16];    // B fragments of the 8 steps
  float sums[TOKEN_TILES][RUNS][2];  // of x over a run of columns, for zero points: W = 1 everywhere (SUMS_OF_X)
  float folded[TOKEN_TILES][RUNS][4];  // what folded decoders add to a tile's sum
};

// The tokens' columns of one tile to shared memory, by one warp; zero beyond x.
constexpr int TOKEN_BYTES = 256 + 16;  // of one token; 16 more: the eight rows of a matrix then lie in different banks
INLINE void fetch_tokens(const Arguments& p, u32 slot, int tile, int stride = TOKEN_BYTES, bool exact = false) {
  const int lane = threadIdx.x & 31, first = lane >> 4, column = tile * 128 + (lane & 15) * 8;  // half a warp for each token
  const int valid = WHOLE ? 16 : min(max((p.x_columns - column) * 2, 0), 16);
  const u16* from = (exact ? p.chosen : p.x) + (size_t)first * p.x_stride + (valid ? column : 0);
  const u32 to = slot + first * stride + (lane & 15) * 16;
  UNROLL for (int i = 0; i < TOKEN_TILES * 4; i++, from += 2 * p.x_stride)
    if (first + 2 * i < p.M) copy_async(to + 2 * i * stride, from, valid);
}

// From rows of `stride` bytes in shared memory, natural order of columns, or TURNED. Absent tokens read token 0, whose products then
// land in columns of y^T that nobody stores.
template <bool TURNED = false> INLINE void load_tokens(u32 address, int stride, int M, Tokens& x) {
  const int lane = threadIdx.x & 31;
  UNROLL for (int n = 0; n < TOKEN_TILES; n++) {
    const int token = n * 8 + (CHOSEN ? lane >> 2 : lane & 7);
    const u32 row = address + (TURNED || token < M ? token : 0) * stride + (CHOSEN ? lane & 3 : lane >> 3) * 16;
    UNROLL for (int quarter = 0; quarter < 4; quarter++) {
      if constexpr (CHOSEN)
        load_shared_u32x4(x.fragments[n] + 4 * quarter, row + 64 * quarter);
      else if constexpr (TURNED)
        load_matrices_across(x.fragments[n] + 4 * quarter, row + 64 * quarter);
      else
        load_matrices(x.fragments[n] + 4 * quarter, row + 64 * quarter);
    }
  }
  UNROLL for (int n = 0; n < TOKEN_TILES; n++) UNROLL for (int run = 0; run < RUNS; run++) {
    float sum[4] = {}, folded[4] = {};
    UNROLL for (int s = run * (RUN / 16); s < (run + 1) * (RUN / 16); s++) {
      const u32 b0 = x.fragments[n][2 * s], b1 = x.fragments[n][2 * s + 1], ones[4] = {ONES, ONES, ONES, ONES};
      if constexpr (SUMS_OF_X) matrix_multiply(sum, ones, b0, b1, sum);
      if constexpr (FOLDS) {
        u32 offsets[4];
        folded_offsets(s, offsets);
        matrix_multiply(folded, offsets, b0, b1, folded);
      }
    }
    x.sums[n][run][0] = sum[0], x.sums[n][run][1] = sum[1];
    UNROLL for (int j = 0; j < 4; j++) x.folded[n][run][j] = folded[j];
  }
}

// ---- Single bits -----------------------------------------------------------------------------------------------------
// part += (bit - 1) x for one word of a tile, 16 rows x 64 columns, and no number is decoded: to the instruction for sparse A
// every column of x looks like two, itself and 0 x, and the bit is the place of the one number, -1, that A has there. For signs,
// part += (2 bit - 1) x, the second is -x.
// A lane's word has bit 16 e + 2 n + i0 for row g + 8 i0 and column 8 n + 2 t + e; so a product takes the columns of one e and of
// two lanes, and the 16 bytes of x from column 8 (t + 4 q) on are what lane t needs of B. (0 x, not 0: not finite stays so.)
INLINE void multiply_chosen(u32 word, int w, const Tokens& x, float (*part)[4]) {
  constexpr u32 less = both(minus(1));
  const u32 a[4] = {less, less, less, less};
  const u32 upper = and_or(word, 0x55555555u, 0x88888888u), lower = and_or(word >> 1, 0x55555555u, 0x88888888u);
  UNROLL for (int e = 0; e < 2; e++) {
    const u32 places = __byte_perm(upper, lower, e ? 0x7632 : 0x5410);
    UNROLL for (int n = 0; n < TOKEN_TILES; n++) {
      u32 b[2][4];
      UNROLL for (int h = 0; h < 2; h++) UNROLL for (int r = 0; r < 4; r++) {
        const u32 columns = x.fragments[n][8 * w + 4 * (r & 1) + 2 * h + (r >> 1)];
        b[h][r] = __byte_perm(columns, multiply_pairs(columns, SIGNS ? less : 0), e ? 0x7632 : 0x5410);
      }
      matrix_multiply_chosen<0>(part[n], a, b[0], places, part[n]);
      matrix_multiply_chosen<1>(part[n], a, b[1], places, part[n]);
    }
  }
}

// ---- One tile --------------------------------------------------------------------------------------------------------
// Groups from a tile's first to that of a run. Columns beyond K (WHOLE: there are none) have no group; x is zero there, so any
// finite scale will do, and they take the last.
constexpr bool STEADY = GROUP == 0 || GROUP % 128 == 0 || (WHOLE && 128 % (GROUP ? GROUP : 1) == 0);
constexpr int run_group(int run) { return GROUP && GROUP < 128 ? run * RUN / (GROUP ? GROUP : 1) : 0; }

// What decoding needs beside the words: of the lane's two rows their tables, in shared memory or in registers, a pair of numbers
// that multiplies floats, or one that takes zero points away.
struct Decoding {
  u32 table[2], unit[2], less[2];
  RowTable own;
  PlaneTable planes[2];
};
INLINE void decode(const u32* words, int s, const Decoding& by, u32* a) {
  if constexpr (PLANES)
    decode_planes<!OFFSETS_OF_SUMS>(words, s, by.planes, a);
  else if constexpr (PAIRED)
    decode_pairs(words[s], by.table[0], by.table[1], a);
  else if constexpr (BY_ROWS)
    decode_by_rows(words, s, by.own, by.table[1], a);
  else if constexpr (TABLE)
    decode_table<COPIED ? ENTRY_STEP : 2>(words, s, by.table[0], by.table[1], a);
  else if constexpr (FLOATS && !SIGNS)
    decode_floats(words, s, by.unit[0], by.unit[1], a);
  else if constexpr (FOLDS)
    decode_folded(words, s, a);
  else if constexpr (ZERO_IN_CODES)
    decode_from_zero(words, s, by.less, a);
  else
    decode_integers(words, s, a);
}

// part += codes x for the steps of one run.
INLINE void multiply_run(const u32* words, int run, const Decoding& by, const Tokens& x, float (*part)[4]) {
  if constexpr (CHOSEN) {
    UNROLL for (int w = run * RUN / 64; w < (run + 1) * RUN / 64; w++) multiply_chosen(words[w], w, x, part);
  } else {
    UNROLL for (int s = run * (RUN / 16); s < (run + 1) * (RUN / 16); s++) {
      u32 a[4];
      decode(words, s, by, a);
      UNROLL for (int n = 0; n < TOKEN_TILES; n++)
        matrix_multiply(part[n], a, x.fragments[n][2 * s], x.fragments[n][2 * s + 1], part[n]);
    }
  }
}

// The tables of the groups of one tile in each of a warp's row tiles, whose sides lie `stride` bytes apart, to `room`.
template <int TILES> INLINE void make_planes(u8* room, const u8* sides, int stride, int tile, int first, int groups) {
  if constexpr (MADE) {
    __syncwarp();
    UNROLL for (int i = threadIdx.x & 31; i < ROW_TILES * MADE_TABLES; i += 32) {
      const int run = i / 16 % RUNS, group = (STEADY ? group_of(tile, 0) + run_group(run) : min(group_of(tile, run), groups - 1)) - first;
      make_plane_table(room, i, ((const uint2*)(sides + i / MADE_TABLES * stride))[group * 16 + i % 16]);
    }
    __syncwarp();
  }
}

// The tables of rows g in registers for a whole row block, where these allow it: read anew for every tile they are a load in six.
constexpr bool TABLES_STAY = BY_ROWS && !OUTLIERS && !KEPT && ROW_TILES * TOKEN_TILES * WARPS < 64;
struct OwnTables {
  RowTable rows[TABLES_STAY ? ROW_TILES : 1];
  INLINE void load(u32 tables, int first_tile) {
    if constexpr (TABLES_STAY)
      UNROLL for (int r = 0; r < ROW_TILES; r++) rows[r] = load_row_table(table_at(tables, first_tile + r, (threadIdx.x & 31) >> 2));
  }
  INLINE const RowTable& operator[](int r) const { return rows[TABLES_STAY ? r : 0]; }
};

// acc += W x for one tile, all 8 steps: the warp's row tile `row_tile`. `first` is the group that `side` begins with, `groups` how
// many there are; the tables of rows g and g + 8 lie at `table_upper` and `table_lower`, those of bit planes at `made`.
template <int TILES>
INLINE void multiply_tile(const u32* words, const u8* side, int row_tile, int tile, int first, int groups, u32 table_upper,
                          u32 table_lower, const RowTable& own_table, const u8* made, const Tokens& x, float (*acc)[4]) {
  // What lies beside the tile's first group, for row g; other groups are at places that the compiler knows, if it can.
  const int own = (group_of(tile, 0) - first) * 16 + ((threadIdx.x & 31) >> 2);
  const u8 *scales = side + own * SCALE_BYTES, *zeros = side + Side<TILES>::zeros + own * ZERO_BYTES;
  const u8* picks = side + Side<TILES>::picks + own;
  Decoding by = {{table_upper, table_lower}, {}, {}, {}, {}};
  if constexpr (BY_ROWS) by.own = TABLES_STAY ? own_table : load_row_table(table_upper);
  UNROLL for (int run = 0; run < RUNS; run++) {
    const int at = 16 * (STEADY ? run_group(run) : min(group_of(tile, run), groups - 1) - group_of(tile, 0));
    UNROLL for (int h = 0; h < 2; h++) {
      if constexpr (TABLE == 3)
        by.table[h] = (h ? table_lower : table_upper) + picked(picks[at + 8 * h]) * (PAIRED ? PAIR_BYTES : 2 << BITS);
      by.unit[h] = SCALED ? scale_pair(scales, at + 8 * h) : both(power_of_two(FLOAT_SHRINK));
      if constexpr (ZERO_IN_CODES) by.less[h] = with_zero(zeros[at + 8 * h], h);
    }
    if constexpr (PLANES) {
      const int group = group_of(tile, 0) - first + at / 16;
      read_planes<MADE>(by.planes, MADE ? made + run * 256 : side + group * 16 * SCALE_BYTES,
                        OFFSETS_OF_SUMS ? nullptr : side + Side<TILES>::zeros + group * 16 * ZERO_BYTES, (threadIdx.x & 31) >> 2);
    }
    if constexpr (SCALED || PLANES || (GROUP == 0 && TABLE == 2)) {  // sums that nothing is done to
      multiply_run(words, run, by, x, acc);
      if constexpr (OFFSETS_OF_SUMS)
        UNROLL for (int j = 0; j < 4; j++) {
          const float offset = from_half(((const u16*)zeros)[at + 8 * (j >> 1)]);
          UNROLL for (int n = 0; n < TOKEN_TILES; n++) acc[n][j] += offset * x.sums[n][run][j & 1];
        }
      continue;
    }
    float part[TOKEN_TILES][4] = {}, zero[2] = {0, 0}, scale[2] = {1, 1};
    const bool folded_last = FOLDS && row_tile < 2;  // the first tiles do not wait for what is being computed
    if (FOLDS && !folded_last)
      UNROLL for (int n = 0; n < TOKEN_TILES; n++) UNROLL for (int j = 0; j < 4; j++) part[n][j] = x.folded[n][run][j];
    multiply_run(words, run, by, x, part);
    UNROLL for (int h = 0; h < 2; h++) {
      if constexpr (SUMS_OF_X) zero[h] = read_zero(zeros, at + 8 * h) - CENTRE;
      if constexpr (GROUP != 0) scale[h] = read_scale(scales, at + 8 * h);
      if constexpr (TABLE == 3) scale[h] = with_sign_of(scale[h], picks[at + 8 * h]);
    }
    UNROLL for (int n = 0; n < TOKEN_TILES; n++) UNROLL for (int j = 0; j < 4; j++) {
      float sum = part[n][j];
      if (folded_last) sum += x.folded[n][run][j];
      if constexpr (SUMS_OF_X) sum -= zero[j >> 1] * x.sums[n][run][j & 1];
      acc[n][j] += GROUP == 0 && TABLE != 3 ? sum : scale[j >> 1] * sum;
    }
  }
}

#include "few_outliers.cuh"
#include "few_kept.cuh"
#include "few_sums.cuh"

extern __shared__ __align__(128) u8 shared[];
