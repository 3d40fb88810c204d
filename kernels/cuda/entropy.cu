// Huffman-coded bytes back to numbers: one thread for each run of 256 symbols. What is stored: kernels/entropy/ref.py.
//
// A code has at most 12 bits, so decoding is a loop of four steps: look the next 12 bits up in a table of 4096 entries, take
// the symbol, skip its length, fill up from the stream. The chain through these steps is what takes the time, some 40 cycles
// a symbol; thousands of threads hide it. Neighbouring threads read neighbouring runs, of 85 bytes or so on exponents, which
// share cache lines; each writes 16 bytes at a time.
//
// Count for a 4096 x 4096 weight: 11 MB of stream, 17 MB of signs and mantissas, 34 MB written; 65536 threads, half of what
// an H100 holds at once.
//
// BFLOAT16 1: a symbol is an exponent, joined with a byte of `rest`, sign in its top bit and mantissa below. 0: a byte.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int RUN = 256, LONGEST = 12, TABLE = 1 << LONGEST, THREADS = 128;

struct Arguments {
    const u32* stream;   // padded with zeros to whole words, and one more
    const long long* ends;  // [runs] the byte behind each run
    const u16* lengths;  // [runs] bytes of each run
    const u16* table;    // [4096] symbol + 256 * bits
    const u8* rest;      // [count] or null
    void* out;           // [count] bfloat16 or bytes
    long long count;
};

// The bits from a byte of the stream on, lowest first.
struct Reader {
    const u32* next;
    u64 bits;
    int held;
    __device__ Reader(const u32* stream, long long byte) : next(stream + byte / 4 + 1), held(32 - 8 * (int)(byte % 4)) {
        bits = stream[byte / 4] >> (8 * (byte % 4));
    }
    __device__ u32 take(const u16* table) {
        if (held < LONGEST) bits |= (u64)*next++ << held, held += 32;
        const u32 entry = table[bits & (TABLE - 1)];
        bits >>= entry >> 8, held -= entry >> 8;
        return entry & 255;
    }
};

__device__ u32 joined(u32 exponent, u32 rest) { return (rest & 0x80) << 8 | exponent << 7 | (rest & 0x7F); }

extern "C" __global__ void __launch_bounds__(THREADS) entropy_decode(const __grid_constant__ Arguments p) {
    __shared__ u16 table[TABLE];
    for (int i = threadIdx.x; i < TABLE / 8; i += THREADS) ((uint4*)table)[i] = ((const uint4*)p.table)[i];
    __syncthreads();
    const long long run = blockIdx.x * (long long)THREADS + threadIdx.x, first = run * RUN;
    if (first >= p.count) return;
    Reader reader(p.stream, p.ends[run] - p.lengths[run]);
    const int symbols = p.count - first < RUN ? (int)(p.count - first) : RUN;
    for (int i = 0; i < symbols; i += 8) {
        u32 found[8];
#pragma unroll
        for (int j = 0; j < 8; j++) found[j] = i + j < symbols ? reader.take(table) : 0;
        if (i + 8 <= symbols) {
#if BFLOAT16
            const uint2 beside = *(const uint2*)(p.rest + first + i);
            u32 words[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u32 pair = (j < 2 ? beside.x : beside.y) >> (16 * (j % 2));
                words[j] = joined(found[2 * j], pair & 255) | joined(found[2 * j + 1], pair >> 8 & 255) << 16;
            }
            *(uint4*)((u16*)p.out + first + i) = make_uint4(words[0], words[1], words[2], words[3]);
#else
            *(uint2*)((u8*)p.out + first + i) =
                make_uint2(found[0] | found[1] << 8 | found[2] << 16 | found[3] << 24,
                           found[4] | found[5] << 8 | found[6] << 16 | found[7] << 24);
#endif
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (i + j < symbols) {
#if BFLOAT16
                    ((u16*)p.out)[first + i + j] = (u16)joined(found[j], p.rest[first + i + j]);
#else
                    ((u8*)p.out)[first + i + j] = (u8)found[j];
#endif
                }
        }
    }
}
