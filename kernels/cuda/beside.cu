// out = y + S x^T: sparse outliers, as they are stored, on top of a product that cannot hold them (its inputs are rounded, and
// outliers meet inputs as they are).
//
// A block takes TOKENS tokens and has their inputs in shared memory, turned, [K][TOKENS], so that an outlier's lie side by side:
// LANES lanes have PER tokens each, and 32 / LANES outliers of a row are looked up at once. A warp has ROWS rows, whose first
// outliers, 64 of each, it asks for together and before the previous kernel has ended: weights are constants. At the end it has
// sums of ROWS rows in every lane and wants one row's from all lanes; each exchange between lanes halves the rows that a lane
// still has, so that it takes about as many as there are sums. Every sum has a fixed order.
//
// Count for 16 tokens: 12 instructions and 4 reads of shared memory (which collide, 2 on average) for 8 outliers.
//
// PER, LANES: TOKENS = PER * LANES. FP16, VALUE_FP16: types of activations and of outliers. WIDE: columns are int32, not int16.
// WARPS: of a block.
#include "machine.cuh"

constexpr int TOKENS = PER * LANES, AT_ONCE = 32 / LANES, HELD = 2;  // HELD: times 32 outliers of a row
static_assert(ROWS * LANES <= 32, "lanes have a row each at the end");

struct Arguments {
  const u16* x;      // [M][K]
  const int* start;  // [N + 1]
  const void* column;
  const u16 *value, *y;
  u16* out;  // as y, [M][N]
  int M, N, K;
};

extern __shared__ __align__(16) u8 inputs[];  // [K + 1][TOKENS] 16-bit numbers, the last ones zeros

// An outlier: its column, and the bits of its value in the upper half; what is beyond a row is 0 times the zeros behind the inputs.
struct Outlier {
  u32 column, value;
};
INLINE Outlier outlier_of(const Arguments& p, int e, int end) {
  if (e >= end) return {(u32)p.K, 0};
  return {WIDE ? __ldg((const u32*)p.column + e) : __ldg((const u16*)p.column + e), (u32)__ldg(p.value + e) << 16};
}
// As it is held, in one register where that is enough.
struct HeldOutlier {
  u32 words[1 + WIDE];
  INLINE void operator=(const Outlier& o) {
    words[0] = WIDE ? o.value : o.value | o.column;
    if constexpr (WIDE) words[1] = o.column;
  }
  INLINE Outlier in(int lane) const {  // that of another lane
    const u32 first = LANES > 1 ? __shfl_sync(~0u, words[0], lane) : words[0];
    if constexpr (WIDE) return {LANES > 1 ? __shfl_sync(~0u, words[WIDE], lane) : words[WIDE], first};
    return {first & 0xFFFF, first & 0xFFFF0000u};
  }
};

// ---- Inputs -----------------------------------------------------------------------------------------------------------
INLINE u16 input_of(const Arguments& p, int token, int k) {
  return token < p.M && k < p.K ? __ldcg(p.x + (size_t)token * p.K + k) : (u16)0;
}
// Columns k and k + 1 of a token.
template <bool PAIRS> INLINE u32 inputs_of(const Arguments& p, int token, int k) {
  if constexpr (PAIRS) return token < p.M && k < p.K ? __ldcg((const u32*)(p.x + (size_t)token * p.K + k)) : 0;
  return input_of(p, token, k) | (u32)input_of(p, token, k + 1) << 16;
}
INLINE void store_inputs(int k, int part, const u32* words) {
  u8* to = inputs + (k * TOKENS + part * PER) * 2;
  if constexpr (PER == 1) *(u16*)to = (u16)words[0];
  else if constexpr (PER == 2) *(u32*)to = words[0];
  else *(uint2*)to = make_uint2(words[0], words[1]);
}
// The block's tokens, from `first` on: two columns of PER tokens at a time. PAIRS: they lie at multiples of 4 bytes.
template <bool PAIRS> INLINE void turn_inputs(const Arguments& p, int first) {
#pragma unroll(PAIRS ? 4 : 1)
  for (int i = threadIdx.x; i < (p.K / 2 + 1) * LANES; i += 32 * WARPS) {
    const int part = i % LANES, k = i / LANES * 2;
    u32 of[PER], low[2] = {}, high[2] = {};
    UNROLL for (int m = 0; m < PER; m++) of[m] = inputs_of<PAIRS>(p, first + part * PER + m, k);
    if constexpr (PER == 1) low[0] = of[0], high[0] = of[0] >> 16;
    UNROLL for (int m = 0; m + 1 < PER; m += 2)
      low[m / 2] = __byte_perm(of[m], of[m + 1], 0x5410), high[m / 2] = __byte_perm(of[m], of[m + 1], 0x7632);
    store_inputs(k, part, low);
    if (k < p.K) store_inputs(k + 1, part, high);
  }
}

