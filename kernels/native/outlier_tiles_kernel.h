// What outliers in tiles (outlier_tiles.h) add for up to four tokens in bfloat16.
//
// Per step: its columns and values are spread over their places, one permutation of two registers picks 32 inputs, and one
// product of pairs joins the sums of sixteen rows. Nothing is looked up in memory by an index: only streams are read. A place
// that is empty has the value zero.
#pragma once
#include "adding.h"
#include "numbers.h"
#include "outlier_tiles.h"
#include "paths.h"

namespace aerogel {
namespace UNIT {

constexpr int64_t kTiledTokens = 4;

INLINE int64_t tiled_stride(const Beside& b) { return ceil_div(b.columns, kOutlierBlock) * kOutlierBlock; }

// Sums of a strip for M tokens, whose inputs lie `stride` numbers apart.
template <int M>
INLINE void tiled_sums(const OutlierTiles& t, int64_t strip, int64_t first, const uint16_t* x, int64_t stride, F16 (&total)[M]) {
    __m512 sum[M];
    repeat<M>([&](int m) ALWAYS { sum[m] = _mm512_setzero_ps(); });
    const uint16_t* value = t.value + first;
    const uint16_t* column = t.column + first;
    for (int64_t step = t.first[strip]; step < t.first[strip + 1]; ++step) {
        const uint32_t mask = t.mask[step];
        const uint16_t* block = x + t.block[step] * kOutlierBlock;
        const __m512i places = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(column));
        const __m512i values = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(value));
        repeat<M>([&](int m) ALWAYS {
            const uint16_t* from = block + m * stride;
            const __m512i inputs = _mm512_permutex2var_epi16(_mm512_loadu_si512(from), places, _mm512_loadu_si512(from + 32));
            sum[m] = _mm512_dpbf16_ps(sum[m], reinterpret_cast<__m512bh>(values), reinterpret_cast<__m512bh>(inputs));
        });
        const int count = __builtin_popcount(mask);
        value += count, column += count;
    }
    repeat<M>([&](int m) ALWAYS { total[m].part[0] = reinterpret_cast<NativeF>(sum[m]); });
}

template <int M>
void add_tiled(const Beside& b, const Inputs& inputs, int64_t first, int64_t stop) {
    const OutlierTiles t = outlier_tiles_of(b);
    for (int64_t row = first; row < stop; row += kStrip) {
        F16 sum[M];
        tiled_sums<M>(t, row / kStrip, b.start[row], reinterpret_cast<const uint16_t*>(inputs.all), tiled_stride(b), sum);
        const int count = static_cast<int>(stop - row < kStrip ? stop - row : kStrip);
        for (int64_t m = 0; m < M && m < b.tokens; ++m) {
            float out[kStrip] = {};
            const int64_t at = m * b.rows + row;
            if (count == kStrip) store(out, load_floats(b.y, at, kBfloat16));
            for (int i = 0; i < count && count < kStrip; ++i) out[i] = read_float(b.y, at + i, kBfloat16);
            store(out, load<F16>(out) + sum[m]);
            store_floats(b.out, at, kBfloat16, out, count);
        }
    }
}

// As `prepare` in beside.h, with tiles where there are some and they suit the call.
inline Status prepare_tiled(const Beside& b, int threads, Adding& to) {
    const bool suits = b.tiles && !b.kept && b.type == kBfloat16 && b.tokens <= kTiledTokens;
    if (!suits) return path_entry(kAvx512).step.prepare(b, threads, to);
    const int64_t stride = tiled_stride(b), tokens = b.tokens == 3 ? 4 : b.tokens;
    const char* x = static_cast<const char*>(b.x);
    if (stride != b.columns || tokens != b.tokens) {
        char* memory = static_cast<char*>(scratch(kBesideScratch, static_cast<size_t>(tokens * stride * 2)));
        if (!memory) return kOutOfMemory;
        memset(memory, 0, static_cast<size_t>(tokens * stride * 2));
        for (int64_t m = 0; m < b.tokens; ++m) memcpy(memory + m * stride * 2, x + m * b.columns * 2, static_cast<size_t>(b.columns) * 2);
        x = memory;
    }
    to = {b, {x, nullptr}, nullptr, true};
    if (tokens == 1) to.rows = add_tiled<1>;
    if (tokens == 2) to.rows = add_tiled<2>;
    if (tokens == 4) to.rows = add_tiled<4>;
    return kDone;
}

}  // namespace UNIT
}  // namespace aerogel
