// The end of a row block in `few_tokens.cuh`: the warps that had different slices of K leave their sums in shared memory, and every
// output is added up over the slices, in order, scaled and stored. Where a cluster's blocks share K, each then adds up what the others
// send it.

#pragma once

#ifndef HALF_SUMS
#define HALF_SUMS 0
#endif
constexpr int SLICES = HALF_SUMS ? (K_WARPS + 1) / 2 : K_WARPS;  // of which partial sums lie in shared memory
constexpr int PARTIAL_STRIDE = BLOCK_ROWS + 4;  // of one token: four tokens of a warp's store then fall into four banks

// Each warp's sums to shared memory as [slice][token][row]; then every output is added up over the slices, in order.
template <typename Each> INLINE void each_partial(float* partials, const Arguments& p, int row_warp, int slice, Each each) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  UNROLL for (int r = 0; r < ROW_TILES; r++) UNROLL for (int n = 0; n < TOKEN_TILES; n++) UNROLL for (int j = 0; j < 4; j++) {
    const int row = (row_warp * ROW_TILES + r) * 16 + g + 8 * (j >> 1), token = n * 8 + 2 * t + (j & 1);
    if (token < p.M) each(partials[(slice * p.M + token) * PARTIAL_STRIDE + row], r, n, j);
  }
}
INLINE void store_partials(float* partials, const Arguments& p, int row_warp, int slice, float (*acc)[TOKEN_TILES][4]) {
  each_partial(partials, p, row_warp, slice, [&](float& place, int r, int n, int j) { place = acc[r][n][j]; });
}
// The same in half of the room, which beside large tables may be another stage of the ring: the upper half of the slices leave their
// sums, and the lower half, warp by warp and lane by lane, take them into their own.
INLINE void store_half_partials(float* partials, const Arguments& p, int row_warp, int slice, float (*acc)[TOKEN_TILES][4]) {
  if (slice >= SLICES) store_partials(partials, p, row_warp, slice - SLICES, acc);
  barrier_of(1, THREADS);
  if (slice >= SLICES) return;
  if (slice + SLICES < K_WARPS)
    each_partial(partials, p, row_warp, slice, [&](float& place, int r, int n, int j) { acc[r][n][j] += place; });
  store_partials(partials, p, row_warp, slice, acc);
}

// What the outputs of two rows, from an even one on, are finished with.
struct TwoRows {
  int n;  // the first of them
  float scale[2], bias[2];

  INLINE void ask(const Arguments& p, int first_tile, int row) {
    n = first_tile * 16 + row;
    UNROLL for (int i = 0; i < 2; i++) {
      if (GROUP == 0 && n + i < p.N) scale[i] = read_scale(p.scale, n + i);
      if (p.bias && n + i < p.N) bias[i] = from_half(p.bias[n + i]);
    }
  }
  INLINE u32 output(const Arguments& p, int i, float factor, float sum, const float* outliers) const {
    if constexpr (SCALE >= 3) sum *= factor;
    if constexpr (GROUP == 0) sum *= scale[i];
    if constexpr (OUTLIERS) sum += outliers[i];
    if (p.bias) sum += bias[i];
    return to_half(sum);
  }
  // `outliers`: what their outliers come to.
  INLINE void store(const Arguments& p, int token, float factor, float2 sum, const float* outliers) const {
    u16* to = p.y + (size_t)token * p.N + n;
    if (n + 1 < p.N) {
      const u32 upper = output(p, 0, factor, sum.x, outliers), lower = output(p, 1, factor, sum.y, outliers);
      if (((p.N | (size_t)p.y >> 1) & 1) == 0)
        *(u32*)to = upper | lower << 16;
      else
        to[0] = (u16)upper, to[1] = (u16)lower;
    } else if (n < p.N) {
      to[0] = (u16)output(p, 0, factor, sum.x, outliers);
    }
  }
};

// What every output is multiplied by where scales are bytes: asked for at a kernel's start, since its end waits for it.
INLINE float factor_of(const Arguments& p) {
  return SCALE >= 3 ? (p.factor ? *p.factor : 1.0f) * (SCALED ? 1 << SCALED_SHRINK : 1) : 1.0f;
}

