// Where the few-token kernels have what their outliers need (outliers.cuh), and what the warps do that add them.

#pragma once

constexpr int OUTLIER_THREADS = 32 * OUTLIER_WARPS;
// In shared memory: two barriers, for inputs that are here (of shared ones, for each half); the inputs, behind each token's 16 bytes of
// zeros, and the bytes from token to token; the sums of a row block and of the one before; what is on its way. A cluster's blocks
// each have all of this.
struct OutlierRoom {
  u32 here, x, x_stride, queue;
  float* sums;
};
INLINE int outlier_sums_bytes() { return 2 * OUTLIERS * BLOCK_ROWS * 4; }
INLINE int outlier_x_stride(const Arguments& p) { return p.k_tiles * 256 + 16; }
INLINE int outlier_x_bytes(const Arguments& p) { return OUTLIER_SHARE ? 0 : (OUTLIERS * outlier_x_stride(p) + 127) & ~127; }
INLINE int outlier_bytes(const Arguments& p) {
  return OUTLIERS ? 128 + outlier_x_bytes(p) + outlier_sums_bytes() + OUTLIER_WARPS * OUTLIER_ROUNDS * OUTLIER_ROUND : 0;
}
INLINE OutlierRoom outlier_room(const Arguments& p, u8* room) {
  const u32 here = shared_address(room), sums = 128 + outlier_x_bytes(p);
  return {here, here + 128, (u32)outlier_x_stride(p), here + sums + outlier_sums_bytes(), (float*)(room + sums)};
}
INLINE const float* sums_of_outliers(const OutlierRoom& room, int block) { return room.sums + block % 2 * OUTLIERS * BLOCK_ROWS; }
// What OUTLIER_WARPS warps of a block do, of which `thread` is one: the sums of its row blocks. The warps that multiply meet them
// at the end of each, at barrier 2; they may then already begin the next one, whose sums have a place of their own.
// wait(half): for the inputs.
template <typename Wait>
INLINE void sum_outliers(const Arguments& p, const OutlierRoom& room, int thread, int first_row, int row_step, int row_blocks, const Wait& wait) {
#if OUTLIERS
  constexpr int ROWS = BLOCK_ROWS / OUTLIER_WARPS;
  const int warp = thread / 32;
  OutlierSums<ROWS> outliers;
  outliers.begin(p.outlier_start, p.outlier, room.queue + warp * OUTLIER_ROUNDS * OUTLIER_ROUND, p.k_tiles * 128, p.N,
                 first_row + warp * ROWS, row_step, row_blocks);
  if (thread < p.M) store_shared_u32x4(room.x + thread * room.x_stride + p.k_tiles * 256, 0);
  barrier_of(3, OUTLIER_THREADS);
  for (int block = 0; block < row_blocks; block++) {
    for (int half = 0; half < outliers.HALVES; half++) {
      if (block == 0) wait(half);
      while (!outliers.done(block, half)) outliers.step(room.x, room.x_stride, p.M, room.sums + warp * ROWS, BLOCK_ROWS);
    }
    barrier_of(2, THREADS + OUTLIER_THREADS);
  }
  copies_wait<0>();
#endif
}
