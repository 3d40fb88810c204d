// The inner loop for few rows of activations: codes are decoded in registers and meet every row. R strips are taken together, so
// that enough sums are under way to hide the latency of the dot product. A segment is summed in registers, then its scale applied
// in float32. Many rows have another loop (panel.h).
//
// Instructions for 128 weights of 4 bits and one row on AVX-512: 1 load, 7 shifts and permutations, 4 dot products.
#pragma once
#include "plan.h"

namespace aerogel {
namespace UNIT {

// Scale and offset of a strip in a group.
struct Factors {
    F16 scale, offset;
};

INLINE Factors factors_of(const Plan& plan, int64_t strip, int64_t group, float bias) {
    const Weight& weight = *plan.weight;
    const int64_t at = (strip * plan.columns.groups + group) * kStrip;
    Factors f;
    f.scale = weight.scale_type < kFloat8E4m3 ? load_floats(weight.scale, at, weight.scale_type)
                                              : load_small(static_cast<const uint8_t*>(weight.scale) + at, weight.scale_type);
    f.offset = spread<F16>(bias);
    if (floating_zero(weight)) {
        // What was added to the signed code is the bias, to the unsigned one that less 2^(bits-1).
        f.offset = load<F16>(static_cast<const float*>(weight.zero) + at) + spread<F16>(bias - static_cast<float>(1 << (weight.bits - 1)));
    } else if (weight.zero) {
        f.offset = f.offset + load_bytes(static_cast<const int8_t*>(weight.zero) + at);
    }
    return f;
}

// What the picks of a strip in a group add to the indices of its codes: of two tables, the second lies behind the first.
template <class P, int BITS, Form FORM>
INLINE U16 picks_of(const Plan& plan, int64_t strip, int64_t group) {
    if constexpr (FORM == kTables) {
        const uint16_t* pick = static_cast<const uint16_t*>(plan.weight->pick);
        if (pick) return lanes_of(pick[strip * plan.columns.groups + group], P::kPickedBytes << BITS);
    }
    return spread<U16>(0u);
}

// The first COUNT steps of a tile of R strips against M rows. CHAINS sums take turns.
template <class P, int BITS, Form FORM, int R, int M, int CHAINS, int COUNT>
INLINE void accumulate(const typename P::Decoder& decoder, const uint8_t* const (&codes)[R], const U16 (&picks)[R], const uint8_t* x,
                       typename P::Accumulator (&total)[R][M][CHAINS]) {
    constexpr int kRow = 8 * P::kOperands * P::kWordBytes;
    constexpr Range kRange = P::template range<BITS>();
    typename P::Accumulator pairs[R][M][CHAINS];
    if constexpr (kRange == kNibbles) {
        repeat<R * M * CHAINS>([&](int i) ALWAYS { (&pairs[0][0][0])[i] = P::none(); });
    }
    auto& sum = kRange == kNibbles ? pairs : total;
    unroll<COUNT>([&](auto step) ALWAYS {
        repeat<R>([&](int r) ALWAYS {
            typename P::Operand w[P::kOperands];
            P::template weights<BITS, FORM, step, M>(decoder, codes[r], picks[r], w);
            unroll<P::kOperands>([&](auto o) ALWAYS {
                constexpr int kNumber = step * P::kOperands + o, kChain = kNumber % CHAINS;
                repeat<M>([&](int m) ALWAYS {
                    sum[r][m][kChain] = P::template dot<kRange>(sum[r][m][kChain], w[o], x + m * kRow + kNumber * P::kWordBytes);
                });
            });
        });
    });
    if constexpr (kRange == kNibbles) {
        repeat<R * M * CHAINS>([&](int i) ALWAYS {
            (&total[0][0][0])[i] = P::joined((&total[0][0][0])[i], (&pairs[0][0][0])[i]);
        });
    }
}

// How far ahead of use codes are asked for, where their bytes and not the arithmetic are the bound.
constexpr int64_t kAhead = 1536;

// Strips that are taken together; those beyond the last repeat it.
template <int R>
struct Strips {
    int64_t strip[R];
    const uint8_t* codes[R];

