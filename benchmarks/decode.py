"""Decoding with a whole model: our loop beside transformers' own, dense and 4-bit, one machine, one run.

    python benchmarks/decode.py --out benchmarks/results/decode_h100.json            Llama-3-8B's shape, random weights
    python benchmarks/decode.py --shape tiny --device cpu --new 8                      does the script run at all?
    python benchmarks/decode.py --profile ...                                          where a step's time goes (CUDA)

Weights are random: what a model says makes no difference to how long it takes. The 4-bit model is made packed on the
device, no dense copy of it ever exists. Each row is the median over --repeats of: tokens per second behind the first
token (`decode`), of the whole call (`overall`), seconds to the first token (`first`). Prompt 128, 128 new tokens.

Peers: transformers' `generate` as it is (`eager`), and with a static cache, which compiles the step (`static`).
The variant `compiled` is our traced step through torch.compile instead of our fused operators, in the same CUDA graph.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from aerogel.kernels.decode import session as sessions
from aerogel.kernels.decode import triton_ops
from aerogel.kernels.decode.loop import Decoder
from aerogel.kernels.decode.merge import merge
from aerogel.kernels.decode.trace import Program
from aerogel.kernels.linear import Linear
from aerogel.kernels.sidecars import SidecarLinear
from aerogel.pack.scheme import Scheme
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.hadamard import random_signs
from aerogel.quantize.rotation import Rotation

SHAPES: dict[str, dict[str, int]] = {
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1024},
}  # fmt: skip


def config_of(shape: str, layers: int | None) -> LlamaConfig:
    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=False, eos_token_id=None, pad_token_id=0)
    config._attn_implementation = "sdpa"
    return config


def dense(config: LlamaConfig, device: str) -> LlamaForCausalLM:
    """bfloat16, made on the device."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.float()
    return model.requires_grad_(False)


def packed(config: LlamaConfig, device: str, kind: str, group: int | None, head_bits: int | None) -> LlamaForCausalLM:
    """The same with random packed linears: `w4`, with activations rounded to int8 `w4a8`, or in a rotated basis `w4h`. Only the
    embedding, the norms and (without `head_bits`) the head are dense; inputs of the head are neither rounded nor rotated."""
    bits = int(kind[1])
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or (name == "lm_head" and head_bits is None):
            continue
        head = name == "lm_head"
        grid = IntGrid(bits=head_bits if head and head_bits else bits, group_size=group, scale_dtype=torch.bfloat16)
        rounded = kind.endswith("a8") and not head
        scheme = Scheme(format="pack-quantized", grid=grid, activations="int8" if rounded else "none")
        sizes, options = (module.in_features, module.out_features, scheme), {"dtype": torch.bfloat16, "device": device}
        if kind.endswith("h") and not head:
            signs_K = random_signs(module.in_features, torch.Generator().manual_seed(module.in_features)).to(device, torch.int8)
            rotation = Rotation(signs_K=signs_K, block_1=torch.tensor([64], dtype=torch.int32, device=device))
            layer: Linear = SidecarLinear(*sizes, beside=rotation.tensors(), **options)
        else:
            layer = Linear(*sizes, **options)
        for key, buffer in layer.named_buffers(recurse=False):
            if key == "weight_shape":
                buffer.copy_(torch.tensor([module.out_features, module.in_features]))
            elif buffer.is_floating_point():
                buffer.uniform_(0.5e-3, 2e-3)
            else:
                buffer.random_(-(2**31), 2**31 - 1)
        model.set_submodule(name, layer)
    for module in list(model.modules()):
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                module._parameters[key] = torch.nn.Parameter(made.normal_(0, 0.02) if made.ndim > 1 else made.fill_(1), False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    merge(model)
    for module in model.modules():
        if isinstance(module, Linear):
            module.prepare()
    return model


def now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(model: Any, batch: int, prompt: int, new: int, decoder: Decoder) -> tuple[float, float]:
    ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
    start = now(str(model.device))
    first = None
    for _ in decoder.stream(list(ids), new):
        first = first or time.perf_counter()
    return (first or start) - start, now(str(model.device)) - start


def theirs(model: Any, batch: int, prompt: int, new: int, **how: Any) -> tuple[float, float]:
    ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    seconds = []
    for tokens in (1, new):
        start = now(str(model.device))
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **how
        )
        seconds.append(now(str(model.device)) - start)
    return seconds[0], seconds[1]


def row(name: str, call: Callable[[], tuple[float, float]], batch: int, new: int, repeats: int) -> dict[str, Any]:
    start = time.perf_counter()
    call()
    first_call = time.perf_counter() - start
    samples = [call() for _ in range(repeats)]
    found = {
        "name": name,
        "batch": batch,
        "decode": statistics.median(batch * (new - 1) / (whole - first) for first, whole in samples),
        "overall": statistics.median(batch * new / whole for _, whole in samples),
        "first": statistics.median(first for first, _ in samples),
        "samples": samples,
        "first_call_seconds": first_call,
    }
    print(f"{name:28} batch {batch:3}: {found['decode']:9.1f} tok/s decode, {found['overall']:9.1f} overall, "
          f"first token {1e3 * found['first']:8.2f} ms, first call {first_call:6.1f} s", flush=True)  # fmt: skip
    return found


