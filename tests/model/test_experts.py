"""Experts through loading: packed once each and never dense, run as the dense ones do; what is not understood says so."""

from __future__ import annotations

import inspect
import json
import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import zoo
from tests.model.test_loading import IDS, close, logits, make, reference
from tests.model.tiny import ids_file, recipe
from transformers import AutoModelForCausalLM, PreTrainedModel

from aerogel.kernels.decode.loop import Decoder
from aerogel.kernels.expert_linears import ExpertLinears
from aerogel.kernels.experts import ExpertLinear, PackedExperts
from aerogel.kernels.gemm.ref import round_input
from aerogel.model.compress import compress
from aerogel.model.experts import differs
from aerogel.model.inspect import inspect as inspect_checkpoint
from aerogel.model.loading import load
from aerogel.model.reader import CheckpointReader
from aerogel.model.structure import build_on_meta
from aerogel.pack.export import export_dense
from aerogel.pack.format import Format
from aerogel.quantize.grids import Codes, Fp8Grid, IntGrid

MOE = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe", "nemotron_h"]
"""Gated and not, with biases and shared experts, concatenated and interleaved, as lists of matrices and as stacks on disk."""
OTHERS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {**zoo.SMALL, **zoo.MOE, "shared_expert_intermediate_size": 16},
    "olmoe": {**zoo.SMALL, **zoo.MOE},
    "nemotron_h": {
        **zoo.SMALL,
        **zoo.HEADS,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "layers_block_type": ["attention", "moe"],
    },
}


@pytest.fixture(autouse=True)
def more_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in OTHERS.items():
        monkeypatch.setitem(zoo.ZOO, name, config)


def apart(model: PreTrainedModel) -> dict[str, ExpertLinears]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertLinears)}


def stacks(model: PreTrainedModel) -> dict[str, ExpertLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertLinear)}


@pytest.mark.parametrize("name", MOE)
def test_experts_stay_packed_and_run_as_the_dense_ones(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path, name)
    wanted = logits(reference(made))
    with monkeypatch.context() as patched:
        # Loading must not decode a weight.
        patched.setattr(Codes, "decode", lambda *_: pytest.fail("decoded a weight while loading"))
        patched.setattr(Format, "decode", lambda *_: pytest.fail("decoded a weight while loading"))
        model = load(made.packed)
    found = stacks(model)
    assert found and not [p for p, value in model.named_parameters() if value.ndim == 3]
    close(logits(model), wanted, 2e-5)
    reader = CheckpointReader(made.packed)
    for module in found.values():
        module.restore()
    held = sum(tensor.nbytes for module in found.values() for n, tensor in module._buffers.items() if tensor is not None)
    on_disk = sum(entry.nbytes for entry in reader if ".experts." in entry.name and "weight" in entry.name.rpartition(".")[2])
    # Gate and up of an expert are one weight here, so one of their two shapes is gone.
    assert held <= on_disk <= held + 16 * len(reader.names)
    close(logits(model), wanted, 2e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_unpacking_gives_the_dense_parameters(tmp_path: Path, name: str) -> None:
    made = make(tmp_path, name)
    model = load(made.packed)
    model.dequantize()
    dense = reference(made)
    for parameter, value in dense.named_parameters():
        if value.ndim == 3:
            assert torch.equal(model.get_parameter(parameter), value), parameter
    assert not any(isinstance(module, PackedExperts) for module in model.modules())


@pytest.mark.parametrize("grid", [IntGrid(bits=3, group_size=16, symmetric=False), IntGrid(bits=8)], ids=str)
def test_other_grids_and_types(tmp_path: Path, grid: IntGrid) -> None:
    made = make(tmp_path, "qwen3_moe", dtype=torch.bfloat16, grid_of=lambda m: grid)
    model = load(made.packed)
    assert len(stacks(model)) == 4
    close(logits(model), logits(reference(made).float()), 3e-2)


def test_some_experts_at_other_widths_are_linears_of_their_own(tmp_path: Path) -> None:
    made = make(
        tmp_path,
        "mixtral",
        grid_of=lambda m: IntGrid(bits=8 if m.block == 1 and m.expert == 2 else 4, group_size=16),
    )
    model = load(made.packed)
    assert all(name.startswith("model.layers.0.") for name in stacks(model)) and len(apart(model)) == 2
    assert not [p for p, value in model.named_parameters() if value.ndim == 3]
    close(logits(model), logits(reference(made)), 2e-5)
    facts = inspect_checkpoint(made.packed)["experts"]
    assert facts == {"packed": ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"], "dense": {}}
    tokens = {loop: list(Decoder(model, loop).stream([IDS[0]], 4)) for loop in ("auto", "plain")}  # type: ignore[arg-type]
    assert tokens["auto"] == tokens["plain"]
    index, share, module = torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2), model.get_submodule("model.layers.1.mlp.experts")
    x, compiled = torch.randn(2, module.down_proj.out_features), torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        wanted = module(x, index, share)
        assert torch.equal(compiled(x, index, share), wanted)
        twin = deepcopy(module)
        for tensor in (held for name, held in module.named_buffers() if "scale" in name):
            tensor.zero_()
        assert torch.equal(twin(x, index, share), wanted), "a copy reads the weights of the original"
    model = load(made.packed)
    model.dequantize()
    for parameter, value in reference(made).named_parameters():
        if value.ndim == 3:
            assert torch.equal(model.get_parameter(parameter), value), parameter


def test_experts_that_compute_otherwise_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    plain = inspect.unwrap(MixtralExperts.forward)
    made = make(tmp_path, "mixtral")
    module = build_on_meta(zoo.build("mixtral").config).get_submodule("model.layers.0.mlp.experts")
    assert differs(module) is None
    monkeypatch.setattr(MixtralExperts, "forward", lambda self, x, index, weight: 2 * plain(self, x, index, weight))
    assert "something else" in (differs(module) or "")
    model = load(made.packed)
    assert not stacks(model)
    close(logits(model), logits(reference(made)), 2e-5)
    monkeypatch.setattr(MixtralExperts, "forward", lambda self, x: x)
    assert "called otherwise" in (differs(module) or "")


def test_a_decode_step_of_packed_experts_is_traced(tmp_path: Path) -> None:
    made = make(tmp_path, "qwen3_moe")
    model = load(made.packed)
    tokens = {}
    for loop in ("auto", "plain"):
        decoder = Decoder(model, loop)  # type: ignore[arg-type]
        tokens[loop] = list(decoder.stream([IDS[0]], 6))
        assert decoder.facts()["loop"] == ("fused" if loop == "auto" else "plain"), decoder.facts()
    assert tokens["auto"] == tokens["plain"]


@pytest.mark.parametrize(
    ("grid", "activations"),
    [(IntGrid(bits=8), "int8"), (Fp8Grid(), "fp8"), (Fp8Grid(strategy="block"), "none"), (Fp8Grid(strategy="block"), "fp8")],
    ids=str,
)
def test_experts_whose_inputs_are_rounded_and_whose_scales_are_shared_stay_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: Any, activations: str
) -> None:
    """As the checkpoint asks, where kernels for linears do it."""
    monkeypatch.setitem(zoo.ZOO, "qwen3_moe", {**zoo.ZOO["qwen3_moe"], "moe_intermediate_size": 256})
    made = make(tmp_path, "qwen3_moe", dtype=torch.bfloat16, grid_of=lambda m: grid, activations=activations)
    model = load(made.packed)
    assert len(stacks(model)) == 4 and not [p for p, value in model.named_parameters() if value.ndim == 3]
    dense = reference(made)
    for name, module in stacks(model).items():
        assert torch.equal(module.dequantize(torch.bfloat16), dense.get_parameter(name)), name
        x, expert = torch.randn(3, module.in_features).bfloat16(), torch.tensor([0, 3, 1])
        rounded = round_input(x.float(), module.problem())
        assert torch.equal(rounded, x.float()) == (activations == "none")
        wanted = torch.einsum("nk,nok->no", rounded, module.dequantize(torch.float32)[expert])
        routes = module.routes(expert)
        close(module(module.spread(x, routes), expert, routes).float(), wanted, 1e-2)


