// What one call works on, and the activations as the kernels read them.
//
// Columns are summed in segments that share one weight scale (and, with int8 activations, one activation scale):
//
//     y[m, n] = sum over segments s of  scale[n, group of s] * (dot(codes, x) - offset[n, group of s] * sum of x)
//
// A segment is the longest run of whole tiles that divides the group and is not longer than the arithmetic allows: sums
// of a bounded length keep float32 accurate. Groups that are not made of whole tiles (16, 48, 72, ...) have ragged segments, which
// end with any octet: whole groups, or equal parts of them as long as the arithmetic allows. Activations are copied into [run of tiles][block of rows][tile][row][32 columns]: what meets a decoded panel lies together, and no two
// parts of it fight for a place in a cache. A row is one term of one token (see numerics.h); a block's missing rows are zeros.
#pragma once
#include "adding.h"
#include "int8.h"
#if defined(__AVX512BF16__)
#include "exact_bfloat.h"
#else
#include "exact_float.h"
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
#include "pairs.h"
#endif

namespace aerogel {
namespace UNIT {

constexpr int64_t kBlockTiles = 8;  // of a decoded panel: 256 columns, which stay in the first-level cache
constexpr int kOctets = kTile / kOctet;

struct Plan {
    const Weight* weight;
    const Call* call;
    Columns columns;
    int64_t strips, tiles, segments, strip_bytes;
    int64_t segment_tiles;       // whole tiles of a segment; 0: segments are ragged
    int64_t segments_per_group;
    int64_t segment_octets;      // of a ragged segment; the last of a group may have fewer
    int64_t terms, tokens_per_block, blocks;
    int block_rows;
    Form form;       // what the loops take the codes for
    bool few;        // the loop for few rows runs it
    bool folded;     // decoded operands have their scales multiplied in, and segments know no groups
    bool moved;      // int8 activations have 128 added
    const Adding* adding;  // what is added to rows by those who made them, or null
    uint8_t* x;      // [run of kBlockTiles tiles][block][tile][row][row_bytes]
    float* x_sum;    // [block][segment][row]
    float* x_scale;  // [block][segment][row], int8 only
    int32_t* group_at;    // [octet] the group; behind the last there are zeros to multiply, so any will do
    int32_t* segment_at;  // [octet + 1] the segment; none behind the last octet
    int row_bytes;
    float factor_of_all;  // of the results, before the bias
    float bias;           // of the codes, see numerics.h
    alignas(64) uint8_t decoder[kDecoderBytes];  // see numerics.h

