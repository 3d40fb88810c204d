// AVX-512 with the int8 dot product: Cascade Lake, Zen 4 and later.
#define UNIT avx512
#include "gemm.h"

namespace aerogel {

Status exact_avx512(const Weight& weight, const Call& call) { return avx512::run<avx512::Exact>(weight, call); }
Status int8_avx512(const Weight& weight, const Call& call) { return avx512::run<avx512::Int8>(weight, call); }

}  // namespace aerogel