// Scales of rows as well: they are asked for at the start of a row block, into the second-level cache.
INLINE void prefetch_row_scales(const Arguments& p, int first_tile, int thread) {
  if constexpr (GROUP == 0) {
    const int at = first_tile * 16 * SCALE_BYTES + thread * 128;
    if (thread * 128 < BLOCK_ROWS * SCALE_BYTES && at < p.row_tiles * 16 * SCALE_BYTES)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(p.scale + at));
  }
}

// Pairs of rows are numbered along the rows and then the tokens.
constexpr int ROW_PAIRS = BLOCK_ROWS / 2;
INLINE float2 sum_of_slices(const float* partials, int M, int pair) {
  const float* from = partials + pair / ROW_PAIRS * PARTIAL_STRIDE + pair % ROW_PAIRS * 2;
  float2 sum = {0, 0};
  UNROLL for (int slice = 0; slice < SLICES; slice++) {
    const float2 part = *(const float2*)(from + slice * M * PARTIAL_STRIDE);
    sum.x += part.x, sum.y += part.y;
  }
  return sum;
}

// The outputs that one of COUNT threads finishes: two rows of every TOKENS-th token, or where the threads are fewer than the pairs of
// rows, several such. It asks for the rows' scales before the sums are there: with each output they took most of a row block's end.
template <int COUNT> struct Outputs {
  static constexpr int SIDE = COUNT < ROW_PAIRS ? COUNT : ROW_PAIRS, TURNS = (ROW_PAIRS + SIDE - 1) / SIDE, TOKENS = COUNT / SIDE;
  int pair, token;
  TwoRows rows[TURNS];

  INLINE Outputs(const Arguments& p, int first_tile, int thread) : pair(thread % SIDE), token(thread / SIDE) {
    UNROLL for (int i = 0; i < TURNS; i++) rows[i].ask(p, first_tile, 2 * min(pair + i * SIDE, ROW_PAIRS - 1));
  }
  INLINE void finish(const float* partials, const Arguments& p, float factor, const float* outliers) const {
    constexpr int MOST = (8 * TOKEN_TILES + TOKENS - 1) / TOKENS, TOGETHER = MOST < 4 ? MOST : 4;  // tokens whose sums are read at once
    UNROLL for (int i = 0; i < TURNS; i++)
      for (int first = token; first < p.M && token < TOKENS && pair + i * SIDE < ROW_PAIRS; first += TOGETHER * TOKENS) {
        float2 sums[TOGETHER];
        auto place = [&](int j) { return min(first + j * TOKENS, p.M - 1) * ROW_PAIRS + pair + i * SIDE; };
        UNROLL for (int j = 0; j < TOGETHER; j++) sums[j] = sum_of_slices(partials, p.M, place(j));
        UNROLL for (int j = 0; j < TOGETHER; j++)
          if (first + j * TOKENS < p.M) rows[i].store(p, first + j * TOKENS, factor, sums[j], outliers + 2 * place(j));
      }
  }
};

#if CLUSTER > 1
// The same where a cluster's blocks share K. Each is responsible for a part of the outputs and has an inbox, [block][pair], where
// the others send their sums; it is outside of the ring, which a slower block may still be reading.
INLINE int inbox_bytes(const Arguments& p) { return (p.M * BLOCK_ROWS * 4 + 127) & ~127; }
INLINE void finish_in_cluster(const float* partials, const float2* inbox, u32 bell, const Arguments& p, float factor,
                              int first_tile, int thread, const float* outliers) {
  const int part = p.M * BLOCK_ROWS / 2 / CLUSTER, rank = cluster_rank();
  for (int pair = thread; pair < part * CLUSTER; pair += THREADS)
    send(shared_address(inbox + rank * part + pair % part), sum_of_slices(partials, p.M, pair), bell, pair / part);
  mbarrier_wait_for_cluster(bell, 0);
  for (int i = thread; i < part; i += THREADS) {
    float2 sum = {0, 0};
    UNROLL for (int block = 0; block < CLUSTER; block++)
      sum.x += inbox[block * part + i].x, sum.y += inbox[block * part + i].y;
    const int pair = rank * part + i;
    TwoRows rows;
    rows.ask(p, first_tile, 2 * (pair % ROW_PAIRS));
    rows.store(p, pair / ROW_PAIRS, factor, sum, outliers + 2 * pair);
  }
}
#endif