    bool ragged() const { return segment_tiles == 0; }
    int64_t group_of(int64_t segment) const { return segment / segments_per_group; }
    int64_t octets() const { return tiles * kOctets; }
    // Whether a segment ends with an octet.
    bool ends(int64_t octet) const { return segment_at[octet] != segment_at[octet + 1]; }
    const uint8_t* x_at(int64_t block, int64_t tile) const {
        const int64_t first = tile / kBlockTiles * kBlockTiles, count = tiles - first < kBlockTiles ? tiles - first : kBlockTiles;
        return x + (blocks == 1 ? tile : first * blocks + block * count + tile - first) * block_rows * row_bytes;
    }
    int64_t factor(int64_t block, int64_t segment) const { return (block * segments + segment) * block_rows; }
};

inline int64_t segment_tiles(const Columns& columns, int64_t longest) {
    if (columns.groups == 1) return longest / kTile;
    if (columns.group % kTile) return 0;
    int64_t tiles = longest / kTile;
    while ((columns.group / kTile) % tiles) --tiles;
    return tiles;
}

// The segments of a plan, which know no groups where scales are folded.
template <class P>
inline void set_segments(Plan& plan, bool folded) {
    plan.folded = folded;
    plan.segment_tiles = folded ? P::kLongestSegment / kTile : segment_tiles(plan.columns, P::kLongestSegment);
    if (plan.ragged()) {
        const int64_t octets = plan.columns.group / kOctet;
        plan.segments_per_group = ceil_div(octets, P::kLongestSegment / kOctet);
        plan.segment_octets = ceil_div(octets, plan.segments_per_group);
        plan.segments = plan.columns.groups * plan.segments_per_group;
    } else {
        plan.segments = ceil_div(plan.tiles, plan.segment_tiles);
        plan.segments_per_group = plan.columns.groups == 1 || folded ? plan.segments : plan.columns.group / kTile / plan.segment_tiles;
    }
}

// Writes which group and which segment every octet belongs to.
inline void place_octets(const Plan& plan) {
    const int64_t per_group = plan.columns.groups > 1 ? plan.columns.group / kOctet : plan.octets();
    int64_t group = 0, within = 0;
    for (int64_t octet = 0; octet < plan.octets(); ++octet, ++within) {
        if (within == per_group && group + 1 < plan.columns.groups) ++group, within = 0;
        plan.group_at[octet] = static_cast<int32_t>(group);
        if (!plan.ragged()) {
            plan.segment_at[octet] = static_cast<int32_t>(octet / (plan.segment_tiles * kOctets));
        } else {
            const int64_t part = within < per_group ? within / plan.segment_octets : plan.segments_per_group - 1;
            plan.segment_at[octet] = static_cast<int32_t>(group * plan.segments_per_group + part);
        }
    }
    plan.segment_at[plan.octets()] = -1;
}

template <class P>
inline Plan make_plan(const Weight& weight, const Call& call) {
    Plan plan{};
    plan.weight = &weight, plan.call = &call;
    plan.columns = columns_of(weight);
    plan.strips = ceil_div(weight.rows, kStrip), plan.tiles = ceil_div(plan.columns.count, kTile);
    plan.strip_bytes = plan.tiles * kVector * weight.bits;
    plan.terms = !P::kTerms || call.x_type == kBfloat16 ? 1 : call.x_type == kFloat16 ? 2 : 3;
    set_segments<P>(plan, false);
    plan.row_bytes = 8 * P::kOperands * P::kWordBytes;
    return plan;
}

// Sum of sixteen lanes, always in the same order.
INLINE float lane_sum(const F16& v) {
    float lanes[16];
    store(lanes, v);
    for (int width = 8; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    return lanes[0];
}

// Where an octet's columns lie among those of the weight, and how many of them there are; fewer where a group is filled up.
struct Octet {
    int64_t first, count;
};
inline Octet octet_at(const Plan& plan, int64_t begin) {
    const int64_t columns = plan.weight->columns, group = plan.weight->group;
    int64_t first = begin, stop = columns;
    if (plan.columns.group != group) {
        const int64_t number = begin / plan.columns.group;
        first = number * group + begin % plan.columns.group;
        if ((number + 1) * group < columns) stop = (number + 1) * group;
    }
    const int64_t left = stop - first;
    return {first, left < 0 ? 0 : left < kOctet ? left : kOctet};
}

// 32 columns of a token from column `begin` on as floats, zeros after the last.
INLINE void read_tile(const Plan& plan, int64_t token, int64_t begin, float* to) {
    const int64_t row = token * plan.weight->columns;
    if (plan.columns.group == plan.weight->group && begin + kTile <= plan.weight->columns) {
        store(to, load_floats(plan.call->x, row + begin, plan.call->x_type));
        store(to + 16, load_floats(plan.call->x, row + begin + 16, plan.call->x_type));
        return;
    }
    for (int64_t octet = 0; octet < kTile; octet += kOctet) {
        const Octet at = octet_at(plan, begin + octet);
        for (int64_t k = 0; k < kOctet; ++k) {
            to[octet + k] = k < at.count ? read_float(plan.call->x, row + at.first + k, plan.call->x_type) : 0.0f;
        }
    }
}

#if defined(__AVX512BF16__)
// The leading bfloat16 of 32 floats, in the order [4t, 4t+2, 4t+1, 4t+3] that the operands have; what is left stays.
INLINE void split_term(float* values, uint8_t* to, bool last) {
    alignas(64) static const uint16_t order[32] = {1,  5,  3,  7,  9,  13, 11, 15, 17, 21, 19, 23, 25, 29, 27, 31,
                                                   33, 37, 35, 39, 41, 45, 43, 47, 49, 53, 51, 55, 57, 61, 59, 63};
    __m512 value[2];
    __m512i high[2];
    for (int i = 0; i < 2; ++i) {
        value[i] = _mm512_loadu_ps(values + 16 * i);
        high[i] = _mm512_and_si512(_mm512_castps_si512(value[i]), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
        // A NaN must not lose the bits that make it one.
        high[i] = _mm512_mask_or_epi32(high[i], _mm512_cmp_ps_mask(value[i], value[i], _CMP_UNORD_Q), high[i],
                                       _mm512_set1_epi32(0x00400000));
        if (!last) {
            const __mmask16 finite = static_cast<__mmask16>(~_mm512_fpclass_ps_mask(value[i], 0x99));
            _mm512_storeu_ps(values + 16 * i, _mm512_maskz_sub_ps(finite, value[i], _mm512_castsi512_ps(high[i])));
        }
    }
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(high[0], _mm512_load_si512(order), high[1]));
}
#endif

#if defined(__AVX512BF16__)
// 32 columns of a token that is bfloat16 already, zeros after the last; and the same where groups are filled up.
INLINE __m512i bfloats_at(const uint16_t* from, int64_t begin, int64_t columns) {
    const int64_t left = columns - begin;
    return _mm512_maskz_loadu_epi16(left >= kTile ? 0xffffffffu : left > 0 ? (1u << left) - 1u : 0u, from + begin);
}
inline __m512i bfloats_of_octets(const Plan& plan, const uint16_t* from, int64_t begin) {
    alignas(64) uint16_t values[kTile];
    for (int i = 0; i < kOctets; ++i) {
        const Octet at = octet_at(plan, begin + kOctet * i);
        const __mmask8 there = static_cast<__mmask8>((1u << at.count) - 1u);
        _mm_store_si128(reinterpret_cast<__m128i*>(values + kOctet * i), _mm_maskz_loadu_epi16(there, from + at.first));
    }
    return _mm512_load_si512(values);
}

// `place_exact` of such a token: its numbers only change their order, and are summed in pairs.
inline void place_bfloats(const Plan& plan, int64_t token, int64_t first, int64_t count) {
    alignas(64) static const uint16_t order[32] = {0,  2,  1,  3,  4,  6,  5,  7,  8,  10, 9,  11, 12, 14, 13, 15,
                                                   16, 18, 17, 19, 20, 22, 21, 23, 24, 26, 25, 27, 28, 30, 29, 31};
    const int64_t block = token / plan.tokens_per_block, row = token % plan.tokens_per_block, columns = plan.weight->columns;
    const uint16_t* from = static_cast<const uint16_t*>(plan.call->x) + token * columns;
    const __m512i places = _mm512_load_si512(order), ones = _mm512_set1_epi16(0x3f80);
    const bool filled = plan.columns.group != plan.weight->group;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t tile = first; tile < first + count; ++tile) {
        const __m512i values = filled ? bfloats_of_octets(plan, from, tile * kTile) : bfloats_at(from, tile * kTile, columns);
        uint8_t* to = const_cast<uint8_t*>(plan.x_at(block, tile)) + row * plan.row_bytes;
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(places, values));
        sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(values), reinterpret_cast<__m512bh>(ones));
    }
    if (!plan.ragged()) {
        plan.x_sum[plan.factor(block, first / plan.segment_tiles) + row] = _mm512_reduce_add_ps(sum);
        return;
    }
    float lanes[16];
    _mm512_storeu_ps(lanes, sum);
    for (int i = 0; i < kOctets; ++i) {
        const float* pairs = lanes + 4 * i;
        plan.x_sum[plan.factor(block, plan.segment_at[first * kOctets + i]) + row] += (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]);
    }
}
#endif

