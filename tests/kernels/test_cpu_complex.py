"""Complex codes on a CPU: the compiled loops give what the codes decode to, and give the codes back."""

from __future__ import annotations

import pytest
import torch

from aerogel.kernels.dispatch import choose
from aerogel.kernels.gemm.cpu_complex import LookedUpComplex, NativeComplex
from aerogel.kernels.gemm.cpu_tables import FLOAT32_PATHS
from aerogel.kernels.linear import Linear
from aerogel.kernels.native import library
from aerogel.kernels.problem import Kernel, Problem
from aerogel.quantize.codes import quantized
from aerogel.quantize.formats.complex import Complex
from aerogel.quantize.formats.nf4 import Nf4

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 4e-3)], ids=str
)
@pytest.mark.parametrize(("N", "K"), [(2, 2), (66, 130), (150, 64)])
@pytest.mark.parametrize("kernel", [NativeComplex, LookedUpComplex])
def test_the_product_is_that_of_the_decoded_weight(
    kernel: type[Kernel], dtype: torch.dtype, tolerance: float, N: int, K: int
) -> None:
    weight_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(N))
    codes = quantized(Complex(), weight_NK, Complex().fit(weight_NK))
    problem = Problem(format="complex-packed", grid=Complex(), N=N, K=K, dtype=dtype)
    assert choose(problem)[1] in (NativeComplex, LookedUpComplex)
    layout = kernel.pack(codes, problem)
    back = kernel.unpack(layout, problem)
    assert torch.equal(back.values_NK, codes.values_NK) and torch.equal(back.scale_NG, codes.scale_NG)
    for M in (1, 5, 40):
        x_MK = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)
        bias_N = torch.randn(N)
        wanted_MN = x_MK.double() @ codes.decode().double().T + bias_N
        found_MN = kernel.run(x_MK, layout, problem, bias_N)
        assert float((found_MN - wanted_MN).norm() / wanted_MN.norm()) < tolerance, M


def test_a_layer_in_bfloat16_runs_it_and_other_numbers_do_not() -> None:
    weight_NK = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    layer = Linear.from_codes(quantized(Complex(), weight_NK, Complex().fit(weight_NK)), dtype=torch.bfloat16)
    assert layer.kernel_name == ("cpu-complex" if library.best("exact") in FLOAT32_PATHS else "cpu-complex-lookup")
    assert "complex" in (NativeComplex.refuses(Problem(format="any", grid=Nf4(), N=4, K=32)) or "")
