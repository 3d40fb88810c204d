// A weight whose codes point into tables of up to 16 numbers, and what a caller hands over for it.
//
//     W[n, k] = table[t][code[n, k]] * (scale[n, group of k] * factor)      t: 0, the row n, or pick[n, group of k]
//
// Codes of 2, 3 or 4 bits lie as in layout.h with rows and columns exchanged: strips of 4 rows, tiles of 128 columns, steps
// of 16. Byte 16 * row + c of a limb's vector, field f, is the code of column 16 * step + c: the sixteen bytes of a
// row lie together, so each row can have a table of its own in the one instruction that every machine has for a lookup.
// Scales and picks lie as [strip][group][4]. The columns of a group whose size is no multiple of 16 are filled up to one.
#pragma once
#include "layout.h"

namespace aerogel {

constexpr int kLookupStrip = 4;
constexpr int kLookupTile = 128;
constexpr int kLookupStep = 16;
constexpr int kEntries = 16;

struct Lookup {
    const void* codes;
    const void* scale;
    const void* pick;    // one byte per scale, or null
    const void* number;  // bytes [tables][4][16]: the bytes of float32 numbers, lowest first
    const void* fixed;   // bytes [tables][2][16]: low and high bytes of integers within +-16383, number = integer * unit
    const void* unit;    // float32 [tables]; with a pick the same for all
    int64_t codes_bytes, scale_bytes, pick_bytes, number_bytes, fixed_bytes, unit_bytes;
    int64_t rows, columns;  // N, K
    int64_t group;          // columns that share a scale; 0 for all of them
    int64_t tables;         // 1; the rows filled up to whole strips; with a pick up to 256
    float factor;
    int32_t bits, scale_type;
};

// The same as the loops see it, with groups filled up to whole steps; what fills them follows the `used` columns of each.
struct FilledLookup : Lookup {
    int64_t used;
};

// What `Call::numerics` may be here beside kExact: integers of 15 bits, see lookup_kernel.h.
constexpr int32_t kFixed = 2;

}  // namespace aerogel
