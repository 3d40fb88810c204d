"""The small operations against their formulas, in plain torch and (where Triton is installed) under its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.decode.cases import ATTENTION, attention, distance, textbook

from aerogel.kernels.decode import ops
from aerogel.kernels.decode.sample import Sampling, kept, likeliest, pick

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_is_the_formula(case: Any) -> None:
    given = attention(case, torch.float32)
    expected = textbook(given)
    before = given["keys"].clone()
    found = torch.ops.aerogel.attend(*given.values())
    assert distance(found, expected) < 2e-6
    n = int(given["slot"])
    changed = (given["keys"].nan_to_num(7) != before.nan_to_num(7)).any(-1).any(0).any(0)
    assert changed.nonzero().flatten().tolist() == [n], "only the new key's slot is written"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_and_gates_round_as_the_models_do(dtype: torch.dtype) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 1, 48).to(dtype)
    llama, gemma = LlamaRMSNorm(48, 1e-5).to(dtype), GemmaRMSNorm(48, 1e-5).to(dtype)
    with torch.no_grad():
        for norm in (llama, gemma):
            norm.weight.normal_()
        assert torch.equal(ops.rms_norm(x, llama.weight, 1e-5, True), llama(x))
        total, normed = ops.add_rms_norm(x, y, 1.0 + gemma.weight.float(), 1e-5, False)
        assert torch.equal(total, x + y)
        assert torch.equal(normed, gemma(x + y))
    for act in ("silu", "gelu"):
        assert torch.equal(ops.gate(x, y, act), getattr(torch.nn.functional, act)(x) * y)


@pytest.mark.parametrize("name", ["attend", "add_rms_norm", "rms_norm", "gate", "rotate"])
def test_operators_keep_the_promises_of_their_schemas(name: str) -> None:
    x, w = torch.randn(2, 1, 16), torch.randn(16)
    samples: dict[str, tuple[Any, ...]] = {
        "attend": tuple(attention(ATTENTION[1], torch.float32).values()),
        "add_rms_norm": (x, x + 1, w, 1e-5, True),
        "rms_norm": (x, w, 1e-5, False),
        "gate": (x, x + 1, "silu"),
        "rotate": (torch.randn(2, 3, 5, 16), torch.randn(2, 5, 16), torch.randn(2, 5, 16)),
    }
    operator = getattr(torch.ops.aerogel, name).default
    torch.library.opcheck(operator, samples[name], test_utils=("test_schema",))


def test_triton_kernels_equal_the_formulas() -> None:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.decode.interpret"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), "src", "."])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_cuts_are_those_of_transformers() -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    expected = logits
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(0.8)):
        expected = warper(torch.zeros(4, 1, dtype=torch.int64), expected)
    found = kept(logits, Sampling(temperature=0.7, top_k=12, top_p=0.8))
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert torch.allclose(found, expected)


def test_draws_follow_the_distribution() -> None:
    shares = torch.tensor([0.5, 0.25, 0.15, 0.1])
    logits = shares.log().expand(20000, 4)
    drawn = pick(logits, Sampling(temperature=1.0), torch.Generator().manual_seed(0))
    assert torch.allclose(
        drawn.bincount(minlength=4) / 20000 if drawn.ndim == 1 else drawn[:, 0].bincount(minlength=4) / 20000,
        shares,
        atol=0.012,
    )


def test_the_likeliest_is_the_argmax() -> None:
    logits = torch.randn(3, 64 * 128)
    assert torch.equal(likeliest(logits), logits.argmax(-1, keepdim=True))
    several = torch.zeros(2, 64 * 128, dtype=torch.bfloat16)
    several[0, [700, 701, 5000]] = 3.0  # the first of equals
    several[1, 4000] = float("nan")
    assert likeliest(several).tolist() == [[700], [4000]]
