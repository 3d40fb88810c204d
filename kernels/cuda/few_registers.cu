// Few tokens, weights through registers: each warp loads the next tile's words while it multiplies the present one's. No
// barrier stands in the loop, nothing but loads and matrix products; any compute capability from 8.0, any shape. Best where a
// block has only a few tiles, so that nearly all of its weights are on their way before the previous kernel has ended.
//
// Shared memory: tables, what outliers need, then for each warp two slots of [tokens][272 bytes] and the sides of its tiles; the partial sums
// later take the place of the slots. A slot is filled two tiles ahead, the words of codes one tile ahead. With outliers, which need
// all inputs, a warp fetches those of all its tiles at once, to where they stay.

#include "few_tokens.cuh"

// What lies beside one tile of each row tile: BYTES for each of 16 rows of the groups from `first` on, one run of a row tile's memory.
template <int BYTES> INLINE void fetch_groups(const Arguments& p, u32 to, const u8* from, int first_tile, int first) {
  constexpr int pieces = Side<1>::groups * BYTES;  // of 16 bytes, for a row tile
  const int valid = STEADY ? pieces : min(Side<1>::groups, p.groups - first) * BYTES;
  UNROLL for (int j = 0; j < (ROW_TILES * pieces + 31) / 32; j++) {
    const int i = (threadIdx.x & 31) + 32 * j, r = i / pieces, piece = i % pieces;
    const size_t place = (size_t)min(first_tile + r, p.row_tiles - 1) * p.groups * BYTES + piece;
    if (r < ROW_TILES && piece < valid) copy_async(to + r * Side<1>::bytes + piece * 16, from + 16 * place + (size_t)first * (16 * BYTES), 16);
  }
}
// Beside outliers a lane finds its pieces one by one: in whole runs 4.34 us became 5.09 us there (4096x4096, one token, an H100), where
// plain weights gain.
INLINE void fetch_pieces(const Arguments& p, u32 slot, int first_tile, int first) {
  constexpr int pieces = SCALE_BYTES + ZERO_BYTES + PICK_BYTES, per_tile = Side<1>::groups * pieces;  // of 16 bytes
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
INLINE void fetch_side(const Arguments& p, u32 slot, int first_tile, int tile) {
  if constexpr (GROUP == 0 && ZERO == 0 && TABLE != 3) return;
  const int first = group_of(tile, 0);
  if constexpr (OUTLIERS && !APART) return fetch_pieces(p, slot, first_tile, first);
  if constexpr (SCALE_BYTES) fetch_groups<SCALE_BYTES>(p, slot, p.scale, first_tile, first);
  if constexpr (ZERO_BYTES) fetch_groups<ZERO_BYTES>(p, slot + Side<1>::zeros, p.zero, first_tile, first);
  if constexpr (PICK_BYTES) fetch_groups<PICK_BYTES>(p, slot + Side<1>::picks, p.pick, first_tile, first);
}

constexpr bool SHARES_X = OUTLIERS && !EXACT && !APART;  // outliers meet the inputs of the codes, which then stay

struct Rows {  // where each row tile's codes begin, in this lane's eyes; rows beyond the last read the last
  const u8* codes[ROW_TILES];
};
INLINE Rows rows_of(const Arguments& p, int first_tile) {
  Rows rows;
  UNROLL for (int r = 0; r < ROW_TILES; r++)
    rows.codes[r] = p.codes + (size_t)min(first_tile + r, p.row_tiles - 1) * p.k_tiles * TILE_BYTES;
  return rows;
}
INLINE void fetch_words(const Rows& rows, int tile, u32 (*words)[WORDS]) {
  UNROLL for (int r = 0; r < ROW_TILES; r++)
    load_words_from_global(rows.codes[r] + (u32)(tile * TILE_BYTES), threadIdx.x & 31, words[r]);
}

extern "C" __global__ void __launch_bounds__(THREADS + OUTLIER_THREADS, BLOCKS) few_registers(const __grid_constant__ Arguments p) {
#if APART
  if (blockIdx.x < p.apart_blocks) return allow_next_kernel(), add_outliers_apart(p, shared, WARPS + OUTLIER_WARPS);
#endif
  const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, first_tile = (blockIdx.x - (APART ? p.apart_blocks : 0)) * ROW_TILES;
  const OutlierRoom outlier_place = outlier_room(p, shared + table_room(p.tables));
  const int table_bytes = table_room(p.tables) + outlier_bytes(p) + kept_bytes(p);  // and of what stands beside the codes
  const int sides = SHARES_X ? 0 : p.M * TOKEN_BYTES, slot_bytes = sides + ROW_TILES * Side<1>::bytes;
  const u32 slots = shared_address(shared) + table_bytes + warp * 2 * slot_bytes;
  const Rows rows = rows_of(p, first_tile);
  KeptColumns kept(p, shared_address(shared) + table_room(p.tables) + outlier_bytes(p), 0, warp);
  const float factor = factor_of(p);
  const u32 number = ask_for_tables(p, shared, first_tile);  // before all else
  allow_next_kernel();
  if (OUTLIERS && threadIdx.x >= THREADS) {
    OwnOutliers outliers;
    const int thread = threadIdx.x - THREADS;
    ask_for_outliers(p, outliers, thread, first_tile * 16, 0, 1);
    return sum_outliers(p, outliers, outlier_place, thread, first_tile * 16, 0, 1, [] { barrier_of(4, THREADS + OUTLIER_THREADS); });
  }
  int tile = warp;
  u32 words[ROW_TILES][WORDS], next[ROW_TILES][WORDS];
  if (tile < p.k_tiles) {
    fetch_words(rows, tile, words);
    fetch_side(p, slots + sides, first_tile, tile);
    if (tile + WARPS < p.k_tiles) fetch_side(p, slots + slot_bytes + sides, first_tile, tile + WARPS);
  }
  prefetch_row_scales(p, first_tile, threadIdx.x);
  if constexpr (KEPT) kept.copy(first_tile);
  lay_out_tables(p, shared, first_tile, number);
  if constexpr (TABLE) barrier_of(1, THREADS);
  OwnTables own_tables;
  own_tables.load(shared_address(shared), 0);
  wait_for_previous_kernel();
  if constexpr (OUTLIERS && !APART)
    for (int t = tile; t < p.k_tiles; t += WARPS) fetch_tokens(p, outlier_place.x + t * 256, t, outlier_place.x_stride, EXACT);
  if (!SHARES_X && tile < p.k_tiles) fetch_tokens(p, slots, tile);
  if constexpr (KEPT) kept.begin();
  copies_commit();
  if (!SHARES_X && tile + WARPS < p.k_tiles) fetch_tokens(p, slots + slot_bytes, tile + WARPS);
  copies_commit();

  float acc[ROW_TILES][TOKEN_TILES][4] = {};
  for (int turn = 0; tile < p.k_tiles; tile += WARPS, turn ^= 1) {
    const u32 slot = slots + turn * slot_bytes;
    if (tile + WARPS < p.k_tiles) fetch_words(rows, tile + WARPS, next);
    copies_wait<1>();
    __syncwarp();
    if (OUTLIERS && !APART && tile == warp) {
      if constexpr (OUTLIERS_TURNED)
        for (int t = tile; t < p.k_tiles; t += WARPS) turn_tokens(outlier_place.x + t * 256, outlier_place.x_stride);
      arrive_at(4, THREADS + OUTLIER_THREADS);
    }
    Tokens x;
    if constexpr (SHARES_X)
      load_tokens<OUTLIERS_TURNED>(outlier_place.x + tile * 256, outlier_place.x_stride, p.M, x);
    else
      load_tokens(slot, TOKEN_BYTES, p.M, x);
    const u8* side = shared + (slot - shared_address(shared)) + sides;
    u8* made = shared + warp * ROW_TILES * MADE_BYTES;
    make_planes<1>(made, side, Side<1>::bytes, tile, group_of(tile, 0), p.groups);
    UNROLL for (int r = 0; r < ROW_TILES; r++)
      multiply_tile<1>(words[r], side + r * Side<1>::bytes, r, tile, group_of(tile, 0), p.groups,
                       table_at(shared_address(shared), r, g), table_at(shared_address(shared), r, g + 8), own_tables[r], made + r * MADE_BYTES, x, acc[r]);
    __syncwarp();
    if (tile + 2 * WARPS < p.k_tiles) {
      fetch_side(p, slot + sides, first_tile, tile + 2 * WARPS);
      if constexpr (!SHARES_X) fetch_tokens(p, slot, tile + 2 * WARPS);
    }
    copies_commit();
    UNROLL for (int r = 0; r < ROW_TILES; r++) UNROLL for (int w = 0; w < WORDS; w++) words[r][w] = next[r][w];
  }
  if (OUTLIERS && !APART && warp >= p.k_tiles) copies_wait<0>(), arrive_at(4, THREADS + OUTLIER_THREADS);
  if constexpr (KEPT) copies_wait<0>(), kept.add(first_tile, acc);
  const Outputs<THREADS> outputs(p, first_tile, threadIdx.x);
  barrier_of(1, THREADS);
  float* partials = (float*)(shared + table_bytes);
  store_partials(partials, p, 0, warp, acc);
  barrier_of(OUTLIERS ? 2 : 1, THREADS + OUTLIER_THREADS);
  outputs.finish(partials, p, factor, sums_of_outliers(outlier_place, 0));
}
