// AArch64 with the int8 dot product: Armv8.2 and later.
#define UNIT neon
#include "attend.h"
#include "beside.h"
#include "gemm.h"
#include "hadamard.h"
#include "lookup_many.h"
#include "own_rows.h"
#include "paths.h"
#include "prompt.h"

namespace aerogel {

Status exact_neon(const Weight& weight, const Call& call) { return neon::run<neon::Exact>(weight, call); }
Status int8_neon(const Weight& weight, const Call& call) { return neon::run<neon::Int8>(weight, call); }
Status own_neon(const OwnTables& weight, const Call& call) { return neon::own_tables(weight, call); }
extern const Step step_neon;
const Step step_neon = {
    neon::attend, neon::attend_prompt, neon::norm, neon::gate, neon::hadamard, neon::add_beside, neon::prepare, neon::read_all,
    {neon::lookup<neon::Real>, neon::lookup<neon::Fixed>},
};

}  // namespace aerogel
