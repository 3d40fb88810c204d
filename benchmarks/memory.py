"""Peak memory and time of compressing a large checkpoint: GPTQ at 4 bits on a random Llama of 4 billion parameters.

    python benchmarks/memory.py --work FOLDER --out benchmarks/results/memory.json [--blocks 36 9]

Writes the checkpoint (8 GB of bfloat16, shard by shard) into FOLDER, compresses it in a process of its own, and reads that
process' peak resident memory and the seconds per block. Run with fewer --blocks beside the full number to see that time
grows linearly with them.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from aerogel.eval.machine import machine, versions
from aerogel.model.writer import write_json, write_tensors

HIDDEN, INNER, HEADS, KEY_HEADS, HEAD, VOCABULARY = 3072, 8192, 24, 8, 128, 128256
RECIPE = """aerogel: 1
calibration: {{source: "{ids}:calibration", samples: 16, sequence_length: 512, batch: 2, compute: bfloat16}}
stages:
  - quantize: {{method: gptq, bits: 4, group_size: 64, clip: none, refit: 0}}
"""


def make(folder: Path, blocks: int) -> int:
    """A random Llama with `blocks` blocks in `folder`, one shard per block; returns its parameters."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16).mul_(shape[-1] ** -0.5)

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD,
        "num_hidden_layers": blocks,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "dtype": "bfloat16",
    }
    write_json(folder / "config.json", config)
    weight_map: dict[str, str] = {}
    count = 0

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal count
        write_tensors(folder / name, tensors)
        weight_map.update(dict.fromkeys(tensors, name))
        count += sum(t.numel() for t in tensors.values())

    shard(
        "model-00000.safetensors",
        {
            "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
            "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        },
    )
    for i in range(blocks):
        p = f"model.layers.{i}."
        linears = {
            "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
            "self_attn.k_proj": (KEY_HEADS * HEAD, HIDDEN),
            "self_attn.v_proj": (KEY_HEADS * HEAD, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }
        norms = {
            f"{p}{n}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16) for n in ("input_layernorm", "post_attention_layernorm")
        }
        shard(f"model-{i + 1:05d}.safetensors", {f"{p}{n}.weight": random(*s) for n, s in linears.items()} | norms)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return count


def cpu_seconds() -> float:
    """User and system time of the finished child processes: unlike the clock, other processes hardly change it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(work: Path, blocks: int) -> dict[str, object]:
    """Compresses the model with `blocks` blocks in a fresh process."""
    model, out = work / f"model-{blocks}", work / f"out-{blocks}"
    shutil.rmtree(model, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    parameters = make(model, blocks)
    ids = torch.randint(0, VOCABULARY, (16, 512), generator=torch.Generator().manual_seed(1))
    write_tensors(work / "ids.safetensors", {"calibration": ids})
    (work / "recipe.yaml").write_text(RECIPE.format(ids=work / "ids.safetensors"))
    command = [sys.executable, "-m", "aerogel", "compress", str(model), "-r", str(work / "recipe.yaml"), "-o", str(out)]
    start, cpu = time.perf_counter(), cpu_seconds()
    done = subprocess.run(
        [*command, "--json", str(work / "report.json"), "--quiet"], check=False, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"compress failed with exit code {done.returncode}: {done.stderr[-2000:]}")
    report = json.loads((work / "report.json").read_text())
    # The largest child so far: sizes are run from small to large, so each row's peak is its own.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    row = {
        "blocks": blocks,
        "parameters": parameters,
        "source_bytes": report["size"]["source_bytes"],
        "bytes": report["size"]["bytes"],
        "bits_per_weight": report["size"]["bits_per_weight"],
        "peak_resident_bytes": peak,
        "peak_reported_bytes": report["peak_memory_bytes"],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds() - cpu,
        "seconds_per_block": [round(block["seconds"], 2) for block in report["blocks"]],
    }
    shutil.rmtree(model)
    shutil.rmtree(out)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[9, 36])
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    rows = [measure(given.work, blocks) for blocks in sorted(given.blocks)]
    result = {
        "command": "python benchmarks/memory.py --work FOLDER --out benchmarks/results/memory.json --blocks "
        + " ".join(map(str, given.blocks)),
        "machine": machine(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "recipe": RECIPE,
        "rows": rows,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        sys.stdout.write(
            json.dumps({key: row[key] for key in ("blocks", "parameters", "peak_resident_bytes", "seconds", "cpu_seconds")})
            + "\n"
        )


if __name__ == "__main__":
    main()
