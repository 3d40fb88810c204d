// AVX2 with the int8 dot product in 256 bits: Alder Lake and later. Exact numerics are those of unit_avx2.
#define UNIT avxvnni
#include "gemm.h"

namespace aerogel {

Status int8_avxvnni(const Weight& weight, const Call& call) { return avxvnni::run<avxvnni::Int8>(weight, call); }

}  // namespace aerogel