def test_blocks_that_two_matrices_would_share_stay_apart(tmp_path: Path) -> None:
    made = make(tmp_path, "qwen3_moe", grid_of=lambda m: Fp8Grid(strategy="block"))  # of 16 rows each
    model = load(made.packed)
    assert len(apart(model)) == 2 and all(name.endswith("gate_up_proj") for name in apart(model))
    close(logits(model), logits(reference(made)), 2e-5)


OPTIONS: dict[str, dict[str, Any]] = {
    "outliers": {"method": "rtn", "bits": 4, "group_size": 16, "outliers": "sigma", "outlier_sigma": 2.0},
    "columns": {"method": "rtn", "bits": 4, "group_size": 16, "columns": "largest", "column_share": 0.05},
    "columns beside rounded inputs": {"method": "rtn", "bits": 8, "activations": "int8", "columns": "largest"},
    "static inputs": {"method": "rtn", "bits": 8, "activations": "int8-static"},
    "planes": {"method": "nested", "format": "planes", "bits": 4, "group_size": 16},
    "codebooks": {"method": "rtn", "format": "kmeans", "bits": 3},
}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_experts_of_every_kind_run_packed(options: dict[str, Any], kind: str, tmp_path: Path, caplog: Any) -> None:
    """What is kept beside the codes of experts, how their inputs are rounded, and numbers that have no grouped kernel: nothing
    is decoded, and nothing is lost."""
    compress(zoo.save(kind, tmp_path / "dense"), recipe(ids_file(tmp_path), {"quantize": options}), tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path / "out")
    assert "decoded" not in caplog.text and not [p for p, value in model.named_parameters() if value.ndim == 3]
    whole = apart(model) or stacks(model)
    assert whole and all("reference" not in str(module.kernel_name) for module in whole.values())
    exported = AutoModelForCausalLM.from_pretrained(export_dense(tmp_path / "out", tmp_path / "again"), dtype="auto")
    rounded = options.get("activations") is not None
    # Rounded inputs change few numbers by much in a random model, whose router turns on small differences.
    close(logits(model), logits(exported), 0.25 if rounded else 2e-5)
    if rounded:
        assert not torch.allclose(logits(model), logits(exported), rtol=1e-5, atol=1e-5), "inputs are not rounded"


@pytest.mark.parametrize("name", MOE)
def test_servers_are_told_of_every_matrix_that_stays_dense(name: str, tmp_path: Path) -> None:
    """A router is no linear in transformers and one in vLLM, where a target that names the class claims it: vLLM 0.26 stops
    at `mlp.gate.weight` of a Qwen3 in int4 and, where the compressed weight has that name too, reads bfloat16 as codes."""
    dense = zoo.save(name, tmp_path / "dense")
    compress(dense, recipe(None, {"quantize": {"method": "rtn", "bits": 8, "group_size": None}}), tmp_path / "out")
    kept = {
        entry.name.removesuffix(".weight")
        for entry in CheckpointReader(tmp_path / "out")
        if len(entry.shape) == 2 and entry.name.endswith(".weight") and entry.dtype.is_floating_point
    }
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert all("embed" in name for name in kept - set(ignored))
    assert any(name.endswith((".gate", ".router")) for name in ignored)
