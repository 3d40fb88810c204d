"""Outliers and kept columns through a whole run: stored beside the codes, loaded, traced, exported; plan knows their bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import zoo
from tests.model.test_loading import REPOSITORY
from tests.model.tiny import IDS, error, ids_file, logits, recipe
from transformers import AutoModelForCausalLM

import aerogel
from aerogel.kernels.decode.loop import Decoder
from aerogel.kernels.decode.merge_beside import MergedBeside, PartBeside
from aerogel.kernels.experts import ExpertLinear
from aerogel.kernels.sidecars import SidecarLinear
from aerogel.model.compress import compress
from aerogel.model.plan import plan
from aerogel.pack.export import export_dense, export_layout
from aerogel.quantize.outliers import NAMES, Outliers
from aerogel.quantize.sidecars import SIDECARS


def stage(method: str = "gptq", **more: Any) -> dict[str, Any]:
    return {"quantize": {"method": method, "bits": 3, "group_size": 16, "outlier_share": 0.01, **more}}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_compressed_loaded_and_exported(kind: str, tmp_path: Path) -> None:
    dense = zoo.save(kind, tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), stage(outliers="sensitivity"))
    report = compress(dense, chosen, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert config["quantization_config"]["quant_method"] == "aerogel"
    planned = plan(dense, chosen)["size"]
    assert planned["bits_per_weight"] == pytest.approx(report["size"]["bits_per_weight"], rel=1e-9)
    model = aerogel.load(tmp_path / "out")
    kept = [module for module in model.modules() if isinstance(module, SidecarLinear)]
    assert len(kept) == sum(len(block["layers"]) for block in report["blocks"])
    exported = AutoModelForCausalLM.from_pretrained(export_dense(tmp_path / "out", tmp_path / "again"), dtype="auto")
    assert error(logits(model), logits(exported)) < 2e-5
    before, stored, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("dense", "out", "again"))
    for name in {name.rpartition(".")[0] for name in stored if name.endswith(NAMES[0])}:
        outliers = Outliers.read({local: stored[f"{name}.{local}"] for local in NAMES})
        assert outliers is not None
        wanted, found = (held[f"{name}.weight"] for held in (before, after))
        wanted, found = (w.T[outliers.places()] if kind == "gpt2" else w[outliers.places()] for w in (wanted, found))
        assert torch.equal(found, outliers.value_E.float())
        torch.testing.assert_close(found, wanted, rtol=2**-11, atol=0)


COLUMNS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "bits": 4, "group_size": 16, "columns": "largest", "column_share": 0.05},
    "int8": {"method": "rtn", "bits": 8, "activations": "int8", "columns": "largest", "column_share": 0.05},
    "dynamic": {"method": "rtn", "bits": 8, "activations": "int8", "columns": "dynamic", "column_threshold": 1.5},
    "both": {"method": "rtn", "bits": 4, "columns": "largest", "outliers": "sigma", "outlier_sigma": 2.0},
    "nvfp4": {"method": "rtn", "format": "nvfp4", "columns": "largest"},
    "rows": {"method": "gptq", "bits": 4, "group_size": 16, "gptaq": True, "rows": "loss", "row_share": 0.3},
    "rows of int8": {"method": "rtn", "bits": 4, "activations": "int8", "rows": "loss", "row_share": 0.5, "row_bits": 8},
    "rotation": {"method": "gptq", "bits": 4, "group_size": 16, "gptaq": True, "transform": "hadamard", "transform_block": 16},
    "rotation of int8": {"method": "rtn", "bits": 8, "activations": "int8", "transform": "hadamard", "transform_block": 16},
    "rows of nvfp4": {"method": "rtn", "format": "nvfp4", "rows": "loss", "row_share": 0.3, "row_bits": 7},
}


@pytest.mark.parametrize("options", COLUMNS.values(), ids=COLUMNS)
def test_columns_compressed_loaded_generated_and_exported(options: dict[str, Any], tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), {"quantize": options})
    report = compress(dense, chosen, tmp_path / "out")
    planned = plan(dense, chosen)["size"]
    # Of outliers by sigma plan knows the most, and of rows the sum but for what does not fill a row.
    if options.get("outliers") is None:
        near = 0.05 if "rows" in options else 1e-9
        assert planned["bits_per_weight"] == pytest.approx(report["size"]["bits_per_weight"], rel=near)
    model: Any = aerogel.load(tmp_path / "out")
    assert any(isinstance(module, SidecarLinear) for module in model.modules())
    exported = AutoModelForCausalLM.from_pretrained(export_dense(tmp_path / "out", tmp_path / "again"), dtype="auto")
    assert error(logits(model), logits(exported)) < (3e-2 if "activations" in options else 2e-5)
    model.generation_config.eos_token_id = None
    expected = model.generate(IDS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)[0, IDS.shape[1] :].tolist()
    assert [token for (token,) in Decoder(model, "fused").stream([IDS[0]], 8)] == expected


@pytest.mark.parametrize("name", ["gptq", "int8", "dynamic", "both", "rows", "rows of int8", "rotation"])
@pytest.mark.parametrize("layout", ["portable", "native-cpu"])
def test_merged_siblings_keep_them(name: str, layout: str, tmp_path: Path) -> None:
    if layout == "native-cpu" and "int8" in str(COLUMNS[name]):
        pytest.skip("native layouts hold weights whose inputs are not rounded")
    dense = zoo.save("llama", tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), {"quantize": {"group_size": 16, **COLUMNS[name]}}, pack={"layout": layout})
    compress(dense, chosen, tmp_path / "out")
    plain, merged = aerogel.load(tmp_path / "out"), aerogel.load(tmp_path / "out", merge=True)
    wholes = [module for module in merged.modules() if isinstance(module, MergedBeside)]
    assert len(wholes) == 4
    assert error(logits(merged), logits(plain)) < 1e-6
    before, after = plain.state_dict(), merged.state_dict()
    beside = {key for key in before if any(f".{name}." in key for name in SIDECARS)}
    assert beside == {key for key in after if any(f".{name}." in key for name in SIDECARS)}
    assert all(torch.equal(before[key], after[key]) for key in beside)
    parts = {name: module for name, module in merged.named_modules() if isinstance(module, PartBeside)}
    assert parts
    for path, part in parts.items():
        assert torch.equal(part.dequantize(torch.float32), plain.get_submodule(path).dequantize(torch.float32))
    again = wholes[0]
    held = {tensor.data_ptr() for tensor in again.buffers()}
    first = [part for part in parts.values() if part._whole[0] is again]
    assert any(tensor.data_ptr() in held for part in first for tensor in part.buffers())


@pytest.mark.parametrize("loop", ["fused", "plain"])
def test_traced_steps_add_them_too(loop: Any, tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    compress(dense, recipe(None, stage("rtn", outliers="sigma", outlier_sigma=2.0)), tmp_path / "out")
    model: Any = aerogel.load(tmp_path / "out")
    model.generation_config.eos_token_id = None
    expected = model.generate(IDS[:1], max_new_tokens=12, do_sample=False, pad_token_id=0)[0, IDS.shape[1] :].tolist()
    decoder = Decoder(model, loop)
    assert [token for (token,) in decoder.stream([IDS[0]], 12)] == expected
    assert decoder.way == loop


@pytest.mark.parametrize("options", [COLUMNS[name] for name in ("both", "rows", "gptq", "rotation")], ids=str)
def test_native_layouts_carry_them_there_and_back(options: dict[str, Any], tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    stages = {"quantize": {**options, "group_size": 16}}
    compress(dense, recipe(ids_file(tmp_path), stages), tmp_path / "portable")
    report = compress(dense, recipe(ids_file(tmp_path), stages, pack={"layout": "native-cpu"}), tmp_path / "native")
    planned = plan(dense, recipe(ids_file(tmp_path), stages, pack={"layout": "native-cpu"}))["size"]
    assert planned["bits_per_weight"] == pytest.approx(report["size"]["bits_per_weight"], rel=0.05)
    model = aerogel.load(tmp_path / "native")
    kept = [module for module in model.modules() if isinstance(module, SidecarLinear)]
    assert kept and all(module.layout == "native-cpu" and module.runs_as_stored for module in kept)
    assert torch.equal(logits(model), logits(aerogel.load(tmp_path / "portable")))
    export_layout(tmp_path / "native", tmp_path / "back", "portable")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("portable", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_with_rows_of_more_bits_stay_packed(kind: str, tmp_path: Path) -> None:
    dense = zoo.save(kind, tmp_path / "dense")
    chosen = recipe(
        ids_file(tmp_path), {"quantize": {"method": "rtn", "bits": 4, "group_size": 16, "rows": "loss", "row_share": 0.3}}
    )
    compress(dense, chosen, tmp_path / "out")
    model: Any = aerogel.load(tmp_path / "out")
    experts = [module for module in model.modules() if isinstance(module, ExpertLinear) and module.more is not None]
    assert experts and not [value for value in model.parameters() if value.ndim == 3]
    exported = AutoModelForCausalLM.from_pretrained(export_dense(tmp_path / "out", tmp_path / "again"), dtype="auto")
    assert error(logits(model), logits(exported)) < 2e-6
    for name, module in model.named_modules():
        if isinstance(module, ExpertLinear) and module.more is not None:
            dense_ENK = exported.get_parameter(name)
            found = module.dequantize(torch.float32)
            assert torch.equal(found, dense_ENK if found.shape == dense_ENK.shape else dense_ENK.transpose(1, 2))
    model.generation_config.eos_token_id = None
    expected = model.generate(IDS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)[0, IDS.shape[1] :].tolist()
    assert [token for (token,) in Decoder(model, "auto").stream([IDS[0]], 8)] == expected


FRESH = """
import hashlib, sys
from pathlib import Path
import torch, aerogel
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model, seen = aerogel.load(folder), hashlib.sha256()
    for name, module in sorted(model.named_modules()):
        if hasattr(module, "dequantize") and hasattr(module, "scheme"):
            seen.update(module.dequantize(torch.float32).numpy().tobytes())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        seen.update(model(ids).logits.numpy().tobytes())
    print(folder.name, seen.hexdigest())
"""
"""What all packed weights decode to, and the logits of a few tokens, of each checkpoint in a folder."""


def test_a_fresh_process_decodes_what_stands_beside_the_codes_to_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, made = zoo.save("llama", tmp_path / "dense"), tmp_path / "made"
    static = {"method": "rtn", "bits": 8, "group_size": None, "activations": "int8-static"}
    stages = {**COLUMNS, "outliers": stage(outliers="sensitivity")["quantize"], "static": static}
    for name, options in stages.items():
        compress(dense, recipe(ids_file(tmp_path), {"quantize": options}), made / name.replace(" ", "-"))
    compress(dense, recipe(None, pack={"entropy": True}), made / "entropy")
    monkeypatch.setattr(sys, "argv", ["-c", str(made)])
    exec(FRESH, {})
    here = capsys.readouterr().out
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", FRESH, made], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == here and len(here.splitlines()) == len(stages) + 1
