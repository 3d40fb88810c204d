"""Entropy coded checkpoints: every tensor comes back bit for bit, in a model, in a folder, and through a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import zoo

import aerogel
from aerogel.errors import BadInput
from aerogel.model import entropy
from aerogel.pack import export

KINDS = ["llama", "gpt2", "mixtral"]


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of tests are small."""
    monkeypatch.setattr(entropy, "LEAST_BYTES", 512)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a if a[n].numel()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_checkpoint_runs_coded_and_comes_back(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    dense = zoo.save(kind, tmp_path / "dense", dtype=dtype)
    _, savings = export.export_coded(dense, tmp_path / "coded")
    if dtype == torch.bfloat16:
        assert savings
        assert all(saving.after < 0.8 * saving.before for saving in savings if saving.before > 1 << 14)
    ids = torch.arange(12)[None]
    wanted, found = (aerogel.load(folder)(ids).logits for folder in (dense, tmp_path / "coded"))
    assert torch.equal(wanted, found)
    export.export_plain(tmp_path / "coded", tmp_path / "plain")
    assert same(weights_of(dense), weights_of(tmp_path / "plain"))
    assert json.loads((dense / "config.json").read_text()) == json.loads((tmp_path / "plain/config.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_through_a_recipe_with_and_without_other_stages(tmp_path: Path, kind: str) -> None:
    dense = zoo.save(kind, tmp_path / "dense", dtype=torch.bfloat16)
    four = {"aerogel": 1, "stages": [{"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}]}
    plain = aerogel.compress(dense, four, tmp_path / "four-plain")
    for name, stages, other, size in (
        ("lossless", [], dense, plain["size"]["source_bytes"]),
        ("four", four["stages"], tmp_path / "four-plain", plain["size"]["bytes"]),
    ):
        report = aerogel.compress(dense, {"aerogel": 1, "stages": stages, "pack": {"entropy": True}}, tmp_path / name)
        saved = sum(row["bytes"] - row["coded_bytes"] for row in report["entropy"])
        assert saved > 0
        assert size - report["size"]["bytes"] == saved
        assert sum(row["bytes"] for row in report["tensors"]) == report["size"]["bytes"]
        ids = torch.arange(12)[None]
        assert torch.equal(aerogel.load(tmp_path / name)(ids).logits, aerogel.load(other)(ids).logits)
        export.export_plain(tmp_path / name, tmp_path / f"{name}-back")
        assert same(weights_of(other), weights_of(tmp_path / f"{name}-back"))


def test_dense_export_decodes_both_codings(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense", dtype=torch.bfloat16)
    export.export_coded(dense, tmp_path / "coded")
    export.export_dense(tmp_path / "coded", tmp_path / "again")
    assert same(weights_of(dense), weights_of(tmp_path / "again"))


@pytest.mark.parametrize("dtype", entropy.DTYPES)
def test_every_dtype_and_every_bit_pattern(dtype: torch.dtype) -> None:
    """Skewed bytes of each type, and for bfloat16 all 65536 patterns: NaNs with any payload, infinities, both zeros."""
    raw = torch.empty(1 << 15).geometric_(0.4, generator=torch.Generator().manual_seed(0)).clamp(max=255).to(torch.uint8)
    cases = [raw.view(dtype).reshape(64, -1)]
    if dtype == torch.bfloat16:
        patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
        cases.append(torch.cat([patterns, torch.zeros(1 << 16, dtype=dtype)]).reshape(256, -1))
    for tensor in cases:
        parts, saving = entropy.coded_tensors("x.weight", tensor)
        assert saving is not None
        held = {name.removeprefix("x.weight" + entropy.MARK): part for name, part in parts.items()}
        back = entropy.decoded_tensor(held, "x.weight")
        assert back.dtype == dtype
        assert torch.equal(back.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))


def test_noise_stays_as_it_is() -> None:
    noise = torch.randint(0, 256, (64, 1024), dtype=torch.uint8)
    parts, saving = entropy.coded_tensors("x.weight", noise)
    assert saving is None
    assert parts == {"x.weight": noise}


def test_what_cannot_be_coded_or_undone_says_so(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense", dtype=torch.bfloat16)
    with pytest.raises(BadInput, match="not entropy coded"):
        export.export_plain(dense, tmp_path / "plain")
    export.export_coded(dense, tmp_path / "coded")
    with pytest.raises(BadInput, match="already"):
        export.export_coded(tmp_path / "coded", tmp_path / "twice")
    with pytest.raises(BadInput, match="gptq"):
        entropy.coding_config({"quant_method": "gptq"})
    with pytest.raises(BadInput, match="at least one stage"):
        aerogel.compress(dense, {"aerogel": 1, "stages": []}, tmp_path / "nothing")
    file = tmp_path / "coded/model.safetensors"
    held = load_file(file)
    lost = next(name for name in held if name.endswith("_coded_runs"))
    save_file({name: tensor for name, tensor in held.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="_coded_runs is missing"):
        export.export_plain(tmp_path / "coded", tmp_path / "broken")
