// A few columns that are kept beside codes whose inputs were rounded, for a few tokens: some matrix products more for a row tile.
//
//     y[m, n] += sum over kept columns c of  kept[n, c] * chosen[m, c]
//
// Their weights lie as fragments, 16 rows x 16 columns a step, and their inputs side by side, as the kernel that rounded all others
// found them. The warps that split K share the steps. A warp copies the weights of its first step into shared memory when a row
// block begins, each lane its own 16 bytes, and multiplies when it ends; what it has of the inputs does not change.
//
// KEPT: 1 where a weight has kept columns.

#pragma once

constexpr int KEPT_ROOM = ROW_TILES * 512;  // bytes of one warp that has a step
INLINE int kept_warps(const Arguments& p) { return min(p.kept_steps, K_WARPS); }  // that have one, of those that split K
INLINE int kept_bytes(const Arguments& p) { return KEPT ? ROW_WARPS * kept_warps(p) * KEPT_ROOM : 0; }

struct KeptColumns {
  const Arguments& p;
  u32 room;
  int slice;  // the first of the warp's steps, of which every K_WARPS-th is its own
  u32 x[TOKEN_TILES][2];

  // room: of all warps.
  INLINE KeptColumns(const Arguments& p, u32 room, int row_warp, int slice) : p(p), slice(slice) {
    this->room = room + (row_warp * kept_warps(p) + slice) * KEPT_ROOM + (threadIdx.x & 31) * 16;
  }

  INLINE const uint4* weights(int row_tile, int step) const {
    return p.kept + ((size_t)min(row_tile, p.row_tiles - 1) * p.kept_steps + step) * 32 + (threadIdx.x & 31);
  }
  INLINE void read_tokens(int step, u32 (*found)[2]) const {
    const int lane = threadIdx.x & 31;
    UNROLL for (int n = 0; n < TOKEN_TILES; n++) {
      const u32* from = (const u32*)(p.chosen + ((size_t)min(n * 8 + (lane >> 2), p.M - 1) * p.kept_steps + step) * 16) + (lane & 3);
      found[n][0] = __ldcg(from), found[n][1] = __ldcg(from + 4);
    }
  }
  INLINE static void multiply(const uint4& weights, const u32 (*tokens)[2], float (*acc)[4]) {
    const u32 a[4] = {weights.x, weights.y, weights.z, weights.w};
    UNROLL for (int n = 0; n < TOKEN_TILES; n++) matrix_multiply(acc[n], a, tokens[n][0], tokens[n][1], acc[n]);
  }

  // At the beginning of a row block.
  INLINE void copy(int row_tile) {
    if (slice < p.kept_steps)
      UNROLL for (int r = 0; r < ROW_TILES; r++) copy_async(room + r * 512, weights(row_tile + r, slice), 16);
  }
  // Once, when the previous kernel has ended.
  INLINE void begin() {
    if (slice < p.kept_steps) read_tokens(slice, x);
  }
  // At the end of a row block, whose copies have all arrived.
  INLINE void add(int row_tile, float (*acc)[TOKEN_TILES][4]) const {
    if (slice >= p.kept_steps) return;
    UNROLL for (int r = 0; r < ROW_TILES; r++) {
      u32 a[4];
      load_shared_u32x4(a, room + r * 512);
      multiply(make_uint4(a[0], a[1], a[2], a[3]), x, acc[r]);
    }
#pragma unroll 1
    for (int step = slice + K_WARPS; step < p.kept_steps; step += K_WARPS) {
      u32 tokens[TOKEN_TILES][2];
      read_tokens(step, tokens);
      UNROLL for (int r = 0; r < ROW_TILES; r++) multiply(__ldg(weights(row_tile + r, step)), tokens, acc[r]);
    }
  }
};
