// y_MN = x_MK W_NK^T for up to 16 tokens, W packed: two kernels around one idea.
//
// With few tokens the time is that of reading W once, if nothing stands in the way of the reading. So W is the LEFT factor
// of the matrix instruction, y^T = W x^T: a lane's bytes become its A fragment in registers (decode.cuh) and are used there;
// the tokens are the instruction's 8 columns, absent ones computed and thrown away. 1 to 8 tokens cost the same, 9 to 16 a
// second product per fragment (TOKEN_TILES). Codes are multiplied as exact integers; a group's sum in float32 is then
// scaled and added up, so that no product is rounded with its scale.
//
//   warp (row w, slice k)     ROW_TILES tiles of 16 rows that share each fragment of x; of the k tiles every K_WARPS-th one
//   block                     ROW_WARPS x K_WARPS warps; the slices are summed once, through shared memory, in a fixed order
//   cluster                   CLUSTER blocks that split K further and sum through each other's shared memory: each block
//                             then needs only its part of x, which matters when the tokens weigh as much as the weights
//
// few_registers  each warp loads the next tile's words into registers while it multiplies the present one's. No barrier in
//                the loop; any compute capability from 8.0; any shape. Best where a block has only a few tiles.
// few_ring       one warp lets the copy engine fill a ring of stages, the others consume (9.0 and newer). Large stages
//                keep tens of KB in flight on every multiprocessor; blocks are persistent, so the ring never runs dry
//                between row blocks. Best where the weight is large.
//
// Both ask for weights BEFORE they wait for the previous kernel (early launch), since no kernel of a model writes those.
//
// Shape legend: M tokens, N out features, K in features; tiles of 16 rows x 128 columns; s step of 16 columns, 0..7.

#include "decode.cuh"

constexpr int BLOCK_TILES = ROW_WARPS * ROW_TILES;
constexpr int BLOCK_ROWS = BLOCK_TILES * 16;
constexpr int WARPS = ROW_WARPS * K_WARPS;
constexpr int THREADS = WARPS * 32;
constexpr int PARTIAL_STRIDE = BLOCK_ROWS + 4;  // of one token: four tokens of a warp's store then fall into four banks

struct Arguments {
  const u8* codes;   // [row tile][k tile][256 * BITS]
  const u8* scale;   // [row tile][group][16]
  const u8* zero;    // the same, or null
  const u16* table;  // [tables][2^BITS] in the activations' type, or null
  const u8* pick;    // [row tile][group][16], or null
  const u16* x;      // [M][x_stride], 16-byte aligned, x_stride a multiple of 8; zero in the columns from K to x_columns
  const u16* bias;   // [N] in the activations' type, or null
  u16* y;            // [M][N]
  int M, N, x_stride, x_columns, row_tiles, k_tiles, groups, tables;
};

// ---- What lies beside the codes --------------------------------------------------------------------------------------
// The scales, zero points and table numbers of one row tile for a run of TILES k tiles, in shared memory.
template <int TILES> struct Side {
  static constexpr int columns = TILES * 128;
  static constexpr int groups = GROUP == 0                            ? 1
                                : columns % (GROUP ? GROUP : 1) == 0 ? columns / (GROUP ? GROUP : 1)
                                : GROUP % columns == 0               ? 1
                                                                     : columns / (GROUP ? GROUP : 1) + 2;
  static constexpr int zeros = groups * 16 * SCALE_BYTES, picks = zeros + groups * 16 * ZERO_BYTES;
  static constexpr int bytes = picks + groups * 16 * PICK_BYTES;
};

