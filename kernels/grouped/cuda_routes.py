"""Who goes where in a layer of experts on CUDA: the host's side of `experts.cu`, one operator for each of its kernels.

    aerogel::route_experts    expert of each pair -> pairs sorted by expert, and cut into runs of tokens of one expert
    aerogel::spread_tokens    x [M, K] -> a row for each pair, in sorted order
    aerogel::add_experts      rows in sorted order -> each token's weighted sum, added up in float32

Nothing waits for the host: sizes depend on the numbers of pairs and experts alone, so a graph can record it.

Shape legend: E experts, M tokens, S = M * k pairs of token and expert, N or K features.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aerogel.kernels.gemm.cuda_wgmma_plan import in_pieces

if TYPE_CHECKING:
    from aerogel.kernels.cuda.launch import Launch

SOURCE = "experts.cu"
SORTING_WARPS, PAIRS_A_BLOCK, MOST_SORTING_BLOCKS = 32, 2048, 16
THREADS = 256
WEIGHT_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class RouteArguments(ctypes.Structure):
    """`RouteArguments` of experts.cu, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("expert", "order", "place", "runs")),
        *((name, ctypes.c_int) for name in ("pairs", "experts", "run")),
    ]


class SpreadArguments(ctypes.Structure):
    """`SpreadArguments` of experts.cu, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "order")),
        *((name, ctypes.c_int) for name in ("each", "pieces")),
    ]


class AddArguments(ctypes.Structure):
    """`AddArguments` of experts.cu, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "weight", "place", "y")),
        *((name, ctypes.c_int) for name in ("each", "columns", "weight_type")),
    ]


RUNS = (16, 32, 48, 64, 96, 128, 160, 192, 256)
"""Tokens of a run, T."""
DECODING = 88
"""Tokens whose products take as long as decoding the rows that they are multiplied with."""
BLOCKS: dict[str, Any] = {
    "route_pairs": RouteArguments,
    "spread_tokens": SpreadArguments,
    "add_experts": AddArguments,
}
"""Kernels and their arguments."""


