// Sparse outliers beside a packed weight, for a few tokens: the sum that a block adds to its rows before they are stored.
//
//     y[m, n] += sum over outliers e of row n of  value[e] * x[m, column[e]]
//
// At 1 % of the weights they are 8 % of the bytes of four-bit codes, and one trip to memory after another: where a row begins, its
// outliers, the inputs. So they are no work of the warps that multiply: some warps of each block do nothing else, and what they
// wait for was asked for long before, since memory that is busy with weights answers late. A warp takes some of the block's rows
// and reads the outliers of several at a time in rounds: each lane copies quads of four outliers into shared memory, some lanes
// for each row; ROUNDS rounds are on their way, the first ones before the previous kernel has ended. Where rows begin is known
// two row blocks ahead.
//
// Up to 4 tokens each lane multiplies its own quads, for all tokens, and a row's lanes add up; with more, a lane has one token or
// two and walks through the quads of a row, so that the lanes of a row read one outlier and the inputs of all tokens.
// The inputs lie in shared memory, all of them. Every sum has a fixed order.
//
// The inputs are those of the matmul: fetching them twice takes longer than all else here. A row's outliers lie in two runs, of the
// first half of the inputs and of the second: inputs of many tokens can be used when their half is there. Runs are filled up to quads, with 0 times a column of
// zeros behind the last input; so are rounds that have nothing for a lane.
//
// OUTLIERS: tokens that sums are kept for, 1, 2, 4, 8 or 16, at least M; 0 where a weight has no outliers.
// OUTLIER_SHARE: 1 where few_ring shares the inputs; else they have a place of their own.
// OUTLIER_WARPS, OUTLIER_ROUNDS: how many warps, and rounds of each that are on their way (at most 8).

#pragma once
#include "decode.cuh"

#ifndef OUTLIERS
#define OUTLIERS 0
#define OUTLIER_SHARE 0
#define OUTLIER_WARPS 0
#define OUTLIER_ROUNDS 1
#endif

// Rows that a warp reads at once, and each lane's quads of a round.
constexpr bool OUTLIERS_BY_TOKEN = OUTLIERS > 4;
constexpr int OUTLIER_HALVES = OUTLIERS_BY_TOKEN && OUTLIER_SHARE ? 2 : 1;  // of the inputs, one after the other
constexpr int OUTLIER_ROWS = OUTLIERS_BY_TOKEN ? 4 : 8, OUTLIER_QUADS = OUTLIERS_BY_TOKEN ? 1 : 4;
constexpr int OUTLIER_ROUND = 32 * 16 * OUTLIER_QUADS;  // bytes

