// x86-64 with AVX2, FMA and F16C: Haswell, Zen 1 and later.
#define UNIT avx2
#include "attend.h"
#include "beside.h"
#include "gemm.h"
#include "hadamard.h"
#include "lookup_run.h"
#include "own_rows.h"
#include "paths.h"
#include "prompt.h"

namespace aerogel {

Status exact_avx2(const Weight& weight, const Call& call) {
    using namespace avx2;
    const bool ragged = segment_tiles(columns_of(weight), Pairs::kLongestSegment) == 0;
    const bool pairs = call.tokens == 1 && paired(weight.bits, ragged);
    if (FloatBytes::holds(weight)) return pairs ? run<FloatPairs>(weight, call) : run<TwoBytes>(weight, call);
    return pairs && IntegerBytes::holds(weight) ? run<Pairs>(weight, call) : run<Exact>(weight, call);
}
Status int8_avx2(const Weight& weight, const Call& call) { return avx2::run<avx2::Int8>(weight, call); }
Status own_avx2(const OwnTables& weight, const Call& call) { return avx2::own_tables(weight, call); }
extern const Step step_avx2;
const Step step_avx2 = {
    avx2::attend, avx2::attend_prompt, avx2::norm, avx2::gate, avx2::hadamard, avx2::add_beside, avx2::prepare, avx2::read_all,
    {avx2::lookup<avx2::Real>, avx2::lookup<avx2::Fixed>},
};

}  // namespace aerogel
