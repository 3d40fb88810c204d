"""What aerogel writes, in vLLM with vLLM's own kernels: does it load where a report says so, and does it say the same?

    python benchmarks/served.py --work FOLDER --out benchmarks/results/vllm_h100.json
    python benchmarks/served.py --work FOLDER --cases int4-g128 fp8 --attention TRITON_ATTN     vLLM without flash attention

A small random Llama, and for experts a Qwen3 and a Mixtral, are compressed once in every way below, in the type that models
come in, bfloat16. vLLM, in a process of its own that knows nothing of aerogel, generates from PROMPTS random prompts and gives
the whole distribution of every token (`served_vllm.py`). Divergences, in nats per token, over all tokens but the first:

    vllm          of vLLM from the same file in float32 on a CPU, each weight decoded and inputs rounded where it says so
    ours          the same of aerogel's packed kernels, in bfloat16 on the device: what bfloat16 alone makes
    compression   of the file in float32 from the dense model in float32: what there is to get wrong

and `most` the largest difference of a logarithm of a probability, among those of at least LIKELY. A row is good when vLLM is no
further away than MOST times what bfloat16 makes, ours or vLLM's own of the dense model. `loads` is what the report of
`compress` says; rows where vLLM does otherwise are listed under `missed`, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import aerogel
from aerogel.eval.machine import machine, versions
from aerogel.model.loading import load
from aerogel.model.writer import write_json

VOCABULARY, PROMPTS, LENGTH, NEW = 1024, 4, 96, 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "tie_word_embeddings": False,
}
EXPERTS = SIZES | {"hidden_size": 512, "num_attention_heads": 8, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen3_moe": EXPERTS | {"num_experts": 8, "moe_intermediate_size": 256, "intermediate_size": 1024},
    "mixtral": EXPERTS | {"num_local_experts": 8, "intermediate_size": 512},
}
INT4 = {"bits": 4, "group_size": 128}
INT8 = {"bits": 8, "group_size": None}
LINEARS: dict[str, dict[str, Any]] = {
    "int4-g128": INT4,
    "int4-g64": INT4 | {"group_size": 64},
    "int4-g32": INT4 | {"group_size": 32},
    "int4-channel": INT4 | {"group_size": None},
    "int4-g128-zero": INT4 | {"symmetric": False},
    "int4-g64-zero": INT4 | {"group_size": 64, "symmetric": False},
    "int4-channel-zero": INT4 | {"group_size": None, "symmetric": False},
    "int8-g128": INT4 | {"bits": 8},
    "int8-channel": INT8,
    "int8-g128-zero": INT4 | {"bits": 8, "symmetric": False},
    "int2-g64": {"bits": 2, "group_size": 64},
    "int3-g64": {"bits": 3, "group_size": 64},
    "int3-channel": {"bits": 3, "group_size": None},
    "int5-g64": {"bits": 5, "group_size": 64},
    "int6-g64": {"bits": 6, "group_size": 64},
    "int4-g128-int8": INT4 | {"activations": "int8"},
    "int4-g64-int8": INT4 | {"group_size": 64, "activations": "int8"},
    "int4-channel-int8": INT4 | {"group_size": None, "activations": "int8"},
    "int4-g128-int8-static": INT4 | {"activations": "int8-static"},
    "int8-int8": INT8 | {"activations": "int8"},
    "int8-int8-static": INT8 | {"activations": "int8-static"},
    "fp8": {"format": "fp8"},
    "fp8-tensor": {"format": "fp8", "strategy": "tensor"},
    "fp8-fp8": {"format": "fp8", "activations": "fp8"},
    "fp8-fp8-static": {"format": "fp8", "activations": "fp8-static"},
    "fp8-tensor-fp8-static": {"format": "fp8", "strategy": "tensor", "activations": "fp8-static"},
    "fp8-block": {"format": "fp8", "strategy": "block"},
    "fp8-block-fp8": {"format": "fp8", "strategy": "block", "activations": "fp8"},
    "nvfp4": {"format": "nvfp4"},
    "mxfp4": {"format": "mx"},
    "mxfp8": {"format": "mx", "kind": "e4m3"},
}
"""Name -> a quantize stage, whose method is round-to-nearest."""
OF_EXPERTS = (
    "int4-g128",
    "int4-g64-zero",
    "int8-channel",
    "int4-g128-int8",
    "int8-int8",
    "fp8",
    "fp8-fp8",
    "fp8-block-fp8",
    "nvfp4",
    "mxfp4",
    "mxfp8",
)
CASES: dict[str, tuple[str, dict[str, Any] | None]] = {
    **{f"{model}-dense": (model, None) for model in MODELS},
    **{name: ("llama", stage) for name, stage in LINEARS.items()},
    **{f"{model}-{name}": (model, LINEARS[name]) for model in ("qwen3_moe", "mixtral") for name in OF_EXPERTS},
}
LIKELY, MOST = 1e-4, 3.0
PATIENCE = 240
"""Seconds for vLLM to start and answer."""


def make_models(work: Path, wanted: set[str]) -> None:
    """Random dense models, prompts, and token ids to calibrate static scales with."""
    for name in wanted:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **MODELS[name])).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.to(torch.bfloat16).save_pretrained(work / name)
    random = torch.Generator().manual_seed(1)
    save_file({"ids": torch.randint(4, VOCABULARY, (PROMPTS, LENGTH), generator=random)}, work / "prompts.safetensors")
    save_file({"ids": torch.randint(4, VOCABULARY, (8, 256), generator=random)}, work / "calibration.safetensors")


def compressed(name: str, work: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a case, and who loads it as the report says."""
    model, stage = CASES[name]
    if stage is None:
        return work / model, {"in": ["vLLM"], "not": []}
    calibration = {"source": f"{work / 'calibration.safetensors'}:ids", "samples": 8, "sequence_length": 256}
    recipe = {"aerogel": 1, "calibration": calibration, "stages": [{"quantize": {"method": "rtn", **stage}}]}
    report = aerogel.compress(work / model, recipe, work / name / "checkpoint", device="cuda", overwrite=True)
    return work / name / "checkpoint", report["loads"]


