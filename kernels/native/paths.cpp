// Which paths there are, and which of them this machine has. A path also needs the operating system to save its registers,
// which the compiler's feature tests include.
#include "paths.h"

#include <atomic>

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace aerogel {

#define DECLARE(NAME)                                  \
    Status exact_##NAME(const Weight&, const Call&);   \
    Status int8_##NAME(const Weight&, const Call&);    \
    Status own_##NAME(const OwnTables&, const Call&);  \
    extern const Step step_##NAME;
DECLARE(portable)
DECLARE(avx2)
DECLARE(avxvnni)
DECLARE(avx512)
DECLARE(avx512bf16)
DECLARE(amx)
DECLARE(neon)
#undef DECLARE
Status prepare_avx512bf16(const Beside&, int threads, Adding& to);

namespace {

PathEntry table[kPaths];

#if defined(__x86_64__)
// A bit of what the processor says about itself: what not every compiler has a name for.
enum Register { kEax, kEbx, kEcx, kEdx };
bool says(unsigned leaf, unsigned part, Register found, int bit) {
    unsigned word[4] = {};
    return __get_cpuid_count(leaf, part, &word[kEax], &word[kEbx], &word[kEcx], &word[kEdx]) && (word[found] >> bit & 1u);
}
#endif

#if defined(__x86_64__) && defined(HAVE_AMX)
// Whether tiles of bytes may be used: the processor has them, and Linux gives this process the memory to save them in, which
// must be asked for.
bool may_use_tiles() {
#if defined(AEROGEL_EMULATE_TILES)
    return true;
#elif defined(__linux__)
    if (!says(7, 0, kEdx, 24) || !says(7, 0, kEdx, 25)) return false;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}
#endif

bool fill() {
    table[kPortable] = {exact_portable, int8_portable, true, step_portable, own_portable};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool f16c = says(1, 0, kEcx, 29), vnni = says(7, 1, kEax, 4), bf16 = says(7, 1, kEax, 5);
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
    const bool bfloat = avx512 && bf16 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
    (void)avx512, (void)bfloat, (void)vnni;
#if defined(HAVE_AVX2)
    table[kAvx2] = {exact_avx2, int8_avx2, avx2, step_avx2, own_avx2};
#if defined(HAVE_AVXVNNI)
    table[kAvxVnni] = {exact_avx2, int8_avxvnni, avx2 && vnni, step_avx2, own_avx2};
#endif
#endif
#if defined(HAVE_AVX512)
    table[kAvx512] = {exact_avx512, int8_avx512, avx512, step_avx512, own_avx512};
#if defined(HAVE_AVX512BF16)
    Step step = step_avx512;
    step.prepare = prepare_avx512bf16;
    table[kAvx512Bf16] = {exact_avx512bf16, int8_avx512, bfloat, step, own_avx512bf16};
#if defined(HAVE_AMX)
    table[kAmx] = {exact_avx512bf16, int8_amx, table[kAvx512Bf16].able && may_use_tiles(), step, own_avx512bf16};
#endif
#endif
#endif
#elif defined(__aarch64__) && defined(HAVE_NEON)
    const bool dot = (getauxval(AT_HWCAP) & (1ul << 20)) != 0;  // HWCAP_ASIMDDP
    table[kNeon] = {exact_portable, int8_neon, dot, step_portable, own_portable};
#endif
    return true;
}

std::atomic<uint32_t> counted{~0u};

}  // namespace

const PathEntry& path_entry(int32_t path) {
    static const bool filled = fill();
    (void)filled;
    return table[path];
}

int32_t best_path(int32_t numerics) {
    const uint32_t counts = counted.load(std::memory_order_relaxed);
    for (int32_t path = kPaths - 1; path > kPortable; --path) {
        const PathEntry& entry = path_entry(path);
        if (entry.able && counts >> path & 1 && (numerics == kExact ? entry.exact : entry.int8)) return path;
    }
    return kPortable;
}

void choose_among(uint32_t paths) { counted.store(paths, std::memory_order_relaxed); }

}  // namespace aerogel
