// The CPU library of an architecture that cannot run Python here: every path, width and kind of arithmetic against doubles.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../kernels/native/api.h"

using namespace aerogel;

namespace {

uint64_t state = 1;
uint32_t random_bits() { return static_cast<uint32_t>((state = state * 6364136223846793005ull + 1442695040888963407ull) >> 33); }
float uniform() { return static_cast<float>(random_bits() % 20001) / 10000.0f - 1.0f; }

// How numbers of each Type and ScaleType are stored: bytes, bits of the mantissa, bias of the exponent, and which bit is the sign.
struct Kind {
    size_t bytes;
    int mantissa, bias;
    uint32_t sign;
};
constexpr Kind kKinds[] = {{4, 23, 127, 1u << 31}, {2, 10, 15, 1u << 15}, {2, 7, 127, 1u << 15}, {1, 3, 7, 1u << 7}, {1, 0, 127, 0}, {1, 3, 15, 0}};

double decoded(uint32_t bits, const Kind& kind) {
    const uint32_t magnitude = kind.sign ? bits & (kind.sign - 1) : bits, below = magnitude & ((1u << kind.mantissa) - 1);
    const int exponent = static_cast<int>(magnitude >> kind.mantissa);
    const double mantissa = std::ldexp(below, -kind.mantissa) + (exponent ? 1.0 : 0.0);
    return (bits & kind.sign ? -1.0 : 1.0) * std::ldexp(mantissa, (exponent ? exponent : 1) - kind.bias);
}

// Results of a type: no numbers, until they are written.
struct Results {
    std::vector<uint8_t> stored;
    int32_t type;

    Results(size_t count, int32_t of) : stored(count * kKinds[of].bytes, 0xff), type(of) {}
    double operator[](size_t i) const {
        uint32_t bits = 0;
        memcpy(&bits, &stored[i * kKinds[type].bytes], kKinds[type].bytes);
        return decoded(bits, kKinds[type]);
    }
    int64_t bytes() const { return static_cast<int64_t>(stored.size()); }
};

// Numbers of a type as a caller hands them over: of 1/4 to 2, and of either sign where the type has one.
struct Numbers : Results {
    std::vector<double> value;

    Numbers(size_t count, int32_t of) : Results(count, of) {
        const Kind& kind = kKinds[of];
        for (size_t i = 0; i < count; ++i) {
            const uint32_t exponent = static_cast<uint32_t>(kind.bias) - 2 + random_bits() % 3;
            const uint32_t bits = exponent << kind.mantissa | (random_bits() & ((1u << kind.mantissa) - 1)) | (random_bits() % 2 ? kind.sign : 0);
            memcpy(&stored[i * kind.bytes], &bits, kind.bytes);
            value.push_back(decoded(bits, kind));
        }
    }
    double operator[](size_t i) const { return value[i]; }
};

// What rounding results to a type costs.
double rounding(int32_t type) { return type == kFloat32 ? 0.0 : std::ldexp(1.0, -kKinds[type].mantissa - 1); }

// The error of results [M, N] beside x times a dense weight [N, K] and what `more` adds, as norms.
template <class More>
double error_against(const std::vector<double>& dense, const Numbers& x, const Results& y, int64_t M, int64_t N, int64_t K, More more) {
    double wrong = 0, all = 0;
    for (int64_t m = 0; m < M; ++m) {
        for (int64_t n = 0; n < N; ++n) {
            double sum = more(m, n);
            for (int64_t k = 0; k < K; ++k) sum += dense[static_cast<size_t>(n * K + k)] * x[static_cast<size_t>(m * K + k)];
            const double found = y[static_cast<size_t>(m * N + n)];
            wrong += (found - sum) * (found - sum), all += sum * sum;
        }
    }
    return std::sqrt(wrong / all);
}

// Where memory behind `from` begins that is aligned as codes must be.
uint8_t* aligned(std::vector<uint8_t>& from) { return from.data() + (kVector - reinterpret_cast<uintptr_t>(from.data()) % kVector) % kVector; }

// The layout of layout.h, one code at a time.
std::vector<uint8_t> packed(const std::vector<int>& u, int64_t N, int64_t K, int bits, int64_t group, const Columns& columns) {
    const int64_t strips = ceil_div(N, kStrip), tiles = ceil_div(columns.count, kTile);
    std::vector<uint8_t> memory(static_cast<size_t>(strips * tiles * kVector * bits) + kVector);
    uint8_t* codes = aligned(memory);
    for (int64_t n = 0; n < N; ++n) {
        for (int64_t column = 0; column < K; ++column) {
            const int64_t k = columns.groups > 1 ? column / group * columns.group + column % group : column;
            uint8_t* tile = codes + ((n / kStrip) * tiles + k / kTile) * kVector * bits;
            int value = 0;
            for (int width : {8, 4, 2, 1}) {
                if (bits == 8 ? width != 8 : (width == 8 || !(bits & width))) continue;
                const int per = 8 / width, step = static_cast<int>(k % kTile / 4);
                const int part = u[static_cast<size_t>(n * K + column)] >> value & ((1 << width) - 1);
                tile[kVector * (step / per) + 4 * (n % kStrip) + k % 4] |= static_cast<uint8_t>(part << (width * (step % per)));
                tile += kVector * width, value += width;
            }
        }
    }
    return memory;
}

// A few numbers beside a weight: every seventh is an outlier, and two columns are kept.
struct Extra {
    std::vector<int32_t> start{0}, index{3, 64};
    std::vector<int16_t> column;
    Numbers value, kept;

