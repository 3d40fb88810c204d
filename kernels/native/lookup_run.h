// A product with a weight that is tables, from activations to results: loops for few tokens (lookup_kernel.h), panels for many
// (lookup_many.h).
#pragma once
#include "lookup_many.h"
#include "scratch.h"

namespace aerogel {
namespace UNIT {

// Sixteen columns of a token from `column` on, zeros beyond the last.
INLINE F16 sixteen_of(const LookupPlan& plan, int64_t token, int64_t column) {
    const int64_t K = plan.weight->columns, left = K - column;
    const int32_t type = plan.call->x_type;
    if (left >= kLookupStep) return load_floats(plan.call->x, token * K + column, type);
    float value[kLookupStep] = {};
    for (int64_t k = 0; k < left; ++k) value[k] = read_float(plan.call->x, token * K + column + k, type);
    return load<F16>(value);
}

// Sixteen numbers of up to 2^15 as integers of 16 bits, to the nearest, ties to even.
INLINE void store_rounded(void* to, const F16& v) {
    // Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
    const I16 bits = bits_of(v + spread<F16>(12582912.0f)) - spread<I16>(0x4b400000);
#if defined(__AVX512F__)
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bits.part[0])));
#elif defined(__AVX2__)
    const __m256i packed = _mm256_packs_epi32(reinterpret_cast<__m256i>(bits.part[0]), reinterpret_cast<__m256i>(bits.part[1]));
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
#else
    int16_t lanes[16];
    for (int lane = 0; lane < 16; ++lane) lanes[lane] = static_cast<int16_t>(bits.part[lane / kNative][lane % kNative]);
    memcpy(to, lanes, sizeof lanes);
#endif
}

// One token as the policy reads it.
template <class P>
void lookup_place(const LookupPlan& plan, int64_t token) {
    const int64_t first = token / plan.together * plan.together, stride = plan.together * kLookupStep;
    typename P::Element* to = plan.x_of<P>(first) + (token - first) * kLookupStep;
    for (int64_t unit = 0; unit < plan.units; ++unit) {
        F16 value[kLookupTile / kLookupStep], peak = zero_f();
        F16 poison = zero_f();  // stays 0, unless something is infinite or not a number
        for (int64_t step = 0; step < plan.unit_steps; ++step) {
            value[step] = sixteen_of(plan, token, (unit * plan.unit_steps + step) * kLookupStep);
            peak = larger(magnitude(value[step]), peak), poison = multiply_add(value[step], zero_f(), poison);
        }
        if constexpr (P::kPlanes == 4) {
            for (int64_t step = 0; step < plan.unit_steps; ++step, to += stride) store(to, value[step]);
        } else {
            const float most = largest_of(peak), scale = most > 1e-30f ? most / 16383.0f : 1.0f, inverse = 1.0f / scale;
            for (int64_t step = 0; step < plan.unit_steps; ++step, to += stride) store_rounded(to, value[step] * spread<F16>(inverse));
            plan.x_unit[first * plan.units + unit * plan.together + token - first] = scale + total_of(poison);
        }
    }
}

// The steps of groups of so many columns where that is an odd number for which there is a loop, or 0. One token leaves codes of four bits
// in their tiles: taking them out first costs it more than fewer sums bring.
INLINE int64_t odd_steps(int64_t group, int bits, int64_t together) {
    if (!kLookupLoops || (together == 1 && bits == 4)) return 0;
    return group == 3 * kLookupStep || group == 5 * kLookupStep ? group / kLookupStep : 0;
}

template <class P, int BITS, int F>
void lookup_tokens(const LookupPlan& plan) {
    if constexpr (kLookupLoops) {
        if (plan.together > 1) return lookup_all<P>(plan, lookup_strip<P, BITS, F, kLookupTokens>);
    }
    lookup_all<P>(plan, lookup_strip<P, BITS, F, 1>);
}
template <class P, int BITS, int F>
void odd_tokens(const LookupPlan& plan) {
    if (plan.together > 1) return lookup_all<P>(plan, lookup_odd<P, BITS, F, kLookupTokens>);
    if constexpr (BITS < 4) lookup_all<P>(plan, lookup_odd<P, BITS, F, 1>);
}
template <class P, int BITS>
void lookup_groups(const LookupPlan& plan, int64_t group) {
    if constexpr (kLookupLoops) {
        if (group % 128 == 0) return lookup_tokens<P, BITS, 8>(plan);
        if (group % 32 == 0) return lookup_tokens<P, BITS, 2>(plan);
        switch (odd_steps(group, BITS, plan.together)) {
            case 3: return odd_tokens<P, BITS, 3>(plan);
            case 5: return odd_tokens<P, BITS, 5>(plan);
        }
    }
    lookup_tokens<P, BITS, 1>(plan);
}

