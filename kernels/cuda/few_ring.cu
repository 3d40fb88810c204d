// Few tokens, weights through a ring: one warp lets the copy engine fill the stages of a ring in shared memory, the others
// consume them (compute capability 9.0 and newer). The stages keep tens of KB in flight on every multiprocessor, and blocks
// are persistent: the ring runs on across row blocks, so that memory never rests. Best where the weight is large.
//
// A stage holds K_WARPS k tiles of the block's row tiles: for each row tile its codes, one contiguous run and so one copy,
// and its scales. The engine takes some 20 cycles per copy whatever its size, so runs should be long: many k tiles in a
// stage, few row tiles. The tokens stay in shared memory as a whole (X_RESIDENT), arriving with the stages of the first row
// block, or come with every stage (X_IN_STAGE), or each warp fetches the columns of its own tiles, two ahead, as in
// few_registers.cu. With 16 tokens every multiprocessor would fetch as many bytes of x as of weights, all from the L2 cache,
// which is then the limit: X_SHARE blocks of a cluster fetch x once, each some tokens, and the engine puts them into the shared
// memory of all. A stage that x comes with is free when the warps of all these blocks have read it, unless no stage is used again
// while x still comes.
//
// Shared memory: barriers in 256 bytes, tables, what outliers need, a cluster's inbox, the ring, the tokens, partial sums (in
// place of the ring where the block has one row block only).

#include "few_tokens.cuh"

constexpr int SIDE_BYTES = Side<K_WARPS>::bytes;
constexpr int CODE_BYTES = K_WARPS * TILE_BYTES;
constexpr int WEIGHT_BYTES = (BLOCK_TILES * (CODE_BYTES + SIDE_BYTES) + 127) & ~127;
constexpr bool X_BY_WARPS = !X_RESIDENT && !X_IN_STAGE;
constexpr int STAGE_TOKEN_BYTES = K_WARPS * 256 + 16;  // of one token in a stage
constexpr int STAGE_BYTES = WEIGHT_BYTES + (X_IN_STAGE ? (TOKEN_TILES * 8 * STAGE_TOKEN_BYTES + 127) & ~127 : 0);
static_assert(!OUTLIER_SHARE || (X_RESIDENT && CLUSTER == 1), "outliers find all inputs where the whole of x stays");
constexpr bool X_TOLD = OUTLIER_PRODUCTS && OUTLIER_SHARE;  // each stage of x has a barrier of its own
constexpr bool X_TURNED = OUTLIERS_TURNED && X_TOLD;
constexpr bool SIDES = GROUP != 0 || ZERO != 0 || TABLE == 3;

// Warps beside the multiplying ones: the one that produces, with BESIDE three more (few_beside.cuh), and with 8 multiplying warps three
// more that only give up registers, which a multiprocessor hands out by warpgroups. Many row tiles of 16 tokens are too much for the 168 that 9 warps could have.
#ifndef BESIDE
#define BESIDE 0
#endif
constexpr int PRODUCER_THREADS = TRADE || BESIDE ? 128 : 32, ALL_WARPS = WARPS + PRODUCER_THREADS / 32;
constexpr int STAGE_READERS = WARPS + (PATCHES ? OUTLIER_WARPS : 0);
constexpr bool COLLECTS_AMONG = APART && TRADE;  // the three then wait for sums of outliers
constexpr int BLOCK_WARPS = ALL_WARPS + (COLLECTS_AMONG ? 0 : OUTLIER_WARPS);

// a / b rounded down, for a below 2^21: an integer division takes some 200 cycles, and a launch waits for two.
INLINE int divide_small(int a, int b) { return (int)__fdividef((float)a + 0.5f, (float)b); }

// This block's part of the work: its k tiles (a cluster's blocks share K), its row blocks.
struct Share {
  int first_tile, end_tile, stages, row_blocks, row_step, row_start;
  int readers;   // blocks that must have read a stage before it is filled again
  int rotation;  // the stage that comes first
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
  const int others = APART ? p.apart_blocks : 0;  // which have no rows
  s.row_step = (gridDim.x - others) / CLUSTER, s.row_start = (blockIdx.x - others) / CLUSTER;
  const int all_blocks = (p.row_tiles + BLOCK_TILES - 1) / BLOCK_TILES;
  // As many as the cluster's first block: those that share x take turns together, if need be without rows.
  s.row_blocks = divide_small(all_blocks - s.row_start / X_SHARE * X_SHARE + s.row_step - 1, s.row_step);
  s.readers = X_IN_STAGE || (!X_TOLD && s.stages > p.stages) ? X_SHARE : 1;
  const int start = s.row_start / X_SHARE;
  s.rotation = (OUTLIERS_TURNED && !X_TURNED) || s.stages == 0 ? 0 : start - divide_small(start, s.stages) * s.stages;  // inputs are turned in their order
  return s;
}

