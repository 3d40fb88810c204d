// Sparse outliers beside a packed weight, for a few tokens: the sum that a block adds to its rows before they are stored.
//
//     y[m, n] += sum over outliers e of row n of  value[e] * x[m, column[e]]
//
// At 1 % of the weights they are 8 % of the bytes of four-bit codes, and one trip to memory after another: where a row begins, its
// outliers, the inputs. So they are no launch of their own, and no work of the warps that multiply, whose time is what the matmul
// takes: some warps of each block do nothing else. Each takes a part of the block's rows, four of them at a time with
// LANES lanes each. A step uses HELD outliers a lane, which it asked for a step before, the first ones before the previous
// kernel has ended. The inputs lie in shared memory, all of them. Every sum has a fixed order.
//
// OUTLIERS: tokens that sums are kept for, 1, 2 or 4, at least M; 0 where a weight has no outliers.

#pragma once
#include "decode.cuh"

#ifndef OUTLIERS
#define OUTLIERS 0
#endif

// The outliers of ROWS rows, a multiple of four, of every row block, for one warp.
template <int ROWS> struct OutlierSums {
  static constexpr int TOKENS = OUTLIERS ? OUTLIERS : 1, AT_ONCE = 4, LANES = 32 / AT_ONCE, HELD = 8, BATCHES = ROWS / AT_ONCE;

  const int* start;    // [N + 1]
  const u32* outlier;  // column in the lower half, value in the upper
  int N, first_row, row_step, batches;  // the warp's first row, rows from one row block to the next, batches of all row blocks
  int batch = 0;           // which rows these are
  int at, end;             // this lane's next outlier of its row, and where the row ends
  int next_at, next_end;   // of the batch behind
  u32 held[HELD];
  float sums[TOKENS] = {};

  INLINE int lane() const { return threadIdx.x & 31; }
  INLINE int row_in_block(int b) const { return b % BATCHES * AT_ONCE + lane() / LANES; }
  INLINE void find(int b, int& from, int& to) const {
    const int row = b < batches ? min(first_row + b / BATCHES * row_step + row_in_block(b), N) : N;
    from = __ldg(start + row) + lane() % LANES, to = __ldg(start + min(row + 1, N));
  }
  INLINE void fetch() {
    UNROLL for (int i = 0; i < HELD; i++) held[i] = at + i * LANES < end ? __ldg(outlier + at + i * LANES) : 0;
  }
  INLINE void begin(const int* start_N1, const u32* outlier_E, int rows, int first, int step, int row_blocks) {
    start = start_N1, outlier = outlier_E, N = rows, first_row = first, row_step = step, batches = row_blocks * BATCHES;
    find(0, at, end), find(1, next_at, next_end);
    fetch();
  }
  // Whether the outliers of row block `block` are all added up.
  INLINE bool done(int block) const { return batch >= (block + 1) * BATCHES; }

  // x: tokens of `stride` numbers in shared memory. rows: where the warp's sums of each of two row blocks go, [2][TOKENS][width].
  INLINE void step(const u16* x, int stride, float* rows, int width) {
    UNROLL for (int i = 0; i < HELD; i++) {  // what is not there is 0 times the first input; not finite stays so only where it is
      const bool there = at + i * LANES < end;
      const u32 column = held[i] & 0xFFFF;
      const float value = from_half((u16)(held[i] >> 16));
      UNROLL for (int m = 0; m < TOKENS; m++) sums[m] += there ? value * from_half(x[m * stride + column]) : 0.0f;
    }
    at += HELD * LANES;
    if (!__any_sync(~0u, at < end)) {
      UNROLL for (int m = 0; m < TOKENS; m++) {
        UNROLL for (int far = LANES / 2; far; far /= 2) sums[m] += __shfl_xor_sync(~0u, sums[m], far);
        if (lane() % LANES == 0) rows[(batch / BATCHES % 2 * TOKENS + m) * width + row_in_block(batch)] = sums[m];
        sums[m] = 0;
      }
      batch++, at = next_at, end = next_end;
      find(batch + 1, next_at, next_end);
    }
    fetch();
  }
};
