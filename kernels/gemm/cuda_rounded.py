"""Inputs in e4m3 where the tensor cores do not multiply e4m3 with the weight: rounded first, then multiplied in 16 bits.

    y_MN = x'_MK @ W_NK.T,    x' = s_x * e4m3(x / s_x)        s_x per token, per token and 128 columns, or stored

Weights in blocks of 128 x 128 (as DeepSeek-V3 and Qwen3 publish theirs), sizes that are no multiple of 16, float16, and GPUs
before compute capability 8.9. The weight lies as `cuda` has it, and its kernels run; before them torch's operators round x, in
about ten launches: 20 of the 29 microseconds that a token of 4096 x 4096 takes on an H100, where decoding the weight took 227.
x' has the activations' 16 bits: e4m3 times a float32 scale, rounded by 2^-9 in bfloat16 where e4m3 itself rounds by 2^-4.

Shape legend: M tokens, N out features, K in features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from aerogel.kernels.gemm.cuda import Cuda
from aerogel.kernels.gemm.cuda_around import AroundCuda
from aerogel.kernels.gemm.ref import round_input
from aerogel.kernels.problem import Layout, Problem
from aerogel.quantize.codes import Codes
from aerogel.quantize.grids import Fp8Grid


class CudaRounded(AroundCuda):
    """e4m3 weights with e4m3 inputs, multiplied in 16 bits."""

    about: ClassVar[str] = "inputs rounded to e4m3, then the weight-only CUDA kernels: FP8 in blocks, and what cuda-fp8 refuses"

    @staticmethod
    def inner(problem: Problem) -> Problem:
        """The matmul of inputs that are rounded already."""
        return replace(problem, activations="none")

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Anything but e4m3 weights with fp8 activations, and what the weight-only kernels refuse."""
        return (
            problem.needs_activations("fp8", "fp8-static")
            or problem.needs_numbers(Fp8Grid)
            or Cuda.refuses(CudaRounded.inner(problem))
        )

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """See `Cuda.pack`."""
        return Cuda.pack(codes, CudaRounded.inner(problem))

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The inverse of `pack`, exactly."""
        return Cuda.unpack(layout, CudaRounded.inner(problem))

    @staticmethod
    def operand(x_MK: Tensor, layout: Layout, problem: Problem) -> Tensor:
        """x rounded."""
        return round_input(x_MK.float(), problem, layout.get("input_scale")).to(x_MK.dtype).contiguous()