// Blocks go round along K from different stages on: else all would want the same lines of x at once, each of which one slice of the L2
// cache has to give to all of them.
INLINE int stage_of(const Share& share, int turn) {
  const int stage = turn + share.rotation;
  return stage < share.stages ? stage : stage - share.stages;
}

// Where things lie in shared memory.
struct Room {
  u32 full, empty, bell;  // barriers: a stage is filled, a stage is read, all of a cluster's sums are here
  u32 laid_out, looked_up, sums, added;  // BESIDE: tables lie there, are done with (two places); partial sums are there, added up
  u8 *tables, *inbox, *ring;
  OutlierRoom outliers;
  u32 kept;
  u32 x, x_stride;  // x_stride: bytes from token to token where x is resident
  float* partials;
};
INLINE Room room_of(const Arguments& p, bool single) {
  Room r;
  r.full = shared_address(shared), r.empty = r.full + 8 * p.stages, r.bell = r.full + 248;
  r.laid_out = r.full + 200, r.looked_up = r.full + 216, r.sums = r.full + 232, r.added = r.full + 240;
  r.tables = shared + 256;
  u8* beside = shared + 256 + ((table_room(p.tables) * (BESIDE && !single ? 2 : 1) + 127) & ~127);
  r.outliers = outlier_room(p, beside);
  r.kept = shared_address(beside) + outlier_bytes(p);
  r.inbox = beside + ((outlier_bytes(p) + kept_bytes(p) + 127) & ~127);
#if CLUSTER > 1
  r.ring = r.inbox + inbox_bytes(p);
#else
  r.ring = r.inbox;
#endif
  r.x = shared_address(r.ring) + p.stages * STAGE_BYTES;
  r.x_stride = (((p.k_tiles + K_WARPS - 1) / K_WARPS + CLUSTER - 1) / CLUSTER) * K_WARPS * 256 + 16;
  if (OUTLIER_SHARE) r.outliers.x = r.x, r.outliers.x_stride = r.x_stride;
  const int x_bytes = X_RESIDENT ? (X_TURNED ? OUTLIERS : p.M) * r.x_stride : X_BY_WARPS ? WARPS * 2 * p.M * TOKEN_BYTES : 0;
  r.partials = (float*)(single ? r.ring : r.ring + p.stages * STAGE_BYTES + x_bytes);
  return r;
}

// ---- Producing -------------------------------------------------------------------------------------------------------
// One stage's weights, by the whole warp: lane r asks for row tile r.
INLINE void fetch_weights(const Arguments& p, u32 stage, u32 full, int row_block, int tile, int tiles, u32 token_bytes) {
  const int lane = threadIdx.x & 31, rows = max(min(BLOCK_TILES, p.row_tiles - row_block * BLOCK_TILES), 0);
  const int first = group_of(tile, 0), groups = min(group_of(tile + tiles - 1, RUNS - 1), p.groups - 1) - first + 1;
  const u32 side_bytes = SIDES ? groups * 16 * ((GROUP ? SCALE_BYTES : 0) + ZERO_BYTES + PICK_BYTES) : 0;
  if (lane == 0) mbarrier_expect(full, rows * (tiles * TILE_BYTES + side_bytes) + token_bytes);
  __syncwarp();
  for (int r = lane; r < rows; r += 32) {
    const size_t row_tile = (size_t)row_block * BLOCK_TILES + r, place = (row_tile * p.groups + first) * 16;
    const u32 side = stage + BLOCK_TILES * CODE_BYTES + r * SIDE_BYTES;
    bulk_copy(stage + r * CODE_BYTES, p.codes + (row_tile * p.k_tiles + tile) * TILE_BYTES, tiles * TILE_BYTES, full);
    if constexpr (GROUP != 0) bulk_copy(side, p.scale + place * SCALE_BYTES, groups * 16 * SCALE_BYTES, full);
    if constexpr (ZERO != 0) bulk_copy(side + Side<K_WARPS>::zeros, p.zero + place * ZERO_BYTES, groups * 16 * ZERO_BYTES, full);
    if constexpr (TABLE == 3) bulk_copy(side + Side<K_WARPS>::picks, p.pick + place, groups * 16, full);
  }
}

