// Sparse outliers beside a few tokens whose inputs come with the stages of a ring, added up as they come: by patches of 8 rows x 1024
// columns, which are a stage's (cuda_patches.py).
//
// Nobody has to hold all inputs, so this serves weights of any number of them. A warp has PATCH_TURNS times 8 rows of every row block and
// follows the ring as the warps that multiply do, which it lags behind or waits for; a stage is free when both have read it. The words do
// not depend on inputs: they are copied rounds ahead, and read before a stage is waited for.
//
// A unit of 16 outliers is one matrix product tokens x rows: lane 4 g + t looks up four columns for tokens g and g + 8, and has the values of
// these four where they are of row g, else 0. A look-up is a wavefront, since four lanes' columns are of different kinds of banks; with
// these shared memory is the limit beside 16 tokens, whose look-ups are twice as many. Absent tokens are whatever lies there. What is not
// finite makes other rows of its token NaN, which are not finite anyway.

#pragma once

constexpr int PATCH_ROWS = 8, PATCH_TILES = 8, BATCH = 3;  // units whose inputs are asked for together
constexpr int PATCH_UNITS = 2 * BATCH, PATCH_ROUND = 512;  // units of a round, as many as one weight in a hundred fills; bytes between rounds
constexpr int PATCH_TURNS = BLOCK_ROWS / OUTLIER_WARPS / PATCH_ROWS;
static_assert(PATCH_UNITS * 4 <= 32, "each lane copies 16 bytes of a round");

struct PatchSums {
  static constexpr int ROUNDS = OUTLIER_ROUNDS, TILES = OUTLIERS / 8;
  const int* start;  // [groups of rows * patches + 1], in units
  const u32* words;  // [][4 lanes][4]
  u32 queue;         // [ROUNDS] in shared memory
  int first_group, group_step, groups, row_blocks, patches, first_patch;
  int block = 0, turn = 0, which = 0, at, end;  // what is fetched: a patch's next unit, and the patch's end; of the warp's groups it is `which`
  int here[PATCH_TURNS], behind[PATCH_TURNS];   // lane c: where patch c begins, of the row block that is fetched, and of the next
  u64 ahead = 0;  // eight bits for each slot of a round: units that were left of its patch, at most PATCH_UNITS + 1
  int slot = 0;   // of the oldest round
  float sums[PATCH_TURNS][2][4] = {};

  INLINE static int lane() { return threadIdx.x & 31; }
  INLINE int patch_of(int turn) const {
    const int patch = turn + first_patch;
    return patch < patches ? patch : patch - patches;
  }
  INLINE void find_bounds(int row_block, int* bounds) const {
    UNROLL for (int i = 0; i < PATCH_TURNS; i++) {
      const int group = first_group + row_block * group_step + i;
      bounds[i] = __ldg(start + (row_block < row_blocks && group < groups ? group * patches + min(lane(), patches) : 0));
    }
  }
  INLINE void find() {
    UNROLL for (int i = 0; i < PATCH_TURNS; i++) if (which == i)
      at = __shfl_sync(~0u, here[i], patch_of(turn)), end = __shfl_sync(~0u, here[i], patch_of(turn) + 1);
  }
  // All of a row block's into the second-level cache.
  INLINE void prefetch(const int* bounds) const {
    const int first = __shfl_sync(~0u, bounds[0], 0), bytes = 64 * (__shfl_sync(~0u, bounds[PATCH_TURNS - 1], patches) - first);
    if (lane() == 0 && bytes > 0) bulk_prefetch(words + (size_t)first * 16, bytes);
  }
  INLINE void next_patch() {
    if (turn == 0 && which == 0) prefetch(behind);
    if (++which == PATCH_TURNS) which = 0, turn++;
    if (turn == patches) {
      turn = 0, block++;
      UNROLL for (int i = 0; i < PATCH_TURNS; i++) here[i] = behind[i];
      find_bounds(block + 1, behind);
    }
    find();
  }
  INLINE void fetch() {
    if (block < row_blocks) {
      const int left = end - at;
      if (lane() < 4 * min(left, PATCH_UNITS)) copy_async(queue + slot * PATCH_ROUND + lane() * 16, words + (size_t)at * 16 + lane() * 4, 16);
      ahead = (ahead & ~(255ull << 8 * slot)) | (u64)min(left, PATCH_UNITS + 1) << 8 * slot;
      at += PATCH_UNITS;
      if (left <= PATCH_UNITS) next_patch();
    }
    copies_commit();
    slot = slot + 1 == ROUNDS ? 0 : slot + 1;
  }
  // As soon as it can be: where outliers are is the first of two trips to memory.
  INLINE void ask(const int* start_P1, int rows, int k_tiles, int first_row, int row_step, int blocks) {
    start = start_P1, groups = (rows + PATCH_ROWS - 1) / PATCH_ROWS, patches = (k_tiles + PATCH_TILES - 1) / PATCH_TILES;
    first_group = first_row / PATCH_ROWS, group_step = row_step / PATCH_ROWS, row_blocks = blocks;
    find_bounds(0, here), find_bounds(1, behind);
  }
  INLINE void begin(const u32* words_U, u32 room, int patch) {
    words = words_U, queue = room, first_patch = patch;
    find();
#pragma unroll 1
    for (int i = 0; i < ROUNDS; i++) fetch();
  }

