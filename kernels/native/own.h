// A weight whose rows have tables of their own, for each group of columns or for all of them, and what a caller hands over for it.
//
//     W[n, k] = table[n, group of k][code[n, k]]          1 to 4 bits, numbers in bfloat16
//
// Codebooks that were fitted to a row are such weights; so are sums of bit planes, whose 2^planes values in a group are a table.
// Codes lie as in lookup.h: strips of 4 rows, tiles of 128 columns, steps of 16. Tables lie as [strip][group][half][row][16 bytes],
// of up to 3 bits one half: the low bytes of eight numbers, then the high ones; of 4 bits two halves, low and high bytes of
// sixteen.
//
// Rows may share tables, which then change as often as every eight columns (ShiftAddLLM's blocks). Those lie as [run of rows]
// [step of 16 columns][byte][first or last eight columns][8 or 16 bytes]: one lookup with a bit of the column in its index.
#pragma once
#include "lookup.h"

namespace aerogel {

struct OwnTables {
    const void* codes;
    const void* table;
    int64_t codes_bytes, table_bytes;
    int64_t rows, columns;  // N, K
    int64_t group;          // columns that share a table, a multiple of 16; 0 for all of them, and where rows share tables
    int64_t shared;         // rows that share tables, a multiple of 4; 0: each has its own
    int32_t bits;
};

// Bytes of the tables of a strip in a group, and of a run of rows in a step.
constexpr int64_t own_table_bytes(int bits) { return bits <= 3 ? 64 : 128; }
constexpr int64_t shared_table_bytes(int bits) { return own_table_bytes(bits) / 2; }

// How many columns tables hold for, and how often they change along a row.
inline int64_t own_table_columns(const OwnTables& w) { return w.shared ? kLookupStep : w.group ? w.group : w.columns; }
inline int64_t own_table_groups(const OwnTables& w) { return ceil_div(w.columns, own_table_columns(w)); }

}  // namespace aerogel
