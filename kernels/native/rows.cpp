// Rows of a packed weight as numbers, (u - 2^(bits-1) - zero) * scale: what an embedding looks up; and what rows of more bits add.
//
// A token needs one row of many, a few hundred codes, so they are taken one by one and without special instructions.
#define UNIT rows
#include "rows.h"

#include "numbers.h"

namespace aerogel {
namespace {

using namespace rows;

// Codes u of the 32 columns of a tile, of the row that lies in `lane` of its strip; the limbs are those of layout.h.
void tile_codes(const uint8_t* tile, int64_t lane, int bits, int32_t (&u)[kTile]) {
    memset(u, 0, sizeof u);
    int value = 0;
    for (int width : {8, 4, 2, 1}) {
        if (bits == 8 ? width != 8 : width == 8 || !(bits & width)) continue;
        const int per = 8 / width;
        for (int k = 0; k < kTile; ++k) {
            const int step = k / 4;
            const int byte = tile[kVector * (step / per) + 4 * lane + k % 4];
            u[k] |= (byte >> (width * (step % per)) & ((1 << width) - 1)) << value;
        }
        tile += kVector * width;
        value += width;
    }
}

void decode_row(const Weight& weight, int64_t row, void* to, int64_t at, int32_t type) {
    const Columns columns = columns_of(weight);
    const int64_t strip = row / kStrip, lane = row % kStrip, tiles = ceil_div(columns.count, kTile);
    const int64_t group = columns.groups > 1 ? columns.group : columns.count, own = columns.groups > 1 ? weight.group : columns.count;
    const uint8_t* codes = static_cast<const uint8_t*>(weight.codes) + strip * tiles * kVector * weight.bits;
    for (int64_t begin = 0; begin < columns.count; begin += kTile, codes += kVector * weight.bits) {
        int32_t u[kTile];
        float value[kTile + 8] = {};  // as many as a store reads
        tile_codes(codes, lane, weight.bits, u);
        for (int first = 0; first < kTile && begin + first < columns.count; first += kOctet) {  // whose columns share a group
            const int64_t number = (begin + first) / group, within = (begin + first) % group, real = number * own + within;
            const int64_t left = own - within < weight.columns - real ? own - within : weight.columns - real;
            if (left <= 0) continue;  // what fills up a group
            const int64_t factor = (strip * columns.groups + number) * kStrip + lane;
            const float scale = read_float(weight.scale, factor, weight.scale_type);
            float offset;
            if (floating_zero(weight)) {
                offset = static_cast<const float*>(weight.zero)[factor];
            } else {
                offset = static_cast<float>((1 << (weight.bits - 1)) + (weight.zero ? static_cast<const int8_t*>(weight.zero)[factor] : 0));
            }
            for (int k = first; k < first + kOctet; ++k) value[k] = (static_cast<float>(u[k]) - offset) * scale;
            store_floats(to, at + real, type, value + first, left < kOctet ? static_cast<int>(left) : kOctet);
        }
    }
}

}  // namespace

void add_row_sums(const RowSums& sums) {
    for (int64_t token = 0; token < sums.tokens; ++token) {
        for (int64_t i = 0; i < sums.count; ++i) {
            const int64_t to = token * sums.rows + sums.index[i];
            float sum[16] = {read_float(sums.y, to, sums.type) + read_float(sums.part, token * sums.count + i, sums.type)};
            store_floats(sums.y, to, sums.type, sum, 1);
        }
    }
}

Status decode_rows(const Weight& weight, const Rows& wanted) {
    for (int64_t i = 0; i < wanted.count; ++i) {
        if (wanted.ids[i] < 0 || wanted.ids[i] >= weight.rows) return kNoSuchRow;
    }
    for (int64_t i = 0; i < wanted.count; ++i) decode_row(weight, wanted.ids[i], wanted.to, i * weight.columns, wanted.type);
    return kDone;
}

}  // namespace aerogel
