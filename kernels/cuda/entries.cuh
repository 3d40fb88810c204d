// Tables of 256 numbers of 16 bits, for all rows: codes are whole bytes, of a lane's words byte 2 (i % 2) + e of word i / 2 is half e of
// register i (BYTES in pack/tile_orders.py).
//
// The bytes of a warp's lanes are any of 256, so in one table its look-ups would meet in the banks of shared memory, 3.4 in one on
// average. There is a copy of the table for every lane (32 KB): each finds its numbers in a bank of its own, and a load takes one turn.
// Five instructions for a register: two sums of products of bytes for the places, two loads, one that joins the halves.
//
// Defines used: none. `place_of_pair` comes from tables.cuh.

#pragma once

// Entry e of lane l lies at 128 e + 4 l, in the lower half of four bytes. By whole warps, whose lanes hold eight entries each and tell
// each other; `table` at a multiple of 16 bytes.
constexpr int ENTRY_STEP = 32 * 4, ENTRIES_BYTES = 256 * ENTRY_STEP;
static __device__ __forceinline__ void fetch_entries(const u16* table, u8* room, int thread, int threads) {
  const int lane = thread & 31;
  const uint4 own = ((const uint4*)table)[lane];
  for (int four = thread >> 5; four < 64; four += threads >> 5) {  // entries 4 four .. 4 four + 3, eight lanes write each of them
    const u32 first = __shfl_sync(0xFFFFFFFFu, four & 1 ? own.z : own.x, four >> 1);
    const u32 last = __shfl_sync(0xFFFFFFFFu, four & 1 ? own.w : own.y, four >> 1);
    const u32 number = (lane & 16 ? last : first) >> (lane & 8) * 2;
    ((uint4*)room)[four * 32 + lane] = make_uint4(number, number, number, number);
  }
}

// Where the number of half `e` of register `i` of step `s` lies, entries being STEP bytes apart from `first` on. `low` and `high` are the
// step's two words.
template <int STEP> static __device__ __forceinline__ u32 place_of_entry(u32 low, u32 high, int i, int e, u32 first) {
  return place_of_pair<STEP>(i < 2 ? low : high, i % 2 * 2 + e, first);
}