// ---- One tile --------------------------------------------------------------------------------------------------------
// acc += W x for one tile, all 8 steps. `first` is the group that `side` begins with, `groups` how many there are.
template <int TILES>
INLINE void multiply_tile(const u32* words, const u8* side, int tile, int first, int groups, u32 table_upper, u32 table_lower,
                          const u32 (*x)[16], const float (*x_sum)[RUNS][2], float (*acc)[4]) {
  const int g = (threadIdx.x & 31) >> 2;
  UNROLL for (int run = 0; run < RUNS; run++) {
    // Columns beyond K have no group; x is zero there, so any finite scale will do.
    const int group = (GROUP % 128 ? min(group_of(tile, run), groups - 1) : group_of(tile, run)) - first;
    u32 upper = table_upper, lower = table_lower;
    if constexpr (TABLE == 3) {
      const u8* number = side + Side<TILES>::picks + group * 16;
      upper += number[g] * (2 << BITS), lower += number[g + 8] * (2 << BITS);
    }
    float part[TOKEN_TILES][4] = {};
    float(*sum)[4] = GROUP == 0 ? acc : part;
    UNROLL for (int step = 0; step < RUN / 16; step++) {
      const int s = run * (RUN / 16) + step;
      u32 a[4];
      if constexpr (TABLE)
        decode_table(words, s, upper, lower, a);
      else
        decode_integers(words, s, a);
      UNROLL for (int n = 0; n < TOKEN_TILES; n++) matrix_multiply(sum[n], a, x[n][2 * s], x[n][2 * s + 1]);
    }
    if constexpr (ZERO) {
      const float above = read_zero(side + Side<TILES>::zeros, group * 16 + g) - CENTRE;
      const float below = read_zero(side + Side<TILES>::zeros, group * 16 + g + 8) - CENTRE;
      UNROLL for (int n = 0; n < TOKEN_TILES; n++) UNROLL for (int j = 0; j < 4; j++)
        sum[n][j] -= (j < 2 ? above : below) * x_sum[n][run][j & 1];
    }
    if constexpr (GROUP != 0) {
      const float above = read_scale(side, group * 16 + g), below = read_scale(side, group * 16 + g + 8);
      UNROLL for (int n = 0; n < TOKEN_TILES; n++) UNROLL for (int j = 0; j < 4; j++)
        acc[n][j] += (j < 2 ? above : below) * part[n][j];
    }
  }
}

// The fragments of x for one tile: rows of `stride` bytes in shared memory, natural order of columns. Absent tokens read
// token 0, whose products then land in columns of y^T that nobody stores.
INLINE void load_tokens(u32 address, int stride, int M, u32 (*x)[16]) {
  const int lane = threadIdx.x & 31;
  UNROLL for (int n = 0; n < TOKEN_TILES; n++) {
    const int token = n * 8 + (lane & 7);
    const u32 row = address + (token < M ? token : 0) * stride + (lane >> 3) * 16;
    UNROLL for (int half = 0; half < 4; half++) load_matrices(x[n] + 4 * half, row + 64 * half);
  }
}

// Sums of x over each run of columns, for the zero points: W = 1 everywhere.
INLINE void sum_tokens(const u32 (*x)[16], float (*x_sum)[RUNS][2]) {
  if constexpr (ZERO) {
    const u32 ones[4] = {ONES, ONES, ONES, ONES};
    UNROLL for (int n = 0; n < TOKEN_TILES; n++) UNROLL for (int run = 0; run < RUNS; run++) {
      float sum[4] = {};
      UNROLL for (int step = 0; step < RUN / 16; step++) {
        const int s = run * (RUN / 16) + step;
        matrix_multiply(sum, ones, x[n][2 * s], x[n][2 * s + 1]);
      }
      x_sum[n][run][0] = sum[0], x_sum[n][run][1] = sum[1];
    }
  }
}

// ---- The end of a row block ------------------------------------------------------------------------------------------
// Each warp's sums to shared memory as [slice][token][row]; then every output is added up over the slices, in order.
INLINE void store_partials(float* partials, const Arguments& p, int row_warp, int slice, float (*acc)[TOKEN_TILES][4]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  UNROLL for (int r = 0; r < ROW_TILES; r++) UNROLL for (int n = 0; n < TOKEN_TILES; n++) UNROLL for (int j = 0; j < 4; j++) {
    const int row = (row_warp * ROW_TILES + r) * 16 + g + 8 * (j >> 1), token = n * 8 + 2 * t + (j & 1);
    if (token < p.M) partials[(slice * p.M + token) * PARTIAL_STRIDE + row] = acc[r][n][j];
  }
}

INLINE void store_output(const Arguments& p, int first_tile, int row, int token, float sum) {
  const int n = first_tile * 16 + row;
  if (n >= p.N) return;
  if constexpr (GROUP == 0) sum *= read_scale(p.scale, n);
  if (p.bias) sum += from_half(p.bias[n]);
  p.y[(size_t)token * p.N + n] = to_half(sum);
}

