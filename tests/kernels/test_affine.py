"""Integers with floating zero points on the kernels: every path of the CPU against float64, layouts that invert, a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.kernels.test_cpu import EXACT, SHAPES, TYPES, activations, relative
from tests.kernels.tile_weights import dense64 as tile_dense
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.dispatch import choose, explain
from aerogel.kernels.embedding import PackedEmbedding
from aerogel.kernels.gemm.cpu import Native, linear
from aerogel.kernels.gemm.cuda import Cuda, tile_weight
from aerogel.kernels.gemm.triton_linear import Triton
from aerogel.kernels.linear import Linear
from aerogel.kernels.native import library
from aerogel.kernels.problem import Problem
from aerogel.quantize.codes import Codes
from aerogel.quantize.formats.affine import Affine

needs_library = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
ROUNDED = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""On a GPU zero points are rounded to the activations' type."""


def codes_of(N: int, K: int, bits: int, group: int, dtype: torch.dtype) -> Codes:
    """Random codes, scales and zero points, some of which lie far outside the codes."""
    random = torch.Generator().manual_seed(N + K + bits)
    G = -(-K // group) if group else 1
    zero = torch.rand(N, G, generator=random) * (1 << bits) * 1.5 - 0.25 * (1 << bits)
    return Codes(
        values_NK=torch.randint(0, 1 << bits, (N, K), generator=random, dtype=torch.uint8),
        scale_NG=(torch.rand(N, G, generator=random) + 0.1).to(dtype),
        zero_NG=zero.to(dtype),
        grid=Affine(bits=bits, group_size=group or None, scale_dtype=dtype),
    )


def dense64(codes: Codes) -> Tensor:
    """(u - z) * s."""
    K = codes.values_NK.shape[1]
    assert codes.zero_NG is not None
    scale, zero = (x.double().repeat_interleave(codes.grid.group_size or K, 1)[:, :K] for x in (codes.scale_NG, codes.zero_NG))
    return (codes.values_NK.double() - zero) * scale


def problem_of(codes: Codes, **facts: Any) -> Problem:
    N, K = codes.values_NK.shape
    return Problem(format="affine-packed", grid=codes.grid, N=N, K=K, **facts)


@needs_library
@pytest.mark.parametrize("path", library.PATHS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_path_against_float64(path: str, bits: int) -> None:
    if path not in library.paths():
        pytest.skip(f"{path}: {'this machine has not its instructions' if path in library.paths(able=False) else 'not built'}")
    for index, (N, K, group) in enumerate(SHAPES):
        codes = codes_of(N, K, bits, group, TYPES[(bits + index) % 3])
        layout, dense = Native.pack(codes, problem_of(codes)), dense64(codes)
        for M in (1, 3, 16, 40):
            x = activations(M, K, TYPES[(M + index) % 3])
            given = (layout["codes"], layout["scale"], layout["zero"], None, N, group, library.NUMERICS["exact"])
            y = linear(x, *given, library.PATHS.index(path))
            # z times the sum of x is taken out of sums that are as large: a few digits of float32 cancel.
            assert relative(y, x.double() @ dense.T) < EXACT[x.dtype] + 1e-5, (N, K, group, M, x.dtype)


@needs_library
def test_rounded_inputs_are_refused_and_a_head_looks_rows_up() -> None:
    codes = codes_of(50, 72, 4, 24, torch.float16)
    layer = Linear.from_codes(codes, dtype=torch.bfloat16)
    assert layer.kernel_name == "cpu"
    assert torch.equal(layer.dequantize(torch.float32), codes.decode())
    ids = torch.tensor([[0, 49, 7]])
    assert torch.equal(PackedEmbedding(layer)(ids), codes.decode(torch.bfloat16)[ids])
    layout = layer.operands()
    with pytest.raises(BadInput):
        linear(activations(2, 72, torch.float32), layout["codes"], layout["scale"], layout["zero"], None, 50, 24, 1)
    reasons = dict(explain(problem_of(codes, dtype=torch.float32, fast=True)))
    assert "floating zero points" in str(reasons["cpu-int8"])


@pytest.mark.parametrize("kernel", [Native, Cuda, Triton])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group", [0, 32])
def test_layouts_invert(kernel: Any, dtype: torch.dtype, group: int) -> None:
    for bits in range(1, 9):
        codes = codes_of(37, 200, bits, group, dtype)
        problem = problem_of(codes, dtype=torch.bfloat16)
        back = kernel.unpack(kernel.pack(codes, problem), problem)
        for name in ("values_NK", "scale_NG", "zero_NG"):
            assert torch.equal(getattr(back, name), getattr(codes, name)), name


@pytest.mark.parametrize("group", [0, 32, 48])
def test_the_cuda_kernels_layout_means_this_weight(group: int) -> None:
    """By the definition that those kernels are tested against."""
    for bits in range(1, 9):
        codes = codes_of(37, 200, bits, group, TYPES[bits % 3])
        problem = problem_of(codes, dtype=torch.bfloat16)
        weight = tile_weight(Cuda.pack(codes, problem), problem)
        weight.check()
        assert weight.zero is not None and weight.zero.dtype == codes.scale_NG.dtype
        torch.testing.assert_close(tile_dense(weight), dense64(codes), rtol=1e-12, atol=0)


def test_layers_that_read_one_input_are_one_weight() -> None:
    """Rows of a layout lie behind one another, as `merge` wants them."""
    from aerogel.kernels import layouts

    parts = [codes_of(64, 96, 4, 32, torch.float16), codes_of(32, 96, 4, 32, torch.float16)]
    members = [Linear.from_codes(codes) for codes in parts]
    for member in members:
        member.restore()
    whole = layouts.stacked(Native, members, replace(problem_of(parts[0]), N=96))
    assert whole is not None
    joined = Native.unpack(whole, replace(problem_of(parts[0]), N=96))
    assert torch.equal(joined.decode(), torch.cat([codes.decode() for codes in parts]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_gpu_multiplies_with_it(bits: int) -> None:
    """Kernels for every width, group and type of zero points are tested as such; here, that codes reach them."""
    dtype, group = (torch.bfloat16, torch.float16)[bits % 2], (64, 0, 48)[bits % 3]
    codes = codes_of(200, 432, bits, group, (torch.float16, torch.float32, torch.bfloat16)[bits % 3]).to("cuda")
    dense = dense64(codes)
    layer = Linear.from_codes(codes, dtype=dtype)
    assert layer.kernel_name == "cuda" and torch.equal(layer.dequantize(torch.float32), codes.decode())
    problem = problem_of(codes, dtype=dtype, device="cuda")
    words = Triton.pack(codes, problem)
    for tokens in (3, 100):
        x = torch.randn(tokens, 432, device="cuda").to(dtype)
        for y in (layer(x), Triton.run(x, words, problem)):
            assert relative(y, x.double() @ dense.T) < ROUNDED[dtype], (group, tokens)


def test_the_dispatcher_names_the_same_kernels_on_every_device() -> None:
    codes = codes_of(64, 128, 3, 32, torch.float16)
    assert dict(explain(problem_of(codes, dtype=torch.bfloat16, device="xpu")))["cuda"] is not None
    if library.missing() is None:
        assert choose(problem_of(codes, dtype=torch.bfloat16))[0] == "cpu"
