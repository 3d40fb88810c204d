// Sparse outliers beside a weight for a few tokens, added up by blocks of their own: for inputs that do not fit into shared memory
// beside a ring of weights. There is one block on a multiprocessor, and rows seldom divide so that all have the same work; those that
// would have little do the outliers instead.
//
// The first `apart_blocks` blocks of a launch read no codes. Each of them has one slice of the inputs, `apart_tiles` k tiles, in shared
// memory, turned so that the 8 numbers of a column lie side by side (of 16 tokens two times 8), and some of the rows. The others are
// the plain kernel; some warps of each wait for the sums of its rows and add up the slices.
//
// Outliers come in units of 64, of 8 rows 8 each, which are 256 bytes: four matrix products tokens x rows, each of 16 columns, two of
// each row. ldmatrix gathers the columns, from wherever they lie; it is fast where the 8 columns of a matrix lie in 8 kinds of banks,
// which are dealt when a weight is packed (cuda_apart.py). Of the other factor a lane has two numbers of one row in one of the four
// products, and nothing else; so 32 words are all values of a unit, and which product a lane is needed in never changes. The rows of
// a piece of 256 are sorted by how many outliers they have, so that the 8 rows of a unit have about as many.
//
//   word 0   of lane 16 h + 8 i + r: where the columns of slot 8 h + r lie, in products i and i + 2
//   word 1   of lane 4 g + t: the values of row g in product (t - g) % 4, whose slots are 2 t, 2 t + 1 (rows 4 to 7: 8 more)
//
// Up to 8 tokens half of the product's rows would be empty, so two products' columns are gathered at once and each product is
// that of its values with both, of which one half of the sums is wanted. What is not finite in a column may make sums of other rows NaN,
// for that token only, as in outliers.cuh.
//
// Who waits for whom. Sums go to `apart_sums`; when a warp has stored those of some groups of a piece it adds the number of groups to
// the piece's flag (a release: its lanes' stores come before, ordered by __syncwarp). A warp that wants sums of a piece polls the flag
// until all are there (an acquire: what it and, behind __syncwarp, its other lanes read then are those sums). When all such warps of a
// block have seen it, the block counts itself among the piece's readers, and the last one sets the flag to zero for the next launch; the
// count of readers wraps around by itself. Flags and sums are touched behind griddepcontrol.wait only, so never while an earlier launch
// on the stream still uses them; launches that may run at once have flags of their own (stream_flags.py). Blocks start in the order of
// their numbers, and the first ones wait for nothing but the previous kernel: so those that are waited for always run.

#pragma once

constexpr int PIECE_ROWS = 256, PIECE_GROUPS = PIECE_ROWS / 8;
constexpr int APART_TOKENS = OUTLIERS, APART_PLANES = APART_TOKENS > 8 ? 2 : 1;
constexpr int APART_AHEAD = 16;  // units that a warp has asked for
constexpr int APART_CHUNKS = 8 * APART_PLANES;  // of 32 columns, that a warp turns at once; of 16 tokens nearly a whole slice is on its way

INLINE int pieces_of(const Arguments& p) { return (p.N + PIECE_ROWS - 1) / PIECE_ROWS; }

// ---- Adding up -------------------------------------------------------------------------------------------------------
// The slice of 8 tokens, from `plane * 8` on: column k, 16 bytes, at place (k & ~7) + (k + 2 (k / 8)) % 8, so that the eight columns that
// a warp stores at once lie in different banks. Absent tokens are copies of the last.
INLINE void turn_slice(const Arguments& p, u32 to, int plane, int first_tile, int tiles, int warp, int warps) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, chunks = tiles * 4;
  const u16* from = p.x + (size_t)min(g + 8 * plane, p.M - 1) * p.x_stride + 8 * t;
  const int row = lane & 7;  // of matrix lane / 8: column 8 * (row / 2) + 2 * (lane / 8) + row % 2 of a chunk
  const u32 own = (row >> 1) * 128 + (row + 2 * (lane >> 3) & 7) * 16;
  for (int chunk = warp * APART_CHUNKS; chunk < chunks; chunk += warps * APART_CHUNKS) {
    uint4 found[APART_CHUNKS];
    UNROLL for (int c = 0; c < APART_CHUNKS; c++) {
      const int column = first_tile * 128 + (chunk + c) * 32;
      found[c] = chunk + c < chunks && column + 8 * t < p.x_columns ? __ldcg((const uint4*)(from + column)) : make_uint4(0, 0, 0, 0);
    }
    UNROLL for (int c = 0; c < APART_CHUNKS; c++) {
      if (chunk + c >= chunks) break;
      const u32 words[4] = {found[c].x, found[c].y, found[c].z, found[c].w}, at = to + (chunk + c) * 512;
#if __CUDA_ARCH__ >= 900
      store_matrices_across(at + own, words);
#else
      UNROLL for (int i = 0; i < 4; i++) store_shared_u32(at + (g >> 1) * 128 + 4 * t + (g + 2 * i & 7) * 16, across(words[i]));
#endif
    }
  }
}