// Places a run of tiles of one token, which is one segment, or one tile of ragged ones, with its sums.
template <bool PAIRS>
inline void place_exact(const Plan& plan, int64_t token, int64_t first, int64_t count) {
    const int64_t block = token / plan.tokens_per_block, row = token % plan.tokens_per_block * plan.terms;
    F16 sums[3][2];
    for (auto& sum : sums) sum[0] = sum[1] = zero_f();
    for (int64_t tile = first; tile < first + count; ++tile) {
        float values[kTile];
        read_tile(plan, token, tile * kTile, values);
        for (int64_t term = 0; term < plan.terms; ++term) {
            uint8_t* to = const_cast<uint8_t*>(plan.x_at(block, tile)) + (row + term) * plan.row_bytes;
            float part[kTile];
            memcpy(part, values, sizeof part);
#if defined(__AVX512BF16__)
            split_term(values, to, term + 1 == plan.terms);
            if (term + 1 < plan.terms) {
                for (int k = 0; k < kTile; ++k) part[k] -= values[k];
            }
#else
            if constexpr (PAIRS) {
                for (int k = 0; k < kTile; k += 4) {
                    const float swapped[4] = {part[k], part[k + 2], part[k + 1], part[k + 3]};
                    memcpy(to + 4 * k, swapped, sizeof swapped);
                }
            } else {
                memcpy(to, part, sizeof part);
            }
#endif
            sums[term][0] = sums[term][0] + load<F16>(part);
            sums[term][1] = sums[term][1] + load<F16>(part + 16);
        }
    }
    for (int64_t term = 0; term < plan.terms; ++term) {
        if (!plan.ragged()) {
            plan.x_sum[plan.factor(block, first / plan.segment_tiles) + row + term] = lane_sum(sums[term][0] + sums[term][1]);
            continue;
        }
        float lanes[kTile];
        store(lanes, sums[term][0]), store(lanes + 16, sums[term][1]);
        for (int k = 0; k < kTile; ++k) plan.x_sum[plan.factor(block, plan.segment_at[first * kOctets + k / kOctet]) + row + term] += lanes[k];
    }
}

// How a segment of a token is rounded: values times `inverse`; `scale` undoes it and is not a number where one of them
// is not finite.
struct Rounding {
    float inverse, scale;
};

// What is read together for rounding: a tile, or an octet with zeros behind it where segments are ragged.
template <bool RAGGED>
struct Columned {
    static constexpr int kColumns = RAGGED ? kOctet : kTile, kVectors = RAGGED ? 1 : 2;