    Extra(int64_t N, int64_t K) : value(static_cast<size_t>(N * K / 7 + 1), kBfloat16), kept(static_cast<size_t>(2 * N), kFloat16) {
        for (int64_t n = 0; n < N; ++n) {
            for (int64_t k = (7 - n * K % 7) % 7; k < K; k += 7) column.push_back(static_cast<int16_t>(k));
            start.push_back(static_cast<int32_t>(column.size()));
        }
    }
    Beside view() const {
        Beside b{};
        b.start = start.data(), b.column = column.data(), b.value = value.stored.data(), b.outliers = start.back(), b.column_bytes = 2, b.value_type = kBfloat16;
        b.index = index.data(), b.kept_value = kept.stored.data(), b.kept = 2, b.kept_type = kFloat16;
        return b;
    }
    double product(int64_t n, const Numbers& x, int64_t first) const {
        double sum = 0;
        const size_t row = static_cast<size_t>(n);
        for (int32_t e = start[row]; e < start[row + 1]; ++e) sum += value[static_cast<size_t>(e)] * x[static_cast<size_t>(first + column[static_cast<size_t>(e)])];
        for (size_t c = 0; c < 2; ++c) sum += kept[2 * row + c] * x[static_cast<size_t>(first + index[c])];
        return sum;
    }
};

// What the codes of a weight are. Floats of 5 to 8 bits are decoded by arithmetic, other tables are gathered.
enum Codes { kIntegerCodes, kFloatZeros, kTableCodes, kFloatCodes, kPickedCodes, kAllCodes };

// `number` chooses the types of scales and activations, and whether there is something beside the weight.
double error_of(int path, int numerics, int bits, int64_t N, int64_t K, int64_t group, int64_t M, int kind, int number) {
    const bool integers = kind <= kFloatZeros, picks = kind == kPickedCodes;
    const Numbers x(static_cast<size_t>(M * K), number % 3);
    const Extra extra(N, K);
    const Beside beside = extra.view();
    const bool added = number % 2 != 0;
    Weight weight{};
    weight.rows = N, weight.columns = K, weight.group = group, weight.factor = 0.5f, weight.bits = bits;
    weight.scale_type = kind == kFloatZeros ? kFloat32 : number % (integers ? 3 : 6);
    const Columns columns = columns_of(weight);
    const int64_t strips = ceil_div(N, kStrip), G = columns.groups;
    std::vector<int> u(static_cast<size_t>(N * K));
    for (int& each : u) each = static_cast<int>(random_bits() % (1u << bits));
    std::vector<uint8_t> codes = packed(u, N, K, bits, group, columns);
    const Numbers scale(static_cast<size_t>(strips * G * kStrip), weight.scale_type), float_zero(static_cast<size_t>(strips * G * kStrip), kFloat32);
    std::vector<int8_t> zero(static_cast<size_t>(strips * G * kStrip));
    for (int8_t& each : zero) each = static_cast<int8_t>(static_cast<int>(random_bits() % (1u << bits)) - (1 << (bits - 1)));
    uint8_t* at = aligned(codes);
    const int mantissa = bits < 7 ? 2 : 3;
    const Kind small{1, mantissa, (1 << (bits < 5 ? 0 : bits - mantissa - 2)) - 1, 1u << (bits - 1)};
    std::vector<float> table(integers ? 0u : (picks ? 2u : 1u) << bits);
    std::vector<uint16_t> pick(static_cast<size_t>(strips * G));
    for (size_t i = 0; i < table.size(); ++i) {
        table[i] = static_cast<float>(static_cast<int>(random_bits() % 255) - 127);
        if (kind == kFloatCodes) table[i] = static_cast<float>(decoded(static_cast<uint32_t>(i), small));
    }
    for (uint16_t& each : pick) each = picks ? static_cast<uint16_t>(random_bits()) : 0;
    weight.codes = at, weight.codes_bytes = strips * ceil_div(columns.count, kTile) * kVector * bits;
    weight.scale = scale.stored.data(), weight.scale_bytes = scale.bytes();
    if (kind == kIntegerCodes) weight.zero = zero.data(), weight.zero_bytes = static_cast<int64_t>(zero.size());
    if (kind == kFloatZeros) weight.zero = float_zero.stored.data(), weight.zero_bytes = float_zero.bytes();
    if (!integers) weight.table = table.data(), weight.table_bytes = static_cast<int64_t>(table.size() * 4);
    if (picks) weight.pick = pick.data(), weight.pick_bytes = static_cast<int64_t>(2 * pick.size());
    if (aerogel_native_check(&weight) != kDone) return INFINITY;
    Results y(static_cast<size_t>(M * N), x.type), again = y;
    Call call{x.stored.data(), nullptr, y.stored.data(), x.bytes(), y.bytes(), 0, M, x.type, 0, numerics, path, 1, added ? &beside : nullptr};
    if (aerogel_native_gemm(&weight, &call) != kDone) return INFINITY;
    call.y = again.stored.data(), call.threads = 3;
    if (aerogel_native_gemm(&weight, &call) != kDone || again.stored != y.stored) return INFINITY;
    std::vector<double> dense(static_cast<size_t>(N * K));
    for (int64_t n = 0; n < N; ++n) {
        for (int64_t k = 0; k < K; ++k) {
            const size_t factor = static_cast<size_t>(((n / kStrip) * G + (group ? k / group : 0)) * kStrip + n % kStrip);
            const size_t code = static_cast<size_t>(u[static_cast<size_t>(n * K + k)]), table_of = picks ? pick[factor / kStrip] >> (n % kStrip) & 1u : 0;
            double q = static_cast<double>(code);
            if (kind == kIntegerCodes) q -= (1 << (bits - 1)) + zero[factor];
            if (kind == kFloatZeros) q -= float_zero[factor];
            if (!integers) q = 0.5 * table[(table_of << bits) + code];
            // The inputs of kept columns are not rounded: the product does not see them.
            const bool seen = numerics == kExact || !added || (k != extra.index[0] && k != extra.index[1]);
            dense[static_cast<size_t>(n * K + k)] = seen ? q * scale[factor] : 0;
        }
    }
    return error_against(dense, x, y, M, N, K, [&](int64_t m, int64_t n) { return added ? extra.product(n, x, m * K) : 0; }) - rounding(x.type);
}

// One code of a weight that is tables, where lookup.h has it.
void put(uint8_t* codes, int code, int64_t n, int64_t k, int64_t tiles, int bits) {
    uint8_t* tile = codes + ((n / kLookupStrip) * tiles + k / kLookupTile) * kVector * bits;
    const int step = static_cast<int>(k % kLookupTile / kLookupStep);
    int value = 0;
    for (int width : {4, 2, 1}) {
        if (!(bits & width)) continue;
        const int per = 8 / width, part = code >> value & ((1 << width) - 1);
        tile[kVector * (step / per) + 16 * (n % kLookupStrip) + k % kLookupStep] |= static_cast<uint8_t>(part << (width * (step % per)));
        tile += kVector * width, value += width;
    }
}

// Lookups of bytes (lookup.h). Of several tables each row has its own, or where `picked` a scale picks one.
double lookup_error_of(int path, int numerics, int bits, int64_t N, int64_t K, int64_t group, int64_t M, int64_t tables, bool picked, int number) {
    Lookup weight{};
    weight.rows = N, weight.columns = K, weight.group = group, weight.tables = tables, weight.factor = 0.5f, weight.bits = bits, weight.scale_type = number % 6;
    const int64_t filled = group < K ? ceil_div(group, kLookupStep) * kLookupStep : group, groups = group ? ceil_div(K, group) : 1;
    const int64_t strips = ceil_div(N, kLookupStrip), tiles = ceil_div(filled == group ? K : groups * filled, kLookupTile);
    std::vector<uint8_t> codes(static_cast<size_t>(strips * tiles * kVector * bits) + kVector), pick(static_cast<size_t>(strips * groups * kLookupStrip));
    std::vector<uint8_t> wide(static_cast<size_t>(weight.tables * 4 * kEntries)), fixed(static_cast<size_t>(weight.tables * 2 * kEntries));
    std::vector<float> unit(static_cast<size_t>(weight.tables), 0x1p-10f), numbers(static_cast<size_t>(weight.tables * kEntries));
    const Numbers scale(pick.size(), weight.scale_type), x(static_cast<size_t>(M * K), number % 3);
    std::vector<double> dense(static_cast<size_t>(N * K));
    for (size_t i = 0; i < numbers.size(); ++i) {
        const int most = number % 4 < 2 ? 16383 : 12;  // small ones let sums of products go on
        const int16_t integer = static_cast<int16_t>(static_cast<int>(random_bits() % static_cast<uint32_t>(2 * most + 1)) - most);
        numbers[i] = static_cast<float>(integer) * 0x1p-10f;
        const size_t table = i / kEntries, entry = i % kEntries;
        uint8_t bytes[4];
        memcpy(bytes, &numbers[i], 4);
        for (size_t plane = 0; plane < 4; ++plane) wide[(table * 4 + plane) * kEntries + entry] = bytes[plane];
        for (size_t plane = 0; plane < 2; ++plane) fixed[(table * 2 + plane) * kEntries + entry] = static_cast<uint8_t>(static_cast<uint16_t>(integer) >> (8 * plane));
    }
    for (uint8_t& each : pick) each = picked ? static_cast<uint8_t>(random_bits() % static_cast<uint32_t>(tables)) : 0;
    uint8_t* to = aligned(codes);
    for (int64_t n = 0; n < N; ++n) {
        for (int64_t k = 0; k < K; ++k) {
            const int code = static_cast<int>(random_bits() % (1u << bits));
            put(to, code, n, group ? k / group * filled + k % group : k, tiles, bits);
            const size_t at = static_cast<size_t>(((n / kLookupStrip) * groups + (group ? k / group : 0)) * kLookupStrip + n % kLookupStrip);
            const int64_t table = picked ? pick[at] : tables > 1 ? n : 0;
            dense[static_cast<size_t>(n * K + k)] = numbers[static_cast<size_t>(table * kEntries + code)] * scale[at] * 0.5;
        }
    }
    const auto bytes_of = [](const auto& of) { return static_cast<int64_t>(of.size() * sizeof(of[0])); };
    weight.codes = to, weight.codes_bytes = bytes_of(codes) - kVector, weight.scale = scale.stored.data(), weight.scale_bytes = scale.bytes();
    weight.number = wide.data(), weight.number_bytes = bytes_of(wide), weight.fixed = fixed.data(), weight.fixed_bytes = bytes_of(fixed);
    weight.unit = unit.data(), weight.unit_bytes = bytes_of(unit);
    if (picked) weight.pick = pick.data(), weight.pick_bytes = bytes_of(pick);
    if (aerogel_native_lookup_check(&weight) != kDone) return INFINITY;
    Results y(static_cast<size_t>(M * N), x.type), again = y;
    Call call{x.stored.data(), nullptr, y.stored.data(), x.bytes(), y.bytes(), 0, M, x.type, 0, numerics, path, 1, nullptr};
    if (aerogel_native_lookup(&weight, &call) != kDone) return INFINITY;
    call.y = again.stored.data(), call.threads = 3;
    if (aerogel_native_lookup(&weight, &call) != kDone || again.stored != y.stored) return INFINITY;
    return error_against(dense, x, y, M, N, K, [](int64_t, int64_t) { return 0.0; }) - rounding(x.type);
}

// Tables of each row and group (own.h), or where `shared` is not 0 of each run of rows and eight columns.
double own_error_of(int path, int bits, int64_t N, int64_t K, int64_t group, int64_t shared, int64_t M) {
    OwnTables weight{};
    weight.rows = N, weight.columns = K, weight.group = group, weight.shared = shared, weight.bits = bits;
    const int64_t strips = ceil_div(N, kLookupStrip), tiles = ceil_div(K, kLookupTile), groups = own_table_groups(weight);
    const int64_t runs = shared ? ceil_div(N, shared) : strips, size = bits <= 3 ? 8 : 16;
    std::vector<uint8_t> codes(static_cast<size_t>(strips * tiles * kVector * bits) + kVector);
    std::vector<uint8_t> table(static_cast<size_t>(runs * groups * (shared ? shared_table_bytes(bits) : own_table_bytes(bits))));
    for (size_t i = 0; i < table.size(); ++i) table[i] = random_bits() & 0xbf;  // finite as high bytes, too: codes behind the last column are 0
    const Numbers x(static_cast<size_t>(M * K), kBfloat16);
    std::vector<double> dense(static_cast<size_t>(N * K));
    uint8_t* to = aligned(codes);
    for (int64_t n = 0; n < N; ++n) {
        for (int64_t k = 0; k < K; ++k) {
            const int code = static_cast<int>(random_bits() % (1u << bits));
            put(to, code, n, k, tiles, bits);
            // Where the low byte of its number lies, and how far behind it the high one.
            int64_t low, high;
            if (shared) {
                low = ((n / shared) * groups + k / kLookupStep) * shared_table_bytes(bits) + (k % kLookupStep / 8) * size + code, high = 2 * size;
            } else {
                low = ((n / kLookupStrip) * groups + (group ? k / group : 0)) * own_table_bytes(bits) + 16 * (n % kLookupStrip) + code;
                high = bits <= 3 ? 8 : 16 * kLookupStrip;
            }
            // Exponents of random bytes would reach from nothing to infinity.
            uint8_t& upper = table[static_cast<size_t>(low + high)];
            upper = static_cast<uint8_t>((upper & 0x80) | 0x3f);
            dense[static_cast<size_t>(n * K + k)] = decoded(table[static_cast<size_t>(low)] | uint32_t{upper} << 8, kKinds[kBfloat16]);
        }
    }
    weight.codes = to, weight.codes_bytes = static_cast<int64_t>(codes.size()) - kVector;
    weight.table = table.data(), weight.table_bytes = static_cast<int64_t>(table.size());
    Results y(static_cast<size_t>(M * N), kBfloat16), again = y;
    Call call{x.stored.data(), nullptr, y.stored.data(), x.bytes(), y.bytes(), 0, M, kBfloat16, 0, kExact, path, 1, nullptr};
    if (aerogel_native_own(&weight, &call) != kDone) return INFINITY;
    call.y = again.stored.data(), call.threads = 3;
    if (aerogel_native_own(&weight, &call) != kDone || again.stored != y.stored) return INFINITY;
    return error_against(dense, x, y, M, N, K, [](int64_t, int64_t) { return 0.0; }) - rounding(kBfloat16);
}

// A rotation of inputs in blocks: the largest error beside the largest number.
double hadamard_error_of(int path, int64_t K, int64_t block, int64_t M) {
    std::vector<float> x(static_cast<size_t>(M * K)), y(x.size());
    std::vector<int8_t> signs(static_cast<size_t>(K));
    for (float& each : x) each = uniform();
    for (int8_t& each : signs) each = random_bits() % 2 ? 1 : -1;
    const Hadamard arguments{x.data(), signs.data(), y.data(), M, K, block, kFloat32, 3};
    aerogel_native_choose_among(1u << path);
    const int32_t status = aerogel_native_hadamard(&arguments);
    aerogel_native_choose_among(~0u);
    if (status != kDone) return INFINITY;
    double wrong = 0, most = 0;
    for (int64_t at = 0; at < M * K; ++at) {
        const int64_t first = at / block * block;
        double sum = 0;
        for (int64_t i = 0; i < block; ++i) {
            const bool negative = __builtin_popcountll(static_cast<uint64_t>(i & (at - first))) % 2 != 0;
            sum += (negative ? -1.0 : 1.0) * x[static_cast<size_t>(first + i)] * signs[static_cast<size_t>((first + i) % K)];
        }
        sum /= std::sqrt(static_cast<double>(block));
        wrong = std::fmax(wrong, std::fabs(sum - y[static_cast<size_t>(at)])), most = std::fmax(most, std::fabs(sum));
    }
    return wrong / most;
}

// What ran, and what of it was wrong.
struct Count {
    int ran = 0, failed = 0;