    INLINE Strips(const Plan& plan, int64_t first) {
        for (int r = 0; r < R; ++r) {
            strip[r] = first + r < plan.strips ? first + r : plan.strips - 1;
            codes[r] = static_cast<const uint8_t*>(plan.weight->codes) + strip[r] * plan.strip_bytes;
        }
    }
    template <int BITS>
    INLINE void ask_for(const Plan& plan, int64_t tile) const {
        // Behind the end of a strip lies one of these; what is read next lies behind the last of them.
        const int64_t ahead = tile * tile_bytes<BITS>() + kAhead, next = ahead < plan.strip_bytes ? ahead : ahead + (R - 1) * plan.strip_bytes;
        repeat<R>([&](int r) ALWAYS { repeat<BITS>([&](int line) ALWAYS { __builtin_prefetch(codes[r] + next + line * kVector); }); });
    }
};

// Of so many totals those that stay in registers beside so many sums. The others are read and written where a segment ends: a store of
// 512 bits takes two cycles, so of sixteen rows each total in memory costs as much as two products.
constexpr int totals_held(int totals, int sums) { return kNative < 16 || sums + totals <= 24 ? totals : 23 - sums; }

// Scales, and offsets where there are any, of R strips for a run of groups: [group][strip][16]. Read group by group, what a scale is would
// be decided for every strip again, which takes longer than the decoding.
constexpr int64_t kFactorGroups = 8;
struct FactorRun {
    const Plan& plan;
    const int64_t* strip;
    int64_t R;
    float bias;
    bool offsets;
    float *scale, *offset;

