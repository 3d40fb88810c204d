// Panels of weights that are tables (run_panels.h): float32 numbers from four lookups, one per byte, with their scales multiplied in.
//
// Instructions for 32 weights on AVX2: 23.
#pragma once
#include "lookup_kernel.h"
#include "run_panels.h"

namespace aerogel {
namespace UNIT {

// The numbers of sixteen columns of a strip: [four columns][row][column].
LOOKUP_STEP void lookup_numbers(const U16 (&table)[Real::kPlanes], const U16& code, const F16& scale, float* to) {
    repeat<kParts>([&](int part) ALWAYS {
        NativeU byte[Real::kPlanes];
        repeat<Real::kPlanes>([&](int plane) ALWAYS { byte[plane] = look_up(table[plane].part[part], code.part[part]); });
        unroll<2>([&](auto high) ALWAYS {
            const NativeU lower = in_turn<1, high>(byte[0], byte[1]), upper = in_turn<1, high>(byte[2], byte[3]);
            unroll<2>([&](auto half) ALWAYS {
                const NativeF w = reinterpret_cast<NativeF>(in_turn<2, half>(lower, upper)) * scale.part[part];
                memcpy(to + (2 * high + half) * 16 + part * kNative, &w, sizeof w);
            });
        });
    });
}

// The same of some tiles, one step after the other. What fills a group up is written, and then the next step over it.
template <int BITS>
int64_t lookup_panel(const void* of, int64_t strip, int64_t tile, int64_t tiles, float* to) {
    const LookupPlan& plan = *static_cast<const LookupPlan*>(of);
    const Lookup& weight = *plan.weight;
    const uint8_t* codes = static_cast<const uint8_t*>(weight.codes) + (strip * plan.tiles + tile) * tile_bytes<BITS>();
    U16 table[Real::kPlanes];
    const int64_t begin = strip * plan.groups * kLookupStrip;
    const int32_t *group_at = plan.group_at + tile * 8, *const stop = group_at + tiles * 8;
    RowFactors factors(plan, strip);
    factors.read(group_at[0], stop[-1] + 1);
    const uint8_t* fours = plan.fours + tile * 8;
    const float* const begin_of_panel = to;
    F16 scale;
    int64_t held = -1;
    for (; group_at < stop; group_at += 8, codes += tile_bytes<BITS>()) {
        unroll<8>([&](auto step) ALWAYS {
            const int64_t group = group_at[step];
            if (group != held) {
                if (held < 0 || weight.pick) tables_of<Real>(weight, strip, begin + group * kLookupStrip, table);
                scale = factors.scales_of(group), held = group;
            }
            lookup_numbers(table, quad<BITS, step>(codes), scale, to);
            to += *fours++ * 16;
        });
    }
    return (to - begin_of_panel) / 16;
}

// All of a product of a plan whose steps are placed.
inline Status lookup_many(const LookupPlan& plan) {
    const auto panel = plan.weight->bits == 2 ? lookup_panel<2> : plan.weight->bits == 3 ? lookup_panel<3> : lookup_panel<4>;
    const auto finish = [](const void* of, int64_t strip, int64_t first, int64_t tokens, const float* total) {
        lookup_finish<Real>(*static_cast<const LookupPlan*>(of), strip, first, tokens, total);
    };
    float* x = reinterpret_cast<float*>(plan.x);
    const int64_t columns = plan.weight->columns;
    return run_panels({plan.call, &plan, columns, plan.strips, plan.tiles, x, false, plan.four_at, plan.all_fours, panel, finish});
}

}  // namespace UNIT
}  // namespace aerogel
