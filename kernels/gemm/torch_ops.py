"""The matmul with a packed weight through operators that torch ships, each only where it is faster than decoding.

`Chunked`       decodes some rows of W, multiplies, and goes on: nothing dense beyond a chunk exists. Runs everything.
`Int4Cpu`       torch's CPU kernel for 4-bit groups: W = (u - 8) * s + z', decoded in registers. At 4096 x 4096, bfloat16
                and one token it takes an eighth of the time of a dense matmul, being bound by memory.
`Int8Cpu`       torch's CPU kernel for int8 per channel, the same at half the gain.
`Int8Dynamic`   int8 x int8 with exact int32 sums, then y = acc * s_x * s_w; for `activations: int8`.

The CPU kernels round each product's factors to the activations' 16-bit type, as a dense 16-bit matmul would: their error
against the specification is about 0.002 relative in bfloat16 and 0.0003 in float16. Their float32 paths are scalar and
slower than decoding, so they refuse float32.

Shape legend: M tokens, N out features, K in features, G groups along K.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from aerogel.kernels.gemm.ref import quantize_int8, round_input
from aerogel.kernels.problem import Kernel, Layout, Problem
from aerogel.pack.format import ROW_STEP
from aerogel.quantize.grids import Codes, IntGrid

CHUNK_ELEMENTS = 1 << 22
"""Weights decoded at a time: 8 MB in a 16-bit type."""
INT4_GROUPS = (32, 64, 128, 256)
HALF = (torch.bfloat16, torch.float16)


class Chunked(Kernel):
    """Decode rows of W in the activations' dtype, multiply, repeat."""

    about: ClassVar[str] = "decode a few rows at a time in the activations' type and multiply; runs everything"
    traceable: ClassVar[bool] = False

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Nothing."""
        return None

    @staticmethod
    def run(x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """y in chunks of output rows."""
        if problem.activations != "none":
            x_MK = round_input(x_MK.float(), problem, layout.get("input_scale")).to(x_MK.dtype)
        y_MN = x_MK.new_empty(x_MK.shape[0], problem.N)
        # Few CPUs multiply float16: there float32 is twenty times faster, and loses nothing.
        wide = x_MK.float() if x_MK.dtype == torch.float16 and problem.device == "cpu" else x_MK
        step = max(ROW_STEP, CHUNK_ELEMENTS // max(problem.K, 1) // ROW_STEP * ROW_STEP)
        for start in range(0, problem.N, step):
            stop = min(start + step, problem.N)
            part = problem.stored.rows(layout, problem.grid, start, stop)
            y_MN[:, start:stop] = wide @ problem.stored.decode(part, problem.grid, wide.dtype).T
        return y_MN if bias_N is None else y_MN.add_(bias_N)


class Int4Cpu(Kernel):
    """`torch._weight_int4pack_mm_for_cpu`."""

    about: ClassVar[str] = "torch's CPU kernel for 4-bit groups of 32 to 256, bfloat16"

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Anything but 4-bit integer groups on a CPU in a 16-bit type, N a multiple of 16."""
        group = problem.grid.group_size or 0
        if problem.needs_numbers(IntGrid) or problem.grid.bits != 4 or problem.format != "pack-quantized":
            return "runs 4-bit pack-quantized weights only"
        if group not in INT4_GROUPS:
            return f"needs a group_size of {', '.join(map(str, INT4_GROUPS))}, found {problem.grid.group_size}"
        # In float16 it is over a hundred times slower than decoding.
        return problem.needs_device("cpu") or problem.needs_dtype(torch.bfloat16) or problem.needs_multiples(16, group)

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """int4 uint8 [N, K/2]; scale_and_offset [G, N, 2] in the activations' dtype, offset = -z * s.

        Scales and zero points stay beside it, because rounding them to 16 bits loses what `unpack` must give back; where
        they are of that type already only the zero points do.
        """
        scale = codes.scale_NG.float()
        offset = torch.zeros_like(scale) if codes.zero_NG is None else codes.zero_NG.float() * -scale
        layout = {
            "int4": torch._convert_weight_to_int4pack_for_cpu(codes.values_NK.int() + 8, 1),
            "scale_and_offset": torch.stack([scale.T, offset.T], -1).to(problem.dtype).contiguous(),
        }
        if codes.scale_NG.dtype != problem.dtype:
            layout["weight_scale"] = codes.scale_NG
        if codes.zero_NG is not None:
            layout["zero"] = codes.zero_NG
        return layout

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """Multiplies the packed weight with the identity at scale 1: exact integers, whatever order the nibbles are in."""
        ones = torch.zeros_like(layout["scale_and_offset"])
        ones[..., 0] = 1
        values = torch.empty(problem.N, problem.K, dtype=torch.int8)
        size = problem.grid.group_size or problem.K
        eye = torch.eye(problem.K, dtype=problem.dtype)
        for start in range(0, problem.K, 256):
            rows = torch._weight_int4pack_mm_for_cpu(eye[start : start + 256], layout["int4"], size, ones)
            values[:, start : start + 256] = rows.T.to(torch.int8)
        scale = layout.get("weight_scale", layout["scale_and_offset"][..., 0].T.contiguous())
        return Codes(values_NK=values, scale_NG=scale, zero_NG=layout.get("zero"), grid=problem.grid)

    @staticmethod
    def run(x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """One call of the operator."""
        if x_MK.shape[0] == 0:
            return x_MK.new_empty(0, problem.N)
        size = problem.grid.group_size or problem.K
        y_MN: Tensor = torch._weight_int4pack_mm_for_cpu(x_MK, layout["int4"], size, layout["scale_and_offset"])
        return y_MN if bias_N is None else y_MN.add_(bias_N)


class _Int8(Kernel):
    """Weights of plain int8, as int-quantized stores them, whatever format the codes came in."""

    @classmethod
    def runs_stored(cls, problem: Problem) -> bool:
        """Where they came in that format."""
        return problem.format == "int-quantized"

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """weight int8 [N, K], weight_scale [N, 1]."""
        return {"weight": codes.values_NK.contiguous(), "weight_scale": codes.scale_NG.contiguous()}

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The same tensors as codes."""
        return Codes(values_NK=layout["weight"], scale_NG=layout["weight_scale"], zero_NG=None, grid=problem.grid)


def _refuses_grid(problem: Problem) -> str | None:
    grid = problem.integer
    if grid is None or grid.bits != 8 or grid.group_size is not None or not grid.symmetric:
        return "runs symmetric 8-bit integers per channel only"
    return None


class Int8Cpu(_Int8):
    """`torch._weight_int8pack_mm`: int8 weights, 16-bit activations."""

    about: ClassVar[str] = "torch's CPU kernel for int8 per channel with bfloat16 or float16 activations"

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Anything but weight-only int8 per channel on a CPU in a 16-bit type, N in 16s and K in 32s."""
        return (
            problem.needs_device("cpu")
            or problem.needs_activations("none")
            or problem.needs_dtype(*HALF)  # in float32 decoding is faster
            or problem.needs_multiples(16, 32)  # the operator itself does not check: it reads past the end
            or _refuses_grid(problem)
        )

    @staticmethod
    def run(x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """Integers times activations first, scales after: a scale of another type is then rounded only once, with y."""
        if x_MK.shape[0] == 0:
            return x_MK.new_empty(0, problem.N)
        scale = layout["weight_scale"].reshape(-1)
        if scale.dtype == x_MK.dtype:
            y_MN: Tensor = torch._weight_int8pack_mm(x_MK, layout["weight"], scale)
        else:
            raw = torch._weight_int8pack_mm(x_MK, layout["weight"], torch.ones_like(scale, dtype=x_MK.dtype))
            y_MN = (raw.float() * scale.float()).to(x_MK.dtype)
        return y_MN if bias_N is None else y_MN.add_(bias_N)


class Int8Dynamic(_Int8):
    """`torch._int_mm`: both factors int8, exact sums."""

    about: ClassVar[str] = "int8 x int8 matmul with exact sums, for activations: int8"

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Anything but int8 weights per channel with int8 activations; on CUDA, sizes that its kernel cannot take."""
        return (
            problem.needs_activations("int8", "int8-static")
            or problem.needs_device("cpu", "cuda")
            or (problem.needs_multiples(8, 8) if problem.device == "cuda" else None)
            or _refuses_grid(problem)
        )

    @staticmethod
    def run(x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """acc_MN = qx @ qw.T in int32; y = acc * s_x * s_w (+ bias) in float32, rounded once."""
        M = x_MK.shape[0]
        if M == 0:
            return x_MK.new_empty(0, problem.N)
        values, scale_M1 = quantize_int8(x_MK, layout.get("input_scale"))
        if x_MK.is_cuda and M <= 16:
            # cuBLAS wants more than 16 rows; the added ones are zero and cut off again.
            values = torch.nn.functional.pad(values, (0, 0, 0, 17 - M))
        acc: Tensor = torch._int_mm(values, layout["weight"].T)[:M]
        y_MN = acc.float() * scale_M1 * layout["weight_scale"].float().T
        if bias_N is not None:
            y_MN += bias_N.float()
        return y_MN.to(x_MK.dtype)
