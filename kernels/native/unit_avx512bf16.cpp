// AVX-512 with the bfloat16 dot product and permutations of bytes: Sapphire Rapids, Zen 4 and later. Int8 is that of unit_avx512.
#define UNIT avx512bf16
#include "gemm.h"
#include "outlier_tiles_kernel.h"
#include "own_rows.h"

namespace aerogel {

Status exact_avx512bf16(const Weight& weight, const Call& call) { return avx512bf16::run<avx512bf16::Exact>(weight, call); }
Status prepare_avx512bf16(const Beside& beside, int threads, Adding& to) { return avx512bf16::prepare_tiled(beside, threads, to); }
Status own_avx512bf16(const OwnTables& weight, const Call& call) { return avx512bf16::own_tables(weight, call); }

}  // namespace aerogel