def profile(decoder: Decoder, model: Any, batch: int, prompt: int) -> dict[str, Any]:
    """Microseconds of a step by kernel, from replays of the graph."""
    ours(model, batch, prompt, 8, decoder)
    step = decoder.session.stepper(sessions.Sampling())
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(20):
        step()
    end.record()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(4):
            step()
        torch.cuda.synchronize()
    spent: dict[str, list[float]] = defaultdict(list)
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name[:90]].append(event.device_time)
    table = sorted(((sum(v) / 4, len(v) / 4, k) for k, v in spent.items()), reverse=True)[:24]
    found = {
        "step_us": begin.elapsed_time(end) / 20 * 1e3,
        "kernels_us": sum(sum(v) for v in spent.values()) / 4,
        "table": table,
    }
    print(f"step {found['step_us']:.0f} us, kernels {found['kernels_us']:.0f} us")
    for us, count, name in table:
        print(f"  {us:8.1f} us {count:6.1f} x  {name}")
    return found


class Compiled(Program):
    """The traced step through inductor."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__(graph)
        self._compiled = torch.compile(graph, fullgraph=True, dynamic=False)

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._compiled(*arguments)
        return found


def compiled_row(model: Any, batch: int, args: argparse.Namespace, fused: bool) -> dict[str, Any]:
    kept, fuse = sessions.Program, sessions.fuse
    sessions.Program = Compiled
    if not fused:
        sessions.fuse = lambda graph: {}
    try:
        decoder = Decoder(model)
        name = "compiled" + (" fused" if fused else "")
        return (
            row(name, lambda: ours(model, batch, args.prompt, args.new, decoder), batch, args.new, args.repeats)
            | decoder.facts()
        )
    finally:
        sessions.Program, sessions.fuse = kept, fuse


def peer_rows(model: Any, kind: str, batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for peer in args.peers:
        how = {"cache_implementation": "static"} if peer == "static" else {}
        repeats = 1 if peer == "eager" else args.repeats
        call = partial(theirs, model, batch, args.prompt, args.new, **how)
        rows.append({"model": kind} | row(f"{kind} transformers {peer}", call, batch, args.new, repeats))
    return rows


def our_row(model: Any, name: str, batch: int, args: argparse.Namespace, profiles: dict[str, Any]) -> dict[str, Any]:
    decoder = Decoder(model)
    found = row(name, partial(ours, model, batch, args.prompt, args.new, decoder), batch, args.new, args.repeats)
    if args.profile:
        profiles[f"{name} {batch}"] = profile(decoder, model, batch, args.prompt)
    return found | decoder.facts()


def prefill_row(model: Any, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    call = partial(ours, model, 1, args.prefill, 1, Decoder(model))
    first = call()[0]  # plans and compiles
    again = call()[0]  # captures
    samples = [call()[0] for _ in range(args.repeats)]
    print(f"{kind} prefill {args.prefill}: {1e3 * statistics.median(samples):.1f} ms", flush=True)
    return {
        "model": kind,
        "name": f"{kind} prefill",
        "tokens": args.prefill,
        "seconds": statistics.median(samples),
        "samples": samples,
        "first_seconds": first,
        "capture_seconds": again,
    }


def measure_kind(kind: str, config: LlamaConfig, args: argparse.Namespace, profiles: dict[str, Any]) -> list[dict[str, Any]]:
    start = time.perf_counter()
    model = dense(config, args.device) if kind == "dense" else packed(config, args.device, kind, 128, args.head_bits)
    print(f"{kind}: made in {now(args.device) - start:.1f} s", flush=True)
    kernels = sorted({str(m.kernel_name) for m in model.modules() if isinstance(m, Linear)})
    rows: list[dict[str, Any]] = []
    if kind == "dense":
        if "unmerged" in args.variants:
            rows.append({"model": kind} | our_row(model, "dense ours unmerged", args.batch[0], args, profiles))
        for batch in args.peer_batch:
            rows += peer_rows(model, kind, batch, args)
        merge(model)
    for batch in args.batch:
        rows.append({"model": kind} | our_row(model, f"{kind} ours", batch, args, profiles))
    rows += [
        {"model": kind} | compiled_row(model, args.batch[0], args, variant == "compiled-fused")
        for variant in args.variants
        if variant.startswith("compiled")
    ]
    if args.prefill:
        rows.append(prefill_row(model, kind, args))
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else None
    return [found | {"kernels": kernels, "peak_bytes": peak} for found in rows]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    config = config_of(args.shape, args.layers)
    rows: list[dict[str, Any]] = []
    profiles: dict[str, Any] = {}
    for kind in args.models:
        rows += measure_kind(kind, config, args, profiles)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join(["python", "benchmarks/decode.py", *sys.argv[1:]]),
        "machine": {"gpu": gpu, "cpu": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        "shape": args.shape,
        "layers": config.num_hidden_layers,
        "prompt": args.prompt,
        "new_tokens": args.new,
        "rows": rows,
        "profiles": profiles,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=["dense", "w4"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prefill", type=int, default=0)
    parser.add_argument("--head-bits", type=int, default=8)
    parser.add_argument("--peers", nargs="*", default=["eager", "static"])
    parser.add_argument("--peer-batch", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--variants", nargs="*", default=[])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--plans", type=Path, help="a result of decode_attention.py whose best plans to use")
    args = parser.parse_args()
    if args.plans:
        for chosen in json.loads(args.plans.read_text("utf-8"))["rows"]:
            # Plans are by slots; where batches disagree the smallest batch, which comes first, decides.
            triton_ops.OVERRIDE.setdefault(chosen["slots"], tuple(map(int, chosen["best"].split(","))))
    torch.manual_seed(0)
    found = measure(args)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
