"""Random experts and routings, and what a grouped matmul with them must give; for the CPU and the GPU."""

from __future__ import annotations

from typing import Any

import torch

from aerogel.kernels.experts import ExpertLinear, ExpertRows, stacked
from aerogel.kernels.gemm.ref import round_input
from aerogel.pack.config import choose_format
from aerogel.pack.format import Activations
from aerogel.pack.scheme import Scheme
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.grids import Codes, Fp8Grid, IntGrid, quantized

GRIDS: list[Any] = [
    IntGrid(bits=4, group_size=32, scale_dtype=torch.bfloat16),
    IntGrid(bits=3, group_size=16, symmetric=False),
    IntGrid(bits=8, symmetric=False, scale_dtype=torch.float16),
    IntGrid(bits=2, group_size=64, symmetric=False),
]
FP8 = Fp8Grid(strategy="channel")
FLOATS: list[Any] = [FP8, Fp8Grid(strategy="tensor"), Fp8Grid(strategy="block", scale_dtype=torch.bfloat16), Mx()]
BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def experts_of(
    grid: Any, E: int, N: int, K: int, dtype: torch.dtype, device: str = "cpu", activations: Activations = "none"
) -> ExpertLinear:
    """E random experts [N, K], prepared on `device`. With static rounding inputs have a unit for each expert, which cuts some
    of a normal distribution off."""
    dense = torch.randn(E, N, K, generator=torch.Generator().manual_seed(E * N + K))
    codes: list[Codes] = [quantized(grid, one, grid.fit(one)) for one in dense]
    fmt = choose_format(grid, activations)
    layer = ExpertLinear(E, K, N, Scheme(format=fmt.name, grid=grid, activations=activations), dtype=dtype)
    layer.fill(stacked(lambda e: fmt.encode(codes[e]), E))
    if layer.input_scale is not None:
        layer.input_scale.copy_(torch.linspace(1, 2, E)[:, None] / (127 if activations == "int8-static" else 448))
    return layer.to(device).prepare(dtype)


def product(layer: ExpertLinear, x: torch.Tensor, expert: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The layer's y, pair by pair: each is a token of its own with one expert of weight 1, so that adding changes nothing."""
    routes = layer.routes(expert)
    y = layer(layer.spread(x, routes), expert, routes, bias)
    return layer.add(y, torch.ones(len(expert), 1, device=x.device), routes)


def wanted_of(layer: ExpertLinear, x: torch.Tensor, expert: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y in float64, pair by pair from the dense weights; zeros for experts that are not there."""
    dense = layer.dequantize(torch.float32).double()
    each = len(expert) // max(1, len(x))
    y = torch.zeros(len(expert), layer.out_features, dtype=torch.float64, device=x.device)
    for s, e in enumerate(expert.tolist()):
        if e < layer.experts:
            y[s] = dense[e] @ x[s // each].double() + (0 if bias is None else bias[e].double())
    return y


def rounded_of(layer: ExpertLinear, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """As `wanted_of` without a bias, of inputs rounded as the layer's checkpoint asks, pair by pair."""
    dense, scale = layer.dequantize(torch.float32).double(), layer.input_scale
    each, problem = len(expert) // len(x), layer.problem()
    y = torch.zeros(len(expert), layer.out_features, dtype=torch.float64, device=x.device)
    for s, e in enumerate(expert.tolist()):
        if e < layer.experts:
            row = round_input(x[s // each][None].float(), problem, None if scale is None else scale[e])
            y[s] = dense[e] @ row[0].double()
    return y


def with_rows(layer: ExpertLinear, R: int) -> ExpertLinear:
    """The layer with something added to R rows of each expert."""
    E, N, K = layer.experts, layer.out_features, layer.in_features
    grid = IntGrid(bits=4, group_size=32)
    more = experts_of(grid, E, R, K, layer.compute_dtype, layer.device.type)
    layer.more = ExpertRows(E, K, R, more.scheme, dtype=layer.compute_dtype, device=layer.device)
    layer.more.linear = more
    draw = torch.Generator().manual_seed(R)
    layer.more.index_ER.copy_(torch.stack([torch.randperm(N, generator=draw)[:R].sort().values for _ in range(E)]))
    return layer


def routing(M: int, k: int, E: int, device: str = "cpu") -> torch.Tensor:
    """Experts of M tokens, k each, one pair of which goes to nobody."""
    index = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(m))[:k] for m in range(M)])
    index[M // 2, -1] = E
    return index.reshape(-1).to(device)