    static INLINE void read(const Plan& plan, int64_t token, int64_t begin, float (&values)[kVectors * 16]) {
        if constexpr (!RAGGED) return read_tile(plan, token, begin, values);
        const Octet at = octet_at(plan, begin);
        memset(values, 0, sizeof values);
        for (int64_t k = 0; k < at.count; ++k) values[k] = read_float(plan.call->x, token * plan.weight->columns + at.first + k, plan.call->x_type);
    }
};

template <bool RAGGED>
inline Rounding rounding_of(const Plan& plan, int64_t token, int64_t begin, int64_t stop) {
    using Some = Columned<RAGGED>;
    float values[Some::kVectors * 16];
    F16 largest = zero_f(), poison = zero_f();
    for (; begin < stop; begin += Some::kColumns) {
        Some::read(plan, token, begin, values);
        for (int i = 0; i < Some::kVectors; ++i) {
            const F16 part = load<F16>(values + 16 * i);
            largest = larger(magnitude(part), largest);
            poison = multiply_add(part, zero_f(), poison);  // stays 0, unless something is infinite or not a number
        }
    }
    const float peak = largest_of(largest);
    // Anything smaller would make the inverse overflow; it rounds to 0 with scale 1.
    const float unit = peak > 1e-30f ? peak / 127.0f : 1.0f;
    return {1.0f / unit, unit + total_of(poison)};
}

// Places columns begin .. stop - 1 of a token, which are a segment, rounded to s * [-127, 127] with s = max|x| / 127 over them or
// over the token.
template <bool RAGGED>
inline void place_int8(const Plan& plan, int64_t token, int64_t segment, int64_t begin, int64_t stop, const Rounding& rounding) {
    using Some = Columned<RAGGED>;
    const int64_t block = token / plan.tokens_per_block, row = token % plan.tokens_per_block;
    // Adding 1.5 * 2^23 leaves the rounded integer in the low bits, ties to even.
    const F16 inverse = spread<F16>(rounding.inverse), magic = spread<F16>(12582912.0f);
    const I16 moved = spread<I16>(plan.moved ? 0x80 : 0), base = spread<I16>(0x4b400000);
    float values[Some::kVectors * 16];
    I16 sum = zero_i();
    for (; begin < stop; begin += Some::kColumns) {
        Some::read(plan, token, begin, values);
        uint8_t* to = const_cast<uint8_t*>(plan.x_at(block, begin / kTile)) + row * plan.row_bytes + begin % kTile;
        for (int i = 0; i < Some::kVectors; ++i) {
            const I16 rounded = bits_of(multiply_add(load<F16>(values + 16 * i), inverse, magic)) - base;
            if constexpr (RAGGED) {
                uint8_t bytes[16];
                store_bytes(bytes, rounded ^ moved);
                memcpy(to, bytes, kOctet);
            } else {
                store_bytes(to + 16 * i, rounded ^ moved);
            }
            sum = sum + rounded;
        }
    }
    const int64_t at = plan.factor(block, segment) + row;
    plan.x_sum[at] = total_of(to_float(sum));  // exact: integers below 2^24
    plan.x_scale[at] = rounding.scale;
}

// The segments of a token one after the other.
template <bool RAGGED>
inline void place_rounded(const Plan& plan, int64_t token) {
    const int64_t columns = plan.tiles * kTile, length = plan.segment_tiles * kTile;
    const bool whole = plan.call->numerics == kInt8Token;
    const Rounding of_token = whole ? rounding_of<false>(plan, token, 0, columns) : Rounding{};
    for (int64_t begin = 0, stop = 0; begin < columns; begin = stop) {
        stop = begin + (RAGGED ? kOctet : length);
        while (RAGGED && !plan.ends(stop / kOctet - 1)) stop += kOctet;
        if (stop > columns) stop = columns;
        const Rounding rounding = whole ? of_token : rounding_of<RAGGED>(plan, token, begin, stop);
        place_int8<RAGGED>(plan, token, plan.segment_at[begin / kOctet], begin, stop, rounding);
    }
}

template <class P>
inline void place_token(const Plan& plan, int64_t token) {
    if constexpr (P::kOperands == 1) return plan.ragged() ? place_rounded<true>(plan, token) : place_rounded<false>(plan, token);
    const int64_t step = plan.ragged() ? 1 : plan.segment_tiles;
    for (int64_t first = 0; first < plan.tiles; first += step) {
        const int64_t count = plan.tiles - first < step ? plan.tiles - first : step;
#if defined(__AVX512BF16__)
        if (plan.call->x_type == kBfloat16) {
            place_bfloats(plan, token, first, count);
            continue;
        }
#endif
        place_exact<P::kOnlyOneRow>(plan, token, first, count);
    }
}

}  // namespace UNIT
}  // namespace aerogel