    template <class Load>
    INLINE void read(int64_t first, int64_t count, float* to, Load&& load) const {
        for (int64_t r = 0; r < R; ++r) {
            const int64_t at = (strip[r] * plan.columns.groups + first) * kStrip;
            for (int64_t g = 0; g < count; ++g) store(to + (g * R + r) * kStrip, load(at + g * kStrip));
        }
    }
    // Groups from `first` on; returns the first that has not been read.
    __attribute__((noinline)) int64_t read_from(int64_t first) const {
        const Weight& weight = *plan.weight;
        const int64_t left = plan.columns.groups - first, count = left < kFactorGroups ? left : kFactorGroups;
        const uint8_t* bytes = static_cast<const uint8_t*>(weight.scale);
        switch (weight.scale_type) {
            case kFloat32: read(first, count, scale, [&](int64_t at) ALWAYS { return load_floats(bytes, at, kFloat32); }); break;
            case kFloat16: read(first, count, scale, [&](int64_t at) ALWAYS { return load_floats(bytes, at, kFloat16); }); break;
            case kBfloat16: read(first, count, scale, [&](int64_t at) ALWAYS { return load_floats(bytes, at, kBfloat16); }); break;
            case kFloat8E4m3: read(first, count, scale, [&](int64_t at) ALWAYS { return load_small(bytes + at, kFloat8E4m3); }); break;
            case kFloat8E8m0: read(first, count, scale, [&](int64_t at) ALWAYS { return load_small(bytes + at, kFloat8E8m0); }); break;
            default: read(first, count, scale, [&](int64_t at) ALWAYS { return load_small(bytes + at, kFloat8Ue5m3); });
        }
        if (offsets) {
            for (int64_t r = 0; r < R; ++r) {
                for (int64_t g = 0; g < count; ++g) store(offset + (g * R + r) * kStrip, factors_of(plan, strip[r], first + g, bias).offset);
            }
        }
        return first + count;
    }
};

// Totals [strip][row][16] of strips first .. first + R - 1 for one block of M rows. Segments are runs of pieces, of which a tile has
// PIECES.
template <class P, int BITS, Form FORM, int R, int M, int PIECES>
void strips(const Plan& plan, int64_t first, int64_t block, float* to) {
    // More sums than these would not stay in registers.
    constexpr int kChains = P::kOnlyOneRow || R * M * kParts >= 8 || P::template range<BITS>() == kNibbles ? 1 : 2;
    constexpr int kRow = 8 * P::kOperands * P::kWordBytes, kPieceBytes = kRow / PIECES;
    constexpr int kTotals = R * M, kHeld = totals_held(kTotals, kTotals * kChains);
    constexpr float kBias = static_cast<float>(P::template bias<BITS, FORM>());
    const typename P::Decoder decoder = P::template decoder<BITS, FORM>(plan.decoder);
    const bool offset = kBias != 0.0f || plan.weight->zero != nullptr;
    const Strips<R> from(plan, first);
    alignas(64) float scales[kFactorGroups * R * kStrip], offsets[kFactorGroups * R * kStrip];
    const FactorRun factors{plan, from.strip, R, kBias, offset, scales, offsets};
    const int32_t *segment_at = plan.segment_at, *group_at = plan.group_at;
    const float *x_sum = plan.x_sum + plan.factor(block, 0), *x_scale = plan.x_scale + plan.factor(block, 0);
    const uint64_t pieces = static_cast<uint64_t>(plan.tiles * PIECES);
    const bool one_block = plan.blocks == 1;
    const uint8_t* x = plan.x_at(block, 0) - M * kRow;  // of the tile before
    int64_t group_begin = 0, group_stop = 0;            // of those whose factors have been read
    F16 held[kHeld];
    repeat<kHeld>([&](int i) ALWAYS { held[i] = zero_f(); });
    memset(to, 0, sizeof(float) * kStrip * kTotals);
    for (uint64_t piece = 0; piece < pieces;) {
        const int32_t segment = segment_at[piece * (kOctets / PIECES)], group = group_at[piece * (kOctets / PIECES)];
        if (group >= group_stop) group_begin = group, group_stop = factors.read_from(group);
        typename P::Accumulator sum[R][M][kChains];
        U16 picks[R];
        repeat<R>([&](int r) ALWAYS {
            picks[r] = picks_of<P, BITS, FORM>(plan, from.strip[r], group);
            repeat<M>([&](int m) ALWAYS { repeat<kChains>([&](int c) ALWAYS { sum[r][m][c] = P::none(); }); });
        });
        do {
            const uint64_t tile = piece / PIECES, within = piece % PIECES;
            if (within == 0) {
                x = one_block || tile % kBlockTiles ? x + M * kRow : plan.x_at(block, static_cast<int64_t>(tile));
                if (M <= 2) from.template ask_for<BITS>(plan, static_cast<int64_t>(tile));
            }
            uint8_t moved[R][tile_bytes<BITS>()];
            const uint8_t* codes[R];
            repeat<R>([&](int r) ALWAYS {
                codes[r] = from.codes[r] + tile * tile_bytes<BITS>();
                if constexpr (PIECES > 1) codes[r] = piece_codes<BITS, PIECES>(codes[r], static_cast<int64_t>(within), moved[r]);
            });
            accumulate<P, BITS, FORM, R, M, kChains, 8 / PIECES>(decoder, codes, picks, x + within * kPieceBytes, sum);
            ++piece;
        } while (segment_at[piece * (kOctets / PIECES)] == segment);
        F16 value[kTotals];
        repeat<kTotals>([&](int i) ALWAYS {
            typename P::Accumulator all = sum[i / M][i % M][0];
            if constexpr (kChains == 2) all = all + sum[i / M][i % M][1];
            value[i] = P::value(all);
        });
        const int64_t read = (group - group_begin) * R * kStrip;
        const float *sums = x_sum + segment * M, *units = x_scale + segment * M;
        // Decided once and not for each row.
        if (offset) {
            repeat<kTotals>([&](int i) ALWAYS {
                value[i] = value[i] - load<F16>(offsets + read + i / M * kStrip) * spread<F16>(sums[i % M]);
            });
        }
        const auto join = [&](int i, const F16& total) ALWAYS {
            const F16 scale = load<F16>(scales + read + i / M * kStrip);
            if constexpr (P::kOperands == 1) return multiply_add(value[i], scale * spread<F16>(units[i % M]), total);
            return multiply_add(value[i], scale, total);
        };
        repeat<kHeld>([&](int i) ALWAYS { held[i] = join(i, held[i]); });
        if constexpr (kTotals > kHeld) {
            repeat<kTotals - kHeld>([&](int j) ALWAYS { store(to + (kHeld + j) * kStrip, join(kHeld + j, load<F16>(to + (kHeld + j) * kStrip))); });
            // There are no registers for those while the next segment is summed.
            asm volatile("" : : "r"(to) : "memory");
        }
    }
    repeat<kHeld>([&](int i) ALWAYS { store(to + i * kStrip, held[i]); });
}

}  // namespace UNIT
}  // namespace aerogel
