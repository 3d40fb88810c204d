"""The matmul of e4m3 weights with e4m3 activations on NVIDIA GPUs: one kernel rounds the input, cuBLAS or CUTLASS multiplies.

    x ~ x8 * s_x        e4m3, a scale per token: s_x = max |x| / 448, or a stored one; kernels/cuda/quantize.cu
    y_MN = (x8 @ w8.T) * s_x * s_w + bias        float32 sums, through torch._scaled_mm with a scale per row of each factor

At 4096 tokens the product runs at twice a dense one's speed, and the rounding costs a twentieth of it.

Shape legend: M tokens, N out features, K in features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from aerogel.kernels import gpu_here
from aerogel.kernels.gemm.cuda_made import Made
from aerogel.kernels.gemm.cuda_quantize import E4M3, Quantizer
from aerogel.kernels.problem import Kernel, Layout, Problem
from aerogel.quantize.grids import Codes, Fp8Grid

LEAST_CAPABILITY = (8, 9)


def fp8_linear(x: Tensor | Made, weight: Tensor, scale_N: Tensor, bias: Tensor | None, fixed: Tensor | None = None) -> Tensor:
    """`aerogel::fp8_linear` on CUDA: x bf16 [M, K], or the norm or gate that makes it and rounds it there, weight e4m3 [N, K],
    its float32 scales [N] -> bf16 [M, N]. fixed: float32 [1], the scale of every token."""
    like = x if isinstance(x, Tensor) else x.x
    M, K = like.shape
    if M == 0 or K == 0:
        return like.new_zeros(M, weight.shape[0]) if bias is None else bias.expand(M, -1).to(like.dtype).contiguous()
    with torch.cuda.device(like.device):
        codes, scale_M = Quantizer(dtype=like.dtype, device=like.device, output=E4M3, columns=K)(x, fixed)
    if bias is not None:
        bias = bias.to(like.dtype).contiguous()
        bias = bias.clone() if bias.data_ptr() % 16 else bias  # cuBLAS has no kernel for others
    y: Tensor = torch._scaled_mm(
        codes,
        weight.T,
        scale_a=scale_M[:, None],
        scale_b=scale_N[None],
        bias=bias,
        out_dtype=like.dtype,
    )
    return y


def _fake(x: Tensor, weight: Tensor, scale_N: Tensor, bias: Tensor | None, fixed: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_library = torch.library.Library("aerogel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "fp8_linear(Tensor x, Tensor weight, Tensor scale_N, Tensor? bias, Tensor? fixed=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("fp8_linear", fp8_linear, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("aerogel::fp8_linear", _fake, lib=_library)


class CudaFp8(Kernel):
    """e4m3 x e4m3 with a scale per output and per token."""

    about: ClassVar[str] = "e4m3 x e4m3 on the tensor cores, activations rounded by one kernel, for activations: fp8"

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Anything but e4m3 per channel or tensor with fp8 activations in bfloat16; sizes that the matmul cannot take."""
        blocks = "runs e4m3 weights with a scale per output or tensor, not for each block"
        return (
            problem.needs_device("cuda")
            or problem.needs_activations("fp8", "fp8-static")
            or problem.needs_numbers(Fp8Grid)
            or (None if problem.grid.group_size is None else blocks)
            or problem.needs_dtype(torch.bfloat16)
            or problem.needs_multiples(16, 16)
            or gpu_here.nvidia_missing(LEAST_CAPABILITY)
        )

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """weight e4m3 [N, K], weight_scale as stored, scale_N float32 [N]."""
        scale = codes.scale_NG.contiguous()
        return {
            "weight": codes.values_NK.contiguous(),
            "weight_scale": scale,
            "scale_N": scale.float().reshape(-1).expand(problem.N).contiguous(),
        }

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The same tensors as codes."""
        return Codes(values_NK=layout["weight"], scale_NG=layout["weight_scale"], zero_NG=None, grid=problem.grid)

    @staticmethod
    def run(x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """One call of the operator."""
        fixed = layout.get("input_scale")
        y_MN: Tensor = torch.ops.aerogel.fp8_linear.default(x_MK, layout["weight"], layout["scale_N"], bias_N, fixed)
        return y_MN
