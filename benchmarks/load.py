"""How long loading takes and how much memory it holds: portable and native checkpoints, on a CPU and on a GPU.

    python benchmarks/load.py cpu --work FOLDER --out benchmarks/results/load_cpu.json
    python benchmarks/load.py cuda --work FOLDER --out benchmarks/results/load_h100.json
    python benchmarks/load.py cuda --numbers nvfp4 --work FOLDER --out benchmarks/results/load_h100_nvfp4.json

Writes a random Llama, packed at 4 bits in groups of 128 or in other numbers, with an 8-bit head, into FOLDER: by default 2 GB
for a CPU, the shape of Llama-3-8B for a GPU. `aerogel export --layout native` converts integers. Every load happens in a
process of its own, with the files in the page cache and after all imports; on a GPU the first one has no compiled kernel.
Measured:

    seconds      of `aerogel.load`, siblings merged; on a GPU also the part spent behind the reading (repacking, compiling), and
                 of the first sixteen tokens behind a prompt of 64, compiling and capturing included
    memory       CPU: resident memory of the process, its part that no other process shares, and what of the file is private,
                 while a second process has the same model loaded. GPU: the peak of what tensors held, over what they hold
    same         whether all loads give the very same logits
    said         what a person is told about compiling

On a GPU the exit code is 1 where a bar of BARS is missed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.eval.machine import machine, versions
from aerogel.eval.memory import tensor_bytes
from aerogel.model.reader import CheckpointReader
from aerogel.model.writer import write_json, write_tensors
from aerogel.pack.config import choose_format, format_of, quantization_config
from aerogel.pack.export import export_layout
from aerogel.quantize.codes import Codes, quantized, stacked
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.planes import PlaneGrid

SHAPES = {
    "cpu": {"hidden": 3072, "inner": 8192, "blocks": 28, "heads": 24, "key_heads": 8, "vocabulary": 64128},
    "cuda": {"hidden": 4096, "inner": 14336, "blocks": 32, "heads": 32, "key_heads": 8, "vocabulary": 128256},
}
HEAD = 128
W4 = IntGrid(bits=4, group_size=128, scale_dtype=torch.bfloat16)
W8 = IntGrid(bits=8, group_size=128, scale_dtype=torch.bfloat16)
NUMBERS: dict[str, Any] = {
    "int4": W4,
    "nvfp4": Nvfp4(),
    "mxfp4": Mx(),
    "nf4": Nf4(scale_dtype=torch.bfloat16),
    "kmeans": KMeans(scale_dtype=torch.bfloat16),
    "planes": PlaneGrid(bits=3, group_size=128, offset="scale", scale_dtype=torch.bfloat16),
}
FITTED_ROWS = 256
"""Of a weight of other numbers than integers, which repeat."""
PROMPT, NEW = 64, 16
BARS = {"load_s": 5.0, "peak_over_held": 1.10, "compiling_s": 10.0}
"""Seconds of a load beside the disk's, peak memory over what is held, seconds of compiling for a load and its first tokens."""
REPEATS = {"cpu": 3, "cuda": 2}


