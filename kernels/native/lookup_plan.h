// What the loops of weights that are tables work on: how a call is laid out, and what stands beside codes, scales and picked tables.
#pragma once
#include "bytes.h"
#include "lookup.h"
#include "numbers.h"

namespace aerogel {
namespace UNIT {

struct LookupPlan {
    const FilledLookup* weight;
    const Call* call;
    int64_t strips, tiles, groups;
    int64_t together, padded;   // tokens that a loop takes together, and all tokens filled up to whole blocks of those
    int64_t unit_steps, units;  // steps whose activations share a unit, and how many units a token has
    uint32_t ends;              // steps of a group with which a sum of integers ends beside its last, a bit each, for `lookup_odd`
    bool half;                  // whether only the first eight columns of a group's last step count
    uint8_t* x;                 // [block][step][token][16 columns] of the policy's type
    float* x_unit;              // [block][unit][token], Fixed only
    int32_t* group_at;          // [tiles * 8]: the group of each step
    uint8_t* fours;             // [tiles * 8]: the vectors of four columns of each step that do not fill a group up
    int32_t* four_at;           // [all_fours]: the first columns of those vectors
    int64_t all_fours;
    const uint8_t* pairs;  // the tables of two rows, for each two that may be picked (write_pairs), or null

    template <class P>
    typename P::Element* x_of(int64_t token) const {
        return reinterpret_cast<typename P::Element*>(x) + token * units * unit_steps * kLookupStep;
    }
};

constexpr int kLookupTokens = 4;  // of a block

#if defined(__AVX2__) || defined(__aarch64__)
constexpr bool kLookupLoops = true;  // a loop for each kind of group and for some tokens at a time
#else
constexpr bool kLookupLoops = false;
#endif

INLINE float read_scale(const void* from, int64_t at, int32_t type) {
    if (type < kFloat8E4m3) return read_float(from, at, type);
    const uint32_t byte = static_cast<const uint8_t*>(from)[at];
    if (type == kFloat8E8m0) return bits_to_float(byte ? byte << 23 : 0x00400000u);
    // The exponent is moved by a multiplication, which takes subnormal numbers along.
    if (type == kFloat8Ue5m3) return bits_to_float(uint32_t{byte} << 20) * 0x1p112f;
    return bits_to_float((byte & 0x80u) << 24 | (byte & 0x7fu) << 20) * 0x1p120f;
}

// Four numbers, each in the four lanes of its run.
INLINE F16 in_runs(const float* four) {
    F16 v;
#if defined(__AVX512F__)
    const __m512i order = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    v.part[0] = reinterpret_cast<NativeF>(_mm512_permutexvar_ps(order, _mm512_castps128_ps512(_mm_loadu_ps(four))));
#elif defined(__AVX2__)
    const __m256 all = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(four));
    v.part[0] = reinterpret_cast<NativeF>(_mm256_permutevar_ps(all, _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0)));
    v.part[1] = reinterpret_cast<NativeF>(_mm256_permutevar_ps(all, _mm256_set_epi32(3, 3, 3, 3, 2, 2, 2, 2)));
#else
    for (int lane = 0; lane < 16; ++lane) v.part[lane / kNative][lane % kNative] = four[lane / 4];
#endif
    return v;
}

// Where tables are picked among a few, those of two rows lie together for each two of them, so that four rows' are read without shuffles.
constexpr int64_t kPairedTables = 4, kPairBytes = 2 * kEntries;  // of a plane

// [table of the first row][of the second][plane][row][16].
template <class P>
inline void write_pairs(const Lookup& weight, uint8_t* to) {
    const uint8_t* from = static_cast<const uint8_t*>(P::kPlanes == 4 ? weight.number : weight.fixed);
    for (int64_t pair = 0; pair < weight.tables * weight.tables; ++pair) {
        for (int64_t plane = 0; plane < P::kPlanes; ++plane, to += kPairBytes) {
            memcpy(to, from + (pair / weight.tables * P::kPlanes + plane) * kEntries, kEntries);
            memcpy(to + kEntries, from + (pair % weight.tables * P::kPlanes + plane) * kEntries, kEntries);
        }
    }
}

// The scales of a strip as floats for a run of groups, [group][4], and a word that changes where rows have other tables than in the group
// before: two pairs of tables, a half each, or the group's number where rows pick among more. Read group by group, what a scale is would
// be decided each time.
struct RowFactors {
    static constexpr int64_t kRun = 64;
    const Lookup& weight;
    bool paired;
    int64_t begin, all;       // of the strip's among all scales, and how many there are
    int64_t first, stop = 0;  // groups that have been read
    float scale[(kRun + 3) * kLookupStrip];
    alignas(64) uint16_t tables[kRun * 2];