  // The lane's words of BATCH units; behind a patch's last unit they may be anything.
  INLINE void read(u32 (*word)[4], u32 place) const {
    UNROLL for (int u = 0; u < BATCH; u++) load_shared_u32x4(word[u], place + u * 64);
  }
  // from: the patch's first input of token g. far: bytes to that of token g + 8. count: units that are the patch's.
  INLINE void add(u32 (*word)[4], u32 from, u32 far, int count, float (*sums)[4]) {
    const u32 own = (lane() >> 2) << 16;
    u32 inputs[BATCH][4][TILES];
    UNROLL for (int u = 0; u < BATCH; u++) if (u < count)
      UNROLL for (int j = 0; j < 4; j++) UNROLL for (int n = 0; n < TILES; n++)
        inputs[u][j][n] = load_shared_half(from + (word[u][j] >> 21) + (n ? far : 0));
    UNROLL for (int u = 0; u < BATCH; u++) if (u < count) {
      u32 a[4] = {}, b[2], kept[4];
      UNROLL for (int h = 0; h < 2; h++) UNROLL for (int n = 0; n < TILES; n++) a[2 * h + n] = joined(inputs[u][2 * h][n], inputs[u][2 * h + 1][n]);
      UNROLL for (int j = 0; j < 4; j++) kept[j] = (word[u][j] ^ own) & 0x70000 ? 0 : word[u][j];
      UNROLL for (int h = 0; h < 2; h++) b[h] = __byte_perm(kept[2 * h], kept[2 * h + 1], 0x5410);
      matrix_multiply(sums[u & 1], a, b[0], b[1], sums[u & 1]);
    }
  }
  // All outliers of the next row block: `rows` is where its sums go, [TOKENS][width]. inputs: where those of a patch are, `stride` bytes
  // from token to token, when wait() has returned, and until done().
  template <typename Inputs> INLINE void add_block(u32 stride, float* rows, int width, Inputs& inputs) {
    const int g = lane() >> 2, t = lane() & 3;
    for (int turn = 0; turn < patches; turn++) {
      const u32 from = inputs.place() + g * stride;
      bool here = false;
      UNROLL for (int which = 0; which < PATCH_TURNS; which++) {
        int left;
        do {
          copies_wait<ROUNDS - 1>();
          __syncwarp();
          left = ahead >> 8 * slot & 255;
          const u32 place = queue + slot * PATCH_ROUND + t * 16;
          u32 even[BATCH][4], odd[BATCH][4];
          read(even, place);
          if (!here) inputs.wait(), here = true;
          if (left > BATCH) read(odd, place + BATCH * 64);
          add(even, from, 8 * stride, left, sums[which]);
          if (left > BATCH) add(odd, from, 8 * stride, left - BATCH, sums[which]);
          __syncwarp();
          fetch();
        } while (left > PATCH_UNITS);
      }
      inputs.done();
    }
    UNROLL for (int i = 0; i < PATCH_TURNS; i++) UNROLL for (int j = 0; j < 2 * TILES; j++) {
      rows[((j & 2) * 4 + g) * width + i * PATCH_ROWS + 2 * t + (j & 1)] = sums[i][0][j] + sums[i][1][j];
      sums[i][0][j] = sums[i][1][j] = 0;
    }
  }
};
