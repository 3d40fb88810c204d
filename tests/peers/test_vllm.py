"""vLLM loads what plans say that it loads, and gives our logits.

`make serve-test` installs vLLM for CPUs in an environment of its own and runs this file; AEROGEL_VLLM is that environment's
interpreter. Without it, everything here is skipped. `serve_vllm.py` says what of vLLM runs, and what of it a CPU cannot show.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model.tiny import recipe
from tests.peers import making

from aerogel.model.compress import compress
from aerogel.model.loading import load

pytestmark = pytest.mark.peers
VARIABLE = "AEROGEL_VLLM"
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 2}
"""Whole blocks of 128 x 128 in every matrix, so that all formats are open."""


def integers(bits: int, group_size: int | None = 64, **more: Any) -> list[dict[str, Any]]:
    return [{"bits": bits, "group_size": group_size, **more}]


def fp8(activations: str = "none", **more: Any) -> list[dict[str, Any]]:
    return [{"format": "fp8", "activations": activations, **more}]


SERVED: dict[str, list[dict[str, Any]]] = {
    "w4": integers(4),
    "w4-128": integers(4, 128),
    "w4-channel": integers(4, None),
    "w4-asymmetric": integers(4, symmetric=False),
    "w4-channel-asymmetric": integers(4, None, symmetric=False),
    "w8": integers(8, 32),
    "w8-channel": integers(8, None),
    "w8-asymmetric": integers(8, symmetric=False),
    "w2-asymmetric": integers(2, symmetric=False),
    "w3": integers(3),
    "w3-asymmetric": integers(3, symmetric=False),
    "w5": integers(5),
    "w6": integers(6),
    "w7": integers(7),
    "w8a8": integers(8, None, activations="int8"),
    "w8a8-static": integers(8, None, activations="int8-static"),
    "w8a8-groups": integers(8, activations="int8"),
    "w4a8": integers(4, activations="int8"),
    "w4a8-channel-asymmetric": integers(4, None, symmetric=False, activations="int8"),
    "fp8": fp8(),
    "fp8-tensor": fp8(strategy="tensor"),
    "fp8a8": fp8("fp8"),
    "fp8a8-static": fp8("fp8-static"),
    "fp8a8-block": fp8("fp8", strategy="block"),
    "nvfp4": [{"format": "nvfp4"}],
    "mxfp4": [{"format": "mx"}],
    "mxfp8": [{"format": "mx", "kind": "e4m3"}],
    "two-widths": [*integers(4, targets=["re:.*self_attn.*"]), *integers(8, targets=["re:.*mlp.*"])],
    "two-formats": [*integers(4, targets=["re:.*self_attn.*"]), *fp8("fp8", targets=["re:.*mlp.*"])],
    "kept": integers(4, ignore=["re:.*down_proj", "re:.*layers.1.self_attn", "lm_head"]),
    "head": integers(4, ignore=[]),
    "head-asymmetric": integers(8, symmetric=False, ignore=[]),
    "head-w8a8": integers(8, None, activations="int8", ignore=[]),
    "head-nvfp4": [{"format": "nvfp4", "ignore": []}],
}
"""Quantize stages by case, all of which plans say vLLM loads."""
REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "w4-static": (integers(4, activations="int8-static"), "No compressed-tensors compatible scheme was found"),
    "fp8-block": (fp8(strategy="block"), "compressed_tensors_w8a16_fp8.py:process_weights_after_loading: AssertionError"),
    "unlike": ([*integers(4, targets=["re:.*[qk]_proj"]), *integers(8, targets=["re:.*(v|o|gate|up|down)_proj"])], ""),
}
"""What they say it does not load, and how it stops. One that runs all the same: correct model/servers.py."""
EXACT = 2e-5
"""Relative Frobenius error of logits against ours, both in float32: the order of sums."""
ROUNDED = 1e-4, 0.1
"""The same where inputs are rounded, of half of the tokens and of all. A number that lies between two codes goes to either of
them, and all tokens behind it follow: few in a row of eleven, or most of one row."""
OWN = 0.3
"""vLLM's own products for CPUs: some are not in float32, and the int8 one saturates without VNNI (0.1 found, 0.18 at most)."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Checkpoints of all cases, each with what vLLM made of it."""
    if VARIABLE not in os.environ:
        pytest.skip(f"{VARIABLE} names no interpreter that has vLLM; run: make serve-test")
    root = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        for name, size in SHAPE.items():
            patch.setitem(making.SHAPE, name, size)
        dense = making.save_tiny(root / "dense", torch.bfloat16)
    save_file({"ids": making.calibration(making.VOCABULARY)}, root / "ids.safetensors")
    for name, stages in {**SERVED, **{name: stages for name, (stages, _) in REFUSED.items()}}.items():
        wanted = [{"quantize": {"method": "rtn", **stage}} for stage in stages]
        compress(dense, recipe(f"{root / 'ids.safetensors'}:ids", *wanted), root / name)
    script = Path(__file__).parent / "serve_vllm.py"
    command = [os.environ[VARIABLE], str(script), *(str(root / name) for name in ("dense", *SERVED, *REFUSED))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (root / "serving.log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr[-5000:]
    yield root


def told(folder: Path) -> dict[str, str | None]:
    found: dict[str, str | None] = json.loads(folder.with_name(f"{folder.name}.json").read_text())
    return found


def errors(folder: Path, name: str) -> torch.Tensor:
    """Relative error of each token's logits, [22], of what vLLM served."""
    with torch.no_grad():
        wanted = load(folder, dtype=torch.float32)(making.test_ids(making.VOCABULARY)).logits
    found = load_file(folder.with_name(f"{folder.name}.{name}.safetensors"))["logits"]
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).flatten()


@pytest.mark.parametrize("name", ["dense", *SERVED])
def test_vllm_serves_what_we_compute(folders: Path, name: str) -> None:
    folder = folders / name
    if name != "dense":
        assert "vLLM" in json.loads((folder / "aerogel_report.json").read_text())["loads"]["in"]
    said = told(folder)
    assert said["decoded"] is None, said["decoded"]
    rounds = any(stage.get("activations", "none") != "none" for stage in SERVED.get(name, ()))
    half, every = ROUNDED if rounds else (EXACT, EXACT)
    found = errors(folder, "decoded")
    assert float(found.median()) <= half and float(found.max()) <= every, found
    if said["own"] is None:
        found = errors(folder, "own")
        assert float(found.max()) <= (OWN if name in SERVED else EXACT), found


@pytest.mark.parametrize("name", REFUSED)
def test_vllm_refuses_what_plans_say_it_refuses(folders: Path, name: str) -> None:
    folder = folders / name
    assert "vLLM" not in json.loads((folder / "aerogel_report.json").read_text())["loads"]["in"]
    said = told(folder)
    for how in ("own", "decoded"):
        stopped = said[how]
        assert stopped is not None
    assert REFUSED[name][1] in str(said["decoded"]), said
