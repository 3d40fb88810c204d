"""Lossless coding of bfloat16 weights: how small, how fast, beside a plain copy of the same numbers in the same run.

    python benchmarks/entropy.py --out benchmarks/results/entropy_cpu.json --checkpoint FOLDER
    python benchmarks/entropy.py --out benchmarks/results/entropy_h100.json --device cuda

Without a checkpoint the weights are Gaussian, 14336 x 4096, in the type and size of a Llama-3-8B layer. Rates are bytes of
dense bfloat16 weights per second, medians of --repeats. On a GPU a linear that decodes its weight and then multiplies is
timed beside the dense one: that is the price of keeping weights coded in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels.entropy import choose, ref
from aerogel.kernels.entropy.ref import Coded


def seconds(work: Callable[[], Any], repeats: int, device: str) -> float:
    """Median time of a call, after one that is not counted."""
    work()
    found = []
    for _ in range(repeats):
        if device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            stop.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(stop) / 1e3)
        else:
            begun = time.perf_counter()
            work()
            found.append(time.perf_counter() - begun)
    return statistics.median(found)


def weights(args: argparse.Namespace) -> dict[str, Tensor]:
    if args.checkpoint is None:
        return {"gaussian 14336 x 4096": (torch.randn(14336, 4096) * 0.02).bfloat16()}
    from aerogel.model.reader import CheckpointReader

    reader = CheckpointReader(args.checkpoint)
    held = [reader.read(e.name).flatten() for e in reader if e.dtype == torch.bfloat16 and len(e.shape) == 2]
    return {f"{args.checkpoint.name}, every matrix": torch.cat(held)}


def cpu_row(tensor: Tensor, repeats: int) -> dict[str, Any]:
    flat = tensor.reshape(-1)

    def encode() -> tuple[Coded, Tensor]:
        exponents, rest = choose.split_bfloat16(flat)
        return choose.encode(exponents), rest

    coded, rest = encode()
    back = choose.decode_bfloat16(coded, rest)
    exponents = choose.split_bfloat16(flat)[0]
    return {
        "same bits": bool(torch.equal(back.view(torch.int16), flat.view(torch.int16))),
        "share": (coded.nbytes + rest.nbytes) / tensor.nbytes,
        "exponent_bits": ref.bits_per_symbol(coded),
        "entropy": ref.entropy(torch.bincount(exponents.int(), minlength=256)),
        "encode_MB_s": tensor.nbytes / 1e6 / seconds(encode, repeats, "cpu"),
        "decode_MB_s": tensor.nbytes / 1e6 / seconds(lambda: choose.decode_bfloat16(coded, rest), repeats, "cpu"),
        "copy_MB_s": tensor.nbytes / 1e6 / seconds(flat.clone, repeats, "cpu"),
    }


def gpu_row(tensor: Tensor, repeats: int) -> dict[str, Any]:
    from aerogel.kernels.entropy import cuda

    exponents, rest = choose.split_bfloat16(tensor.reshape(-1))
    coded = choose.encode(exponents)
    there = Coded(stream=coded.stream.cuda(), lengths=coded.lengths.cuda(), code=coded.code.cuda(), count=coded.count)
    decoding, dense = cuda.Decoding(there, rest.cuda()), tensor.cuda()
    out = torch.full_like(dense, torch.nan)
    same = bool(torch.equal(decoding(out.reshape(-1)).view(torch.int16), dense.reshape(-1).view(torch.int16)))
    row: dict[str, Any] = {
        "same bits": same,
        "share": (coded.nbytes + rest.nbytes) / tensor.nbytes,
        "decode_GB_s": tensor.nbytes / 1e9 / seconds(lambda: decoding(out.reshape(-1)), repeats, "cuda"),
        "copy_GB_s": tensor.nbytes / 1e9 / seconds(lambda: out.copy_(dense), repeats, "cuda"),
    }
    for tokens in (1, 16, 512, 4096):
        x = torch.randn(tokens, dense.shape[1], device="cuda").bfloat16()
        plain = seconds(lambda x=x: x @ dense.T, repeats, "cuda")
        ours = seconds(lambda x=x: (decoding(out.reshape(-1)), x @ out.T), repeats, "cuda")
        row[f"linear at {tokens} tokens, dense / decoded at use"] = plain / ours
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    measure = gpu_row if args.device == "cuda" else cpu_row
    rows = {name: measure(tensor, args.repeats) for name, tensor in weights(args).items()}
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.processor() or platform.machine()}"
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"device": machine, "threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "rows": rows,
    }
    print(json.dumps(rows, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