def main() -> None:
    """Makes both checkpoints, loads them in fresh processes, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=sorted(SHAPES))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--numbers", choices=NUMBERS, default="int4", help="of the blocks' weights")
    parser.add_argument("--blocks", type=int, help="fewer decoder blocks")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--hold", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        child(given.device, given.child, hold=given.hold)
        return
    shape = SHAPES[given.device] | ({"blocks": given.blocks} if given.blocks else {})
    portable, native = given.work / "portable", given.work / f"native-{given.device}"
    folders = [portable, native]
    if given.numbers != "int4":  # which alone have a native layout
        folders = [given.work / given.numbers]
    started = time.perf_counter()
    if not folders[0].exists():
        make(folders[0], shape, given.device, NUMBERS[given.numbers])
    made = time.perf_counter() - started
    print(f"made in {made:.1f} s", flush=True)
    if native in folders and not native.exists():
        export_layout(portable, native, native.name, device=given.device)
    converted = time.perf_counter() - started - made
    loads: dict[str, list[dict[str, Any]]] = {folder.name: [] for folder in folders}
    with tempfile.TemporaryDirectory() as compiled:
        for _ in range(REPEATS[given.device]):
            for folder in folders:
                loads[folder.name].append(measured(given.device, folder, compiled))
                print(folder.name, json.dumps(loads[folder.name][-1]), flush=True)
    result = {
        "benchmark": "load",
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "versions": versions(),
        "shape": shape,
        "numbers": str(NUMBERS[given.numbers]),
        "bytes": {folder.name: CheckpointReader(folder).nbytes for folder in folders},
        "seconds_to_make": made,
        "seconds_to_convert": converted,
        "loads": loads,
        "same_logits": len({row["logits"] for rows in loads.values() for row in rows}) == 1,
    }
    if given.out is not None:
        write_json(given.out, result)
    print({key: value for key, value in result.items() if key not in ("loads", "machine", "versions")})
    rows = [row for rows in loads.values() for row in rows] if given.device == "cuda" else []
    missed = [f"{bar} {row[bar]:.3f}, at most {most}" for row in rows for bar, most in BARS.items() if row[bar] > most]
    if missed:
        raise SystemExit(f"missed: {'; '.join(missed)}")


def make(folder: Path, shape: dict[str, int], device: str, grid: Any = W4) -> None:
    """A random packed Llama in the portable layout, one file per block, its linears on `grid`. Any bits are valid codes of
    integers; other numbers are fitted to a random weight, the same for all of a shape."""
    folder.mkdir(parents=True)
    hidden, inner, key = shape["hidden"], shape["inner"], shape["key_heads"] * shape.get("head", HEAD)
    random = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    names: list[tuple[str, Any, Any]] = []

    fitted: dict[tuple[int, int], dict[str, Tensor]] = {}

    def packed(name: str, grid: Any, N: int, K: int) -> dict[str, Tensor]:
        names.append((name, grid, "none"))
        if not isinstance(grid, IntGrid):
            if (N, K) not in fitted:
                fitted[N, K] = {local: tensor.cpu() for local, tensor in drawn(grid, N, K, random).items()}
            return {f"{name}.{local}": tensor for local, tensor in fitted[N, K].items()}
        found = {}
        for local, (size, dtype) in format_of("pack-quantized").shapes(N, K, grid).items():
            if dtype == torch.int32:
                words = torch.randint(-(1 << 31), 1 << 31, size, generator=random, device=device, dtype=torch.int32)
                found[local] = words
            elif dtype == torch.int64:
                found[local] = torch.tensor([N, K])
            else:
                found[local] = (
                    torch.rand(size, generator=random, device=device).add_(0.5).mul_(K**-0.5 / 2**grid.bits).to(dtype)
                )
        return {f"{name}.{local}": tensor for local, tensor in found.items()}

    def shard(file: str, tensors: dict[str, Tensor]) -> None:
        write_tensors(folder / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))

    norm = torch.ones(hidden, dtype=torch.bfloat16)
    embedding = torch.randn(shape["vocabulary"], hidden, generator=random, device=device).to(torch.bfloat16)
    outer = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm}
    shard("model-00000.safetensors", outer | packed("lm_head", W8, shape["vocabulary"], hidden))
    for i in range(shape["blocks"]):
        p = f"model.layers.{i}."
        sizes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (key, hidden), "self_attn.v_proj": (key, hidden)}
        sizes |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
        sizes |= {"mlp.down_proj": (hidden, inner)}
        tensors = {f"{p}input_layernorm.weight": norm, f"{p}post_attention_layernorm.weight": norm}
        for name, (N, K) in sizes.items():
            tensors |= packed(p + name, grid, N, K)
        shard(f"model-{i + 1:05d}.safetensors", tensors)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))})
    write_json(folder / "config.json", config(shape) | {"quantization_config": quantization_config(names)})


def drawn(grid: Any, N: int, K: int, random: torch.Generator) -> dict[str, Tensor]:
    """A random weight on `grid` as its format stores it: FITTED_ROWS rows, again and again."""
    rows_FK = torch.randn(FITTED_ROWS, K, generator=random, device=random.device) * K**-0.5
    codes = quantized(grid, rows_FK, grid.fit(rows_FK))
    params = stacked([codes] * (N // FITTED_ROWS))
    if params is None or N % FITTED_ROWS:
        raise BadInput(f"{N} rows on {grid} cannot be made of {FITTED_ROWS} that repeat")
    return choose_format(grid).encode(Codes.of(codes.values_NK.repeat(N // FITTED_ROWS, 1), params, grid))


def config(shape: dict[str, int]) -> dict[str, Any]:
    """config.json of the Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["inner"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["key_heads"],
        "head_dim": shape.get("head", HEAD),
        "num_hidden_layers": shape["blocks"],
        "vocab_size": shape["vocabulary"],
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "dtype": "bfloat16",
    }