// Whether tokens come with a row block's stages. Those that products of outliers wait for have barriers of their own: they are here
// before the weights of their stage, and are not forgotten when these make room for others.
INLINE bool with_x(int block) { return X_IN_STAGE || (X_RESIDENT && block == 0); }
INLINE u32 x_is_here(const Room& room, int stage) { return room.outliers.here + 16 * stage; }
INLINE u32 x_is_turned(const Room& room, int stage) { return x_is_here(room, stage) + 8; }

// The weights of one turn into the stage in `slot` of the ring, whose barrier learns what to expect, tokens included.
INLINE void fetch_turn(const Arguments& p, const Share& share, const Room& room, int block, int stage, int slot) {
  const int tile = share.first_tile + stage_of(share, stage) * K_WARPS, tiles = min(K_WARPS, share.end_tile - tile);
  fetch_weights(p, shared_address(room.ring) + slot * STAGE_BYTES, room.full + 8 * slot,
                share.row_start + block * share.row_step, tile, tiles, with_x(block) && !X_TOLD ? p.M * tiles * 256 : 0);
}

// A place in the ring: the stage that is next, and how often (modulo 2) the ring has come round to it.
struct Slot {
  int index = 0;
  u32 round = 0;
  INLINE void next(int stages) {
    if (++index == stages) index = 0, round ^= 1;
  }
};

// One token's columns for one stage: to where they stay, or into the stage in `slot` of the ring.
INLINE void fetch_stage_token(const Arguments& p, const Share& share, const Room& room, int stage, int slot, int token) {
  const int first = stage_of(share, stage) * K_WARPS;
  const u32 bytes = min(K_WARPS, share.end_tile - share.first_tile - first) * 256;
  const u32 full = X_TOLD ? x_is_here(room, stage) : room.full + 8 * slot;
  const u32 to = X_RESIDENT ? room.x + token * room.x_stride + first * 256
                            : shared_address(room.ring) + slot * STAGE_BYTES + WEIGHT_BYTES + token * STAGE_TOKEN_BYTES;
  const u16* from = p.x + (size_t)token * p.x_stride + (share.first_tile + first) * 128;
#if X_SHARE > 1
  if (token % X_SHARE == cluster_rank()) bulk_copy_to_all<X_SHARE>(to, from, bytes, full);
#else
  bulk_copy(to, from, bytes, full);
#endif
}

// Up to 8 tokens, all that the ring holds is asked for before the previous kernel has ended. More tokens weigh as much as the weights,
// and copies are served one after the other: x should not wait behind weights that are needed after it, nor the previous kernel's
// stores behind either. So only the first turn goes ahead of x, and each turn's tokens follow its weights (X_FOLLOWS). Those that outliers
// wait for come before weights from the third turn on: products of outliers begin when all of x is there, and end after the others'. Were
// they to come before the second turn's weights too, memory would rest.
constexpr bool X_FOLLOWS = TOKEN_TILES > 1 && !X_BY_WARPS;

// The first turn's tokens, by all warps, since one alone takes some 50 cycles for each. They may be here before the barrier has
// been told to expect them.
INLINE void fetch_first_tokens(const Arguments& p, const Share& share, const Room& room) {
  if ((threadIdx.x & 31) == 0 && share.stages > 0)
    for (int token = threadIdx.x >> 5; token < p.M; token += ALL_WARPS) fetch_stage_token(p, share, room, 0, 0, token);
}

// All inputs once more for outliers, which cannot wait until the last stage that x comes with is read, or want others than the codes.
INLINE void fetch_inputs_of_outliers(const Arguments& p, const Room& room, int token) {
  if (token == 0) mbarrier_expect(room.outliers.here, p.M * p.x_columns * 2);
  __syncwarp();
  if (token < p.M)
    bulk_copy(room.outliers.x + token * room.outliers.x_stride, (EXACT ? p.chosen : p.x) + (size_t)token * p.x_stride, p.x_columns * 2,
              room.outliers.here);
}