// How many steps of products fit in a sum: with numbers of 15 bits two, with those of tables on a coarse grid many.
template <class P>
int64_t longest_sum(const Lookup& weight) {
    if (P::kPlanes == 4 || weight.tables > kEntries) return P::kLongest;
    int32_t largest = 1;
    for (int64_t table = 0; table < weight.tables; ++table) {
        const uint8_t* low = static_cast<const uint8_t*>(weight.fixed) + table * 2 * kEntries;
        for (int entry = 0; entry < kEntries; ++entry) {
            const int32_t number = static_cast<int16_t>(low[entry] | low[entry + kEntries] << 8), size = number < 0 ? -number : number;
            largest = size > largest ? size : largest;
        }
    }
    return INT32_MAX / (4 * 16383) / largest;
}

// What lies where in steps: groups, and what fills them up.
inline void lookup_steps(LookupPlan& plan, int64_t group) {
    const int64_t steps = plan.tiles * 8, used = group ? plan.weight->used : steps * kLookupStep;
    const int64_t per_group = group ? group / kLookupStep : steps;
    plan.half = per_group * kLookupStep - used >= kLookupStep / 2;
    for (int64_t step = 0, found = 0, within = 0; step < steps; ++step, ++within) {
        if (within == per_group) within = 0, ++found;
        plan.group_at[step] = static_cast<int32_t>(found < plan.groups ? found : plan.groups - 1);
        const int64_t left = used - within * kLookupStep;
        plan.fours[step] = static_cast<uint8_t>(left < kLookupStep ? ceil_div(left, 4) : 4);
    }
}

// The columns of the vectors of panels.
inline void lookup_fours(LookupPlan& plan) {
    for (int64_t step = 0; step < plan.tiles * 8; ++step) {
        const int32_t begin = static_cast<int32_t>(step * kLookupStep);
        for (int32_t four = 0; four < plan.fours[step]; ++four) plan.four_at[plan.all_fours++] = begin + 4 * four;
    }
}

template <class P>
Status lookup(const FilledLookup& weight, const Call& call) {
    LookupPlan plan{};
    plan.weight = &weight, plan.call = &call;
    plan.strips = ceil_div(weight.rows, kLookupStrip), plan.tiles = ceil_div(weight.columns, kLookupTile);
    plan.groups = weight.group ? ceil_div(weight.columns, weight.group) : 1;
    plan.together = kLookupLoops && call.tokens > 1 ? kLookupTokens : 1;
    plan.padded = ceil_div(call.tokens, plan.together) * plan.together;
    // Integers of 16 bits are multiplied in pairs on wide registers, which is as fast as panels until activations leave the cache.
    const bool many = call.tokens >= (kNative == 16 && P::kPlanes == 2 ? 128 : kPanelTokens);
    const int64_t group = weight.group && plan.groups > 1 ? weight.group : 0;
    const int64_t odd = odd_steps(group, weight.bits, plan.together);
    for (int64_t longest = odd ? longest_sum<P>(weight) : 1, step = longest; step < odd; step += longest) plan.ends |= 1u << (step - 1);
    plan.unit_steps = odd ? odd : kLookupTile / kLookupStep;
    plan.units = ceil_div(plan.tiles * 8, plan.unit_steps);
    const size_t few_bytes = static_cast<size_t>(plan.padded * plan.units * plan.unit_steps * kLookupStep) * sizeof(typename P::Element);
    const size_t x_bytes = many ? run_panels_bytes(call.tokens, plan.tiles) : few_bytes;
    const size_t units = static_cast<size_t>(plan.padded * plan.units), steps = static_cast<size_t>(plan.tiles * 8);
    const bool paired = weight.pick && weight.tables <= kPairedTables;
    constexpr size_t kPairs = kPairedTables * kPairedTables * P::kPlanes * kPairBytes;
    const size_t bytes = x_bytes + 4 * (units + steps * 5) + kPairs + steps;
    uint8_t* memory = static_cast<uint8_t*>(scratch(kCallScratch, bytes));
    if (!memory) return kOutOfMemory;
    if (paired) write_pairs<P>(weight, memory), plan.pairs = memory;
    plan.x = memory + kPairs, plan.x_unit = reinterpret_cast<float*>(plan.x + x_bytes);
    plan.group_at = reinterpret_cast<int32_t*>(plan.x_unit + units), plan.four_at = plan.group_at + steps;
    plan.fours = reinterpret_cast<uint8_t*>(plan.four_at + 4 * steps);
    lookup_steps(plan, group);
    if (many) return lookup_fours(plan), lookup_many(plan);
    if (plan.padded != call.tokens) memset(plan.x, 0, x_bytes + 4 * units);
    for (int64_t token = 0; token < call.tokens; ++token) lookup_place<P>(plan, token);
    switch (weight.bits) {
        case 2: lookup_groups<P, 2>(plan, group); return kDone;
        case 3: lookup_groups<P, 3>(plan, group); return kDone;
        case 4: lookup_groups<P, 4>(plan, group); return kDone;
        default: return kBadWidth;
    }
}

}  // namespace UNIT
}  // namespace aerogel