// The groups of 8 rows that one warp adds up, `part` of `parts` of those that the others want in their first round over the rows, then in
// their second, and so on.
struct ApartGroups {
  int part, parts, round_rows, all_pieces, pieces = 0, rows = 0, group = 0, last = 0;  // pieces, rows: up to the present round's end

  INLINE ApartGroups(const Arguments& p, int part, int parts) : part(part), parts(parts), round_rows(p.apart_round_rows), all_pieces(pieces_of(p)) {
    next_round();
  }
  INLINE bool done() const { return group == last; }
  INLINE void next_round() {
    while (group == last && pieces < all_pieces) {
      const u32 first = pieces * PIECE_GROUPS;
      rows += round_rows, pieces = min((rows + PIECE_ROWS - 1) / PIECE_ROWS, all_pieces);
      const u32 groups = pieces * PIECE_GROUPS - first;
      group = first + groups * part / (u32)parts, last = first + groups * (part + 1) / (u32)parts;
    }
  }
  INLINE void next() {
    if (++group == last) next_round();
  }
};

// The units of these groups, in turn, APART_AHEAD of them on their way into shared memory. What is on its way in registers instead is
// waited for all at once: there are six counters of loads, and a counter is waited for until it is zero.
struct ApartUnits {
  const Arguments& p;
  const int* start;  // of the slice
  ApartGroups groups;
  u32 place;         // the lane's 8 bytes of the first unit in shared memory
  const uint2* from = nullptr;
  int left, next_begin, next_end;  // of the run of units that lie side by side, and of the next run
  u32 slot = 0;                    // of the oldest unit, whose words the lane has
  uint2 words;

  INLINE void find_next() {  // asked for one run ahead
    next_begin = 0, next_end = -1;
    if (groups.done()) return;
    next_begin = __ldg(start + groups.group), next_end = __ldg(start + groups.last);
    groups.group = groups.last, groups.next_round();
  }
  INLINE void next_run() {
    do {
      left = 0;
      if (next_end < 0) return;  // there is none
      from = p.apart_units + (size_t)next_begin * 32 + (threadIdx.x & 31), left = next_end - next_begin;
      find_next();
    } while (left == 0);
  }
  INLINE ApartUnits(const Arguments& p, const int* start, const ApartGroups& own, u32 room) : p(p), start(start), groups(own) {
    place = room + (threadIdx.x & 31) * 8;
    find_next(), next_run();
#pragma unroll 1
    for (int i = 0; i < APART_AHEAD; i++) fetch();
    copies_wait<APART_AHEAD - 1>();
    words = read(slot);
  }
  // Into the place of the oldest one; what a lane reads it has copied itself. Behind the last unit come zeros, which are not added
  // but read.
  INLINE void fetch() {
    copy_async_8(place + slot * 256, from, left > 0 ? 8 : 0);
    copies_commit();
    slot = (slot + 1) % APART_AHEAD, from += 32;
    if (--left == 0) next_run();
  }
  INLINE uint2 read(u32 slot) const {
    u32 found[2];
    load_shared_u32x2(found, place + slot * 256);
    return make_uint2(found[0], found[1]);
  }
  // The oldest one's words; those of the next one are asked for, so that they are here in time.
  INLINE uint2 take() {
    const uint2 taken = words;
    copies_wait<APART_AHEAD - 2>();
    words = read((slot + 1) % APART_AHEAD);
    return taken;
  }
};

// A unit whose columns have been gathered: of two products each, or up to 16 tokens of one.
struct Gathered {
  u32 columns[2 * APART_PLANES][4], values;