INLINE void produce(const Arguments& p, const Share& share, const Room& room) {
  const int ahead = X_FOLLOWS ? 0 : min(share.row_blocks * share.stages, p.stages), token = threadIdx.x & 31;
  constexpr bool COPY = OUTLIERS && !OUTLIER_SHARE && !APART && !PATCHES;
  if (COPY && ahead == 0) wait_for_previous_kernel(), fetch_inputs_of_outliers(p, room, token);
  Slot slot;
  int turn = 0;
  for (int block = 0; block < share.row_blocks; block++)
    for (int stage = 0; stage < share.stages; stage++, turn++, slot.next(p.stages)) {
      if (X_FOLLOWS && turn == 0) continue;
      const bool leads = X_FOLLOWS && X_TOLD && turn > 1;
      if (leads && block == 0 && token < p.M) fetch_stage_token(p, share, room, stage, slot.index, token);
      if (turn >= p.stages) mbarrier_wait(room.empty + 8 * slot.index, slot.round ^ 1);
      fetch_turn(p, share, room, block, stage, slot.index);
      if (turn == ahead - 1) {  // the ring is full of weights: now x is needed
        wait_for_previous_kernel();
        const int end = X_BY_WARPS ? 0 : X_IN_STAGE ? ahead : min(ahead, share.stages);
        for (int t = 0; t < end; t++)
          if (token < p.M) fetch_stage_token(p, share, room, t % share.stages, t, token);
        if (COPY) fetch_inputs_of_outliers(p, room, token);
      } else if (!leads && turn >= ahead && token < p.M && with_x(block)) {
        fetch_stage_token(p, share, room, stage, slot.index, token);
      }
    }
  // Blocks that share x arrive at each other's barriers: none leaves before all have arrived at its own.
  for (int last = turn + p.stages; X_SHARE > 1 && turn < last; turn++, slot.next(p.stages))
    if (turn >= p.stages) mbarrier_wait(room.empty + 8 * slot.index, slot.round ^ 1);
}

// ---- Consuming -------------------------------------------------------------------------------------------------------
// Tables of rows change with the row block. They are asked for a row block ahead, since while they came from memory nobody would
// multiply, and laid out between the two barriers at a row block's end: behind the first every warp is done with the last ones, and
// what all threads asked for is here.
INLINE void ask_for_next_tables(const Arguments& p, const Share& share, const Room& room, int block) {
  if constexpr (BY_ROWS && !BESIDE) {
    if (block < share.row_blocks) ask_for_row_tables(p, room.tables, (share.row_start + block * share.row_step) * BLOCK_TILES);
    if (!X_BY_WARPS) copies_commit();  // else with the tokens that are asked for next
  }
}
#include "few_beside.cuh"

// Other tables of rows, at the start of a row block. Behind a barrier the first ones lie there for all.
INLINE void renew_tables(const Arguments& p, const Room& room, int block, int first_tile) {
  if (BESIDE && block > 0) return mbarrier_wait(room.laid_out + 8 * (block & 1), (block - 1) / 2 & 1);
  if (TABLE == 0 || (block > 0 && (TABLE != 2 || BY_ROWS))) return;
  if (block > 0) barrier_of(1, THREADS), lay_out_tables(p, room.tables, first_tile, 0);
  barrier_of(1, THREADS);
}

// A warp has read a stage.
INLINE void give_back(const Share& share, const Room& room, int slot) {
  const int lane = threadIdx.x & 31;
  fence_loads();
  __syncwarp();
  if (share.readers == 1 && arrives(lane)) mbarrier_arrive(room.empty + 8 * slot);
  for (int rank = SANITIZE ? 0 : lane; X_SHARE > 1 && share.readers > 1 && rank < X_SHARE; rank += SANITIZE ? 1 : 32)
    mbarrier_arrive_at(room.empty + 8 * slot, rank);
}

#include "few_inputs.cuh"

