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

// kind: 0 integers, 1 a table of small integers, 2 two tables that are picked for each scale.
double error_of(int path, int numerics, int bits, int64_t N, int64_t K, int64_t group, int64_t M, int kind) {
    Weight weight{};
    weight.rows = N, weight.columns = K, weight.group = group, weight.factor = 0.5f, weight.bits = bits, weight.scale_type = kFloat32;
    const Columns columns = columns_of(weight);
    const int64_t strips = ceil_div(N, kStrip), G = columns.groups;
    std::vector<int> u(static_cast<size_t>(N * K));
    for (int& each : u) each = static_cast<int>(random_bits() % (1u << bits));
    std::vector<uint8_t> codes = packed(u, N, K, bits, group, columns);
    std::vector<float> scale(static_cast<size_t>(strips * G * kStrip)), x(static_cast<size_t>(M * K)), y(static_cast<size_t>(M * N), NAN);
    std::vector<int8_t> zero(scale.size());
    for (float& each : scale) each = uniform() + 1.5f;
    for (float& each : x) each = uniform();
    for (int8_t& each : zero) each = static_cast<int8_t>(static_cast<int>(random_bits() % (1u << bits)) - (1 << (bits - 1)));
    uint8_t* at = aligned(codes);
    std::vector<float> table(static_cast<size_t>(kind) << bits);
    std::vector<uint16_t> pick(static_cast<size_t>(strips * G));
    for (float& each : table) each = static_cast<float>(static_cast<int>(random_bits() % 255) - 127);
    for (uint16_t& each : pick) each = kind == 2 ? static_cast<uint16_t>(random_bits()) : 0;
    weight.codes = at, weight.codes_bytes = strips * ceil_div(columns.count, kTile) * kVector * bits;
    weight.scale = scale.data(), weight.scale_bytes = static_cast<int64_t>(scale.size() * 4);
    if (kind == 0) weight.zero = zero.data(), weight.zero_bytes = static_cast<int64_t>(zero.size());
    if (kind > 0) weight.table = table.data(), weight.table_bytes = static_cast<int64_t>(table.size() * 4);
    if (kind == 2) weight.pick = pick.data(), weight.pick_bytes = static_cast<int64_t>(2 * pick.size());
    if (aerogel_native_check(&weight) != kDone) return INFINITY;
    Call call{x.data(), nullptr, y.data(), M * K * 4, M * N * 4, 0, M, kFloat32, 0, numerics, path, 1, nullptr};
    if (aerogel_native_gemm(&weight, &call) != kDone) return INFINITY;
    std::vector<float> again(y.size());
    call.y = again.data(), call.threads = 3;
    if (aerogel_native_gemm(&weight, &call) != kDone || memcmp(again.data(), y.data(), y.size() * 4) != 0) return INFINITY;
    double wrong = 0, all = 0;
    for (int64_t m = 0; m < M; ++m) {
        for (int64_t n = 0; n < N; ++n) {
            double sum = 0;
            for (int64_t k = 0; k < K; ++k) {
                const int64_t factor = ((n / kStrip) * G + (group ? k / group : 0)) * kStrip + n % kStrip;
                const int code = u[static_cast<size_t>(n * K + k)];
                const double q = kind > 0 ? 0.5 * table[((pick[static_cast<size_t>(factor / kStrip)] >> (n % kStrip) & 1u) << bits) + static_cast<size_t>(code)]
                                          : code - (1 << (bits - 1)) - zero[static_cast<size_t>(factor)];
                sum += q * scale[static_cast<size_t>(factor)] * x[static_cast<size_t>(m * K + k)];
            }
            const double found = y[static_cast<size_t>(m * N + n)];
            wrong += (found - sum) * (found - sum), all += sum * sum;
        }
    }
    return std::sqrt(wrong / all);
}

