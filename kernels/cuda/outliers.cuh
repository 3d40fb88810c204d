// Sparse outliers beside a packed weight, for a few tokens: the sum that a block adds to its rows before they are stored.
//
//     y[m, n] += sum over outliers e of row n of  value[e] * x[m, column[e]]
//
// At 1 % of the weights they are 8 % of the bytes of four-bit codes, and one trip to memory after another: where a row begins, its
// outliers, the inputs. So they are no work of the warps that multiply: some warps of each block do nothing else, and what they
// wait for was asked for long before, since memory that is busy with weights answers late. A warp takes some of the block's rows
// and reads the outliers of several at a time in rounds: each lane copies quads of four outliers into shared memory, some lanes
// for each row; ROUNDS rounds are on their way, the first ones before the previous kernel has ended. Where rows begin is known
// a row block ahead of what is copied, early enough to have the outliers brought into the second-level cache.
//
// The inputs lie in shared memory, all of them; they are those of the matmul, since fetching them twice takes longer than all else
// here. Rows are filled up to quads with 0 times a column of zeros behind the last input; so are rounds that have nothing for a lane.
// Every sum has a fixed order.
//
// Up to 4 tokens each lane looks up the inputs of its own quads, number by number, and a row's lanes add up. With more, 16 outliers
// and the columns that they want are a matrix product, one of whose factors has one number in a column or row. What is not finite in a
// column then makes the sums of three other rows NaN as well, for that token; these are not finite anyway, since the codes of every row
// meet the same column.
//
// Inputs may be turned for that (turn_tokens): of every 8 tokens x 8 columns the first row becomes the first column, so that the 8
// numbers of a column lie side by side, where those of one token did. That is a row of the matrices that ldmatrix loads, each from
// wherever it is told: 64 outliers and 16 tokens are some 40 instructions. But before anything is multiplied all inputs go through
// shared memory once more. Else a look-up brings four columns' inputs of 8 tokens, one for each lane: 190 instructions. Pairs of columns lie in
// four kinds of banks: quads are filled so that the four are of different kinds, as far as a row has them (`by_rows` in
// cuda_outliers.py), else lanes wait for each other.
//
// APART: 1 where other blocks add them, 8 or 16 tokens at a time (few_apart.cuh); then nothing here is used but OUTLIERS.
// PATCHES: 1 where they are added as inputs come, 8 or 16 tokens at a time (few_patches.cuh); then nothing here is used but OUTLIERS.
// OUTLIERS: tokens that sums are kept for, 1, 2, 4, 8 or 16, at least M; 0 where a weight has no outliers.
// OUTLIER_TURN: 1 where inputs are turned.
// OUTLIER_SHARE: 1 where few_ring shares the inputs; else they have a place of their own.
// EXACT: 1 where codes meet rounded inputs and outliers others, as they were: up to 8 tokens.
// OUTLIER_WARPS, OUTLIER_ROUNDS: how many warps, and rounds of each that are on their way (at most 8).

#pragma once
#include "decode.cuh"

#ifndef OUTLIERS
#define OUTLIERS 0
#define OUTLIER_SHARE 0
#define OUTLIER_WARPS 0
#define OUTLIER_ROUNDS 1
#define OUTLIER_TURN 0
#endif
#ifndef APART
#define APART 0
#endif
#ifndef PATCHES
#define PATCHES 0
#endif
#ifndef EXACT
#define EXACT 0
#endif

constexpr bool OUTLIER_PRODUCTS = OUTLIERS > 4, OUTLIERS_TURNED = OUTLIER_PRODUCTS && OUTLIER_TURN && !APART;
// Rows that a warp reads at once, and each lane's quads of a round: 64 outliers of a row, which are enough for 1 % of 4096 inputs.
constexpr int OUTLIER_ROWS = 8, OUTLIER_QUADS = 4;
constexpr int OUTLIER_ROUND = 32 * 16 * OUTLIER_QUADS;  // bytes