// ---- Sums -------------------------------------------------------------------------------------------------------------
INLINE void add_product(const Outlier& o, int part, float* sums) {
  const u32 from = shared_address(inputs) + (o.column * TOKENS + part * PER) * 2;
  const float value = VALUE_FP16 ? from_fp16((u16)(o.value >> 16)) : __uint_as_float(o.value);
  u32 pairs[2];
  if constexpr (PER == 1) pairs[0] = load_shared_u16(from);
  else if constexpr (PER == 2) pairs[0] = load_shared_u32(from);
  else load_shared_u32x2(pairs, from);
  UNROLL for (int m = 0; m < PER; m++) sums[m] = fmaf(value, m % 2 ? high_of(pairs[m / 2]) : low_of(pairs[m / 2]), sums[m]);
}
// 32 outliers, one in each lane, of which the first `count` are there.
INLINE void add_products(const HeldOutlier& mine, int count, int lane, float* sums) {
#pragma unroll(LANES < 2 ? LANES : 2)
  for (int from = 0; from < min(count, 32); from += AT_ONCE) add_product(mine.in(from + lane / LANES), lane % LANES, sums);
}

// The first outliers of a warp's rows, and where each row begins and the last one ends.
struct Held {
  int begin[ROWS + 1];
  HeldOutlier first[ROWS][HELD];

  INLINE void ask(const Arguments& p, int row, int lane) {
    UNROLL for (int r = 0; r <= ROWS; r++) begin[r] = __ldg(p.start + min(row + r, p.N));
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int h = 0; h < HELD; h++)
      first[r][h] = outlier_of(p, begin[r] + 32 * h + lane, begin[r + 1]);
  }
  INLINE void add(const Arguments& p, int lane, float (*sums)[PER]) const {
    UNROLL for (int r = 0; r < ROWS; r++) {
      const int count = __reduce_max_sync(~0u, begin[r + 1] - begin[r]);  // all lanes have the same, and now the compiler knows
      UNROLL for (int h = 0; h < HELD; h++) add_products(first[r][h], count - 32 * h, lane, sums[r]);
#pragma unroll 1
      for (int done = 32 * HELD; done < count; done += 32) {
        HeldOutlier more;
        more = outlier_of(p, begin[r] + done + lane, begin[r + 1]);
        add_products(more, count - done, lane, sums[r]);
      }
    }
  }
};

// Adds up over lanes: each then has the sums of row `lane * ROWS / 32`, whose lanes 32 / ROWS apart have the same.
INLINE void add_up(float (*sums)[PER], int lane) {
  int far = 16;
  UNROLL for (int rows = ROWS; rows > 1; rows /= 2, far /= 2) UNROLL for (int r = 0; r < rows / 2; r++) UNROLL for (int m = 0; m < PER; m++) {
    const float away = lane & far ? sums[r][m] : sums[r + rows / 2][m], kept = lane & far ? sums[r + rows / 2][m] : sums[r][m];
    sums[r][m] = kept + __shfl_xor_sync(~0u, away, far);
  }
  for (; far >= LANES; far /= 2) UNROLL for (int m = 0; m < PER; m++) sums[0][m] += __shfl_xor_sync(~0u, sums[0][m], far);
}

INLINE void store_sums(const Arguments& p, const float* sums, int row, int first, int lane) {
  row += lane / (32 / ROWS);
  if (lane % (32 / ROWS) >= LANES || row >= p.N) return;
  UNROLL for (int m = 0; m < PER; m++) {
    const int token = first + lane % LANES * PER + m;
    const size_t at = (size_t)token * p.N + row;
    if (token < p.M) p.out[at] = to_half(from_half(__ldcg(p.y + at)) + sums[m]);
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) add_outliers(const __grid_constant__ Arguments p) {
  const int lane = threadIdx.x % 32, first = blockIdx.y * TOKENS, step = gridDim.x * WARPS * ROWS;
  int row = (threadIdx.x / 32 * gridDim.x + blockIdx.x) * ROWS;
  allow_next_kernel();
  Held held;
  held.ask(p, row, lane);
  wait_for_previous_kernel();
  if (p.K % 2 == 0 && ((size_t)p.x & 3) == 0) turn_inputs<true>(p, first);
  else turn_inputs<false>(p, first);
  __syncthreads();
  for (; row < p.N; row += step) {
    float sums[ROWS][PER] = {};
    held.add(p, lane, sums);
    if (row + step < p.N) held.ask(p, row + step, lane);
    add_up(sums, lane);
    store_sums(p, sums[0], row, first, lane);
  }
}
