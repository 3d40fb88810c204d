// What stands beside a packed weight and is added to its product: sparse outliers, and a few whole columns.
//
//     out[m, n] = y[m, n] + sum over outliers e of row n of  value[e] * x[m, column[e]]
//                         + sum over kept columns c of       kept[n, c] * x[m, index[c]]
//
// Both are the same loop over numbers of a row, which differ in where the input of a number lies. Inputs are turned round
// first, W tokens of a column together, so that a number meets all of them in one load: W is 1, 4 or 16, whichever holds the
// tokens of the call, and more than 16 are taken in blocks of 16. Up to 4 tokens' inputs stay in the first-level cache.
//
// An outlier is 4 bytes where 4-bit codes are half a byte for a weight: 1 % of the weights read 8 % more. Rows are independent
// and every sum has an order of its own, so the number of threads changes no bit.
#pragma once
#include "adding.h"
#include "step.h"

namespace aerogel {
namespace UNIT {

constexpr int64_t kMostRunRows = 256;    // of a piece
constexpr int64_t kAlone = 1 << 13;      // products below which a second thread costs more than it saves

inline int64_t filled(int64_t count) { return (count + 15) / 16 * 16; }

constexpr int64_t kFarAhead = 1024;  // bytes of outliers that are moved close before they are needed
constexpr int64_t kTurned = 256;     // columns whose inputs are turned round at a time, in the first-level cache
// Whether inputs of 16 bits stay what they are: half the bytes to read at random. Elsewhere widening them takes longer than that
// saves, and every type costs seconds of compiling.
constexpr bool kKeepsType = kNative == 16;

typedef float F4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));
typedef uint16_t Half4 __attribute__((vector_size(8)));

// W tokens of one column.
template <int W>
struct Tokens;
template <>
struct Tokens<1> {
    typedef float V;
    template <int32_t TYPE>
    static INLINE V input(const char* x, int64_t column) { return read_float(x, column, kFloat32); }
    static INLINE V joined(float value, V input, V sum) { return value * input + sum; }
    static INLINE V none() { return 0.0f; }
};
template <>
struct Tokens<4> {
    typedef F4 V;
    template <int32_t TYPE>
    static INLINE V input(const char* x, int64_t column) {
        V v;
        if constexpr (TYPE == kFloat32) memcpy(&v, x + 16 * column, 16);
        if constexpr (TYPE == kBfloat16) {
            Half4 raw;
            memcpy(&raw, x + 8 * column, 8);
            v = reinterpret_cast<V>(__builtin_convertvector(raw, U4) << 16);
        }
        if constexpr (TYPE == kFloat16) {
            for (int lane = 0; lane < 4; ++lane) v[lane] = read_float(x, 4 * column + lane, kFloat16);
        }
        return v;
    }
    static INLINE V joined(float value, V input, V sum) { return value * input + sum; }
    static INLINE V none() { return V{}; }
};
template <>
struct Tokens<16> {
    typedef F16 V;
    template <int32_t TYPE>
    static INLINE V input(const char* x, int64_t column) { return load_floats(x, 16 * column, TYPE); }
    static INLINE V joined(float value, const V& input, const V& sum) { return multiply_add(spread<F16>(value), input, sum); }
    static INLINE V none() { return zero_f(); }
};

// Up to sixteen numbers from `first` on as floats, zeros behind them. Nothing is read that is not wanted.
INLINE F16 read_values(const void* from, int64_t first, int64_t count, int32_t type) {
    if (count >= 16) return load_floats(from, first, type);
#if defined(__AVX512F__)
    const __mmask16 wanted = static_cast<__mmask16>(count > 0 ? (1u << count) - 1 : 0u);
    F16 v;
    if (type == kFloat32) {
        v.part[0] = reinterpret_cast<NativeF>(_mm512_maskz_loadu_ps(wanted, static_cast<const float*>(from) + first));
        return v;
    }
    const __m256i bits = _mm256_maskz_loadu_epi16(wanted, static_cast<const uint16_t*>(from) + first);
    v.part[0] = type == kFloat16 ? reinterpret_cast<NativeF>(_mm512_cvtph_ps(bits))
                                 : reinterpret_cast<NativeF>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    return v;
#else
    float values[16] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = read_float(from, first + i, type);
    return load<F16>(values);
#endif
}

// sums += values[j] * input at places[j] over a vector of values, in sums that take turns: no product waits for the last.
constexpr int kSums = 8;
template <int W, int32_t TYPE, class Place>
INLINE void join(const F16& values, const char* x, Place place, typename Tokens<W>::V (&sums)[kSums]) {
    float value[16];
    store(value, values);
    // Taken from memory, a number reaches all lanes with its load; the compiler would rather cut it out of the register.
    if constexpr (W > 1) asm volatile("" : "+m"(value));
    repeat<16>([&](int j) ALWAYS {
        sums[j % kSums] = Tokens<W>::joined(value[j], Tokens<W>::template input<TYPE>(x, place(j)), sums[j % kSums]);
    });
}

