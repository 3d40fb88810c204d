"""Milliseconds per token on a CPU, and where they go: transformers' generate beside the ways of our loop.

    python benchmarks/decode_cpu.py DENSE PACKED --threads 1 --out benchmarks/results/decode_cpu.json

DENSE and PACKED are checkpoints of one model, run in bfloat16, batch 1. Each way is warmed up, then the ways take turns;
per token both wall time and the process' CPU time are given, medians over --repeats of --new tokens each. CPU time is
what to compare on a machine that others use as well. `parts`: the traced step node by node, microseconds per token by
operator, the cost of the loop itself (an empty call per node) beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aerogel.eval.decode import facts
from aerogel.eval.machine import machine, versions
from aerogel.kernels.decode.loop import Decoder
from aerogel.model.loading import load

PROMPT = 32


def prompt_of(model: Any) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0))


def theirs(model: Any, new: int) -> tuple[float, float]:
    """Seconds per token behind the first: wall and CPU."""
    ids = prompt_of(model)[None]
    marks = []
    for tokens in (1, new + 1):
        start, cpu = time.perf_counter(), time.process_time()
        how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **how)
        marks.append((time.perf_counter() - start, time.process_time() - cpu))
    return (marks[1][0] - marks[0][0]) / new, (marks[1][1] - marks[0][1]) / new


def ours(decoder: Decoder, new: int) -> tuple[float, float]:
    steps = decoder.stream([prompt_of(decoder.model)], new + 2)
    next(steps)
    next(steps)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in steps:
        pass
    return (time.perf_counter() - start) / new, (time.process_time() - cpu) / new


def parts(decoder: Decoder, repeats: int = 10) -> dict[str, float]:
    """Microseconds of a step by operator, run node by node."""
    session: Any = decoder.session
    if not hasattr(session._program, "graph"):
        return {}  # compiled as a whole, with no Python between its operators
    graph = session._program.graph
    spent: dict[str, float] = defaultdict(float)
    weights = {node: getattr(graph, node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for repeat in range(repeats + 1):
        values: dict[Any, Any] = dict(weights)
        arguments = iter(session._arguments())
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(arguments)
            if node.op not in ("call_function", "call_method"):
                continue
            target = getattr(torch.Tensor, node.target) if node.op == "call_method" else node.target
            args = torch.fx.node.map_arg(node.args, values.__getitem__)
            kwargs = torch.fx.node.map_arg(node.kwargs, values.__getitem__)
            start = time.perf_counter()
            values[node] = target(*args, **kwargs)
            if repeat:
                spent[getattr(target, "__qualname__", str(target)).removesuffix(".default")] += time.perf_counter() - start
    calls = sum(node.op.startswith("call_") for node in graph.graph.nodes)
    start = time.perf_counter()
    for _ in range(calls):
        time.perf_counter()
    empty = time.perf_counter() - start
    found = {name: 1e6 * seconds / repeats for name, seconds in sorted(spent.items(), key=lambda item: -item[1])}
    return {"total": sum(found.values()), "nodes": calls, "clock": 1e6 * empty} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ways: dict[str, Callable[[], tuple[float, float]]] = {}
    decoders: dict[str, Decoder] = {}
    for kind, path in (("dense", args.dense), ("packed", args.packed)):
        plain, merged = load(path, dtype=torch.bfloat16), load(path, dtype=torch.bfloat16, merge=True)
        ways[f"{kind}, transformers"] = lambda model=plain: theirs(model, args.new)
        for name, decoder in (("plain", Decoder(plain, "plain")), ("fused", Decoder(plain)), ("merged", Decoder(merged))):
            ways[f"{kind}, ours {name}"] = lambda d=decoder: ours(d, args.new)
            decoders[f"{kind}, ours {name}"] = decoder
    for way in ways.values():
        way()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            samples[name].append(way())
    rows = []
    for name, found in samples.items():
        wall, cpu = (1e3 * statistics.median(sample[i] for sample in found) for i in (0, 1))
        rows.append({"name": name, "wall_ms": wall, "cpu_ms": cpu, "samples": found})
        if name in decoders:
            rows[-1]["ran"] = facts(decoders[name])
        if name.endswith("merged"):
            rows[-1]["parts"] = parts(decoders[name])
        print(f"{name:24} {wall:8.2f} ms/token wall {cpu:8.2f} ms CPU", rows[-1].get("ran", {}).get("kernels", ""), flush=True)
        for part, us in list(rows[-1].get("parts", {}).items())[:14]:
            print(f"      {us:9.1f} us {part}")
    if args.out:
        command = f"python benchmarks/decode_cpu.py {args.dense.name} {args.packed.name} --threads {args.threads}"
        report = {"command": command, "machine": machine(), "versions": versions(), "rows": rows}
        args.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
