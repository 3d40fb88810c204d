// BESIDE: a warp of few_ring.cu that does what would make those that multiply wait for each other at the end of a row block. It lays out
// the tables of rows of the next row block, in the other of two places, and adds up the sums of the last one: so a warp goes from one
// row block to the next when it has stored its own. Only the last row block ends as without it.
//
// Two places for tables and one for sums: the barriers say that tables lie there (laid_out) and are done with (looked_up), that all
// sums are there (sums) and that they are added up (added).

#pragma once

static_assert(!BESIDE || (BY_ROWS && !OUTLIERS && CLUSTER == 1), "a warp beside the others has tables of rows to lay out");

INLINE u8* tables_of_block(const Room& room, int block) { return room.tables + (BESIDE ? block & 1 : 0) * BLOCK_TILES * ROW_TABLE_BYTES; }
INLINE void work_beside(const Arguments& p, const Share& share, const Room& room) {
  const int lane = threadIdx.x & 31;
  const float factor = factor_of(p);
  auto first_tile = [&](int block) { return (share.row_start + block * share.row_step) * BLOCK_TILES; };
  auto ask = [&](int block) {
    if (block >= share.row_blocks) return;
    ask_for_row_tables(p.table, first_tile(block), BLOCK_TILES, p.tables, shared_address(tables_of_block(room, block)), lane, 32);
    copies_commit();
  };
  auto prefetch = [&](int block) {  // into the second-level cache
    const u16* rows = p.table + (size_t)first_tile(block) * 256;
    for (int i = lane; i < BLOCK_TILES * 4 && block < share.row_blocks; i += 32)
      if (first_tile(block) + i / 4 < p.row_tiles) asm volatile("prefetch.global.L2 [%0];" ::"l"(rows + i * 64));
  };
  ask(1);
  prefetch(2);
  for (int block = 0; block + 1 < share.row_blocks; block++) {
    const int next = block + 1, place = next & 1;
    copies_wait<0>();
    if (block > 0) mbarrier_wait(room.looked_up + 8 * place, (next / 2 - 1) & 1);
    __syncwarp();
    lay_out_row_tables(BLOCK_TILES, tables_of_block(room, next), lane, 32);
    mbarrier_arrive(room.laid_out + 8 * place);
    prefetch(next + 1);
    if (block == 0) wait_for_previous_kernel();
    mbarrier_wait(room.sums, block & 1);
    ask(next + 1);  // to where those of `block` came: the first ones are laid out by all others
    finish(room.partials, p, factor, first_tile(block), lane, nullptr, 32);
    mbarrier_arrive(room.added);
  }
}
