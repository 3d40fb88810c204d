"""Other libraries' W4A16 matmuls, timed as ours are: humming-kernels (CUDA) and gemlite (Triton).

    python benchmarks/gpu_gemm.py --peers humming gemlite --bits 4

humming's kernels are compiled first, each shape in a process of its own, into its cache.

Both are PyPI packages and no dependency of this project (`pip install humming-kernels gemlite`). Groups of 128; humming in
bfloat16 with the configurations that it chooses itself, gemlite in float16 with those it ships for the device.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata

import torch
from torch import Tensor

from aerogel.kernels.cuda.timing import copies

GROUP = 128
Calls = Callable[[int], list[Callable[[], object]]]
"""Number of tokens -> a call for each copy of the weight."""


def version_of(package: str) -> str:
    """What is installed."""
    return metadata.version(package)


def humming(N: int, K: int, tokens: tuple[int, ...]) -> Calls:
    """Its matmuls of one shape; all kernels that `tokens` need are compiled here."""
    import ctypes

    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    from humming.forward import humming_forward
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config

    layer = HummingLayer(
        shape_n=N,
        shape_k=K,
        weight_config={"dtype": "int4", "group_size": GROUP},
        input_config=None,
        torch_dtype=torch.bfloat16,
    ).cuda()
    schema = layer.weight_schema
    weight = torch.randn(N, K, device="cuda").mul_(0.02).bfloat16()
    layer.load_from_tensors(type(schema).quant_tensor(weight, schema, torch.bfloat16))
    layer.transform()
    names = ("weight", "weight_scale", "zero_point", "weight_scale_2")
    held = {name: getattr(layer, name).data for name in names if getattr(layer, name, None) is not None}
    config, locks = layer.humming_config, layer.locks
    # Its own choice at each number of tokens, from the one before it on.
    starts = (0, *tokens[:-1])
    chosen = [
        [start, M, get_heuristics_config(layer_config=config, shape_m=M)] for start, M in zip(starts, tokens, strict=True)
    ]
    chosen[-1][1] = 1 << 30
    how = {"locks": locks, "tuning_config": json.dumps(chosen)}
    humming_forward(config, inputs=weight.new_ones(1, K), **how, **held)
    torch.cuda.synchronize()
    each = [held, *({name: t.clone() for name, t in held.items()} for _ in range(copies(_bytes(held)) - 1))]

    def at(M: int) -> list[Callable[[], object]]:
        x = torch.randn(M, K, device="cuda").bfloat16()
        return [lambda h=h: humming_forward(config, inputs=x, **how, **h) for h in each]

    return at


def gemlite(N: int, K: int, _tokens: tuple[int, ...]) -> Calls:
    """Its matmuls of one shape."""
    from gemlite.core import forward_functional
    from gemlite.helper import A16W4_HQQ_INT

    codes = torch.randint(0, 16, (N, K), device="cuda", dtype=torch.uint8)
    scale = torch.full((N * K // GROUP, 1), 0.01, device="cuda", dtype=torch.float16)
    layer = A16W4_HQQ_INT(device="cuda", dtype=torch.float16).from_weights(codes, scale, torch.full_like(scale, 8))
    tensors, facts = layer.get_tensor_args(), layer.get_meta_args()
    each = [tensors, *([_copy(t) for t in tensors] for _ in range(copies(sum(t.nbytes for t in tensors[:3])) - 1))]

    def at(M: int) -> list[Callable[[], object]]:
        x = torch.randn(M, K, device="cuda").half()
        return [lambda t=t: forward_functional(x, None, t, facts) for t in each]

    return at


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


def compile_humming(shapes: Sequence[str], tokens: tuple[int, ...]) -> None:
    """Compiles all of humming's kernels side by side. Raises `CalledProcessError` where one does not compile."""
    words = [sys.executable, __file__, *map(str, tokens)]
    running = [subprocess.Popen([*words, "--shape", shape]) for shape in shapes]
    for process in running:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)


def main() -> None:
    """One shape of `compile_humming`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", required=True)
    parser.add_argument("tokens", nargs="+", type=int)
    asked = parser.parse_args()
    N, K = map(int, asked.shape.split("x"))
    humming(N, K, tuple(asked.tokens))


if __name__ == "__main__":
    main()