INLINE void finish(float* partials, const Arguments& p, int first_tile, int thread) {
  const int count = p.M * BLOCK_ROWS;
#if CLUSTER > 1
  float* sums = partials + K_WARPS * p.M * PARTIAL_STRIDE;
#endif
  for (int i = thread; i < count; i += THREADS) {
    const int token = i / BLOCK_ROWS, row = i % BLOCK_ROWS;
    float sum = 0;
    UNROLL for (int slice = 0; slice < K_WARPS; slice++) sum += partials[(slice * p.M + token) * PARTIAL_STRIDE + row];
#if CLUSTER > 1
    sums[i] = sum;
#else
    store_output(p, first_tile, row, token, sum);
#endif
  }
#if CLUSTER > 1
  cluster_meet();
  for (int i = cluster_rank() * THREADS + thread; i < count; i += CLUSTER * THREADS) {
    float sum = 0;
    UNROLL for (int rank = 0; rank < CLUSTER; rank++) sum += load_from_block(shared_address(sums + i), rank);
    store_output(p, first_tile, i % BLOCK_ROWS, i / BLOCK_ROWS, sum);
  }
  cluster_meet();  // nobody leaves while another still reads its sums
#endif
}

extern __shared__ __align__(128) u8 shared[];

#if !RING
// ---- Weights through registers ---------------------------------------------------------------------------------------
// Shared memory: tables, then for each warp two slots of [tokens][272 bytes] and the sides of its tiles; the partial sums
// later take the place of the slots. A slot is filled two tiles ahead, the words of codes one tile ahead.
constexpr int TOKEN_BYTES = 256 + 16;  // 16 more: the eight rows of a matrix then lie in different banks

INLINE void fetch_side(const Arguments& p, u32 slot, int first_tile, int tile) {
  constexpr int group_bytes = 16 * (SCALE_BYTES + ZERO_BYTES + PICK_BYTES), pieces = group_bytes / 16;
  constexpr int per_tile = Side<1>::groups * pieces;
  if constexpr (GROUP == 0 && ZERO == 0 && TABLE != 3) return;
  const int first = group_of(tile, 0);
  for (int i = threadIdx.x & 31; i < ROW_TILES * per_tile; i += 32) {
    const int r = i / per_tile, group = i % per_tile / pieces, piece = i % pieces;
    const size_t place = (size_t)min(first_tile + r, p.row_tiles - 1) * p.groups + first + group;
    const u32 to = slot + r * Side<1>::bytes;
    if (first + group >= p.groups) continue;
    if (piece < SCALE_BYTES)
      copy_async(to + (group * SCALE_BYTES + piece) * 16, p.scale + (place * SCALE_BYTES + piece) * 16, 16);
    else if (piece < SCALE_BYTES + ZERO_BYTES)
      copy_async(to + Side<1>::zeros + (group * ZERO_BYTES + piece - SCALE_BYTES) * 16,
                 p.zero + (place * ZERO_BYTES + piece - SCALE_BYTES) * 16, 16);
    else
      copy_async(to + Side<1>::picks + group * 16, p.pick + place * 16, 16);
  }
}

INLINE void fetch_tokens(const Arguments& p, u32 slot, int tile) {
  for (int i = threadIdx.x & 31; i < p.M * 16; i += 32) {
    const int token = i >> 4, column = tile * 128 + (i & 15) * 8;
    const int valid = min(max((p.x_columns - column) * 2, 0), 16);
    copy_async(slot + token * TOKEN_BYTES + (i & 15) * 16, p.x + (size_t)token * p.x_stride + (valid ? column : 0), valid);
  }
}

