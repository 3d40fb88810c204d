"""A real checkpoint from file to text, as a user types it: compressed, generated with, timed, and compared token by token.

    python benchmarks/real_model.py --text wikitext2_test.txt --work FOLDER --out benchmarks/results/real_model_h100.json
    python benchmarks/real_model.py --device cpu --recipes w4-fast --new 16 ...                 does the script run at all?

The model is SmolLM2-135M-Instruct (`smollm2.py`) or any folder or GGUF file given by `--model`. Every step with a command of
its own runs as that command in a process of its own, whose wall time counts from its start:

    compress    `aerogel compress MODEL -r RECIPE`, calibrated with --text where a recipe wants text
    generate    `aerogel generate` with one prompt, dense and compressed, compiling kernels; recipes go side by side up to here
    bench       `aerogel bench COMPRESSED --against DENSE --speed-only`, one and 16 sequences, each alone

What comes out is checked in this process, greedy, with PROMPTS (the first three as chat turns), each by itself:

    dense       our loop against transformers' `generate(do_sample=False)`, in bfloat16 and in float32. Where tokens differ,
                `gap` is how much more the float32 model's logits give to the token that transformers took than to ours: two
                orders of summation may choose differently where it is within the rounding of bfloat16, and nowhere else
    compressed  the device against a CPU with the same files (not on a CPU): the first token that differs and its gap in the
                CPU's logits; and, with the tokens of --text given, the perplexity on both, how often both find the same token
                likeliest, and how far their predictions are apart (KL) beside what compression itself changed and beside what
                the CPU's own change by when the last bits of the embeddings do (`divergence_of_last_bits`). Where a recipe
                rounds inputs, the last bit of one decides its code, so single tokens tell little and predictions do

The exit code is 1 where float32 tokens differ, dense tokens differ by a gap above MOST_GAP, perplexities by more than
MOST_PERPLEXITY, or a device's predictions are further from a CPU's than MOST_SHARE of what compression changed and than
MOST_LAST_BITS times what last bits change.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from aerogel.cli.generate import encode, ends
from aerogel.eval.machine import machine, versions
from aerogel.kernels.decode.loop import Decoder
from aerogel.kernels.linear import Linear
from aerogel.model.direct import load_to_decode
from aerogel.model.loading import load
from aerogel.model.pipeline import tokenizer_of
from aerogel.model.source import resolve
from aerogel.model.writer import write_json

PROMPTS = (
    ("What is the capital of France, and what is it known for?", False),
    ("Write three sentences about the sea.", False),
    ("How do I sort a list of numbers in Python?", False),
    ("The history of the steam engine begins", True),
    ("def fibonacci(n):\n", True),
)
"""Text, and whether it is continued as it is."""
RECIPES = ("w4", "w4a8", "w8a8", "w4-nvfp4", "w3", "w2")
WINDOWS, WINDOW = 4, 512
"""Of --text, whose perplexity is taken; tokens of each."""
MOST_GAP, MOST_PERPLEXITY, MOST_SHARE, MOST_LAST_BITS = 0.25, 0.02, 0.25, 1.25
"""Logits (of about 20, where neighbours in bfloat16 are 0.125 apart), a relative difference, and ratios of divergences."""


def command(*words: str) -> dict[str, Any]:
    """One call of the command line: its seconds and what it writes as JSON."""
    started = time.perf_counter()
    call = [sys.executable, "-m", "aerogel", *words, "--json", "-", "--quiet"]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - started
    print(f"{seconds:6.1f} s  aerogel {' '.join(words)}", flush=True)
    if done.returncode:
        raise SystemExit(f"aerogel {' '.join(words)} ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return {"command": " ".join(["aerogel", *words]), "wall_s": seconds, **found}


def compressed(model: str, recipe: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Makes a checkpoint by that recipe; what it took."""
    folder = asked.work / recipe
    calibration = [
        f"calibration.source={asked.text}",
        f"calibration.samples={asked.samples}",
        "calibration.sequence_length=512",
    ]
    sets = [word for one in calibration for word in ("--set", one)]
    report = command("compress", model, "-r", recipe, "-o", str(folder), "--device", asked.device, "--overwrite", *sets)
    return {key: report[key] for key in ("command", "wall_s")} | {"compression": report["size"]["compression"]}


def generated(model: str, asked: argparse.Namespace) -> dict[str, Any]:
    """An answer, and how fast it came."""
    words = ("generate", model, PROMPTS[0][0], "-n", str(asked.new), "--device", asked.device)
    kept = ("command", "wall_s", "text", "tokens", "first_token_seconds", "decode_tokens_per_second", "ran")
    found = command(*words)
    return {key: found[key] for key in kept}