@functools.cache
def expected_runs(pairs: int, experts: int, run: int) -> float:
    """How many runs there are when each pair picks its expert at random."""
    mean, runs = pairs / experts, 0.0
    for count in range(1, int(mean + 10 * math.sqrt(mean) + 10)):
        chance = math.exp(count * math.log(mean) - mean - math.lgamma(count + 1))
        runs += chance * -(-count // run)
    return experts * runs


@functools.cache
def run_tokens(pairs: int, experts: int) -> int:
    """T: long runs waste products on tokens that are not there, short ones decode a weight more often."""
    return min(RUNS, key=lambda run: expected_runs(pairs, experts, run) * math.cbrt(run**3 + DECODING**3))


def most_runs(pairs: int, experts: int, run: int) -> int:
    """The most runs of at most `run` tokens that so many pairs can make."""
    return pairs // run + min(pairs, experts)


def route(expert: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`aerogel::route_experts`: `route_experts` with runs of T = `run_tokens(S, E)` tokens, chosen here, where S is known."""
    return route_experts(expert, experts, run_tokens(len(expert), experts) if len(expert) else RUNS[0])


def route_experts(expert: Tensor, experts: int, run: int) -> tuple[Tensor, Tensor, Tensor]:
    """order int32 [S], the pair at each place; place int32 [S], where each pair is, -1 for experts that do not exist; runs
    int32 [1 + P, 4]: how many there are, then expert, first place, end, and how many runs this expert has; the rest is left as
    it was."""
    pairs = expert.shape[0]
    expert = expert.contiguous()
    order, place, runs = _empty_routes(expert, experts)
    if pairs == 0:
        return order, place, runs.zero_()
    warps = min(SORTING_WARPS, -(-pairs // 32))
    _run(
        "route_pairs",
        expert,
        grid=(min(MOST_SORTING_BLOCKS, -(-pairs // PAIRS_A_BLOCK)),),
        block=32 * warps,
        shared_bytes=4 * (warps + 3) * (experts + 1),
        arguments={
            "expert": expert.data_ptr(),
            "order": order.data_ptr(),
            "place": place.data_ptr(),
            "runs": runs.data_ptr(),
            "pairs": pairs,
            "experts": experts,
            "run": run,
        },
    )
    return order, place, runs


def _empty_routes(expert: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """For runs of any length, so that a graph need not know it."""
    pairs = expert.shape[0]
    rows = 1 + pairs // RUNS[0] + experts
    order, place, runs = (expert.new_empty(size, dtype=torch.int32) for size in ((pairs,), (pairs,), (rows, 4)))
    return order, place, runs


def spread_tokens(x: Tensor, order: Tensor) -> Tensor:
    """x [M, K] bf16 or fp16 -> [S, K rounded up to 8], zeros beyond K; the row at place i is x[order[i] // (S / M)]."""
    M, pairs = x.shape[0], order.shape[0]
    x = in_pieces(x)
    y = x.new_empty(pairs, x.shape[1])
    if y.numel():
        _run(
            "spread_tokens",
            x,
            grid=(pairs,),
            arguments={
                "x": x.data_ptr(),
                "y": y.data_ptr(),
                "order": order.data_ptr(),
                "each": pairs // M,
                "pieces": x.shape[1] // 8,
            },
        )
    return y


def add_experts(rows: Tensor, place: Tensor, weight: Tensor) -> Tensor:
    """rows [S, N] bf16 or fp16 in sorted order, weight [M, k] bf16, fp16 or fp32 -> [M, N]."""
    (M, each), N = weight.shape, rows.shape[1]
    rows, weight = rows.contiguous(), weight.contiguous()
    rows = rows.clone() if rows.data_ptr() % 16 else rows  # read 16 bytes at a time
    y = rows.new_empty(M, N)
    if y.numel():
        _run(
            "add_experts",
            rows,
            grid=(-(-N // (8 * THREADS)), M),
            arguments={
                "rows": rows.data_ptr(),
                "weight": weight.data_ptr(),
                "place": place.data_ptr(),
                "y": y.data_ptr(),
                "each": each,
                "columns": N,
                "weight_type": WEIGHT_TYPES[weight.dtype],
            },
        )
    return y


_LOCK = threading.Lock()
"""Held from filling a launch's arguments until it is queued."""


def _run(
    kernel: str, like: Tensor, *, grid: tuple[int, ...], arguments: dict[str, Any], block: int = THREADS, shared_bytes: int = 0
) -> None:
    with torch.cuda.device(like.device):
        launch = _launch(kernel, like.dtype == torch.float16, like.device, grid, block, shared_bytes)
        with _LOCK:
            for name, value in arguments.items():
                setattr(launch.arguments, name, value)
            launch(torch._C._cuda_getCurrentRawStream(like.device.index))


@functools.lru_cache(maxsize=1024)
def _launch(kernel: str, fp16: bool, device: torch.device, grid: tuple[int, ...], block: int, shared_bytes: int) -> Launch:
    """The kernel with its grid; what it works on is filled in by each call."""
    from aerogel.kernels.cuda.launch import Launch
    from aerogel.kernels.cuda.sources import function

    found = function(SOURCE, kernel, {"FP16": int(fp16)}, device)
    early = torch.cuda.get_device_capability(device) >= (9, 0)
    return Launch(found, BLOCKS[kernel](), grid=grid, block=block, shared_bytes=shared_bytes, early=early)


_library = torch.library.Library("aerogel", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema, _function, _fake in (
    ("route_experts(Tensor expert, int experts) -> (Tensor, Tensor, Tensor)", route, _empty_routes),
    (
        "spread_tokens(Tensor x, Tensor order) -> Tensor",
        spread_tokens,
        lambda x, order: x.new_empty(order.shape[0], -(-x.shape[1] // 8) * 8),
    ),
    (
        "add_experts(Tensor rows, Tensor place, Tensor weight) -> Tensor",
        add_experts,
        lambda rows, place, weight: rows.new_empty(weight.shape[0], rows.shape[1]),
    ),
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _name = _schema.partition("(")[0]
    _library.impl(_name, _function, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"aerogel::{_name}", _fake, lib=_library)