// The last outliers of a row. Values behind them are zeros, so that places behind them may be anything that exists: an input that
// is not finite makes what it joins not a number, which it would be anyway.
template <int W, int32_t TYPE, class Column>
INLINE void join_rest(const Beside& b, const char* x, int64_t first, int64_t count, typename Tokens<W>::V (&sums)[kSums]) {
    const Column* column = static_cast<const Column*>(b.column) + first;
    const F16 values = read_values(b.value, first, count, b.value_type);
    if (first + 16 <= b.outliers) {
        join<W, TYPE>(values, x, [&](int j) ALWAYS { return static_cast<int64_t>(column[j]); }, sums);
    } else {
        join<W, TYPE>(values, x, [&](int j) ALWAYS { return static_cast<int64_t>(column[j < count ? j : 0]); }, sums);
    }
}

// What the outliers of a row add for a block of tokens.
template <int W, int32_t TYPE, class Column>
INLINE typename Tokens<W>::V outliers_of(const Beside& b, const char* x, int64_t row) {
    typename Tokens<W>::V sums[kSums];
    repeat<kSums>([&](int j) ALWAYS { sums[j] = Tokens<W>::none(); });
    const int64_t end = b.start[row + 1];
    int64_t i = b.start[row];
    for (; i + 16 <= end; i += 16) {
        const Column* column = static_cast<const Column*>(b.column) + i;
        __builtin_prefetch(reinterpret_cast<const char*>(column) + kFarAhead);
        __builtin_prefetch(static_cast<const char*>(b.value) + 2 * i + kFarAhead);
        join<W, TYPE>(load_floats(b.value, i, b.value_type), x, [&](int j) ALWAYS { return static_cast<int64_t>(column[j]); }, sums);
    }
    if (i < end) join_rest<W, TYPE, Column>(b, x, i, end - i, sums);
    repeat<4>([&](int j) ALWAYS { sums[j] = sums[j] + sums[j + 4]; });
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Inputs of the outliers of some rows, four tokens each, in the outliers' order. They are copied, many at a time, before they are
// multiplied: the loads of a copy wait for nothing, and whole vectors of products are left.
template <int32_t TYPE, class Column>
struct Copied {
    static constexpr int64_t kMost = 256, kEach = 4 * (TYPE == kFloat32 ? 4 : 2);
    alignas(64) char inputs[kMost * kEach];
    int64_t first = 0, stop = 0;

    // Inputs of outliers i .. i + 15, of those there are before `end`.
    INLINE const char* at(const Beside& b, const char* x, int64_t i, int64_t end) {
        if (i < first || (i + 16 < end ? i + 16 : end) > stop) copy(b, x, i, end);
        return inputs + (i - first) * kEach;
    }

private:
    __attribute__((noinline)) void copy(const Beside& b, const char* x, int64_t from, int64_t end) {
        first = from, stop = from + kMost < end ? from + kMost : end;
        const Column *column = static_cast<const Column*>(b.column) + from, *last = static_cast<const Column*>(b.column) + stop;
        __builtin_prefetch(reinterpret_cast<const char*>(last) + kFarAhead);
        char* to = inputs;
        for (; column + 4 <= last; column += 4, to += 4 * kEach) {
            repeat<4>([&](int j) ALWAYS { memcpy(to + j * kEach, x + column[j] * kEach, kEach); });
        }
        for (; column < last; ++column, to += kEach) memcpy(to, x + *column * kEach, kEach);
    }
};

// The four numbers from 4 * PART on, each in four lanes.
template <int PART>
INLINE F16 four_times(const F16& values) {
#if defined(__AVX512F__)
    const __m512i order = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    F16 v;
    v.part[0] = reinterpret_cast<NativeF>(_mm512_permutexvar_ps(_mm512_add_epi32(order, _mm512_set1_epi32(4 * PART)),
                                                                reinterpret_cast<__m512>(values.part[0])));
    return v;
#else
    float from[16], to[16];
    store(from, values);
    for (int lane = 0; lane < 16; ++lane) to[lane] = from[4 * PART + lane / 4];
    return load<F16>(to);
#endif
}

// What the outliers of a row add for four tokens; `end` is that of the rows whose inputs are copied together.
template <int32_t TYPE, class Column>
INLINE F4 outliers_of_four(const Beside& b, const char* x, int64_t row, int64_t end, Copied<TYPE, Column>& copied) {
    F16 sums[4] = {zero_f(), zero_f(), zero_f(), zero_f()};
    const int64_t stop = b.start[row + 1];
    int64_t i = b.start[row];
    for (; i + 16 <= stop; i += 16) {
        const char* inputs = copied.at(b, x, i, end);
        const F16 values = load_floats(b.value, i, b.value_type);
        unroll<4>([&](auto part) ALWAYS {
            sums[part] = multiply_add(four_times<part>(values), load_floats(inputs, 16 * part, TYPE), sums[part]);
        });
    }
    if (i < stop) {
        const int64_t left = stop - i;
        const char* inputs = copied.at(b, x, i, end);
        const F16 values = read_values(b.value, i, left, b.value_type);
        unroll<4>([&](auto part) ALWAYS {
            sums[part] = multiply_add(four_times<part>(values), read_values(inputs, 16 * part, 4 * left - 16 * part, TYPE), sums[part]);
        });
    }
    float lanes[16];
    F4 four[4];
    store(lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    memcpy(four, lanes, sizeof four);
    return (four[0] + four[1]) + (four[2] + four[3]);
}

// What the kept columns add to four rows: one reading of the inputs for all. Rows beyond the last repeat it.
template <int W>
__attribute__((noinline)) void kept_of(const Beside& b, const float* kept, int64_t row, typename Tokens<W>::V (&sums)[4]) {
    int64_t at[4];
    for (int64_t r = 0; r < 4; ++r) at[r] = (row + r < b.rows ? row + r : b.rows - 1) * b.kept;
    F16 vectors[4] = {zero_f(), zero_f(), zero_f(), zero_f()};
    for (int64_t c = 0; c < b.kept; c += 16) {
        if constexpr (W == 1) {
            const F16 inputs = load<F16>(kept + c);
            repeat<4>([&](int r) ALWAYS { vectors[r] = multiply_add(read_values(b.kept_value, at[r] + c, b.kept - c, b.kept_type), inputs, vectors[r]); });
        } else {
            float values[4][16];
            repeat<4>([&](int r) ALWAYS { store(values[r], read_values(b.kept_value, at[r] + c, b.kept - c, b.kept_type)); });
            asm volatile("" : "+m"(values));
            repeat<16>([&](int j) ALWAYS {
                const auto input = Tokens<W>::template input<kFloat32>(reinterpret_cast<const char*>(kept), c + j);
                repeat<4>([&](int r) ALWAYS { sums[r] = Tokens<W>::joined(values[r][j], input, sums[r]); });
            });
        }
    }
    if constexpr (W == 1) repeat<4>([&](int r) ALWAYS { sums[r] += total_of(vectors[r]); });
}

// Sixteen rows or fewer of a block: sums [row][W] join y.
template <int W>
inline void add_sums(const Beside& b, int64_t block, int64_t row, int64_t rows, const float* sums) {
    for (int64_t token = block * W; token < b.tokens && token < (block + 1) * W; ++token) {
        float out[16];
        const int64_t at = token * b.rows + row;
        if (rows == 16) store(out, load_floats(b.y, at, b.type));
        for (int64_t i = 0; i < rows && rows < 16; ++i) out[i] = read_float(b.y, at + i, b.type);
        for (int64_t i = 0; i < rows; ++i) out[i] += sums[i * W + token % W];
        store_floats(b.out, at, b.type, out, static_cast<int>(rows));
    }
}

template <int W, int32_t TYPE, class Column>
inline void add_rows(const Beside& b, const Inputs& inputs, int64_t first, int64_t stop) {
    Copied<TYPE, Column> copied;
    for (int64_t block = 0; block * W < b.tokens; ++block) {
        const char* x = inputs.all + block * b.columns * W * size_of(TYPE);
        const float* kept = inputs.kept + block * filled(b.kept) * W;
        for (int64_t row = first; row < stop; row += 16) {
            const int64_t rows = stop - row < 16 ? stop - row : 16;
            alignas(64) float sums[16 * W] = {};
            copied.first = copied.stop = 0;
            for (int64_t r = 0; b.start && r < rows; ++r) {
                typename Tokens<W>::V sum;
                if constexpr (W == 4) sum = outliers_of_four<TYPE, Column>(b, x, row + r, b.start[row + rows], copied);
                if constexpr (W != 4) sum = outliers_of<W, TYPE, Column>(b, x, row + r);
                memcpy(sums + r * W, &sum, sizeof sum);
            }
            for (int64_t r = 0; b.kept && r < rows; r += 4) {
                typename Tokens<W>::V four[4];
                memcpy(four, sums + r * W, sizeof four);
                kept_of<W>(b, kept, row + r, four);
                memcpy(sums + r * W, four, sizeof four);
            }
            add_sums<W>(b, block, row, rows, sums);
        }
    }
}

// Columns first .. stop - 1 of a block of W tokens, turned round; missing tokens are zeros. Four numbers of 16 bits are one word.
template <int W>
inline void turn_round16(const Beside& b, int64_t block, int64_t first, int64_t stop, char* to) {
    const int64_t left = b.tokens - block * W;
    uint64_t* out = reinterpret_cast<uint64_t*>(to) + block * b.columns * (W / 4);
    for (int64_t four = 0; four < W / 4; ++four) {
        const uint16_t* row[4];
        uint64_t there[4];
        for (int64_t t = 0; t < 4; ++t) {
            there[t] = 4 * four + t < left ? 0xffff : 0;
            row[t] = static_cast<const uint16_t*>(b.x) + (block * W + (there[t] ? 4 * four + t : 0)) * b.columns;
        }
        for (int64_t k = first; k < stop; ++k) {
            out[k * (W / 4) + four] = (row[0][k] & there[0]) | (row[1][k] & there[1]) << 16 | (row[2][k] & there[2]) << 32 | (row[3][k] & there[3]) << 48;
        }
    }
}
// The same as floats.
template <int W>
inline void turn_round(const Beside& b, int64_t block, int64_t first, int64_t stop, float* to) {
    float row[kTurned];
    for (int64_t token = 0; token < W; ++token) {
        const int64_t number = block * W + token;
        memset(row, 0, sizeof row);
        if (number < b.tokens) to_floats(b.x, number * b.columns + first, b.type, row, stop - first);
        for (int64_t k = first; k < stop; ++k) to[(block * b.columns + k) * W + token] = row[k - first];
    }
}

template <int W, int32_t TYPE>
inline void place_inputs(const Beside& b, int threads, char* all, float* kept) {
    if (b.start) {
        const int64_t steps = ceil_div(b.columns, kTurned);
        parallel(steps * ceil_div(b.tokens, W), b.tokens > 4 ? threads : 1, [&](int64_t piece, int) {
            const int64_t first = piece % steps * kTurned, stop = first + kTurned < b.columns ? first + kTurned : b.columns;
            if constexpr (TYPE == kFloat32) turn_round<W>(b, piece / steps, first, stop, reinterpret_cast<float*>(all));
            if constexpr (TYPE != kFloat32) turn_round16<W>(b, piece / steps, first, stop, all);
        });
    }
    for (int64_t token = 0; token < b.tokens; ++token) {
        for (int64_t c = 0; c < b.kept; ++c) {
            kept[(token / W * filled(b.kept) + c) * W + token % W] = read_float(b.x, token * b.columns + b.index[c], b.type);
        }
    }
}

template <int W, int32_t TYPE>
inline Status prepare_in_blocks(const Beside& b, int threads, Adding& to) {
    const int64_t padded = ceil_div(b.tokens, W) * W;
    const size_t all_bytes = b.start ? static_cast<size_t>((padded * b.columns * size_of(TYPE) + 63) / 64 * 64) : 0;
    const size_t kept_bytes = static_cast<size_t>(padded * filled(b.kept) * 4);
    char* memory = static_cast<char*>(scratch(kBesideScratch, all_bytes + kept_bytes + 64));
    if (!memory) return kOutOfMemory;
    memset(memory + all_bytes, 0, kept_bytes);
    float* kept = reinterpret_cast<float*>(memory + all_bytes);
    place_inputs<W, TYPE>(b, threads, memory, kept);
    to = {b, {memory, kept}, b.column_bytes == 2 ? add_rows<W, TYPE, int16_t> : add_rows<W, TYPE, int32_t>, false};
    return kDone;
}

template <int W>
inline Status prepare_for(const Beside& b, int threads, Adding& to) {
    if constexpr (kKeepsType && W > 1) {
        if (b.type == kFloat16) return prepare_in_blocks<W, kFloat16>(b, threads, to);
        if (b.type == kBfloat16) return prepare_in_blocks<W, kBfloat16>(b, threads, to);
    }
    return prepare_in_blocks<W, kFloat32>(b, threads, to);
}

inline Status prepare(const Beside& b, int threads, Adding& to) {
    if (b.tokens == 1) return prepare_for<1>(b, threads, to);
    return b.tokens <= 4 ? prepare_for<4>(b, threads, to) : prepare_for<16>(b, threads, to);
}

inline Status add_beside(const Beside& b) {
    const int threads = b.tokens * (b.outliers + b.rows * b.kept) < kAlone ? 1 : b.threads;
    Adding adding;
    const Status status = prepare(b, threads, adding);
    if (status != kDone) return status;
    // Many blocks of inputs do not stay in a cache: rows of a piece share their reading.
    const int64_t run = b.tokens > 16 ? kMostRunRows : kMostRunRows / 4;
    parallel(ceil_div(b.rows, run), threads, [&](int64_t piece, int) {
        add(adding, piece * run, (piece + 1) * run);
    });
    return kDone;
}

}  // namespace UNIT
}  // namespace aerogel
