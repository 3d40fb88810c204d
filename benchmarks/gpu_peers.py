"""Other libraries' W4A16 matmuls, timed as ours are: humming-kernels (CUDA) and gemlite (Triton).

    python benchmarks/gpu_gemm.py --peers humming gemlite --bits 4

Their kernels are compiled first, on all cores, into their caches on disk.

Both are PyPI packages and no dependency of this project (`pip install humming-kernels gemlite`). Groups of 128; humming in
bfloat16 with the configurations that it chooses itself, gemlite in float16 with those it ships for
the device (on an H200 those of the H100).
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels.cuda.timing import copies

GROUP = 128
LARGE, FEWER_ROWS = 1 << 27, 5632
"""Weights, from how many on gemlite's kernels are compiled with so many rows; no shape that it has a configuration for."""
Calls = Callable[[int], list[Callable[[], object]]]
"""Number of tokens -> a call for each copy of the weight."""


def version_of(package: str) -> str:
    """What is installed."""
    return metadata.version(package)


def humming(N: int, K: int, tokens: tuple[int, ...]) -> Calls:
    """Its matmuls of one shape; those of the kernels that `tokens` need which no cache has are compiled here."""
    from humming.forward import humming_forward

    layer = _humming_layer(N, K)
    names = ("weight", "weight_scale", "zero_point", "weight_scale_2")
    held = {name: getattr(layer, name).data for name in names if getattr(layer, name, None) is not None}
    config = layer.humming_config
    # Its own choice at each number of tokens, from the one before it on.
    chosen = [[start, M, how] for start, M, how in zip((0, *tokens[:-1]), tokens, _humming_choices(layer, tokens), strict=True)]
    chosen[-1][1] = 1 << 30
    how = {"locks": layer.locks, "tuning_config": json.dumps(chosen)}
    humming_forward(config, inputs=torch.ones(1, K, device="cuda", dtype=torch.bfloat16), **how, **held)
    torch.cuda.synchronize()
    each = [held, *({name: t.clone() for name, t in held.items()} for _ in range(copies(_bytes(held)) - 1))]

    def at(M: int) -> list[Callable[[], object]]:
        x = torch.randn(M, K, device="cuda").bfloat16()
        return [lambda h=h: humming_forward(config, inputs=x, **how, **h) for h in each]

    return at


def _humming_layer(N: int, K: int) -> Any:
    """A layer of humming's with a random weight."""
    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    from humming.layer import HummingLayer

    config = {"dtype": "int4", "group_size": GROUP}
    layer = HummingLayer(shape_n=N, shape_k=K, weight_config=config, input_config=None, torch_dtype=torch.bfloat16).cuda()
    schema = layer.weight_schema
    weight = torch.randn(N, K, device="cuda").mul_(0.02).bfloat16()
    layer.load_from_tensors(type(schema).quant_tensor(weight, schema, torch.bfloat16))
    layer.transform()
    return layer


def _humming_choices(layer: Any, tokens: Sequence[int]) -> list[dict[str, Any]]:
    """The configuration that humming chooses at each number of tokens."""
    from humming.tune import get_heuristics_config

    return [get_heuristics_config(layer_config=layer.humming_config, shape_m=M) for M in tokens]


def gemlite(N: int, K: int, _tokens: tuple[int, ...]) -> Calls:
    """Its matmuls of one shape."""
    from gemlite.core import forward_functional
    from gemlite.helper import A16W4_HQQ_INT

    _load_gemlite_choices()
    codes = torch.randint(0, 16, (N, K), device="cuda", dtype=torch.uint8)
    scale = torch.full((N * K // GROUP, 1), 0.01, device="cuda", dtype=torch.float16)
    layer = A16W4_HQQ_INT(device="cuda", dtype=torch.float16).from_weights(codes, scale, torch.full_like(scale, 8))
    tensors, facts = layer.get_tensor_args(), layer.get_meta_args()
    each = [tensors, *([_copy(t) for t in tensors] for _ in range(copies(sum(t.nbytes for t in tensors[:3])) - 1))]

    def at(M: int) -> list[Callable[[], object]]:
        x = torch.randn(M, K, device="cuda").half()
        return [lambda t=t: forward_functional(x, None, t, facts) for t in each]

    return at


def _load_gemlite_choices() -> None:
    """On an H200, for which gemlite ships no configurations, those of an H100, whose multiprocessors are the same."""
    import gemlite.core

    if "H200" in torch.cuda.get_device_name():
        shipped = Path(gemlite.core.__file__).parent / "configs" / "h100.json"
        if not gemlite.core.GemLiteLinear.load_config(str(shipped)):
            raise RuntimeError(f"gemlite's configurations are not in {shipped}")


def _bytes(held: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in held.values())


def _copy(tensor: Tensor) -> Tensor:
    """With its strides: some weights are stored transposed."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


Contender = Callable[[int, int, tuple[int, ...]], Calls]
PEERS: dict[str, tuple[str, Contender]] = {
    "humming": ("humming-kernels", humming),
    "gemlite": ("gemlite", gemlite),
}
"""Name -> package and what makes its calls."""


def compile_humming(shapes: Sequence[str], tokens: Sequence[int]) -> int:
    """Compiles all of humming's kernels, each once, with a compiler on each core; how many there are."""
    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    from humming.kernel.humming import HummingKernel

    found: dict[str, dict[str, Any]] = {}
    for shape in shapes:
        layer = _humming_layer(*map(int, shape.split("x")))
        for choice in _humming_choices(layer, tokens):
            one = json.loads(layer.humming_config.to_str()) | choice
            one.pop("num_sms", None)  # of the launch, not of the kernel
            found[json.dumps(one, sort_keys=True)] = one
        del layer
    torch.cuda.empty_cache()
    HummingKernel.compile_many([(HummingKernel, one) for one in found.values()])
    return len(found)


def compile_gemlite(shapes: Sequence[str], tokens: Sequence[int]) -> int:
    """Compiles gemlite's Triton kernels in as many processes as there are cores; how many points that were. What it has no
    configuration for it tunes, with some twenty kernels a point."""
    points = [(N, K, M) for N, K in (map(int, shape.split("x")) for shape in shapes) for M in tokens]
    workers = min(os.cpu_count() or 1, len(points))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_only_compile) as pool:
        list(pool.map(_compile_gemlite_point, *zip(*points, strict=True)))
    return len(points)


def _only_compile() -> None:
    """Tuning runs every kernel once, in an order of its own, so that processes seldom compile the same one at the same time."""
    from triton.runtime.autotuner import Autotuner

    def once(call: Callable[[], object], **_: object) -> list[float]:
        call()
        return [0.0, 0.0, 0.0]

    allowed, order = Autotuner.prune_configs, random.Random(os.getpid())
    Autotuner.prune_configs = lambda self, kwargs: order.sample(found := allowed(self, kwargs), len(found))
    Autotuner.do_bench = property(lambda self: once)


def _compile_gemlite_point(N: int, K: int, M: int) -> None:
    """With fewer rows than a large weight has, which make the same kernels: processes share the memory of one device."""
    gemlite(N if N * K <= LARGE else FEWER_ROWS, K, (M,))(M)[0]()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


COMPILE: dict[str, Callable[[Sequence[str], Sequence[int]], int]] = {"humming": compile_humming, "gemlite": compile_gemlite}
"""Name -> what compiles its kernels for some shapes and numbers of tokens."""