// The outliers of ROWS rows, a multiple of OUTLIER_ROWS and at most 32, of every row block, for one warp.
template <int ROWS> struct OutlierSums {
  static constexpr int TOKENS = OUTLIERS ? OUTLIERS : 1, AT_ONCE = OUTLIER_ROWS, LANES = 32 / AT_ONCE, ROUNDS = OUTLIER_ROUNDS;
  static constexpr int TILES = TOKENS > 8 ? 2 : 1;
  static constexpr int TURNS = ROWS / AT_ONCE;        // rows at once, of a row block
  static constexpr int MOST = LANES * OUTLIER_QUADS;  // quads of a row in a round
  static_assert(ROWS % AT_ONCE == 0 && ROWS <= 32 && ROUNDS <= 8, "a warp takes whole batches of rows, and knows of 32 rows");

  struct Bounds {
    int begin, end;  // where the outliers of row `lane` are, in quads
  };
  const int* start;   // [N + 1]
  const u32* quads;   // [][4]: column in the lower half, value in the upper
  u32 queue;          // [ROUNDS][MOST / 2][AT_ONCE][2] quads in shared memory, for turned inputs [ROUNDS][MOST][AT_ONCE]
  u32 nothing;        // 0 times what lies behind the last input; of eight columns that the kind which the last of a four mostly have
  int N, first_row, row_step, row_blocks;  // the warp's first row, rows from one row block to the next
  int block = 0, turn = 0, at, end;        // what is fetched: this lane's next quad of its row, and where the row's end
  Bounds here, behind;                     // of the row block that is fetched, and of the next
  u64 ahead = 0;     // eight bits a round, the oldest one lowest: quads of its longest row that were left, at most MOST + 1
  int slot = 0;      // of the oldest round
  int added = 0;     // turns that are added up
  float sums[TOKENS] = {};           // of the lane's quads
  float products[2][4] = {};         // instead, of the first four rows and of the others

  INLINE static int lane() { return threadIdx.x & 31; }
  INLINE static int row_of() { return lane() / LANES; }    // of those at once
  INLINE static int place_of() { return lane() % LANES; }  // among the lanes of a row
  INLINE Bounds bounds_of(int row_block) const {
    const int row = row_block < row_blocks ? first_row + row_block * row_step + min(lane(), ROWS - 1) : N;
    return {__ldg(start + min(row, N)), __ldg(start + min(row + 1, N))};
  }
  INLINE void find() {
    const int row = turn * AT_ONCE + row_of();
    at = __shfl_sync(~0u, here.begin, row) + place_of(), end = __shfl_sync(~0u, here.end, row);
  }
  // All of a row block's into the second-level cache.
  INLINE void prefetch(const Bounds& rows) const {
    const int begin = __shfl_sync(~0u, rows.begin, 0), bytes = 16 * (__shfl_sync(~0u, rows.end, ROWS - 1) - begin);
#if __CUDA_ARCH__ >= 900
    if (lane() == 0 && bytes > 0) bulk_prefetch(quads + 4 * begin, bytes);
#endif
  }
  INLINE u32 place_in_queue(int i) const {
    const int quad = i * LANES + place_of();
    const int place = OUTLIERS_TURNED ? quad * AT_ONCE + row_of() : (quad / 2 * AT_ONCE + row_of()) * 2 + quad % 2;
    return queue + slot * OUTLIER_ROUND + place * 16;
  }
  INLINE void fetch() {
    int left = 0;
    if (block < row_blocks) {
      UNROLL for (int i = 0; i < OUTLIER_QUADS; i++) {
        if (at + i * LANES < end)
          copy_async(place_in_queue(i), quads + 4 * (at + i * LANES), 16);
        else
          store_shared_u32x4(place_in_queue(i), nothing);  // no lanes of all multiprocessors ask for the same bytes, which would take long
      }
      left = __reduce_max_sync(~0u, max(end - at + place_of(), 0));
    }
    copies_commit();
    ahead = ahead >> 8 | (u64)min(left, MOST + 1) << 8 * (ROUNDS - 1);
    slot = slot + 1 == ROUNDS ? 0 : slot + 1;
    at += MOST;
    if (left > MOST || block >= row_blocks) return;
    if (++turn == TURNS) {
      turn = 0, block++, here = behind, behind = bounds_of(block + 1);
      if (OUTLIER_PRODUCTS) prefetch(here);
    }
    find();
  }
  // Before all else, and long before begin(): where outliers are is the first of two trips to memory that nothing hides at a launch's start.
  INLINE void ask(const int* start_N1, int rows, int first, int step, int blocks) {
    start = start_N1, N = rows, first_row = first, row_step = step, row_blocks = blocks;
    here = bounds_of(0), behind = bounds_of(1);
  }
  INLINE void begin(const u32* outlier_E, u32 room, int columns) {
    quads = outlier_E, queue = room, nothing = columns + (OUTLIERS_TURNED ? 0 : 6);
    find();
#pragma unroll 1
    for (int i = 0; i < ROUNDS; i++) fetch();
  }
  // Whether the outliers of row block `of` are all added up.
  INLINE bool done(int of) const { return added >= (of + 1) * TURNS; }

  // x: where the inputs lie in shared memory, `stride` bytes from token to token, `tokens` of them.
  INLINE void look_up(u32 x, int stride, int tokens) {
    u32 words[OUTLIER_QUADS][4], from[TOKENS];
    UNROLL for (int m = 0; m < TOKENS; m++) from[m] = x + min(m, tokens - 1) * stride;
    UNROLL for (int i = 0; i < OUTLIER_QUADS; i++) load_shared_u32x4(words[i], place_in_queue(i));
    UNROLL for (int i = 0; i < OUTLIER_QUADS; i++) UNROLL for (int j = 0; j < 4; j++) UNROLL for (int m = 0; m < TOKENS; m++)
      sums[m] += high_of(words[i][j]) * from_half(load_shared_u16(from[m] + 2 * column_of(words[i][j])));
  }
  // `count` quads of each row with turned inputs. A product takes a quad of each of four rows: its 16 slots are the columns of A, where
  // lane 4 g + t has row g of slots 2 t, 2 t + 1 and 2 t + 8, 2 t + 9; so of row g's quad it has two numbers, or none.
  INLINE void multiply_turned(u32 x, int stride, int count) {
    const int g = lane() >> 2, t = lane() & 3;
    const u32 round = queue + slot * OUTLIER_ROUND;
    u32 mask[2][2];  // of the lane's two numbers of row g, where they are in A
    UNROLL for (int group = 0; group < 2; group++) UNROLL for (int i = 0; i < 2; i++)
      mask[group][i] = (t >> 1) == (g & 1) && g >> 1 == 2 * group + i ? ~0u : 0;
#pragma unroll 1
    for (int first = 0; first < count; first += 4) {  // what lies behind the rows' last quads is nothing
      u32 pair[4][2], column[4], b[4][TILES][4];
      UNROLL for (int q = 0; q < 4; q++) {
        const u32 from = round + (first + q) * 128;
        column[q] = load_shared_u32(from + lane() * 4);
        load_shared_u32x2(pair[q], from + g * 16 + (t & 1) * 8);
      }
      UNROLL for (int q = 0; q < 4; q++) {
        const u32 k = column_of(column[q]);
        UNROLL for (int n = 0; n < TILES; n++) load_matrices_across(b[q][n], x + ((k & 7) + 8 * n) * stride + k / 8 * 16);
      }
      UNROLL for (int q = 0; q < 4; q++) UNROLL for (int group = 0; group < 2; group++) {
        const u32 values = __byte_perm(pair[q][0], pair[q][1], 0x7632), two[2] = {values & mask[group][0], values & mask[group][1]};
        if constexpr (TILES == 1) {
          const u32 a[4] = {two[0], 0, two[1], 0};
          matrix_multiply(products[group], a, b[q][0][2 * group], b[q][0][2 * group + 1], products[group]);
        } else {  // the other way round, so that no half of the product is empty
          const u32 a[4] = {b[q][0][2 * group], b[q][TILES - 1][2 * group], b[q][0][2 * group + 1], b[q][TILES - 1][2 * group + 1]};
          matrix_multiply(products[group], a, two[0], two[1], products[group]);
        }
      }
    }
  }
  // `count` quads of each row. A product, tokens x rows, takes two quads of each of two rows: of its 16 slots, the columns of A, lane
  // 4 g + t has slots 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 for token g, and for token g + 8. So two outliers of each row are its own.
  INLINE void multiply(u32 x, int stride, int tokens, int count) {
    const int g = lane() >> 2, t = lane() & 3;
    const u32 round = queue + slot * OUTLIER_ROUND + t * 8;
    u32 from[TILES];
    UNROLL for (int n = 0; n < TILES; n++) from[n] = x + min(n * 8 + g, tokens - 1) * stride;
    auto load = [&](u32 (*words)[2], int first) {
      UNROLL for (int row = 0; row < AT_ONCE; row++) load_shared_u32x2(words[row], round + (first / 2 * AT_ONCE + row) * 32);
    };
    auto add = [&](const u32 (*words)[2]) {
      u32 inputs[AT_ONCE][TILES][2];
      UNROLL for (int row = 0; row < AT_ONCE; row++) UNROLL for (int e = 0; e < 2; e++) UNROLL for (int n = 0; n < TILES; n++)
        inputs[row][n][e] = load_shared_u16(twice_lower_half(words[row][e], from[n]));
      UNROLL for (int row = 0; row < AT_ONCE; row += 2) {
        u32 a[4], b[2];
        UNROLL for (int i = 0; i < 2; i++) {
          UNROLL for (int n = 0; n < 2; n++)
            a[2 * i + n] = __byte_perm(inputs[row + i][n % TILES][0], inputs[row + i][n % TILES][1], 0x5410);
          b[i] = g == row + i ? __byte_perm(words[row + i][0], words[row + i][1], 0x7632) : 0;
        }
        matrix_multiply(products[row / 4], a, b[0], b[1], products[row / 4]);
      }
    };
    u32 even[AT_ONCE][2], odd[AT_ONCE][2];  // what comes next is asked for before the present ones' inputs
    load(even, 0);
#pragma unroll 1
    for (int first = 0; first < count; first += 4) {  // what lies behind the rows' last quads is nothing
      load(odd, first + 2);
      add(even);
      if (first + 2 >= count) break;
      load(even, min(first + 4, MOST - 2));
      add(odd);
    }
  }
  INLINE static u32 column_of(u32 outlier) { return __byte_perm(outlier, 0, 0x4410); }  // as a mask it would be a third instruction

  // A round. rows: where the warp's sums of each of two row blocks go, [2][TOKENS][width].
  INLINE void step(u32 x, int stride, int tokens, float* rows, int width) {
    copies_wait<ROUNDS - 1>();
    const int left = ahead & 255;
    if constexpr (OUTLIERS_TURNED)
      __syncwarp(), multiply_turned(x, stride, min(left, MOST)), __syncwarp();
    else if constexpr (OUTLIER_PRODUCTS)
      __syncwarp(), multiply(x, stride, tokens, min(left, MOST)), __syncwarp();
    else
      look_up(x, stride, tokens);
    if (left <= MOST) store(rows + added / TURNS % 2 * TOKENS * width + added % TURNS * AT_ONCE, width), added++;
    fetch();
  }
  INLINE void store(float* to, int width) {
    if constexpr (OUTLIER_PRODUCTS) {
      const int g = lane() >> 2, t = lane() & 3;
      UNROLL for (int n = 0; n < TILES; n++) UNROLL for (int e = 0; e < 2; e++) {
        if constexpr (OUTLIERS_TURNED && TILES == 1)
          to[(2 * t + e) * width + g] = g < 4 ? products[0][e] : products[1][e];
        else
          to[(n * 8 + g) * width + 2 * t + e] = t < 2 ? products[0][2 * n + e] : products[1][2 * n + e];
      }
      UNROLL for (int j = 0; j < (OUTLIERS_TURNED && TILES == 1 ? 2 : 4); j++) products[0][j] = products[1][j] = 0;
    } else {
      UNROLL for (int m = 0; m < TOKENS; m++) {
        UNROLL for (int far = LANES / 2; far; far /= 2) sums[m] += __shfl_xor_sync(~0u, sums[m], far);
        if (place_of() == 0) to[m * width + row_of()] = sums[m];
      }
    }
    UNROLL for (int m = 0; m < TOKENS; m++) sums[m] = 0;
  }
};
