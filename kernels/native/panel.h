// The inner loop for many rows of activations: codes are decoded once into a panel of operands [tile][step][operand][strip] that
// stays in the first-level cache, and meet blocks of M rows whose R x M sums stay in registers.
//
// On one core with 512-bit registers a block takes 1.05 times what its products alone would (R = 2, M = 12, groups of 128): scales
// are applied every 128 columns. Activations come from the last-level cache or from memory for the first strips that meet a run of
// columns; unless they are asked for ahead, those strips take 1.48 times.
#pragma once
#include "kernel.h"

namespace aerogel {
namespace UNIT {

// bias + zero point of a strip in a group, in all four bytes of a lane.
inline __attribute__((noinline)) U16 byte_offsets(const Plan& plan, int64_t strip, int64_t group, int bias) {
    const int8_t* zero = static_cast<const int8_t*>(plan.weight->zero);
    uint32_t bytes[kStrip];
    for (int lane = 0; lane < kStrip; ++lane) {
        const int offset = bias + (zero ? zero[(strip * plan.columns.groups + group) * kStrip + lane] : 0);
        bytes[lane] = (static_cast<uint32_t>(offset) & 0xffu) * 0x01010101u;
    }
    return load<U16>(bytes);
}

// Operands of tiles first .. first + count - 1 of R strips: [tile][step][operand][strip], signed codes where the arithmetic wants
// them, with their scales where they are folded (`folds` in exact_bfloat.h). One function for any R, which only says how far apart
// vectors lie. Where activations are moved, `begin` [segment][strip] gets what the sums of each segment begin with.
template <class P, int BITS, Form FORM>
void decode(const Plan& plan, int64_t R, int64_t first_strip, int64_t first, int64_t count, uint8_t* to, I16* begin) {
    constexpr bool kMoves = P::template moves<BITS>();
    const typename P::Decoder decoder = P::template decoder<BITS, FORM>(plan.decoder);
    const int64_t first_segment = plan.segment_at[first * kOctets];
    if constexpr (kMoves) memset(begin, 0, sizeof(I16) * kOctets * static_cast<size_t>(count * R));
    for (int64_t tile = first; tile < first + count; ++tile) {
        for (int64_t r = 0; r < R; ++r) {
            const int64_t strip = first_strip + r < plan.strips ? first_strip + r : plan.strips - 1;
            const uint8_t* codes = static_cast<const uint8_t*>(plan.weight->codes) + strip * plan.strip_bytes + tile * tile_bytes<BITS>();
            U16 offsets, picks;
            F16 scale;
            uint8_t* operand = to + r * kVector;
            unroll<8>([&](auto step) ALWAYS {
                typename P::Operand w[P::kOperands];
                const int64_t octet = tile * kOctets + step / 2, group = plan.group_at[octet];
                if (step == 0 || (step % 2 == 0 && group != plan.group_at[octet - 1])) {
                    picks = picks_of<P, BITS, FORM>(plan, strip, group);
                    if (P::kFolds && plan.folded) scale = factors_of(plan, strip, group, 0.0f).scale;
                    if constexpr (P::template signed_codes<BITS>()) offsets = byte_offsets(plan, strip, group, P::template bias<BITS, FORM>());
                }
                P::template weights<BITS, FORM, step, kRowsOfPanel>(decoder, codes, picks, w);
                if constexpr (P::kFolds) {
                    if (plan.folded) unroll<P::kOperands>([&](auto o) ALWAYS { w[o] = P::scaled(w[o], scale); });
                }
                if constexpr (P::template signed_codes<BITS>()) w[0] = P::less(w[0], offsets);
                if constexpr (kMoves) {
                    I16& sum = begin[(plan.segment_at[octet] - first_segment) * R + r];
                    sum = P::less_moved(sum, w[0]);
                }
                unroll<P::kOperands>([&](auto o) ALWAYS { store(operand, w[o]), operand += R * kVector; });
            });
        }
        to += 8 * P::kOperands * R * kVector;
    }
}

// How far ahead of use a panel asks for activations. The first strips that meet a run of tiles find them in the last-level cache
// or in memory, the others in the second level.
constexpr int kTilesAhead = 2;

// The products of COUNT steps of a panel with M rows.
template <class P, Range RANGE, int R, int M, int COUNT>
INLINE void multiply_steps(const uint8_t* from, const uint8_t* x, typename P::Accumulator (&sum)[R][M]) {
    constexpr int kRow = 8 * P::kOperands * 4;
    typename P::Accumulator pairs[R][M];
    if constexpr (RANGE == kNibbles) {
        repeat<R>([&](int r) ALWAYS { repeat<M>([&](int m) ALWAYS { pairs[r][m] = P::none(); }); });
    }
    auto& into = RANGE == kNibbles ? pairs : sum;
    repeat<COUNT * P::kOperands>([&](int number) ALWAYS {
        typename P::Operand w[R];
        repeat<R>([&](int r) ALWAYS { w[r] = load<typename P::Operand>(from + (number * R + r) * kVector); });
        unroll<M>([&](auto m) ALWAYS {
            repeat<R>([&](int r) ALWAYS { into[r][m] = P::template dot<RANGE>(into[r][m], w[r], x + m * kRow + number * 4); });
        });
    });
    if constexpr (RANGE == kNibbles) {
        repeat<R>([&](int r) ALWAYS { repeat<M>([&](int m) ALWAYS { sum[r][m] = P::joined(sum[r][m], pairs[r][m]); }); });
    }
}

// Adds the sums of M rows, of a segment or of a part of it, to totals [row][R][16]; x_sum is null where no offset has to be taken out.
template <class P, int R, int M>
INLINE void join_totals(const Factors (&factors)[R], const typename P::Accumulator (&sum)[R][M], const float* x_sum, const float* x_scale,
                        float* total) {
    repeat<R>([&](int r) ALWAYS {
        F16 value[M];
        repeat<M>([&](int m) ALWAYS { value[m] = P::value(sum[r][m]); });
        // Decided here and not for each row, whose totals the compiler would otherwise load before and put aside.
        if (x_sum) repeat<M>([&](int m) ALWAYS { value[m] = value[m] - factors[r].offset * spread<F16>(x_sum[m]); });
        repeat<M>([&](int m) ALWAYS {
            float* at = total + (m * R + r) * kStrip;
            F16 scale = factors[r].scale;
            if constexpr (P::kOperands == 1) scale = scale * spread<F16>(x_scale[m]);
            store(at, multiply_add(value[m], scale, load<F16>(at)));
        });
        // Totals stay in memory: there are no registers for them while the next segment is summed.
        asm volatile("" : : "r"(total) : "memory");
    });
}

// Adds the tiles first .. first + count - 1 of a decoded panel to totals [row][R][16] of one block of M rows. A segment is a run of
// tiles, or where they are ragged of octets.
template <class P, Range RANGE, int R, int M, bool RAGGED>
void panel(const Plan& plan, const uint8_t* operands, const I16* begin, int64_t first_strip, int64_t first, int64_t count, int64_t block,
           float bias, float* total) {
    constexpr int kRow = 8 * P::kOperands * 4, kPieces = RAGGED ? kOctets : 1, kSteps = 8 / kPieces;
    const bool offset = RANGE != kMoved && (bias != 0.0f || plan.weight->zero != nullptr);
    const int64_t last = (first + count) * kPieces;
    for (int64_t piece = first * kPieces; piece < last; begin += R) {
        typename P::Accumulator sum[R][M];
        repeat<R>([&](int r) ALWAYS {
            repeat<M>([&](int m) ALWAYS {
                if constexpr (RANGE == kMoved) sum[r][m] = begin[r];
                if constexpr (RANGE != kMoved) sum[r][m] = P::none();
            });
        });
        const int64_t octet = piece * (kOctets / kPieces), segment = plan.segment_at[octet], group = plan.group_at[octet];
        int64_t stop = piece + 1;
        if constexpr (RAGGED) {
            while (stop < last && plan.segment_at[stop] == segment) ++stop;
        } else {
            stop = piece + plan.segment_tiles < last ? piece + plan.segment_tiles : last;
        }
        for (; piece < stop; ++piece) {
            const uint8_t *from = operands + (piece - first * kPieces) * kSteps * P::kOperands * R * kVector, *x = plan.x_at(block, piece / kPieces);
            if (piece % kPieces == 0) {
                unroll<M * kRow / 64>([&](auto line) ALWAYS { __builtin_prefetch(x + kTilesAhead * M * kRow + line * 64); });
            }
            multiply_steps<P, RANGE, R, M, kSteps>(from, x + piece % kPieces * (kRow / kPieces), sum);
        }
        Factors factors[R];
        repeat<R>([&](int r) ALWAYS {
            factors[r] = factors_of(plan, first_strip + r < plan.strips ? first_strip + r : plan.strips - 1, group, bias);
            if (P::kFolds && plan.folded) factors[r].scale = spread<F16>(1.0f);
        });
        // A segment that goes on behind the panel leaves what it has; its offset is taken out once, at its end.
        const int64_t factor = plan.factor(block, segment);
        const bool ends = !RAGGED || plan.ends(piece - 1);
        join_totals<P, R, M>(factors, sum, offset && ends ? plan.x_sum + factor : nullptr, plan.x_scale + factor, total);
    }
}

}  // namespace UNIT
}  // namespace aerogel