@torch.inference_mode()
def predictions(folder: Path, ids: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """Logarithms of probabilities of the tokens behind ids [B, T], float32 [B, T, vocabulary] on the CPU."""
    model = load(folder, device=device, dtype=dtype)
    return model(ids.to(device)).logits.float().log_softmax(-1).cpu()


def divergence(reference: Tensor, other: Tensor) -> float:
    """The mean KL divergence of `other` from `reference`, in nats per token."""
    return (reference.exp() * (reference - other)).sum(-1).mean().item()


def judged(name: str, work: Path, folder: Path) -> dict[str, float]:
    """How far vLLM's predictions are from the file's, beside ours."""
    found = load_file(work / name / "found.safetensors")
    ids, by_vllm = found["ids"][:, :-1], found["logprobs"]
    exact = predictions(folder, ids, "cpu", torch.float32)
    ours = predictions(folder, ids, "cuda", torch.bfloat16)
    dense = predictions(work / CASES[name][0], ids, "cpu", torch.float32)
    likely = exact > torch.tensor(LIKELY).log()
    return {
        "vllm": divergence(exact, by_vllm),
        "ours": divergence(exact, ours),
        "compression": divergence(dense, exact),
        "most_vllm": (by_vllm - exact)[likely].abs().max().item(),
        "most_ours": (ours - exact)[likely].abs().max().item(),
    }


def run(name: str, work: Path, attention: str | None) -> None:
    """One case from the dense model to its row, WORK/NAME/row.json, as far as it comes."""
    place = work / name
    place.mkdir(parents=True, exist_ok=True)
    row: dict[str, Any] = {"case": name}
    started = time.perf_counter()
    try:
        folder, row["loads"] = compressed(name, work)
        script = Path(__file__).with_name("served_vllm.py")
        words = [sys.executable, str(script), str(folder), str(work / "prompts.safetensors"), str(place / "found")]
        words += ["--new", str(NEW), *(["--attention", attention] if attention else [])]
        with (place / "vllm.log").open("w") as log:
            code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, check=False, timeout=PATIENCE).returncode
        row["served"] = code == 0
        if code:
            row["refused"] = reason((place / "vllm.log").read_text("utf-8", errors="replace"))
        else:
            row |= json.loads((place / "found.json").read_text())
            row["divergence"] = judged(name, work, folder)
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}"
    row["seconds"] = time.perf_counter() - started
    write_json(place / "row.json", row)


def reason(log: str) -> str:
    """The last line of what vLLM said that names an error."""
    lines = [line.strip() for line in log.splitlines() if "Error" in line or "assert" in line.lower()]
    return (lines or log.splitlines() or ["it said nothing"])[-1][:400]


def missed(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What vLLM does otherwise than a report says, and what it computes otherwise than the file says."""
    own = {model: rows.get(f"{model}-dense", {}).get("divergence", {}).get("vllm", 0.0) for model in MODELS}
    found = []
    for name, row in rows.items():
        claimed = "vLLM" in row.get("loads", {}).get("in", ())
        if "failed" in row:
            found.append(f"{name}: {row['failed']}")
        elif claimed != row["served"]:
            found.append(f"{name}: {row.get('refused', 'vLLM serves what the report says it does not')}")
        elif row["served"]:
            apart = row["divergence"]
            if not apart["vllm"] <= MOST * max(apart["ours"], own[CASES[name][0]]):
                found.append(f"{name}: vLLM is {apart['vllm']:.2e} nats away, aerogel in bfloat16 {apart['ours']:.2e}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--jobs", type=int, default=8, help="cases side by side on the one GPU")
    parser.add_argument("--attention", default=None, help="an attention backend of vLLM's, such as TRITON_ATTN")
    parser.add_argument("--one", choices=list(CASES), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        run(asked.one, asked.work, asked.attention)
        return
    make_models(asked.work, {CASES[name][0] for name in asked.cases})
    environment = {"OMP_NUM_THREADS": "2", **os.environ}

    def apart(name: str) -> dict[str, Any]:
        words = [sys.executable, __file__, "--work", str(asked.work), "--one", name]
        words += ["--attention", asked.attention] if asked.attention else []
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        file = asked.work / name / "row.json"
        row: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"case": name, "failed": done.stderr[-400:]}
        print(json.dumps(row), flush=True)
        return row

    with ThreadPoolExecutor(asked.jobs) as pool:
        rows = dict(zip(asked.cases, pool.map(apart, asked.cases), strict=True))
    vllm = next((row["vllm"] for row in rows.values() if "vllm" in row), None)
    result = {
        "benchmark": "served",
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "versions": versions() | {"vllm": vllm},
        "models": MODELS,
        "stages": LINEARS,
        "rows": rows,
        "missed": missed(rows),
    }
    if asked.out is not None:
        write_json(asked.out, result)
    if result["missed"]:
        raise SystemExit("\n".join(result["missed"]))


if __name__ == "__main__":
    main()
