// AArch64 with the int8 dot product: Armv8.2 and later. All else is the portable unit's, which has there what every AArch64 has.
#define UNIT neon
#include "gemm.h"

namespace aerogel {

Status int8_neon(const Weight& weight, const Call& call) { return neon::run<neon::Int8>(weight, call); }

}  // namespace aerogel
