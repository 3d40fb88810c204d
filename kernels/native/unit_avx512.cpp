// AVX-512 with the int8 dot product: Cascade Lake, Zen 4 and later.
#define UNIT avx512
#include "attend.h"
#include "beside.h"
#include "gemm.h"
#include "hadamard.h"
#include "lookup_run.h"
#include "own_rows.h"
#include "paths.h"
#include "prompt.h"

namespace aerogel {

Status exact_avx512(const Weight& weight, const Call& call) { return avx512::run<avx512::Exact>(weight, call); }
Status int8_avx512(const Weight& weight, const Call& call) { return avx512::run<avx512::Int8>(weight, call); }
Status own_avx512(const OwnTables& weight, const Call& call) { return avx512::own_tables(weight, call); }
extern const Step step_avx512;
const Step step_avx512 = {
    avx512::attend, avx512::attend_prompt, avx512::norm, avx512::gate, avx512::hadamard, avx512::add_beside, avx512::prepare, avx512::read_all,
    {avx512::lookup<avx512::Real>, avx512::lookup<avx512::Fixed>},
};

}  // namespace aerogel