// The outliers of ROWS rows, a multiple of OUTLIER_ROWS and at most 32, of every row block, for one warp.
template <int ROWS> struct OutlierSums {
  static constexpr int TOKENS = OUTLIERS ? OUTLIERS : 1, AT_ONCE = OUTLIER_ROWS, LANES = 32 / AT_ONCE, ROUNDS = OUTLIER_ROUNDS;
  static constexpr bool BY_TOKEN = OUTLIERS_BY_TOKEN;
  static constexpr int SUMS = BY_TOKEN ? TOKENS / LANES : TOKENS;  // of a lane
  static constexpr int HALVES = OUTLIER_HALVES;  // of the inputs, one after the other
  static constexpr int BATCHES = ROWS / AT_ONCE, TURNS = HALVES * BATCHES;  // rows at once; those of a row block, a half after the other
  static constexpr int MOST = LANES * OUTLIER_QUADS;  // quads of a row in a round
  static_assert(ROWS % AT_ONCE == 0 && ROWS <= 32 && ROUNDS <= 8, "a warp takes whole batches of rows, and knows of 32 rows");

  struct Bounds {
    int of[HALVES + 1];  // where the runs of row `lane` begin, and where the last one ends, in quads
  };
  const int* start;   // [2 N + 1]
  const u32* quads;   // [][4]: column in the lower half, value in the upper
  u32 queue;          // [ROUNDS][MOST][AT_ONCE] quads in shared memory
  u32 nothing;        // 0 times what lies behind the last input
  int N, first_row, row_step, row_blocks;  // the warp's first row, rows from one row block to the next
  int block = 0, turn = 0, at, end;        // what is fetched: this lane's next quad of its row, and where the row's end
  Bounds here, behind;                     // of the row block that is fetched, and of the next
  u64 ahead = 0;     // eight bits a round, the oldest one lowest: quads of its longest row that were left, at most MOST + 1
  int slot = 0;      // of the oldest round
  int added = 0;     // turns that are added up
  float sums[SUMS] = {};

  INLINE static int lane() { return threadIdx.x & 31; }
  INLINE static int row_of() { return lane() / LANES; }    // of those at once
  INLINE static int place_of() { return lane() % LANES; }  // among the lanes of a row: also the first of a lane's tokens
  INLINE Bounds bounds_of(int row_block) const {
    const int row = row_block < row_blocks ? min(first_row + row_block * row_step + min(lane(), ROWS), N) : N;
    Bounds found;
    UNROLL for (int i = 0; i <= HALVES; i++) found.of[i] = __ldg(start + min(2 * row + i * (2 / HALVES), 2 * N));
    return found;
  }
  INLINE void find() {
    const int row = turn % BATCHES * AT_ONCE + row_of();
    UNROLL for (int half = 0; half < HALVES; half++) {
      const int begin = __shfl_sync(~0u, here.of[half], row), behind_it = __shfl_sync(~0u, here.of[half + 1], row);
      if (turn / BATCHES == half) at = begin + place_of(), end = behind_it;
    }
  }
  INLINE u32 place_in_queue(int i) const { return queue + slot * OUTLIER_ROUND + ((i * LANES + place_of()) * AT_ONCE + row_of()) * 16; }
  INLINE void fetch() {
    UNROLL for (int i = 0; i < OUTLIER_QUADS; i++) {
      if (at + i * LANES < end)
        copy_async(place_in_queue(i), quads + 4 * (at + i * LANES), 16);
      else
        store_shared_u32x4(place_in_queue(i), nothing);  // no lanes of all multiprocessors ask for the same bytes, which would take long
    }
    copies_commit();
    const int left = __reduce_max_sync(~0u, max(end - at + place_of(), 0));
    ahead = ahead >> 8 | (u64)min(left, MOST + 1) << 8 * (ROUNDS - 1);
    slot = slot + 1 == ROUNDS ? 0 : slot + 1;
    at += MOST;
    if (left > MOST) return;
    if (++turn == TURNS) turn = 0, block++, here = behind, behind = bounds_of(block + 1);
    find();
  }
  INLINE void begin(const int* start_H, const u32* outlier_E, u32 room, int columns, int rows, int first, int step, int blocks) {
    start = start_H, quads = outlier_E, queue = room, nothing = columns;
    N = rows, first_row = first, row_step = step, row_blocks = blocks;
    here = bounds_of(0), behind = bounds_of(1);
    find();
#pragma unroll 1
    for (int i = 0; i < ROUNDS; i++) fetch();
  }
  // Whether the outliers of row block `of` are all added up, as far as the end of a half.
  INLINE bool done(int of, int half) const { return added >= of * TURNS + (half + 1) * BATCHES; }

  // x: where the inputs lie in shared memory, `stride` bytes from token to token, `tokens` of them.
  INLINE void multiply(u32 x, int stride, int tokens, int quads_of_row) {
    u32 words[4], from[SUMS];
    UNROLL for (int m = 0; m < SUMS; m++) from[m] = x + min(BY_TOKEN ? place_of() + m * LANES : m, tokens - 1) * stride;
    if constexpr (BY_TOKEN) {
#pragma unroll 4
      for (int q = 0; q < quads_of_row; q++) {
        load_shared_u32x4(words, queue + slot * OUTLIER_ROUND + (q * AT_ONCE + row_of()) * 16);
        add(words, from);
      }
    } else {
      UNROLL for (int i = 0; i < OUTLIER_QUADS; i++) {
        load_shared_u32x4(words, place_in_queue(i));
        add(words, from);
      }
    }
  }
  INLINE void add(const u32* words, const u32* x) {
    UNROLL for (int i = 0; i < 4; i++) UNROLL for (int m = 0; m < SUMS; m++)
      sums[m] += high_of(words[i]) * from_half(load_shared_u16(x[m] + 2 * column_of(words[i])));
  }
  INLINE static u32 column_of(u32 outlier) { return __byte_perm(outlier, 0, 0x4410); }  // as a mask it would be a third instruction

  // A round. rows: where the warp's sums of each of two row blocks go, [2][TOKENS][width].
  INLINE void step(u32 x, int stride, int tokens, float* rows, int width) {
    copies_wait<ROUNDS - 1>();
    if (BY_TOKEN) __syncwarp();
    const int left = ahead & 255;
    multiply(x, stride, tokens, min(left, MOST));
    if (BY_TOKEN) __syncwarp();
    fetch();
    if (left <= MOST) store(rows + added / TURNS % 2 * TOKENS * width + added % BATCHES * AT_ONCE, width, added % TURNS >= BATCHES), added++;
  }
  INLINE void store(float* to, int width, bool second_half) {
    UNROLL for (int m = 0; m < SUMS; m++) {
      if constexpr (BY_TOKEN) {
        float& sum = to[(place_of() + m * LANES) * width + row_of()];
        sum = second_half ? sum + sums[m] : sums[m];
      } else {
        UNROLL for (int far = LANES / 2; far; far /= 2) sums[m] += __shfl_xor_sync(~0u, sums[m], far);
        if (place_of() == 0) to[m * width + row_of()] = sums[m];
      }
      sums[m] = 0;
    }
  }
};
