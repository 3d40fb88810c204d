// BESIDE: three warps of few_ring.cu that do what would make those that multiply wait for each other at the end of a row block. Two lay
// out the tables of rows of the next row block, in the other of two places (one alone delayed the warps that share its scheduler, and
// with them all others); one adds up the sums of the last row block. So a warp goes
// from one row block to the next when it has stored its own. Only the last row block ends as without them.
//
// Two places for tables and one for sums: the barriers say that tables lie there (laid_out) and are done with (looked_up), that all
// sums are there (sums) and that they are added up (added).

#pragma once

static_assert(!BESIDE || (BY_ROWS && !OUTLIERS && CLUSTER == 1), "warps beside the others have tables of rows to lay out");

INLINE u8* tables_of_block(const Room& room, int block) { return room.tables + (BESIDE ? block & 1 : 0) * BLOCK_TILES * ROW_TABLE_BYTES; }
INLINE int first_tile_of(const Share& share, int block) { return (share.row_start + block * share.row_step) * BLOCK_TILES; }

// Tables come two row blocks ahead, behind those that have been laid out from the same place. By LAYERS threads.
constexpr int LAYERS = 64;
INLINE void lay_out_beside(const Arguments& p, const Share& share, const Room& room, int thread) {
  auto ask = [&](int block) {
    if (block < share.row_blocks)
      ask_for_row_tables(p.table, first_tile_of(share, block), BLOCK_TILES, p.tables, shared_address(tables_of_block(room, block)), thread, LAYERS);
    copies_commit();
  };
  ask(1);
  if (share.row_blocks > 2)  // into the second-level cache, since its place is taken
    for (int i = thread; i < BLOCK_TILES * 4; i += LAYERS)
      if (first_tile_of(share, 2) + i / 4 < p.row_tiles)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(p.table + (size_t)first_tile_of(share, 2) * 256 + i * 64));
  for (int block = 1; block < share.row_blocks; block++) {
    const int place = block & 1;
    if (block > 1) mbarrier_wait(room.looked_up + 8 * place, (block / 2 - 1) & 1);
    if (block == 2) ask(2);  // the first ones are laid out by all others
    copies_wait<0>();
    barrier_of(5, LAYERS);
    lay_out_row_tables<BLOCK_TILES, LAYERS>(tables_of_block(room, block), thread);
    mbarrier_arrive(room.laid_out + 8 * place);
    barrier_of(5, LAYERS);  // what is asked for now comes to where both have read
    ask(block + 2);
  }
}

INLINE void add_up_beside(const Arguments& p, const Share& share, const Room& room) {
  const int lane = threadIdx.x & 31;
  const float factor = factor_of(p);
  wait_for_previous_kernel();
  for (int block = 0; block + 1 < share.row_blocks; block++) {
    const Outputs<32> outputs(p, first_tile_of(share, block), lane);
    mbarrier_wait(room.sums, block & 1);
    outputs.finish(room.partials, p, factor, nullptr);
    mbarrier_arrive(room.added);
  }
}
