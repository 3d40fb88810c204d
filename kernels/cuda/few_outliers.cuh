// Where the few-token kernels have what their outliers need (outliers.cuh), and what the warps do that add them.

#pragma once

constexpr int OUTLIER_THREADS = 32 * OUTLIER_WARPS;
#if APART
#include "few_apart.cuh"
#endif
#if PATCHES
#include "few_patches.cuh"
constexpr int OUTLIER_ROOM = OUTLIER_WARPS * OUTLIER_ROUNDS * PATCH_ROUND;
#else
constexpr int OUTLIER_ROOM = OUTLIER_WARPS * OUTLIER_ROUNDS * OUTLIER_ROUND;
#endif
// In shared memory: a barrier for inputs that are here, or where they are shared and products wait for them two for each stage, that it is
// here and that it is turned; the inputs, behind each token's 16 bytes of zeros, and the bytes from token to token; the sums of a row block
// and of the one before; what is on its way. A cluster's blocks each have all of this.
struct OutlierRoom {
  u32 here, x, x_stride, queue;
  float* sums;
};
// Whether each block has one row block, whose sums apart then need one place.
INLINE bool one_round(const Arguments& p) { return APART && (int)(gridDim.x - p.apart_blocks) / CLUSTER * BLOCK_TILES >= p.row_tiles; }
INLINE int outlier_sums_bytes(const Arguments& p) { return (one_round(p) ? 1 : 2) * OUTLIERS * BLOCK_ROWS * 4; }
INLINE int outlier_x_stride(const Arguments& p) { return p.k_tiles * 256 + 16; }
INLINE int outlier_x_bytes(const Arguments& p) { return OUTLIER_SHARE || APART || PATCHES ? 0 : (OUTLIERS * outlier_x_stride(p) + 127) & ~127; }
INLINE int outlier_stages(const Arguments& p) { return (p.k_tiles + K_WARPS - 1) / K_WARPS; }
INLINE int outlier_barrier_bytes(const Arguments& p) { return (OUTLIER_PRODUCTS && OUTLIER_SHARE ? outlier_stages(p) * 16 + 127 : 128) & ~127; }
INLINE int outlier_bytes(const Arguments& p) {
  return OUTLIERS ? outlier_barrier_bytes(p) + outlier_x_bytes(p) + outlier_sums_bytes(p) + (APART ? 0 : OUTLIER_ROOM) : 0;
}
INLINE OutlierRoom outlier_room(const Arguments& p, u8* room) {
  const u32 here = shared_address(room), inputs = outlier_barrier_bytes(p), sums = inputs + outlier_x_bytes(p);
  return {here, here + inputs, (u32)outlier_x_stride(p), here + sums + outlier_sums_bytes(p), (float*)(room + sums)};
}
INLINE const float* sums_of_outliers(const OutlierRoom& room, int block) { return room.sums + block % 2 * OUTLIERS * BLOCK_ROWS; }
// Of every 8 tokens x 8 columns of a tile the numbers across the diagonal, in place, by one warp: then 16 bytes are a column. Absent
// tokens are whatever lay there, here and where they are multiplied.
INLINE void turn_tokens(u32 address, int stride) {
  const int lane = threadIdx.x & 31;
  u32 pairs[TOKEN_TILES][16];
  auto place = [&](int n, int i) { return address + (n * 8 + (lane & 7)) * stride + ((lane >> 3) + i) * 16; };
  UNROLL for (int n = 0; n < TOKEN_TILES; n++) UNROLL for (int i = 0; i < 16; i += 4) load_matrices_across(pairs[n] + i, place(n, i));
#if __CUDA_ARCH__ >= 900
  UNROLL for (int n = 0; n < TOKEN_TILES; n++) UNROLL for (int i = 0; i < 16; i += 4) store_matrices(place(n, i), pairs[n] + i);
#else
  __syncwarp();
  UNROLL for (int n = 0; n < TOKEN_TILES; n++) UNROLL for (int i = 0; i < 16; i++)
    store_shared_u32(address + (n * 8 + (lane >> 2)) * stride + i * 16 + (lane & 3) * 4, pairs[n][i]);
#endif
  __syncwarp();
}

// What such a warp knows of its outliers, as soon as it can ask.
#if OUTLIERS && !APART
constexpr int OWN_ROWS = BLOCK_ROWS / OUTLIER_WARPS;
#if PATCHES
static_assert(OWN_ROWS % PATCH_ROWS == 0, "a warp has whole patches");
using OwnOutliers = PatchSums;
#else
using OwnOutliers = OutlierSums<OWN_ROWS>;
#endif
#else
struct OwnOutliers {};
#endif
INLINE void ask_for_outliers(const Arguments& p, OwnOutliers& outliers, int thread, int first_row, int row_step, int row_blocks) {
#if PATCHES
  outliers.ask(p.outlier_start, p.N, p.k_tiles, first_row + thread / 32 * OWN_ROWS, row_step, row_blocks);
#elif OUTLIERS && !APART
  outliers.ask(p.outlier_start, p.N, first_row + thread / 32 * OWN_ROWS, row_step, row_blocks);
#endif
}

// What OUTLIER_WARPS warps of a block do, of which `thread` is one: the sums of its row blocks. The warps that multiply meet them
// at the end of each, at barrier 2; they may then already begin the next one, whose sums have a place of their own.
// wait(): for the inputs, and until they are turned.
template <typename Wait>
INLINE void sum_outliers(const Arguments& p, OwnOutliers& outliers, const OutlierRoom& room, int thread, int first_row, int row_step, int row_blocks, const Wait& wait) {
#if APART
  collect_outliers(p, room.sums, thread, first_row, row_step, row_blocks);
#elif OUTLIERS
  const int warp = thread / 32;
  outliers.begin(p.outlier, room.queue + warp * OUTLIER_ROUNDS * OUTLIER_ROUND, p.k_tiles * 128);
  if (thread < p.M) store_shared_u32x4(room.x + thread * room.x_stride + p.k_tiles * 256, 0);
  barrier_of(3, OUTLIER_THREADS);
  for (int block = 0; block < row_blocks; block++) {
    if (block == 0) wait();
    while (!outliers.done(block)) outliers.step(room.x, room.x_stride, p.M, room.sums + warp * OWN_ROWS, BLOCK_ROWS);
    barrier_of(2, THREADS + OUTLIER_THREADS);
  }
  copies_wait<0>();
#endif
}

#if PATCHES
// The same by patches. first_patch: whose inputs come first. inputs: see add_block. At barrier 3 the warps that multiply wait until all
// have read the ring, where their partial sums may lie.
template <typename Inputs>
INLINE void sum_patches(const Arguments& p, OwnOutliers& outliers, const OutlierRoom& room, int thread, int row_blocks, int first_patch,
                        u32 x_stride, Inputs& inputs) {
  const int warp = thread / 32;
  outliers.begin(p.outlier, room.queue + warp * OUTLIER_ROUNDS * PATCH_ROUND, first_patch);
  for (int block = 0; block < row_blocks; block++) {
    outliers.add_block(x_stride, room.sums + block % 2 * OUTLIERS * BLOCK_ROWS + warp * OWN_ROWS, BLOCK_ROWS, inputs);
    arrive_at(3, THREADS + OUTLIER_THREADS);
    barrier_of(2, THREADS + OUTLIER_THREADS);
  }
  copies_wait<0>();
}
#endif
