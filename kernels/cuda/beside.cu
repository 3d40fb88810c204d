// What stands beside a packed weight, added to a product: sparse outliers and a few whole columns.
//
//     out[m, n] = y[m, n] + sum over outliers e of row n of  value[e] * x[m, column[e]]
//                         + sum over kept columns c of       kept[n, c] * x[m, index[c]]
//
// A warp takes four rows at a time, since what it waits for is memory: starts, then columns and values, then inputs, each a trip
// of its own. One token: every lane takes an outlier and looks its input up. More tokens: `turn_round` writes x as [K][TOKENS], so
// that a lane gets four tokens of an outlier's column in one load, and TOKENS / 4 lanes share an outlier. (Looked up in x as it
// is, 16 tokens would be 16 sectors of 32 bytes, of which two bytes each are wanted.) Beyond 16 tokens blocks take 16 each.
//
// The kernel begins early and holds the first outliers of its rows in registers when the kernel before it is done. For one token
// it runs before the matmul, whose bias its result then is: the matmul fetches weights meanwhile. Sums have a fixed order.
//
// TOKENS 1, 4, 8 or 16. WIDE 1: columns are int32, else int16. FP16: of x, y and out; VALUE_FP16, KEPT_FP16: of the weights.
#include "machine.cuh"

constexpr int WARPS = 8, ROWS = 4, BLOCK_ROWS = WARPS * ROWS;
constexpr int LANES = TOKENS > 4 ? TOKENS / 4 : 1, STEP = 32 / LANES, EACH = TOKENS > 1 ? 4 : 1;
constexpr int HELD = WIDE ? 0 : TOKENS == 1 ? 2 : 3;  // outliers of each row that a lane holds before it may look at inputs

struct Arguments {
  const int* start;
  const void* column;
  const u16* value;
  const int* index;
  const u16* kept_value;
  const u16* x;       // [M][K]
  u16* turned;        // [slice of TOKENS tokens][K][TOKENS]
  const u16* y;       // [M][N], or null for zeros
  u16* out;
  int M, N, K, kept;
};

INLINE u32 column_at(const Arguments& p, int e) { return WIDE ? ((const u32*)p.column)[e] : (u32)((const u16*)p.column)[e]; }
INLINE float number(u32 bits, bool fp16) { return fp16 ? from_fp16((u16)bits) : from_bf16((u16)bits); }

INLINE void join(const Arguments& p, u32 column, float value, float (&sums)[EACH]) {
  if constexpr (TOKENS == 1) {
    sums[0] += value * from_half(p.x[column]);
  } else {
    const uint2 four = ((const uint2*)p.turned)[((size_t)blockIdx.y * p.K + column) * LANES + threadIdx.x % LANES];
    sums[0] += value * from_half((u16)four.x), sums[1] += value * from_half((u16)(four.x >> 16));
    sums[2] += value * from_half((u16)four.y), sums[3] += value * from_half((u16)(four.y >> 16));
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) add_beside(const __grid_constant__ Arguments p) {
  __shared__ float sums_of_block[TOKENS][BLOCK_ROWS + 1];
  allow_next_kernel();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, place = lane / LANES;
  const int first_row = blockIdx.x * BLOCK_ROWS + warp * ROWS;
  const int starts = p.start ? p.start[min(first_row + min(lane, ROWS), p.N)] : 0;
  int begin[ROWS], end[ROWS];
  UNROLL for (int r = 0; r < ROWS; r++) begin[r] = __shfl_sync(~0u, starts, r), end[r] = __shfl_sync(~0u, starts, r + 1);
  u32 held[ROWS][HELD + 1];
  UNROLL for (int i = 0; i < HELD; i++) UNROLL for (int r = 0; r < ROWS; r++) {
    const int e = begin[r] + i * STEP + place;
    held[r][i] = e < end[r] ? column_at(p, e) | (u32)p.value[e] << 16 : 0;
  }
  wait_for_previous_kernel();
  float sums[ROWS][EACH] = {};
  UNROLL for (int i = 0; i < HELD; i++) UNROLL for (int r = 0; r < ROWS; r++)
    if (begin[r] + i * STEP + place < end[r]) join(p, held[r][i] & 0xFFFF, number(held[r][i] >> 16, VALUE_FP16), sums[r]);
  int longest = 0;
  UNROLL for (int r = 0; r < ROWS; r++) longest = max(longest, end[r] - begin[r]);
  for (int i = HELD * STEP + place; i < longest; i += STEP)
    UNROLL for (int r = 0; r < ROWS; r++)
      if (begin[r] + i < end[r]) join(p, column_at(p, begin[r] + i), number(p.value[begin[r] + i], VALUE_FP16), sums[r]);
  for (int c = place; c < p.kept; c += STEP)
    UNROLL for (int r = 0; r < ROWS; r++)
      if (first_row + r < p.N) join(p, p.index[c], number(p.kept_value[(size_t)(first_row + r) * p.kept + c], KEPT_FP16), sums[r]);
  UNROLL for (int step = 16; step >= LANES; step /= 2)
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int j = 0; j < EACH; j++) sums[r][j] += __shfl_xor_sync(~0u, sums[r][j], step);
  if (place == 0)
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int j = 0; j < EACH; j++) sums_of_block[EACH * lane + j][warp * ROWS + r] = sums[r][j];
  __syncthreads();
  for (int i = threadIdx.x; i < TOKENS * BLOCK_ROWS; i += WARPS * 32) {
    const int token = blockIdx.y * TOKENS + i / BLOCK_ROWS, row = blockIdx.x * BLOCK_ROWS + i % BLOCK_ROWS;
    if (token >= p.M || row >= p.N) continue;
    const size_t at = (size_t)token * p.N + row;
    p.out[at] = to_half((p.y ? from_half(p.y[at]) : 0.0f) + sums_of_block[i / BLOCK_ROWS][i % BLOCK_ROWS]);
  }
}

// A thread takes a column: its tokens are written in a row.
extern "C" __global__ void __launch_bounds__(128) turn_round(const __grid_constant__ Arguments p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int column = blockIdx.x * 128 + threadIdx.x;
  if (column >= p.K) return;
  u32 pairs[(TOKENS + 1) / 2] = {};
  UNROLL for (int t = 0; t < TOKENS; t++) {
    const int token = blockIdx.y * TOKENS + t;
    if (token < p.M) pairs[t / 2] |= (u32)p.x[(size_t)token * p.K + column] << 16 * (t % 2);
  }
  u32* to = (u32*)p.turned + ((size_t)blockIdx.y * p.K + column) * (TOKENS / 2);
  UNROLL for (int i = 0; i < TOKENS / 2; i++) to[i] = pairs[i];
}

// x with zeros at the inputs of kept columns, so that they do not set the unit of all others: a block takes a token.
extern "C" __global__ void __launch_bounds__(256) quiet(const __grid_constant__ Arguments p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const u16* from = p.x + (size_t)blockIdx.x * p.K;
  u16* to = p.out + (size_t)blockIdx.x * p.K;
  const int whole = p.K % 8 == 0 && ((size_t)p.x | (size_t)p.out) % 16 == 0 ? p.K / 8 : 0;
  for (int i = threadIdx.x; i < whole; i += 256) ((uint4*)to)[i] = ((const uint4*)from)[i];
  for (int i = 8 * whole + threadIdx.x; i < p.K; i += 256) to[i] = from[i];
  __syncthreads();
  for (int i = threadIdx.x; i < p.kept; i += 256) to[p.index[i]] = 0;
}