    RowFactors(const LookupPlan& plan, int64_t strip)
        : weight(*plan.weight), paired(plan.pairs != nullptr), begin(strip * plan.groups * kLookupStrip),
          all(plan.strips * plan.groups * kLookupStrip) {
        if (!weight.pick) memset(tables, 0, sizeof tables);
    }
    INLINE F16 scales_of(int64_t group) const { return in_runs(scale + (group - first) * kLookupStrip); }
    INLINE const uint16_t* tables_of(int64_t group) const { return tables + (group - first) * 2; }
    INLINE uint32_t word_of(int64_t group) const {
        uint32_t word;
        memcpy(&word, tables_of(group), sizeof word);
        return word;
    }

    template <class Load>
    INLINE void convert(Load&& load) {
        const int64_t count = (stop - first) * kLookupStrip, at = begin + first * kLookupStrip;
        int64_t i = 0;
        // Sixteen at once also where fewer are wanted, as long as there are others behind them.
        for (; i < count && at + i + 16 <= all; i += 16) store(scale + i, load(at + i));
        for (; i < count; ++i) scale[i] = read_scale(weight.scale, at + i, weight.scale_type);
    }
    // The lines behind those of the groups that were read, which are next: of this strip, or of the one that follows.
    INLINE void ask_for(const uint8_t* bytes, int64_t size) const {
        const int64_t count = (stop - first) * kLookupStrip * size, at = (begin + stop * kLookupStrip) * size;
        for (int64_t line = 0; line < count; line += kVector) __builtin_prefetch(bytes + at + line);
    }
    // Groups from .. until - 1, at most kRun.
    __attribute__((noinline)) void read(int64_t from, int64_t until) {
        first = from, stop = until - from < kRun ? until : from + kRun;
        const uint8_t* pick = static_cast<const uint8_t*>(weight.pick);
        ask_for(static_cast<const uint8_t*>(weight.scale), weight.scale_type < kFloat8E4m3 ? size_of(weight.scale_type) : 1);
        if (pick) ask_for(pick, 1);
        for (int64_t i = 0, at = begin + first * kLookupStrip; pick && i < (stop - first) * 2; ++i, at += 2) {
            tables[i] = static_cast<uint16_t>(pick[at] * weight.tables + pick[at + 1]);
        }
        for (int64_t group = first; pick && !paired && group < stop; ++group) {
            const uint32_t word = static_cast<uint32_t>(group);
            memcpy(tables + (group - first) * 2, &word, sizeof word);
        }
        const uint8_t* bytes = static_cast<const uint8_t*>(weight.scale);
        switch (weight.scale_type) {
            case kFloat32: return convert([&](int64_t at) ALWAYS { return load_floats(bytes, at, kFloat32); });
            case kFloat16: return convert([&](int64_t at) ALWAYS { return load_floats(bytes, at, kFloat16); });
            case kBfloat16: return convert([&](int64_t at) ALWAYS { return load_floats(bytes, at, kBfloat16); });
            case kFloat8E4m3: return convert([&](int64_t at) ALWAYS { return load_small(bytes + at, kFloat8E4m3); });
            case kFloat8E8m0: return convert([&](int64_t at) ALWAYS { return load_small(bytes + at, kFloat8E8m0); });
            default: return convert([&](int64_t at) ALWAYS { return load_small(bytes + at, kFloat8Ue5m3); });
        }
    }
};

// The planes of the tables that the four rows of a strip have in a group.
template <class P>
INLINE void tables_of(const Lookup& weight, int64_t strip, int64_t at, U16 (&table)[P::kPlanes]) {
    constexpr int64_t kBytes = P::kPlanes * kEntries;
    const uint8_t* from = static_cast<const uint8_t*>(P::kPlanes == 4 ? weight.number : weight.fixed);
    const uint8_t* pick = static_cast<const uint8_t*>(weight.pick);
    const uint8_t* base[4];
    for (int row = 0; row < 4; ++row) {
        const int64_t number = pick ? pick[at + row] : weight.tables == 1 ? 0 : strip * kLookupStrip + row;
        base[row] = from + number * kBytes;
    }
    repeat<P::kPlanes>([&](int plane) ALWAYS {
        const uint8_t* const run[4] = {base[0] + plane * kEntries, base[1] + plane * kEntries, base[2] + plane * kEntries,
                                       base[3] + plane * kEntries};
        table[plane] = four_runs(run);
    });
}

// The same of rows that pick among a few tables.
template <class P>
INLINE void paired_tables(const uint8_t* pairs, const uint16_t* pair, U16 (&table)[P::kPlanes]) {
    const uint8_t *first = pairs + pair[0] * (P::kPlanes * kPairBytes), *second = pairs + pair[1] * (P::kPlanes * kPairBytes);
    repeat<P::kPlanes>([&](int plane) ALWAYS { table[plane] = two_halves(first + plane * kPairBytes, second + plane * kPairBytes); });
}

template <class P>
INLINE void group_tables(const LookupPlan& plan, const RowFactors& factors, int64_t strip, int64_t group, U16 (&table)[P::kPlanes]) {
    if (plan.pairs) {
        paired_tables<P>(plan.pairs, factors.tables_of(group), table);
    } else {
        tables_of<P>(*plan.weight, strip, (strip * plan.groups + group) * kLookupStrip, table);
    }
}

}  // namespace UNIT
}  // namespace aerogel