def measured(device: str, folder: Path, compiled: str) -> dict[str, Any]:
    """One load in a process of its own, whose kernels are kept in `compiled`; on a CPU while another holds the same model."""
    command = [sys.executable, __file__, device, "--work", ".", "--child", str(folder)]
    if device != "cpu":
        environment = os.environ | {"AEROGEL_CACHE": compiled, "CUDA_CACHE_PATH": compiled}  # the compiler keeps results too
        return result_of(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout)
    with subprocess.Popen([*command, "--hold"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        if other.stdout is None or other.stdin is None:
            raise RuntimeError("no pipes")
        other.stdout.readline()
        found = result_of(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        other.stdin.close()
    return found


def result_of(text: str) -> dict[str, Any]:
    """The last line of a child."""
    found: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return found


def child(device: str, folder: Path, *, hold: bool) -> None:
    """Loads, runs one token, prints what was measured; with `hold` waits until its input ends."""
    import transformers.models.llama.modeling_llama  # noqa: F401  (imported before the clock runs)

    from aerogel.kernels.decode.loop import Decoder
    from aerogel.kernels.gemm import cpu, cuda  # noqa: F401
    from aerogel.model.loading import load, register
    from aerogel.model.quantizer import AerogelQuantizer

    register()
    row: dict[str, Any] = {}
    if device == "cuda":
        torch.zeros(1, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        watch(AerogelQuantizer, "_process_model_after_weight_loading", "after_reading_s", row)
        row["said"] = []
        listener = logging.Handler()
        listener.emit = lambda record: row["said"].append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("aerogel.kernels.ahead").addHandler(listener)
    before = resident()
    with compiling(row) if device == "cuda" else nullcontext():
        started = time.perf_counter()
        model = load(folder, device=device, merge=True)
        if device == "cuda":
            torch.cuda.synchronize()
        row["load_s"] = time.perf_counter() - started
        held = tensor_bytes(model)
        if device == "cuda":
            row["peak_over_held"] = torch.cuda.max_memory_allocated() / held
            row["reserved_over_held"] = torch.cuda.memory_reserved() / held
        row["held_bytes"] = held
        ids = torch.tensor([[1]], device=device)
        started = time.perf_counter()
        with torch.inference_mode():
            logits = model(ids).logits.float().cpu()
        row["first_forward_s"] = time.perf_counter() - started
        row["logits"] = f"{logits.double().sum().item():.9e}, {logits.abs().max().item():.9e}"
        if device == "cuda":
            started = time.perf_counter()
            tokens = list(Decoder(model).stream([torch.arange(3, 3 + PROMPT)], NEW))
            row["first_tokens_s"], row["tokens"] = time.perf_counter() - started, len(tokens)
    if device == "cpu":
        row |= {f"{key}_bytes": value for key, value in resident().items()} | {"before_bytes": before["resident"]}
        row["file_private_bytes"] = sum(private_of(path) for path in folder.glob("*.safetensors"))
    print(json.dumps(row), flush=True)
    if hold:
        sys.stdin.read()


@contextmanager
def compiling(row: dict[str, Any]) -> Iterator[None]:
    """Puts the seconds during which kernels were being compiled into `row`, those of several at once counted once."""
    from aerogel.kernels.cuda import nvrtc

    spans: list[tuple[float, float]] = []

    def heard(done: nvrtc.Compiled) -> None:
        end = time.perf_counter()
        if not done.cached:
            spans.append((end - done.seconds, end))

    with nvrtc.listening(heard):
        yield
    row["compiling_s"], last = 0.0, 0.0
    for start, end in sorted(spans):
        row["compiling_s"] += max(0.0, end - max(start, last))
        last = max(last, end)


def watch(owner: Any, name: str, key: str, row: dict[str, Any]) -> None:
    """Adds the seconds of every call of `owner.name` to `row[key]`, the device's work included."""
    plain = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        started = time.perf_counter()
        found = plain(*args, **kwargs)
        torch.cuda.synchronize()
        row[key] = row.get(key, 0.0) + time.perf_counter() - started
        return found

    setattr(owner, name, timed if isinstance(owner.__dict__[name], type(lambda: 0)) else staticmethod(timed))


def resident() -> dict[str, int]:
    """Bytes of this process in memory: all, what no other process shares, and what no file holds."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        key, value = line.split(":")
        found[key] = int(value.split()[0]) * 1024
    return {
        "resident": found["Rss"],
        "private": found["Private_Clean"] + found["Private_Dirty"],
        "anonymous": found["Anonymous"],
    }


def private_of(path: Path) -> int:
    """Bytes of a mapped file that this process does not share."""
    size, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[:1].isdigit() or line[:1] in "abcdef":
            inside = line.endswith((str(path.resolve()), str(path)))
        elif inside and line.startswith(("Private_Clean", "Private_Dirty")):
            size += int(line.split()[1]) * 1024
    return size


if __name__ == "__main__":
    main()