  // x: the plane that the lane gathers from.
  INLINE void gather(u32 x, uint2 unit) {
    auto lower = [](u32 v) { return __byte_perm(v, 0, 0x4410) * 16; };
    auto upper = [](u32 v) { return __byte_perm(v, 0, 0x4432) * 16; };
    values = unit.y;
    if constexpr (APART_PLANES == 1) {
      load_matrices_across(columns[0], x + lower(unit.x)), load_matrices_across(columns[1], x + upper(unit.x));
    } else {
      const int lane = threadIdx.x & 31, from = (lane & 16) + (lane & 7);
      const u32 even = __shfl_sync(~0u, unit.x, from), odd = __shfl_sync(~0u, unit.x, from + 8);
      load_matrices_across(columns[0], x + lower(even)), load_matrices_across(columns[1], x + lower(odd));
      load_matrices_across(columns[2 * APART_PLANES - 2], x + upper(even)), load_matrices_across(columns[2 * APART_PLANES - 1], x + upper(odd));
    }
  }
};

// The sums of one group after the other.
struct ApartSums {
  const Arguments& p;
  int slice;
  const int* start;
  ApartGroups now, ahead;
  int left, ahead_begin, ahead_end;  // units of the group that are not added, where those of the next one are
  u32 rows, ahead_rows;              // of the lane's two rows their places in the piece
  int stored = 0;                    // groups since the flag was raised
  float sums[4][4] = {};             // of each product; up to 8 tokens 0, 1 of the even ones and 2, 3 of the odd ones

  INLINE void find_ahead() {
    ahead.next();
    if (ahead.done()) return;
    ahead_begin = __ldg(start + ahead.group), ahead_end = __ldg(start + ahead.group + 1);
    ahead_rows = rows_of(ahead.group);
  }
  INLINE u32 rows_of(int group) const {
    return __ldg((const u16*)(p.apart_rows + ((size_t)slice * pieces_of(p) * PIECE_GROUPS + group) * 8) + (threadIdx.x & 3));
  }
  INLINE ApartSums(const Arguments& p, int slice, const int* start, const ApartGroups& own) : p(p), slice(slice), start(start), now(own), ahead(own) {
    if (now.done()) return;
    left = __ldg(start + now.group + 1) - __ldg(start + now.group), rows = rows_of(now.group);
    find_ahead();
  }
  // The group's sums to [slice][row][token]; and the flag, where the piece or the warp's part ends.
  INLINE void store() {
    const int lane = threadIdx.x & 31, g = lane >> 2, piece = now.group / PIECE_GROUPS;
    float* to = p.apart_sums + ((size_t)slice * pieces_of(p) + piece) * (PIECE_ROWS * APART_TOKENS) + g;
    UNROLL for (int e = 0; e < 2; e++) UNROLL for (int plane = 0; plane < APART_PLANES; plane++) {
      const int row = e ? rows >> 8 : rows & 255, odd = APART_PLANES == 1 ? 2 : 2 * plane;
      to[row * APART_TOKENS + 8 * plane] = sums[0][2 * plane + e] + sums[2][2 * plane + e] + (sums[1][odd + e] + sums[3][odd + e]);
    }
    UNROLL for (int i = 0; i < 4; i++) UNROLL for (int j = 0; j < 4; j++) sums[i][j] = 0;
    stored++;
    if (ahead.done() || ahead.group / PIECE_GROUPS != piece) {
      __syncwarp();
      if (lane == 0) add_released(p.apart_flags + piece, stored);
      stored = 0;
    }
    now = ahead, left = ahead_end - ahead_begin, rows = ahead_rows;
    if (!now.done()) find_ahead();
  }
  // mask: of each product whether the lane's values are in it, for rows 0 to 3 and 4 to 7.
  INLINE void multiply(const Gathered& unit, const u32 (*mask)[2]) {
    UNROLL for (int j = 0; j < 4; j++)
      matrix_multiply(sums[j], unit.columns[APART_PLANES == 1 ? j / 2 : j], unit.values & mask[j][0], unit.values & mask[j][1], sums[j]);
    left--;
  }
};

