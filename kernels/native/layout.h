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
//
// A code is an integer, or points into a table of 2^bits numbers:
//
//     W[n, k] = (u - 2^(bits-1) - zero) * scale        or        table[pick][u] * (scale * factor)
//
// with one table for the whole weight, or one of two picked for each scale: bit i of a strip and group is the pick of row i. Scales
// have a sign, which makes four of two (BitMoD's). Groups of any size: the columns of one that is no
// multiple of 8, an octet, are filled up to it, so that two steps have one scale; what fills them meets activations that are zero.
#pragma once
#include <cstddef>
#include <cstdint>

namespace aerogel {

constexpr int kStrip = 16;
constexpr int kTile = 32;
constexpr int kOctet = 8;  // columns, which have one scale whatever groups there are
constexpr int kVector = 64;

enum Type : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// Types of the scales of tables beyond those: bytes, a float of 4 exponent and 3 mantissa bits, a power of two, and a float of 5 and 3
// bits without a sign. What is no number in them is decoded as one: such scales have another type.
enum ScaleType : int32_t { kFloat8E4m3 = 3, kFloat8E8m0 = 4, kFloat8Ue5m3 = 5 };

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
    kBadOrder = 14,
};

struct Weight {
    const void* codes;
    const void* scale;
    const void* zero;   // null when symmetric, and with tables; signed bytes, or floats, see floating_zero
    const void* table;  // float32 [tables][2^bits], or null: codes are integers
    const void* pick;   // uint16 [strips][groups], a bit for each row: its table; or null: there is one
    int64_t codes_bytes, scale_bytes, zero_bytes, table_bytes, pick_bytes;
    int64_t rows, columns;  // N, K
    int64_t group;          // columns that share a scale; 0 for all of them
    float factor;           // of all scales, where there are tables
    int32_t bits, scale_type;
};

// What stands beside a weight and is added to its product: see beside.h. x, y and out are of one type.
struct Beside {
    const void *x, *y;           // [tokens, columns], [tokens, rows]
    void* out;                   // [tokens, rows]; may be y
    const int32_t* start;        // [rows + 1]: where the outliers of a row begin, ascending; null where there are none
    const void *column, *value;  // [outliers]: int16 or int32, and floats
    const int32_t* index;        // [kept]: inputs whose columns are kept; null where none are
    const void* kept_value;      // [rows, kept]
    const void* tiles;           // the outliers once more, for few tokens (outlier_tiles.h), or null
    int64_t tokens, rows, columns, outliers, kept, tiles_bytes;
    int32_t type, column_bytes, value_type, kept_type, threads;
};

struct Call {
    const void* x;     // [tokens, columns], contiguous
    const void* bias;  // [rows] or null
    void* y;           // [tokens, rows], contiguous
    int64_t x_bytes, y_bytes, bias_bytes;
    int64_t tokens;
    int32_t x_type, bias_type;  // y has x's type
    int32_t numerics, path, threads;
    // Added to the product, whatever the weight is, or null: a Beside of which only the weight's part counts. Where activations are rounded, the product
    // does not see the inputs of its kept columns.
    const Beside* beside;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether zero points are floats z in W = (u - z) * scale, of unsigned codes. A scale has two or four bytes, so that four bytes for
// each zero point are never fewer than those of the scales, and one byte always is.
inline bool floating_zero(const Weight& weight) { return weight.zero && weight.zero_bytes >= weight.scale_bytes; }

// Tables of a weight that picks among them: of 4 bits, what a register of 16-bit numbers holds.
constexpr int64_t kPickedTables = 2;

// The columns of a weight as they are stored, groups filled up.
struct Columns {
    int64_t count, group, groups;
};

inline Columns columns_of(const Weight& weight) {
    if (weight.group == 0) return {weight.columns, 0, 1};
    const int64_t groups = ceil_div(weight.columns, weight.group);
    if (weight.group % kOctet == 0 || groups == 1) return {weight.columns, weight.group, groups};
    const int64_t group = ceil_div(weight.group, kOctet) * kOctet;
    return {groups * group, group, groups};
}

}  // namespace aerogel