uint16_t bfloat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
float number(uint16_t bits) {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
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

// Lookups of bytes (lookup.h), with one table, or where `picked` one of two for each scale.
double lookup_error_of(int path, int numerics, int bits, int64_t N, int64_t K, int64_t group, int64_t M, bool picked) {
    Lookup weight{};
    weight.rows = N, weight.columns = K, weight.group = group, weight.tables = picked ? 2 : 1, weight.factor = 0.5f, weight.bits = bits;
    const int64_t strips = ceil_div(N, kLookupStrip), tiles = ceil_div(K, kLookupTile), groups = group ? ceil_div(K, group) : 1;
    std::vector<uint8_t> codes(static_cast<size_t>(strips * tiles * kVector * bits) + kVector), pick(static_cast<size_t>(strips * groups * kLookupStrip));
    std::vector<uint8_t> wide(static_cast<size_t>(weight.tables * 4 * kEntries)), fixed(static_cast<size_t>(weight.tables * 2 * kEntries));
    std::vector<float> scale(pick.size()), unit(static_cast<size_t>(weight.tables), 0x1p-10f), numbers(static_cast<size_t>(weight.tables * kEntries));
    std::vector<float> dense(static_cast<size_t>(N * K)), x(static_cast<size_t>(M * K)), y(static_cast<size_t>(M * N));
    for (size_t i = 0; i < numbers.size(); ++i) {
        const int16_t integer = static_cast<int16_t>(static_cast<int>(random_bits() % 32767) - 16383);
        numbers[i] = static_cast<float>(integer) * 0x1p-10f;
        const size_t table = i / kEntries, entry = i % kEntries;
        uint8_t bytes[4];
        memcpy(bytes, &numbers[i], 4);
        for (size_t plane = 0; plane < 4; ++plane) wide[(table * 4 + plane) * kEntries + entry] = bytes[plane];
        for (size_t plane = 0; plane < 2; ++plane) fixed[(table * 2 + plane) * kEntries + entry] = static_cast<uint8_t>(static_cast<uint16_t>(integer) >> (8 * plane));
    }
    for (float& each : scale) each = uniform() + 1.5f;
    for (float& each : x) each = uniform();
    for (uint8_t& each : pick) each = picked ? static_cast<uint8_t>(random_bits() % 2) : 0;
    uint8_t* to = aligned(codes);
    for (int64_t n = 0; n < N; ++n) {
        for (int64_t k = 0; k < K; ++k) {
            const int code = static_cast<int>(random_bits() % (1u << bits));
            put(to, code, n, k, tiles, bits);
            const size_t at = static_cast<size_t>(((n / kLookupStrip) * groups + (group ? k / group : 0)) * kLookupStrip + n % kLookupStrip);
            dense[static_cast<size_t>(n * K + k)] = numbers[static_cast<size_t>(pick[at] * kEntries + code)] * scale[at] * 0.5f;
        }
    }
    const auto bytes_of = [](const auto& of) { return static_cast<int64_t>(of.size() * sizeof(of[0])); };
    weight.codes = to, weight.codes_bytes = bytes_of(codes) - kVector, weight.scale = scale.data(), weight.scale_bytes = bytes_of(scale);
    weight.number = wide.data(), weight.number_bytes = bytes_of(wide), weight.fixed = fixed.data(), weight.fixed_bytes = bytes_of(fixed);
    weight.unit = unit.data(), weight.unit_bytes = bytes_of(unit);
    if (picked) weight.pick = pick.data(), weight.pick_bytes = bytes_of(pick);
    if (aerogel_native_lookup_check(&weight) != kDone) return INFINITY;
    Call call{x.data(), nullptr, y.data(), M * K * 4, M * N * 4, 0, M, kFloat32, 0, numerics, path, 1, nullptr};
    if (aerogel_native_lookup(&weight, &call) != kDone) return INFINITY;
    std::vector<float> again(y.size());
    call.y = again.data(), call.threads = 3;
    if (aerogel_native_lookup(&weight, &call) != kDone || memcmp(again.data(), y.data(), y.size() * 4) != 0) return INFINITY;
    double wrong = 0, all = 0;
    for (int64_t m = 0; m < M; ++m) {
        for (int64_t n = 0; n < N; ++n) {
            double sum = 0;
            for (int64_t k = 0; k < K; ++k) sum += static_cast<double>(dense[static_cast<size_t>(n * K + k)]) * x[static_cast<size_t>(m * K + k)];
            const double found = y[static_cast<size_t>(m * N + n)];
            wrong += (found - sum) * (found - sum), all += sum * sum;
        }
    }
    return std::sqrt(wrong / all);
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
    std::vector<uint16_t> x(static_cast<size_t>(M * K)), y(static_cast<size_t>(M * N));
    for (uint16_t& each : x) each = bfloat(uniform());
    std::vector<float> dense(static_cast<size_t>(N * K));
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
            dense[static_cast<size_t>(n * K + k)] = number(static_cast<uint16_t>(table[static_cast<size_t>(low)] | upper << 8));
        }
    }
    weight.codes = to, weight.codes_bytes = static_cast<int64_t>(codes.size()) - kVector;
    weight.table = table.data(), weight.table_bytes = static_cast<int64_t>(table.size());
    Call call{x.data(), nullptr, y.data(), M * K * 2, M * N * 2, 0, M, kBfloat16, 0, kExact, path, 1, nullptr};
    if (aerogel_native_own(&weight, &call) != kDone) return INFINITY;
    std::vector<uint16_t> again(y.size());
    call.y = again.data(), call.threads = 3;
    if (aerogel_native_own(&weight, &call) != kDone || memcmp(again.data(), y.data(), y.size() * 2) != 0) return INFINITY;
    double wrong = 0, all = 0;
    for (int64_t m = 0; m < M; ++m) {
        for (int64_t n = 0; n < N; ++n) {
            double sum = 0;
            for (int64_t k = 0; k < K; ++k) sum += static_cast<double>(dense[static_cast<size_t>(n * K + k)]) * number(x[static_cast<size_t>(m * K + k)]);
            const double found = number(y[static_cast<size_t>(m * N + n)]);
            wrong += (found - sum) * (found - sum), all += sum * sum;
        }
    }
    return std::sqrt(wrong / all);
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

}  // namespace