INLINE void consume(const Arguments& p, const Share& share, const Room& room) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, row_warp = warp / K_WARPS, slice = warp % K_WARPS;
  const int total = share.row_blocks * share.stages;
  const float factor = factor_of(p);
  const u32 own = room.x + warp * 2 * p.M * TOKEN_BYTES;
  int fetched = 0, next_tile = share.first_tile + stage_of(share, 0) * K_WARPS + slice;
  auto fetch_own = [&] {  // this warp's columns of x for the next turn: round and round along K
    if (fetched < total && next_tile < share.end_tile) fetch_tokens(p, own + (fetched & 1) * p.M * TOKEN_BYTES, next_tile);
    copies_commit();
    fetched++, next_tile += K_WARPS;
    if (next_tile - slice >= share.end_tile) next_tile = share.first_tile + slice;
  };
  if (X_BY_WARPS) wait_for_previous_kernel(), fetch_own(), fetch_own();
  KeptColumns kept(p, room.kept, row_warp, share.first_tile ? p.kept_steps : slice);  // by a cluster's first block
  Slot slot;
  int turn = 0;
  for (int block = 0; block < share.row_blocks; block++) {
    float acc[ROW_TILES][TOKEN_TILES][4] = {};
    const int first_row_tile = (share.row_start + block * share.row_step) * BLOCK_TILES;
    prefetch_row_scales(p, first_row_tile, threadIdx.x);
    renew_tables(p, room, block, first_row_tile);
    if (block == 0) ask_for_next_tables(p, share, room, 1);
    const u32 tables = shared_address(tables_of_block(room, block));
    OwnTables own_tables;
    own_tables.load(tables, row_warp * ROW_TILES);
    if constexpr (KEPT) kept.copy(first_row_tile + row_warp * ROW_TILES), copies_commit();
    for (int stage = 0; stage < share.stages; stage++, turn++, slot.next(p.stages)) {
      const int tile = share.first_tile + stage_of(share, stage) * K_WARPS + slice;
      const u8* place = room.ring + slot.index * STAGE_BYTES;
      if (X_BY_WARPS) copies_wait<1>(), __syncwarp();
      mbarrier_wait(room.full + 8 * slot.index, slot.round);
      if (block == 0) tell_outliers(share, room, stage);
      if (X_TOLD && block == 0) mbarrier_wait(X_TURNED ? x_is_turned(room, stage) : x_is_here(room, stage), 0);
      if (KEPT && turn == 0) wait_for_previous_kernel(), kept.begin();
      if (tile < share.end_tile) {
        Tokens x;
        if constexpr (X_RESIDENT)
          load_tokens<X_TURNED>(room.x + (tile - share.first_tile) * 256, room.x_stride, p.M, x);
        else if constexpr (X_IN_STAGE)
          load_tokens(shared_address(place) + WEIGHT_BYTES + slice * 256, STAGE_TOKEN_BYTES, p.M, x);
        else
          load_tokens(own + (turn & 1) * p.M * TOKEN_BYTES, TOKEN_BYTES, p.M, x);
        u8* made = room.tables + warp * ROW_TILES * MADE_BYTES;
        make_planes<K_WARPS>(made, place + BLOCK_TILES * CODE_BYTES + row_warp * ROW_TILES * SIDE_BYTES, SIDE_BYTES, tile,
                             group_of(tile - slice, 0), p.groups);
        UNROLL for (int r = 0; r < ROW_TILES; r++) {
          const int row_tile = row_warp * ROW_TILES + r;
          u32 words[WORDS];
          load_words_from_shared(place + row_tile * CODE_BYTES + slice * TILE_BYTES, lane, words);
          multiply_tile<K_WARPS>(words, place + BLOCK_TILES * CODE_BYTES + row_tile * SIDE_BYTES, r, tile,
                                 group_of(tile - slice, 0), p.groups, table_at(tables, row_tile, g),
                                 table_at(tables, row_tile, g + 8), own_tables[r], made + r * MADE_BYTES, x, acc[r]);
        }
      }
      give_back(share, room, slot.index);
      if (X_BY_WARPS) fetch_own();
    }
    if constexpr (KEPT) copies_wait<0>(), kept.add(first_row_tile + row_warp * ROW_TILES, acc);
    if constexpr (BESIDE) {
      mbarrier_arrive(room.looked_up + 8 * (block & 1));
      if (block > 0) mbarrier_wait(room.added, (block - 1) & 1);
      if (block + 1 < share.row_blocks) {
        store_partials(room.partials, p, row_warp, slice, acc);
        mbarrier_arrive(room.sums);
        continue;
      }
    }
    if constexpr (BY_ROWS && !BESIDE) copies_wait<0>();
    if (block == 0 || BESIDE) wait_for_previous_kernel();  // which may have written the bias, or still be reading y
#if CLUSTER == 1
    const Outputs<THREADS> outputs(p, first_row_tile, threadIdx.x);
#endif
    barrier_of(PATCHES ? 3 : 1, THREADS + (PATCHES ? OUTLIER_THREADS : 0));  // all have read the ring, and used the last partial sums
    if constexpr (HALF_SUMS)
      store_half_partials(room.partials, p, row_warp, slice, acc);
    else
      store_partials(room.partials, p, row_warp, slice, acc);
    if (BY_ROWS && !BESIDE && block + 1 < share.row_blocks) lay_out_row_tables<BLOCK_TILES, THREADS>(room.tables, threadIdx.x);
    barrier_of(OUTLIERS ? 2 : 1, THREADS + OUTLIER_THREADS);
    ask_for_next_tables(p, share, room, block + 2);
#if CLUSTER > 1
    finish_in_cluster(room.partials, (const float2*)room.inbox, room.bell, p, factor, first_row_tile, threadIdx.x,
                      sums_of_outliers(room.outliers, block));
#else
    outputs.finish(room.partials, p, factor, sums_of_outliers(room.outliers, block));
#endif
  }
}

extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, BLOCKS) few_ring(const __grid_constant__ Arguments p) {
#if APART
  if (blockIdx.x < p.apart_blocks) return allow_next_kernel(), add_outliers_apart(p, shared, BLOCK_WARPS);
#endif
  const Share share = share_of(p);
  const bool single = share.row_step >= (p.row_tiles + BLOCK_TILES - 1) / BLOCK_TILES;
  const Room room = room_of(p, single);
  const int warp = threadIdx.x >> 5;
  const u32 number = warp < WARPS ? ask_for_tables(p, room.tables, share.row_start * BLOCK_TILES) : 0;  // before all else
  const bool beside = OUTLIERS && (warp >= (COLLECTS_AMONG ? WARPS + 1 : ALL_WARPS));  // they wait for the previous kernel when they have asked for what does not depend on it
  const int beside_thread = threadIdx.x - THREADS - (COLLECTS_AMONG ? 32 : PRODUCER_THREADS);
  const int first_row = share.row_start * BLOCK_ROWS, row_step = share.row_step * BLOCK_ROWS;
  OwnOutliers outliers;
  if (beside) ask_for_outliers(p, outliers, beside_thread, first_row, row_step, share.row_blocks);
  if ((threadIdx.x & 31) == 0) {
#pragma unroll 1
    for (int i = warp; i < p.stages; i += BLOCK_WARPS)
      mbarrier_init(room.full + 8 * i, 1), mbarrier_init(room.empty + 8 * i, STAGE_READERS * share.readers * ARRIVALS);
#if CLUSTER > 1
    if (warp == 0) mbarrier_init(room.bell, 1), mbarrier_expect(room.bell, p.M * BLOCK_ROWS * 4);
#endif
    if (BESIDE && warp == 0) {
      for (int i = 0; i < 2; i++) mbarrier_init(room.laid_out + 8 * i, LAYERS), mbarrier_init(room.looked_up + 8 * i, THREADS);
      mbarrier_init(room.sums, THREADS), mbarrier_init(room.added, 32);
    }
    if (OUTLIERS && warp == WARPS) init_barriers_of_outliers(p, share, room);
    mbarrier_init_done();
  }
  __syncthreads();
#if X_SHARE * CLUSTER > 1
  cluster_arrive();  // at barriers of this block others may arrive
#endif
  allow_next_kernel();
  if (X_FOLLOWS && warp == WARPS && share.stages > 0) fetch_turn(p, share, room, 0, 0, 0);
  if (X_FOLLOWS && warp < ALL_WARPS) wait_for_previous_kernel();
#if X_SHARE * CLUSTER > 1
  // Outliers' warps have nothing to do with other blocks and need not wait. Under racecheck those that do would then never go on.
  if (!beside || SANITIZE) cluster_wait();
#endif
  if (X_FOLLOWS && warp < ALL_WARPS) fetch_first_tokens(p, share, room);
  if (warp < WARPS) {
    lay_out_tables(p, room.tables, share.row_start * BLOCK_TILES, number);  // while weights and x come
    if constexpr (TRADE) registers_take<APART ? 224 : 232>();
    consume(p, share, room);
  } else {
    if constexpr (TRADE) registers_give<APART ? 56 : 40>();
    if (warp == WARPS) produce(p, share, room);
    if (BESIDE && warp == WARPS + 2) add_up_beside(p, share, room);
    if (BESIDE && (warp == WARPS + 1 || warp == WARPS + 3)) lay_out_beside(p, share, room, (warp - WARPS) / 2 * 32 + (threadIdx.x & 31));
#if PATCHES
    if (beside) {
      PatchInputs inputs = {share, room, p.stages};
      sum_patches(p, outliers, room.outliers, beside_thread, share.row_blocks, share.rotation, STAGE_TOKEN_BYTES, inputs);
    }
#else
    if (beside)
      sum_outliers(p, outliers, room.outliers, beside_thread, first_row, row_step, share.row_blocks,
                   [&] { wait_for_inputs(p, share, room, beside_thread); });
#endif
  }
}