    template <class... Numbers>
    void of(double error, double limit, const char* what, Numbers... numbers) {
        ++ran;
        if (error <= limit) return;
        ++failed;
        std::printf(what, static_cast<int>(numbers)...);
        std::printf(": error %g, limit %g\n", error, limit);
    }
};

void rotations(int path, Count& count) {
    for (int64_t block : {1, 2, 4, 8, 16, 32, 64, 128, 1024}) {
        for (int64_t M : {1, 3, 40}) {
            count.of(hadamard_error_of(path, block < 32 ? 5 * block : 3 * block, block, M), 1e-6, "path %d rotation in blocks of %d, M %d", path, block, M);
        }
    }
}

// Rows of a weight: some of those that few tokens meet are large enough for several threads.
int64_t rows_for(bool large) { return large ? 600 : 37; }

// Groups of whole tiles, of halves, of octets and filled up; more of them than are read together.
void products(int path, Count& count) {
    int number = 0;
    for (int bits = 1; bits <= 8; ++bits) {
        for (int numerics : {kExact, kInt8, kInt8Token}) {
            for (int64_t M : {1, 3, 9}) {
                for (int64_t group : {0, 16, 20, 24, 32}) {
                    for (int kind = 0; kind < kAllCodes; ++kind) {
                        if (kind != kIntegerCodes && numerics != kExact) continue;
                        if ((kind == kFloatCodes && bits < 5) || (kind == kPickedCodes && bits > 4)) continue;
                        const double error = error_of(path, numerics, bits, rows_for(group == 32 && M < 9), 200, group, M, kind, number++);
                        count.of(error, numerics == kExact ? 1e-5 : 3e-2, "path %d numerics %d bits %d M %d group %d kind %d case %d", path, numerics,
                                 bits, M, group, kind, number - 1);
                    }
                }
            }
        }
    }
}

void own_tables(int path, Count& count) {
    for (int bits = 1; bits <= 4; ++bits) {
        for (int64_t M : {1, 3, 9, 17}) {
            for (int64_t kind : {0, 1, 2}) {
                const double error = own_error_of(path, bits, rows_for(kind == 1 && M < 9), 500, kind == 1 ? 32 : 0, kind == 2 ? 8 : 0, M);
                count.of(error, 1e-5, "path %d own tables of %d bits M %d kind %d", path, bits, M, kind);
            }
        }
    }
}

// One table, one for each row, picks among the two of BitMoD's signs, the four that are laid out in pairs, and six that are not.
void lookups(int path, Count& count) {
    int number = 0;
    for (int bits = 2; bits <= 4; ++bits) {
        for (int64_t M : {1, 3, 8, 9, 31}) {
            for (int64_t group : {0, 16, 24, 32, 40, 80, 128}) {  // 40: three steps, of the last a half; 80: five, the last group shorter
                for (int64_t tables : {1, 40, 2, 4, 6}) {
                    for (int32_t numerics : {int32_t{kExact}, kFixed}) {
                        const int64_t K = group == 16 || group == 40 || group == 80 ? 1100 : 300;
                        const double error = lookup_error_of(path, numerics, bits, rows_for(tables < 2 && M < 9), K, group, M, tables, tables > 1 && tables < 40, number++);
                        count.of(error, numerics == kExact ? 1e-5 : 2e-4, "path %d lookups of %d bits numerics %d M %d group %d tables %d case %d", path,
                                 bits, numerics, M, group, tables, number - 1);
                    }
                }
            }
        }
    }
}

}  // namespace

int main() {
    Count count;
    for (int path = 0; path < 7; ++path) {
        if (!(aerogel_native_able() >> path & 1)) continue;
        rotations(path, count), products(path, count), own_tables(path, count), lookups(path, count);
    }
    std::printf("%d of %d passed, paths %x\n", count.ran - count.failed, count.ran, aerogel_native_able());
    return count.failed != 0 || count.ran == 0;
}