// What one of the first blocks does, of `warps` warps.
INLINE void add_outliers_apart(const Arguments& p, u8* room, int warps) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int slice = blockIdx.x % p.apart_slices, blocks = p.apart_blocks / p.apart_slices;  // of each slice; warp by warp, all take turns
  const ApartGroups own(p, warp * blocks + blockIdx.x / p.apart_slices, blocks * warps);
  const int* start = p.apart_start + slice * pieces_of(p) * PIECE_GROUPS;
  const u32 x = shared_address(room), plane_bytes = p.apart_tiles * 128 * 16;
  ApartUnits given(p, start, own, x + APART_PLANES * plane_bytes + warp * APART_AHEAD * 256);
  ApartSums sums(p, slice, start, own);
  u32 mask[4][2];
  UNROLL for (int j = 0; j < 4; j++) UNROLL for (int h = 0; h < 2; h++) mask[j][h] = kept_in_register(((t - g) & 3) == j && g >> 2 == h ? ~0u : 0);
  const int first_tile = slice * p.apart_tiles, tiles = min(p.apart_tiles, p.k_tiles - first_tile);
  wait_for_previous_kernel();
  UNROLL for (int plane = 0; plane < APART_PLANES; plane++) turn_slice(p, x + plane * plane_bytes, plane, first_tile, tiles, warp, warps);
  __syncthreads();
  const u32 plane = kept_in_register(x + (APART_PLANES == 2 ? (lane >> 3 & 1) * plane_bytes : 0));
  Gathered unit, next;
  unit.gather(plane, given.take());
  auto step = [&](const Gathered& present, Gathered& next) {
    while (sums.left == 0 && !sums.now.done()) sums.store();
    if (sums.now.done()) return false;
    given.fetch();
    next.gather(plane, given.take());  // while the present one's products are made
    sums.multiply(present, mask);
    return true;
  };
#pragma unroll 1
  while (step(unit, next) && step(next, unit));  // in turns: one that is copied would be waited for
  copies_wait<0>();
}

// ---- Collecting ------------------------------------------------------------------------------------------------------
// How many row blocks have rows of a piece, each of them by all blocks of a cluster.
INLINE u32 readers_of(const Arguments& p, int piece) {
  const int first = piece * PIECE_ROWS, last = min(first + PIECE_ROWS, p.N) - 1;
  return (last / BLOCK_ROWS - first / BLOCK_ROWS + 1) * CLUSTER;
}
// What OUTLIER_WARPS warps of the other blocks do, of which `thread` is one: the sums of the block's rows, all slices in order, to where
// those that multiply meet them. No flag is set to zero before all of these warps have seen it.
INLINE void collect_outliers(const Arguments& p, float* room, int thread, int first_row, int row_step, int row_blocks) {
  const size_t slice_floats = (size_t)pieces_of(p) * PIECE_ROWS * APART_TOKENS;
  wait_for_previous_kernel();
  for (int block = 0; block < row_blocks; block++) {
    const int first = first_row + block * row_step, rows = min(BLOCK_ROWS, p.N - first);  // none where blocks that share x have no rows
    const int piece = first / PIECE_ROWS + (thread & 31);
    const bool reads = rows > 0 && piece <= (first + rows - 1) / PIECE_ROWS;
    if (reads)
      while (read_acquired(p.apart_flags + piece) != (u32)(PIECE_GROUPS * p.apart_slices)) sleep_a_little();
    __syncwarp();
    float* to = room + block % 2 * APART_TOKENS * BLOCK_ROWS;
    const float* from = p.apart_sums + (size_t)first * APART_TOKENS;
    for (int i = thread * 4; i < rows * APART_TOKENS; i += OUTLIER_THREADS * 4) {
      float4 sum = {0, 0, 0, 0};
      for (int slice = 0; slice < p.apart_slices; slice += 4) {
        float4 part[4];  // all asked for before any is added
        UNROLL for (int j = 0; j < 4; j++)
          part[j] = slice + j < p.apart_slices ? __ldcg((const float4*)(from + (slice + j) * slice_floats + i)) : make_float4(0, 0, 0, 0);
        UNROLL for (int j = 0; j < 4; j++) sum.x += part[j].x, sum.y += part[j].y, sum.z += part[j].z, sum.w += part[j].w;
      }
      float* place = to + i % APART_TOKENS * BLOCK_ROWS + i / APART_TOKENS;
      place[0] = sum.x, place[BLOCK_ROWS] = sum.y, place[2 * BLOCK_ROWS] = sum.z, place[3 * BLOCK_ROWS] = sum.w;
    }
    barrier_of(3, OUTLIER_THREADS);
    if (reads && thread < 32) {
      const u32 all = readers_of(p, piece);
      if (increment_wrapping(p.apart_flags + pieces_of(p) + piece, all - 1) == all - 1) store_relaxed(p.apart_flags + piece, 0);
    }
    barrier_of(2, THREADS + OUTLIER_THREADS);
  }
}
