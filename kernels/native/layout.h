// How a packed weight lies in memory, and what a caller hands over. Everything that crosses the C boundary is here.
//
// A weight [N, K] is cut into strips of 16 rows and every strip into tiles of 32 columns. A strip is one contiguous stream,
// so a thread that owns some strips reads memory from front to back. A code u = q + 2^(bits-1) is split into limbs of 4, 2
// and 1 bits after the binary digits of `bits`, low bits in the widest limb (8 bits: one limb of whole bytes). In a tile the
// limbs lie one after the other, the widest first. A limb of width w is a row of 64-byte vectors; each vector holds 8 / w
// steps of four columns: byte 4 * row + j, field f (at bit w * f) is the code of column 4 * step + j of that row.
//
//     tile of 3 bits:  [lo2, steps 0-3][lo2, steps 4-7][hi1, steps 0-7]        3 * 64 bytes for 16 x 32 weights
//
// Why this way: the four bytes of a 32-bit lane belong to one row, so a shift and a mask give the operand of an int8 dot
// product (four columns of sixteen rows), and one permutation of 16-bit lanes gives two columns in bfloat16; the
// accumulator's lane is a row, so nothing is ever summed across lanes, and an activation is a broadcast.
//
// Scales lie as [strip][group][16] in their stored type, zero points as signed bytes in the same order.
#pragma once
#include <cstddef>
#include <cstdint>

namespace aerogel {

constexpr int kStrip = 16;
constexpr int kTile = 32;
constexpr int kVector = 64;

enum Type : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

enum Numerics : int32_t {
    kExact = 0,  // activations as they are, products and sums in float32
    kInt8 = 1,   // activations rounded to int8 per token and segment, exact integer sums within a segment
    kInt8Token = 2,  // the same with one scale for a whole token, as a checkpoint with int8 activations wants it
};

enum Status : int32_t {
    kDone = 0,
    kBadWidth = 1,
    kBadShape = 2,
    kBadGroup = 3,
    kBadType = 4,
    kTruncatedCodes = 5,
    kTruncatedScale = 6,
    kTruncatedZero = 7,
    kMisaligned = 8,
    kNoSuchPath = 9,
    kTruncatedActivations = 10,
    kOutOfMemory = 11,
    kBadTable = 12,
    kNoSuchRow = 13,
};

struct Weight {
    const void* codes;
    const void* scale;
    const void* zero;  // null when symmetric
    int64_t codes_bytes, scale_bytes, zero_bytes;
    int64_t rows, columns;  // N, K
    int64_t group;          // columns that share a scale; 0 for all of them
    int32_t bits, scale_type;
};

struct Call {
    const void* x;     // [tokens, columns], contiguous
    const void* bias;  // [rows] or null
    void* y;           // [tokens, rows], contiguous
    int64_t x_bytes, y_bytes, bias_bytes;
    int64_t tokens;
    int32_t x_type, bias_type;  // y has x's type
    int32_t numerics, path, threads;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace aerogel