def benched(dense: str, folder: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Speed of both, one and 16 sequences."""
    sizes = ("--batch", "1,16", "--prompt", "128", "--new-tokens", str(asked.new), "--repeats", "3")
    found = command("bench", folder, "--against", dense, "--speed-only", "--device", asked.device, *sizes)
    return {key: found[key] for key in ("command", "wall_s", "bench")}


def greedy(model: Any, prompts: list[Tensor], new: int) -> list[list[int]]:
    """Tokens behind each prompt [T] by our loop."""
    decoder = Decoder(model)
    stop = ends(model)
    return [[step[0] for step in decoder.stream([ids], new, stop=stop) if step[0] is not None] for ids in prompts]


def by_transformers(model: Any, prompts: list[Tensor], new: int) -> list[list[int]]:
    """The same by `generate`."""
    found = []
    for ids in prompts:
        ids_1T = ids[None].to(model.device)
        out = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=new, do_sample=False)
        found.append(out[0, len(ids) :].tolist())
    return found


@torch.inference_mode()
def compared(name: str, ours: list[list[int]], theirs: list[list[int]], prompts: list[Tensor], judge: Any) -> dict[str, Any]:
    """Where tokens differ first, for each prompt, and by how much `judge` prefers theirs there."""
    rows = []
    for one, other, ids in zip(ours, theirs, prompts, strict=True):
        same = next(
            (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
        )
        row: dict[str, Any] = {"tokens": len(other), "same": same, "equal": one == other, "gap": 0.0}
        if same < min(len(one), len(other)):
            seen = torch.cat([ids, torch.tensor(other[:same], dtype=ids.dtype)])[None].to(judge.device)
            logits = judge(seen).logits[0, -1].float()
            row["gap"] = (logits[other[same]] - logits[one[same]]).item()
        elif not row["equal"]:
            row["gap"] = math.inf
        rows.append(row)
    print(
        name, [f"{row['same']}/{row['tokens']}" + (f" gap {row['gap']:.3f}" if row["gap"] else "") for row in rows], flush=True
    )
    return {"equal": all(row["equal"] for row in rows), "most_gap": max(abs(row["gap"]) for row in rows), "prompts": rows}


@torch.inference_mode()
def predictions(model: Any, ids: Tensor) -> Tensor:
    """Logarithms of the probabilities of every next token of windows [WINDOWS, WINDOW], on the CPU in float32."""
    found = [model(window[None]).logits[0, :-1].float().log_softmax(-1).cpu() for window in ids.to(model.device)]
    return torch.stack(found)


def last_bits_changed(model: Any, ids: Tensor) -> Tensor:
    """Predictions behind embeddings that are off by up to a unit in bfloat16's last place (seeded): what no two orders of
    summation agree on."""
    random = torch.Generator().manual_seed(0)

    def change(_module: Any, _inputs: Any, found: Tensor) -> Tensor:
        off = torch.rand(found.shape, generator=random).to(found.device) * 2 - 1
        return (found.float() * (1 + off * 2**-8)).to(found.dtype)

    hook = model.get_input_embeddings().register_forward_hook(change)
    try:
        return predictions(model, ids)
    finally:
        hook.remove()


def perplexity(predicted: Tensor, ids: Tensor) -> float:
    """Of windows [WINDOWS, WINDOW] of token ids, from their predictions [WINDOWS, WINDOW - 1, vocabulary]."""
    return math.exp(-predicted.gather(-1, ids[:, 1:, None]).mean().item())


def divergence(reference: Tensor, other: Tensor) -> float:
    """The mean KL divergence of `other` from `reference`, in nats per token."""
    return (reference.exp() * (reference - other)).sum(-1).mean().item()


def dense_checks(folder: Path, prompts: list[Tensor], ids: Tensor, asked: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """Our loop beside transformers' own, and the float32 model's predictions of windows."""
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(asked.device).eval()
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        plain = exact if dtype == torch.float32 else copy.deepcopy(exact).to(dtype)
        theirs = by_transformers(plain, prompts, asked.new)
        if dtype == torch.bfloat16:  # as the command line loads it
            plain = load_to_decode(folder, loop="auto", device=asked.device, merge=True, bits=None)
        kind = str(dtype).removeprefix("torch.")
        found[kind] = compared(f"dense {kind}", greedy(plain, prompts, asked.new), theirs, prompts, exact)
    return found, predictions(exact, ids)


def compressed_checks(
    folder: Path, prompts: list[Tensor], ids: Tensor, dense: Tensor, asked: argparse.Namespace
) -> dict[str, Any]:
    """The device beside a CPU. dense: predictions of the model that was compressed."""
    tokens, predicted, kernels = {}, {}, {}
    judge = None
    for device in (asked.device, "cpu"):
        tokens[device] = greedy(
            load_to_decode(folder, loop="auto", device=device, merge=True, bits=None), prompts, asked.cpu_new
        )
        judge = load(folder, device=device, merge=True)
        predicted[device] = predictions(judge, ids)
        kernels[device] = sorted({str(one.kernel_name) for one in judge.modules() if isinstance(one, Linear)})
    found = compared(folder.name, tokens[asked.device], tokens["cpu"], prompts, judge) | {
        "perplexity": {device: perplexity(one, ids) for device, one in predicted.items()},
        "same_likeliest": (predicted[asked.device].argmax(-1) == predicted["cpu"].argmax(-1)).double().mean().item(),
        "divergence_of_devices": divergence(predicted["cpu"], predicted[asked.device]),
        "divergence_of_last_bits": divergence(predicted["cpu"], last_bits_changed(judge, ids)),
        "divergence_from_dense": {device: divergence(dense, one) for device, one in predicted.items()},
        "kernels": kernels,
    }
    print(f"{folder.name}: { {key: found[key] for key in list(found)[3:]} }", flush=True)
    return found


def missed(result: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    dense = result["dense"]["tokens"]
    found = [] if dense["float32"]["equal"] else ["dense float32 tokens differ"]
    if dense["bfloat16"]["most_gap"] > MOST_GAP:
        found.append(f"dense bfloat16 tokens differ where logits are {dense['bfloat16']['most_gap']:.3f} apart")
    for name, row in result["compressed"].items():
        if (check := row.get("tokens")) is None:
            continue
        low, high = sorted(check["perplexity"].values())
        if high / low - 1 > MOST_PERPLEXITY:
            found.append(f"{name}: perplexities {check['perplexity']}")
        apart, itself = check["divergence_of_devices"], check["divergence_of_last_bits"]
        share = apart / check["divergence_from_dense"]["cpu"]
        if share > MOST_SHARE and apart > MOST_LAST_BITS * itself:
            found.append(
                f"{name}: predictions of the devices differ by {apart:.4f}, {share:.0%} of what compression changed;"
                f" last bits change {itself:.4f}"
            )
    return found


def write(asked: argparse.Namespace, result: dict[str, Any]) -> None:
    """What was found so far."""
    if asked.out is not None:
        write_json(asked.out, result | {"missed": missed(result)})


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
    from smollm2 import gguf

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder or GGUF file")
    parser.add_argument("--text", type=Path, required=True, help="plain text: calibration, and perplexity from its end")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--samples", type=int, default=32, help="of calibration, 512 tokens each")
    parser.add_argument("--new", type=int, default=96, help="tokens of an answer")
    parser.add_argument("--cpu-new", type=int, default=48, help="tokens of an answer that is compared with a CPU's")
    asked = parser.parse_args()
    model = asked.model or str(gguf())
    started = time.perf_counter()
    folder = resolve(model)
    print(f"{time.perf_counter() - started:6.1f} s  {model} -> {folder}", flush=True)
    tokenizer = tokenizer_of(folder)()
    prompts = [encode(tokenizer, text, raw)[0] for text, raw in PROMPTS]
    ids = tokenizer(asked.text.read_text("utf-8")[-40 * WINDOWS * WINDOW :], return_tensors="pt")["input_ids"]
    windows = ids[0, -WINDOWS * WINDOW :].view(WINDOWS, WINDOW)
    result: dict[str, Any] = {
        "benchmark": "real_model",
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "versions": versions() | {"transformers": transformers.__version__, "python": platform.python_version()},
        "model": Path(model).name,
        "seconds_to_make_checkpoint": time.perf_counter() - started,
        "prompts": [text for text, _ in PROMPTS],
    }

    def prepared(recipe: str | None) -> dict[str, Any]:
        if recipe is None:
            return {"generate": generated(model, asked)}
        return {"compress": compressed(model, recipe, asked), "generate": generated(str(asked.work / recipe), asked)}

    with ThreadPoolExecutor(len(asked.recipes) + 1) as pool:
        result["dense"], *rows = pool.map(prepared, [None, *asked.recipes])
    result["compressed"] = dict(zip(asked.recipes, rows, strict=True))
    result["dense"]["tokens"], dense = dense_checks(folder, prompts, windows, asked)
    for recipe, row in result["compressed"].items():
        if asked.device != "cpu":
            row["tokens"] = compressed_checks(asked.work / recipe, prompts, windows, dense, asked)
    write(asked, result)
    for recipe, row in result["compressed"].items():
        row |= {"speed": benched(model, str(asked.work / recipe), asked)}
        write(asked, result)  # each time: a run that is cut off has measured what it has measured
    found = missed(result)
    if found:
        raise SystemExit("; ".join(found))


if __name__ == "__main__":
    main()
