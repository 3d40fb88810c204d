"""Checkpoints that other tools really made load, decode bit for bit as those tools decode them, and give their logits.

`make peer-test` makes them, each tool in an environment of its own, and runs this file. The folder of made checkpoints is
in AEROGEL_PEERS; `making.py` says what lies in it. Without it, everything here is skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aerogel.kernels.experts import ExpertLinear
from aerogel.kernels.linear import Linear
from aerogel.model.loading import load
from aerogel.model.reader import CheckpointReader
from aerogel.pack.export import export_dense

pytestmark = pytest.mark.peers
VARIABLE = "AEROGEL_PEERS"
COMMAND = "make peer-test"
MADE = {
    "llmcompressor": (
        *("w4-gptq", "w4-gptq-asymmetric", "w4-rtn", "w4-rtn-channel", "w4-rtn-asymmetric", "w3-gptq"),
        *("w8-rtn-asymmetric", "w8a8-int8", "fp8-dynamic", "fp8-block", "mixed"),
    ),
    "auto-round": (
        *("gptq-w4", "gptq-w4-asymmetric", "gptq-w3", "gptq-w8-channel", "awq-w4", "awq-w4-asymmetric"),
        *("compressed-w4", "compressed-w4-asymmetric", "native-w4", "native-w4-asymmetric"),
    ),
    "gptqmodel": (
        *("gptq-w4", "gptq-w4-asymmetric", "gptq-w4-activation-order", "gptq-w4-v2", "gptq-w3", "gptq-w2"),
        *("gptq-w8-channel", "gptq-dynamic", "awq-w4-packed"),
    ),
    "modelopt": (
        *("fp8", "fp8-kv", "fp8-channel", "fp8-block", "fp8-left-out", "int4-awq", "int4-blocks", "w4a8-awq"),
        *("int8", "int8-smooth", "int8-weights", "nvfp4", "nvfp4-kv", "nvfp4-awq", "nvfp4-weights", "nvfp4-mlp"),
        *("nvfp4-fp8", "mxfp4", "mxfp4-fp8", "mxfp8", "mixed", "nvfp4-mixtral", "nvfp4-qwen3-moe"),
        *("fp8-qwen3-moe", "mixed-mixtral"),
    ),
    "gpt-oss": ("mxfp4", "mxfp4-wide"),
    "hqq": ("w8", "w4", "w4-channel", "w4-as-floats", "w3", "w2", "w1"),
}
"""The cases of `make_*.py`, by tool: one that was not made although its tool ran is a failure."""
CASES = [f"{peer}/{case}" for peer, cases in MADE.items() for case in cases]
OTHER_SCALES = {"w8a8-int8": 5e-2, "int8-smooth": 5e-2}
"""compressed-tensors scales a token's int8 input by max|x| / 127.5, we and servers by max|x| / 127: other codes. ModelOpt cuts
inputs beyond a fixed scale at -128, we at -127."""
TOLERANCE = {torch.float16: 5e-3, torch.float32: 2e-3}
"""Relative Frobenius error of logits against ours in float32, by the dtype in which the peer computed them. In float32
some peers still round decoded weights to float16, by up to 2^-11."""


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Path:
    """The folder of one made checkpoint."""
    if VARIABLE not in os.environ:
        pytest.skip(f"{VARIABLE} names no folder of checkpoints made by other tools; run: {COMMAND}")
    peer, _, name = request.param.partition("/")
    root = Path(os.environ[VARIABLE]) / peer
    if not root.is_dir():
        pytest.skip(f"{root} is not there: {peer} made nothing; run: {COMMAND} PEERS={peer}")
    folder = root / name
    failed = folder / "failed.txt"
    assert not failed.exists(), f"{peer} could not make it: {failed.read_text()}"
    return folder


def test_a_peers_checkpoint_decodes_and_runs_as_the_peer_has_it(case: Path) -> None:
    wanted = load_file(case / "decoded.safetensors")
    ids, logits = wanted.pop("ids"), wanted.pop("logits")
    model = load(case / "checkpoint", dtype=torch.float32)
    layers = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    experts = {name for name in wanted if ".experts." in name}  # stacked: the other test has their bits, this one their product
    assert set(layers) == set(wanted) - experts
    assert any(isinstance(module, ExpertLinear) for module in model.modules()) == bool(experts)
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize(wanted[name].dtype), wanted[name]), name
    with torch.no_grad():
        found = model(ids).logits
    error = float((found - logits.float()).norm() / logits.float().norm())
    assert error <= OTHER_SCALES.get(case.name, TOLERANCE[logits.dtype]), error


def test_a_peers_checkpoint_exports_to_the_weights_that_the_peer_decodes(case: Path, tmp_path: Path) -> None:
    wanted = {name: weight for name, weight in load_file(case / "decoded.safetensors").items() if name not in ("ids", "logits")}
    reader = CheckpointReader(export_dense(case / "checkpoint", tmp_path / "dense"))
    for name, weight in wanted.items():
        found = reader.read(name)
        assert found.dtype == weight.dtype and torch.equal(found, weight), name
    untouched = CheckpointReader(case / "checkpoint")
    for name in set(untouched.names) & set(reader.names) - set(wanted):
        assert torch.equal(untouched.read(name), reader.read(name)), name
