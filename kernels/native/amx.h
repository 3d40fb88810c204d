// Many rows on AMX: tiles of sixteen activations by sixteen weights, products of signed bytes, integer sums within a segment.
//
// A decoded panel holds, for a strip and a tile of 32 columns, eight vectors of sixteen rows by four columns: what the
// instruction wants for its right side. Activations lie as [row][32 bytes], which is its left side. So both are loaded as they
// lie; one instruction makes 16 x 16 x 32 products, and four strips share each tile of activations.
//
//     registers   0 - 3   sums of four strips      4   activations      5 - 7   weights, in turn
//
// With AEROGEL_EMULATE_TILES the instructions are functions that do the same in memory: no machine is needed to test the rest.
#pragma once
#include "kernel.h"

namespace aerogel {
namespace UNIT {

// Shapes of the eight registers: rows, and bytes of a row. The argument of LDTILECFG.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 32, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 8, 8, 8};
};

#if defined(AEROGEL_EMULATE_TILES)

struct TileFile {
    TileConfig config;
    uint8_t at[8][16][64];
};
inline TileFile& tile_file() {
    static thread_local TileFile file;
    return file;
}
inline void tiles_begin() { tile_file() = TileFile{}; }
inline void tiles_end() {}
template <int T>
inline void tile_zero() {
    memset(tile_file().at[T], 0, sizeof tile_file().at[T]);
}
template <int T>
inline void tile_load(const void* from, int64_t stride) {
    TileFile& file = tile_file();
    tile_zero<T>();
    for (int row = 0; row < file.config.rows[T]; ++row) {
        memcpy(file.at[T][row], static_cast<const char*>(from) + row * stride, file.config.bytes[T]);
    }
}
template <int T>
inline void tile_store(void* to, int64_t stride) {
    const TileFile& file = tile_file();
    for (int row = 0; row < file.config.rows[T]; ++row) {
        memcpy(static_cast<char*>(to) + row * stride, file.at[T][row], file.config.bytes[T]);
    }
}
// C[m][n] += sum over k, j of A[m][4 k + j] B[k][4 n + j], signed bytes.
template <int C, int A, int B>
inline void tile_dot() {
    TileFile& file = tile_file();
    for (int m = 0; m < file.config.rows[C]; ++m) {
        for (int n = 0; n < file.config.bytes[C] / 4; ++n) {
            int32_t sum;
            memcpy(&sum, file.at[C][m] + 4 * n, 4);
            for (int k = 0; k < file.config.rows[B]; ++k) {
                for (int j = 0; j < 4; ++j) {
                    sum += static_cast<int8_t>(file.at[A][m][4 * k + j]) * static_cast<int8_t>(file.at[B][k][4 * n + j]);
                }
            }
            memcpy(file.at[C][m] + 4 * n, &sum, 4);
        }
    }
}

#else

// Written as assembly because the number of a register is part of the instruction, and here it is a template's.
inline void tiles_begin() {
    const TileConfig config;
    asm volatile("ldtilecfg %0" ::"m"(config));
}
inline void tiles_end() { asm volatile("tilerelease"); }
template <int T>
INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
INLINE void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
INLINE void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
INLINE void tile_dot() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

// As `panel` in panel.h, for blocks of sixteen rows, codes with their zero point taken out, and segments of whole tiles.
template <class P, int R>
void tile_panel(const Plan& plan, const uint8_t* operands, int64_t first_strip, int64_t first, int64_t count, int64_t block, float* total) {
    static_assert(R == 4, "registers 0 to 3 hold the sums");
    alignas(64) int32_t sums[R][kStrip][16];
    int64_t segment = first / plan.segment_tiles;
    for (int64_t tile = first; tile < first + count; tile += plan.segment_tiles, ++segment) {
        const int64_t stop = tile + plan.segment_tiles < first + count ? tile + plan.segment_tiles : first + count;
        unroll<R>([&](auto r) ALWAYS { tile_zero<r>(); });
        for (int64_t t = tile; t < stop; ++t) {
            const uint8_t* from = operands + (t - first) * 8 * R * kVector;
            tile_load<4>(plan.x_at(block, t), plan.row_bytes);
            unroll<R>([&](auto r) ALWAYS {
                constexpr int kRight = 5 + r % 3;
                tile_load<kRight>(from + r * kVector, R * kVector);
                tile_dot<r, 4, kRight>();
            });
        }
        unroll<R>([&](auto r) ALWAYS { tile_store<r>(sums[r], 64); });
        const int64_t group = plan.group_of(segment), factor = plan.factor(block, segment);
        for (int r = 0; r < R; ++r) {
            const int64_t strip = first_strip + r < plan.strips ? first_strip + r : plan.strips - 1;
            const F16 scale = factors_of(plan, strip, group, 0.0f).scale;
            for (int m = 0; m < 16; ++m) {
                float* at = total + (m * R + r) * 16;
                const F16 both = scale * spread<F16>(plan.x_scale[factor + m]);
                store(at, multiply_add(to_float(load<I16>(sums[r][m])), both, load<F16>(at)));
            }
        }
    }
}

}  // namespace UNIT
}  // namespace aerogel
