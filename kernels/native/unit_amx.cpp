// AMX with signed bytes: Sapphire Rapids and later. What tiles are not made for runs as in unit_avx512.
#if defined(AEROGEL_EMULATE_TILES)
#define UNIT amx_emulated
#else
#define UNIT amx
#endif
#define AEROGEL_TILES
#include "gemm.h"

namespace aerogel {

Status int8_avx512(const Weight& weight, const Call& call);

Status int8_amx(const Weight& weight, const Call& call) {
    using namespace UNIT;
    const bool signed_bytes = weight.bits < 8 || !weight.zero;  // q - z of eight bits needs nine
    const bool whole_tiles = segment_tiles(columns_of(weight), Tiles::kLongestSegment) > 0;
    if (call.tokens <= 16 || !signed_bytes || !whole_tiles) return int8_avx512(weight, call);
    return run<Tiles>(weight, call);
}

}  // namespace aerogel
