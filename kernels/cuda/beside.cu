// out = y + S x^T: sparse outliers, as they are stored, on top of a product that cannot hold them (its inputs are rounded, and
// outliers meet inputs as they are).
//
// A warp has a row's outliers at a time. Up to 4 tokens (PAIRS 0) a lane takes an outlier, looks its inputs up, and lanes add up. For
// more, x comes turned, [K][tokens], so that one load brings an outlier's inputs of 2 * PAIRS tokens: PAIRS lanes have two tokens
// each, and 32 / PAIRS outliers are added at once. Sums of 32 rows meet in shared memory, from where a token's lie side by side in y.
// Every sum has a fixed order. Cost: 2 bytes of x from the second-level cache for each outlier and token.
//
// TOKENS: of a block. FP16, VALUE_FP16: types of activations and of outliers. WIDE: columns are int32, not int16.
#include "machine.cuh"

constexpr int WARPS = 8, ROWS = PAIRS ? 32 : WARPS;  // of a block

struct Arguments {
  const u16* x;      // [M][K], or turned [K][x_stride], x_stride even
  const int* start;  // [N + 1]
  const void* column;
  const u16 *value, *y;
  u16* out;  // as y, [M][N]
  int M, N, K, x_stride;
};

INLINE int column_of(const Arguments& p, int e) { return WIDE ? ((const int*)p.column)[e] : ((const short*)p.column)[e]; }
INLINE float value_of(const Arguments& p, int e) { return VALUE_FP16 ? from_fp16(p.value[e]) : from_bf16(p.value[e]); }
INLINE void store(const Arguments& p, int token, int row, float sum) {
  const size_t at = (size_t)token * p.N + row;
  p.out[at] = to_half(from_half(p.y[at]) + sum);
}

INLINE void add_by_looking_up(const Arguments& p, int row, int lane) {
  float sums[TOKENS] = {};
  for (int e = p.start[row] + lane; e < p.start[row + 1]; e += 32) {
    const float value = value_of(p, e);
    const u16* from = p.x + column_of(p, e);
    UNROLL for (int m = 0; m < TOKENS; m++) sums[m] += value * from_half(from[(size_t)min(m, p.M - 1) * p.K]);
  }
  UNROLL for (int m = 0; m < TOKENS; m++) {
    UNROLL for (int far = 16; far; far /= 2) sums[m] += __shfl_xor_sync(~0u, sums[m], far);
    if (lane == 0 && m < p.M) store(p, m, row, sums[m]);
  }
}

// The sums of `row` with the block's tokens from `first` on.
INLINE void add_pairs_of_tokens(const Arguments& p, int row, int first, int lane, float* sums) {
  constexpr int LANES = PAIRS ? PAIRS : 1, AT_ONCE = 32 / LANES;
  const int token = first + 2 * (lane % LANES), end = p.start[row + 1];
  float low = 0, high = 0;
  for (int e = p.start[row]; e < end; e += 32) {
    const bool mine = e + lane < end;
    const int column = mine ? column_of(p, e + lane) : 0;
    const float value = mine ? value_of(p, e + lane) : 0;
#pragma unroll 8
    for (int i = 0; i < LANES; i++) {
      const int from = i * AT_ONCE + lane / LANES;
      const int k = __shfl_sync(~0u, column, from);
      const float v = __shfl_sync(~0u, value, from);
      if (e + from >= end || token >= p.x_stride) continue;
      const u32 pair = *(const u32*)(p.x + (size_t)k * p.x_stride + token);
      low += v * low_of(pair), high += v * high_of(pair);
    }
  }
  UNROLL for (int far = 16; far >= LANES; far /= 2)
    low += __shfl_xor_sync(~0u, low, far), high += __shfl_xor_sync(~0u, high, far);
  if (lane < LANES) sums[2 * lane] = low, sums[2 * lane + 1] = high;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) add_outliers(const __grid_constant__ Arguments p) {
  __shared__ float sums[ROWS][TOKENS + 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_row = blockIdx.x * ROWS, first = blockIdx.y * TOKENS;
  allow_next_kernel();
  wait_for_previous_kernel();
  if (!PAIRS) {
    if (first_row + warp < p.N) add_by_looking_up(p, first_row + warp, lane);
    return;
  }
  for (int r = warp; r < ROWS && first_row + r < p.N; r += WARPS) add_pairs_of_tokens(p, first_row + r, first, lane, sums[r]);
  __syncthreads();
  for (int m = warp; m < TOKENS && first + m < p.M; m += WARPS)
    if (first_row + lane < p.N) store(p, first + m, first_row + lane, sums[lane][m]);
}