INLINE void fetch_words(const Arguments& p, int first_tile, int tile, u32 (*words)[WORDS]) {
  UNROLL for (int r = 0; r < ROW_TILES; r++) {
    const size_t place = (size_t)min(first_tile + r, p.row_tiles - 1) * p.k_tiles + tile;
    load_words_from_global(p.codes + place * TILE_BYTES, threadIdx.x & 31, words[r]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) few_registers(const __grid_constant__ Arguments p) {
  const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, first_tile = blockIdx.x * ROW_TILES;
  const int table_bytes = TABLE ? ((TABLE == 2 ? BLOCK_ROWS : p.tables) * (2 << BITS) + 15) & ~15 : 0;
  const int slot_bytes = p.M * TOKEN_BYTES + ROW_TILES * Side<1>::bytes;
  const u32 slots = shared_address(shared) + table_bytes + warp * 2 * slot_bytes, sides = p.M * TOKEN_BYTES;
  allow_next_kernel();
  int tile = warp;
  u32 words[ROW_TILES][WORDS], next[ROW_TILES][WORDS];
  if (tile < p.k_tiles) {
    fetch_words(p, first_tile, tile, words);
    fetch_side(p, slots + sides, first_tile, tile);
    if (tile + WARPS < p.k_tiles) fetch_side(p, slots + slot_bytes + sides, first_tile, tile + WARPS);
  }
  fetch_tables<BLOCK_ROWS>(p.table, p.tables, (u16*)shared, first_tile, threadIdx.x, THREADS);
  if constexpr (TABLE) __syncthreads();
  wait_for_previous_kernel();
  if (tile < p.k_tiles) fetch_tokens(p, slots, tile);
  copies_commit();
  if (tile + WARPS < p.k_tiles) fetch_tokens(p, slots + slot_bytes, tile + WARPS);
  copies_commit();

  float acc[ROW_TILES][TOKEN_TILES][4] = {};
  for (int turn = 0; tile < p.k_tiles; tile += WARPS, turn ^= 1) {
    const u32 slot = slots + turn * slot_bytes;
    if (tile + WARPS < p.k_tiles) fetch_words(p, first_tile, tile + WARPS, next);
    copies_wait<1>();
    __syncwarp();
    u32 x[TOKEN_TILES][16];
    float x_sum[TOKEN_TILES][RUNS][2];
    load_tokens(slot, TOKEN_BYTES, p.M, x);
    sum_tokens(x, x_sum);
    const u8* side = shared + (slot - shared_address(shared)) + sides;
    UNROLL for (int r = 0; r < ROW_TILES; r++)
      multiply_tile<1>(words[r], side + r * Side<1>::bytes, tile, group_of(tile, 0), p.groups, table_of(shared_address(shared), r, g),
                       table_of(shared_address(shared), r, g + 8), x, x_sum, acc[r]);
    __syncwarp();
    if (tile + 2 * WARPS < p.k_tiles) {
      fetch_side(p, slot + sides, first_tile, tile + 2 * WARPS);
      fetch_tokens(p, slot, tile + 2 * WARPS);
    }
    copies_commit();
    UNROLL for (int r = 0; r < ROW_TILES; r++) UNROLL for (int w = 0; w < WORDS; w++) words[r][w] = next[r][w];
  }
  __syncthreads();
  float* partials = (float*)(shared + table_bytes);
  store_partials(partials, p, 0, warp, acc);
  __syncthreads();
  finish(partials, p, first_tile, threadIdx.x);
}

#else
// ---- Weights through a ring ------------------------------------------------------------------------------------------
// Shared memory: 2 * STAGES + 1 barriers in 256 bytes, tables, the ring, x where it is resident, partial sums (in place of
// the ring when a block has one row block only). A stage holds K_WARPS k tiles of the block's row tiles: for each row tile
// its codes (one contiguous run), for each its side, and, where x is not resident, the tokens' columns.
constexpr int SIDE_BYTES = Side<K_WARPS>::bytes;
constexpr int CODE_BYTES = K_WARPS * TILE_BYTES;
constexpr int WEIGHT_BYTES = BLOCK_TILES * (CODE_BYTES + SIDE_BYTES);
constexpr int STAGE_TOKEN_BYTES = K_WARPS * 256 + 16;
constexpr bool SIDES = GROUP != 0 || ZERO != 0 || TABLE == 3;

struct Share {  // of this block: its stages along K, its row blocks
  int first_tile, end_tile, stages, row_blocks, row_step, row_start;
};
INLINE Share share_of(const Arguments& p) {
  Share s;
  const int all = (p.k_tiles + K_WARPS - 1) / K_WARPS, per = (all + CLUSTER - 1) / CLUSTER;
#if CLUSTER > 1
  const int rank = cluster_rank();
#else
  const int rank = 0;
#endif
  s.first_tile = min(rank * per * K_WARPS, p.k_tiles);
  s.end_tile = min((rank + 1) * per * K_WARPS, p.k_tiles);
  s.stages = (s.end_tile - s.first_tile + K_WARPS - 1) / K_WARPS;
  s.row_step = gridDim.x / CLUSTER, s.row_start = blockIdx.x / CLUSTER;
  const int all_blocks = (p.row_tiles + BLOCK_TILES - 1) / BLOCK_TILES;
  s.row_blocks = (all_blocks - s.row_start + s.row_step - 1) / s.row_step;
  return s;
}

// One stage's weights, by the whole producing warp: lane r asks for row tile r.
INLINE void fetch_weights(const Arguments& p, u8* stage, u32 full, int row_block, int tile, int tiles, u32 token_bytes) {
  const int lane = threadIdx.x & 31, rows = min(BLOCK_TILES, p.row_tiles - row_block * BLOCK_TILES);
  const int first = group_of(tile, 0), groups = min(group_of(tile + tiles - 1, RUNS - 1), p.groups - 1) - first + 1;
  const u32 side_bytes = SIDES ? groups * 16 * ((GROUP ? SCALE_BYTES : 0) + ZERO_BYTES + PICK_BYTES) : 0;
  if (lane == 0) mbarrier_expect(full, rows * (tiles * TILE_BYTES + side_bytes) + token_bytes);
  __syncwarp();
  for (int r = lane; r < rows; r += 32) {
    const size_t row_tile = (size_t)row_block * BLOCK_TILES + r, place = (row_tile * p.groups + first) * 16;
    const u32 side = shared_address(stage) + BLOCK_TILES * CODE_BYTES + r * SIDE_BYTES;
    bulk_copy(shared_address(stage) + r * CODE_BYTES, p.codes + (row_tile * p.k_tiles + tile) * TILE_BYTES, tiles * TILE_BYTES, full);
    if constexpr (GROUP != 0) bulk_copy(side, p.scale + place * SCALE_BYTES, groups * 16 * SCALE_BYTES, full);
    if constexpr (ZERO != 0) bulk_copy(side + Side<K_WARPS>::zeros, p.zero + place * ZERO_BYTES, groups * 16 * ZERO_BYTES, full);
    if constexpr (TABLE == 3) bulk_copy(side + Side<K_WARPS>::picks, p.pick + place, groups * 16, full);
  }
}

INLINE void fetch_columns(const Arguments& p, u32 to, int stride, int tile, int tiles, u32 barrier) {
  const int lane = threadIdx.x & 31;
  if (lane < p.M) bulk_copy(to + lane * stride, p.x + (size_t)lane * p.x_stride + tile * 128, tiles * 256, barrier);
}

INLINE void produce(const Arguments& p, const Share& share, u8* ring, int stage_bytes, u32 full, u32 empty, u32 x_ready, u32 x_room,
                    int x_stride) {
  const int total = share.row_blocks * share.stages, ahead = min(total, STAGES), lane = threadIdx.x & 31;
  for (int turn = 0; turn < total; turn++) {
    const int slot = turn % STAGES, stage = turn % share.stages, tile = share.first_tile + stage * K_WARPS;
    const int tiles = min(K_WARPS, share.end_tile - tile), row_block = share.row_start + turn / share.stages * share.row_step;
    u8* place = ring + slot * stage_bytes;
    if (turn >= STAGES) mbarrier_wait(empty + 8 * slot, (turn / STAGES - 1) & 1);
    fetch_weights(p, place, full + 8 * slot, row_block, tile, tiles, X_RESIDENT ? 0 : p.M * tiles * 256);
    if (!X_RESIDENT && turn >= ahead)
      fetch_columns(p, shared_address(place) + WEIGHT_BYTES, STAGE_TOKEN_BYTES, tile, tiles, full + 8 * slot);
    if (turn == ahead - 1) {  // the ring is full of weights: now x is needed
      wait_for_previous_kernel();
      if (X_RESIDENT) {
        const int all = share.end_tile - share.first_tile;
        if (lane == 0) mbarrier_expect(x_ready, p.M * all * 256);
        __syncwarp();
        fetch_columns(p, x_room, x_stride, share.first_tile, all, x_ready);
      } else
        for (int t = 0; t < ahead; t++) {
          const int first = share.first_tile + t % share.stages * K_WARPS;
          fetch_columns(p, shared_address(ring + t * stage_bytes) + WEIGHT_BYTES, STAGE_TOKEN_BYTES, first,
                        min(K_WARPS, share.end_tile - first), full + 8 * t);
        }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, BLOCKS) few_ring(const __grid_constant__ Arguments p) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2;
  const int row_warp = warp / K_WARPS, slice = warp % K_WARPS;
  const Share share = share_of(p);
  const u32 full = shared_address(shared), empty = full + 8 * STAGES, x_ready = empty + 8 * STAGES;
  u16* tables = (u16*)(shared + 256);
  const int table_bytes = TABLE ? ((TABLE == 2 ? BLOCK_ROWS : p.tables) * (2 << BITS) + 127) & ~127 : 0;
  u8* ring = shared + 256 + table_bytes;
  const int stage_bytes = (WEIGHT_BYTES + (X_RESIDENT ? 0 : p.M * STAGE_TOKEN_BYTES) + 127) & ~127;
  const int x_stride = (((p.k_tiles + K_WARPS - 1) / K_WARPS + CLUSTER - 1) / CLUSTER) * K_WARPS * 256 + 16;
  u8* x_room = ring + STAGES * stage_bytes;
  const bool single = share.row_step >= (p.row_tiles + BLOCK_TILES - 1) / BLOCK_TILES;
  float* partials = (float*)(single ? ring : x_room + (X_RESIDENT ? p.M * x_stride : 0));
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) mbarrier_init(full + 8 * i, 1), mbarrier_init(empty + 8 * i, WARPS);
    mbarrier_init(x_ready, 1);
    mbarrier_init_done();
  }
  __syncthreads();
  allow_next_kernel();
  if (warp == WARPS) {
    produce(p, share, ring, stage_bytes, full, empty, x_ready, shared_address(x_room), x_stride);
#if CLUSTER > 1
    __syncwarp();
    cluster_meet(), cluster_meet();  // every thread of a cluster must come to its meetings
#endif
    return;
  }

  int turn = 0;
  for (int block = 0; block < share.row_blocks; block++) {
    const int first_tile = (share.row_start + block * share.row_step) * BLOCK_TILES;
    float acc[ROW_TILES][TOKEN_TILES][4] = {};
    if constexpr (TABLE) {
      if (block == 0 || TABLE == 2) {
        fetch_tables<BLOCK_ROWS>(p.table, p.tables, tables, first_tile, threadIdx.x, THREADS);
        barrier_of(1, THREADS);
      }
    }
    if (X_RESIDENT && block == 0 && share.stages) mbarrier_wait(x_ready, 0);
    for (int stage = 0; stage < share.stages; stage++, turn++) {
      const int slot = turn % STAGES, tile = share.first_tile + stage * K_WARPS + slice;
      const u8* place = ring + slot * stage_bytes;
      mbarrier_wait(full + 8 * slot, turn / STAGES & 1);
      if (tile < share.end_tile) {
        u32 x[TOKEN_TILES][16];
        float x_sum[TOKEN_TILES][RUNS][2];
        load_tokens(X_RESIDENT ? shared_address(x_room) + (tile - share.first_tile) * 256
                               : shared_address(place) + WEIGHT_BYTES + slice * 256,
                    X_RESIDENT ? x_stride : STAGE_TOKEN_BYTES, p.M, x);
        sum_tokens(x, x_sum);
        UNROLL for (int r = 0; r < ROW_TILES; r++) {
          const int row_tile = row_warp * ROW_TILES + r;
          u32 words[WORDS];
          load_words_from_shared(place + row_tile * CODE_BYTES + slice * TILE_BYTES, lane, words);
          multiply_tile<K_WARPS>(words, place + BLOCK_TILES * CODE_BYTES + row_tile * SIDE_BYTES, tile, group_of(tile - slice, 0), p.groups,
                                 table_of(shared_address(tables), row_tile, g), table_of(shared_address(tables), row_tile, g + 8), x,
                                 x_sum, acc[r]);
        }
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(empty + 8 * slot);
    }
    barrier_of(1, THREADS);  // all have read the ring, and the previous row block's partial sums
    store_partials(partials, p, row_warp, slice, acc);
    barrier_of(1, THREADS);
    wait_for_previous_kernel();
    finish(partials, p, first_tile, threadIdx.x);
  }
}
#endif