int main() {
    int ran = 0, failed = 0;
    for (int path = 0; path < 7; ++path) {
        if (!(aerogel_native_able() >> path & 1)) continue;
        for (int64_t block : {1, 2, 4, 8, 16, 32, 64, 128, 1024}) {
            for (int64_t M : {1, 3, 40}) {
                const double error = hadamard_error_of(path, block < 32 ? 5 * block : 3 * block, block, M);
                ++ran;
                if (error <= 1e-6) continue;
                ++failed;
                std::printf("path %d rotation in blocks of %d, M %d: %g\n", path, static_cast<int>(block), static_cast<int>(M), error);
            }
        }
    }
    for (int path = 0; path < 7; ++path) {
        if (!(aerogel_native_able() >> path & 1)) continue;
        for (int bits = 1; bits <= 8; ++bits) {
            for (int numerics : {0, 1, 2}) {
                for (int64_t M : {1, 3, 9}) {
                    const double limit = numerics == kExact ? 1e-5 : 3e-2;
                    for (int64_t group : {0, 16, 24, 32}) {
                        for (int kind = 0; kind <= (numerics != kExact ? 0 : bits <= 4 ? 2 : 1); ++kind) {
                            const double error = error_of(path, numerics, bits, 37, 100, group, M, kind);
                            ++ran;
                            if (error <= limit) continue;
                            ++failed;
                            std::printf("path %d numerics %d bits %d M %d group %d kind %d: %g\n", path, numerics, bits,
                                        static_cast<int>(M), static_cast<int>(group), kind, error);
                        }
                    }
                }
            }
        }
    }
    for (int path = 0; path < 7; ++path) {
        if (!(aerogel_native_able() >> path & 1)) continue;
        for (int bits = 1; bits <= 4; ++bits) {
            for (int64_t M : {1, 3, 9, 17}) {
                for (int64_t kind : {0, 1, 2}) {
                    const double error = own_error_of(path, bits, 37, 200, kind == 1 ? 32 : 0, kind == 2 ? 8 : 0, M);
                    ++ran;
                    if (error <= 4e-3) continue;
                    ++failed;
                    std::printf("path %d own tables of %d bits M %d kind %d: %g\n", path, bits, static_cast<int>(M), static_cast<int>(kind), error);
                }
            }
        }
    }
    for (int path = 0; path < 7; ++path) {
        if (!(aerogel_native_able() >> path & 1)) continue;
        for (int bits = 2; bits <= 4; ++bits) {
            for (int64_t M : {1, 3, 8, 9, 31}) {
                for (int64_t group : {0, 16, 32, 128}) {
                    for (int kind : {0, 1, 2, 3}) {
                        const int numerics = kind % 2 ? kFixed : kExact;
                        const double error = lookup_error_of(path, numerics, bits, 37, 300, group, M, kind >= 2);
                        ++ran;
                        if (error <= (numerics == kExact ? 1e-5 : 2e-4)) continue;
                        ++failed;
                        std::printf("path %d lookups of %d bits M %d group %d kind %d: %g\n", path, bits, static_cast<int>(M), static_cast<int>(group), kind, error);
                    }
                }
            }
        }
    }
    std::printf("%d of %d passed, paths %x\n", ran - failed, ran, aerogel_native_able());
    return failed != 0 || ran == 0;
}
