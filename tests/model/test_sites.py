"""Sites are found by experiment, folding leaves the block as it was, and scaling pays where some channels are loud."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import zoo
from tests.model.tiny import ids_file, recipe

from aerogel.errors import BadInput
from aerogel.eval.table import tables
from aerogel.model.compress import compress
from aerogel.model.reader import CheckpointReader
from aerogel.model.runner import Activations, Runner
from aerogel.model.sites import Found, apply_scales, sites_of
from aerogel.model.sources import Sources
from aerogel.model.structure import discover
from aerogel.recipes.assign import assign

ROWS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(3))
COARSE = {"method": "rtn", "bits": 3, "group_size": 16}


def sites(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Found]:
    """The sites of block 0 by producer, names without the block's prefix."""
    dense = zoo.save(name, folder / "dense", dtype=dtype)
    structure = discover(dense)
    reader = CheckpointReader(dense)
    runner = Runner(structure, reader.read, dtype, torch.device("cpu"))
    hidden = Activations()
    runner.prologue([ROWS], hidden)
    prefix = structure.block_names[0] + "."
    return {site.module.removeprefix(prefix): site for site in sites_of(runner, 0, hidden[0], reader.read)}


def consumers(site: Found) -> set[str]:
    return {name.split(".", 3)[3].removesuffix(".weight") for name in site.consumers}


QKV = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama(tmp_path: Path, dtype: torch.dtype) -> None:
    found = sites("llama", tmp_path, dtype)
    assert {name: consumers(site) for name, site in found.items()} == {
        "input_layernorm": QKV,
        "self_attn.v_proj": {"self_attn.o_proj"},
        "post_attention_layernorm": {"mlp.gate_proj", "mlp.up_proj"},
        "mlp.up_proj": {"mlp.down_proj"},
    }
    assert not any(site.offset for site in found.values())
    tie = found["self_attn.v_proj"].tie_K
    # Four query heads of width 8 read two value heads: heads 0 and 1 the first, 2 and 3 the second.
    assert tie is not None
    assert tie.tolist() == [8 * (head // 2) + i for head in range(4) for i in range(8)]
    assert all(site.tie_K is None for name, site in found.items() if name != "self_attn.v_proj")


def test_gemma2_has_norms_with_an_offset(tmp_path: Path) -> None:
    found = sites("gemma2", tmp_path)
    assert {name: consumers(site) for name, site in found.items()} == {
        "input_layernorm": QKV,
        "self_attn.v_proj": {"self_attn.o_proj"},
        "pre_feedforward_layernorm": {"mlp.gate_proj", "mlp.up_proj"},
        "mlp.up_proj": {"mlp.down_proj"},
    }
    assert {name for name, site in found.items() if site.offset} == {"input_layernorm", "pre_feedforward_layernorm"}


def test_opt_has_relu_between(tmp_path: Path) -> None:
    found = sites("opt", tmp_path)
    # ReLU lets positive factors through, so fc1 can take up the scale of fc2.
    assert {name: {c.split(".", 4)[4].removesuffix(".weight") for c in site.consumers} for name, site in found.items()} == {
        "self_attn_layer_norm": QKV,
        "self_attn.v_proj": {"self_attn.out_proj"},
        "final_layer_norm": {"fc1"},
        "fc1": {"fc2"},
    }
    assert all(site.tie_K is None for site in found.values())


def test_gpt2_has_only_its_norms(tmp_path: Path) -> None:
    found = sites("gpt2", tmp_path)
    assert {name: {c.split(".", 3)[3] for c in site.consumers} for name, site in found.items()} == {
        "ln_1": {"attn.c_attn.weight"},
        "ln_2": {"mlp.c_fc.weight"},
    }


def test_a_router_that_reads_a_norm_is_a_consumer_or_the_norm_is_no_site(tmp_path: Path) -> None:
    found = sites("mixtral", tmp_path)
    assert consumers(found["input_layernorm"]) == QKV
    site = found.get("post_attention_layernorm")
    if site is not None:
        assert any("gate" in name and "experts" not in name for name in site.consumers)


# ---- folding ----------------------------------------------------------------------------------------------------------


def loud(name: str, folder: Path, *, quiet_weights: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model in which a few channels of every norm are loud; with `quiet_weights` what reads them makes up for it,
    so that the model computes what it did before."""
    model = zoo.build(name)
    readers = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1")
    with torch.no_grad():
        for path, module in model.named_modules():
            kind = type(module).__name__.lower()
            if "norm" in kind and "layers" in path and module.weight.numel() == 32:
                shift = 1.0 if "gemma" in kind else 0.0
                module.weight[::11] = (module.weight[::11] + shift) * 12 - shift
                if getattr(module, "bias", None) is not None:
                    module.bias[::11] *= 12
            if quiet_weights and path.endswith(readers):
                module.weight[:, ::11] /= 12
    model.to(dtype).save_pretrained(folder)
    return folder


def ignored(name: str) -> list[str]:
    return ["lm_head", "re:.*project_"] if name == "opt" else ["lm_head"]


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "qwen3", "falcon", "gpt2", "phi3", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_leaves_the_block_as_it_was(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    dense = loud(name, tmp_path / "dense", dtype=dtype)
    structure = discover(dense)
    sources = Sources(CheckpointReader(dense), torch.device("cpu"))
    runner = Runner(structure, sources.fetch, torch.float32, torch.device("cpu"))
    hidden = Activations()
    runner.prologue([ROWS], hidden)
    block = runner.load_block(0)
    before = runner.run(0, block, hidden[0])
    weights = {n: p.clone() for n, p in block.named_parameters()}
    chosen = recipe(
        None,
        {"scale": {"method": "awq", "steps": 6, "ignore": ignored(name)}},
        {"quantize": {**COARSE, "ignore": ignored(name)}},
    )
    stages = assign(chosen.stages, [(m.name, m.kind) for m in structure.matrices])
    matrices = [m for m in structure.matrices if m.block == 0]
    rows = apply_scales(structure, runner, 0, block, matrices, stages, sources, hidden, 1)
    assert any(row.get("ratio") for row in rows), "nothing was scaled, so nothing was tested"
    changed = {n for n, p in runner.load_block(0).named_parameters() if not torch.equal(p, weights[n])}
    assert any("norm" in n or n.startswith("ln") for n in changed)
    after = runner.run(0, block, hidden[0])
    # What rounding to bfloat16 does to a scaled norm weight is made up for in its readers; a bias cannot be.
    biased = dtype == torch.bfloat16 and name in ("opt", "falcon", "gpt2")
    assert (after - before).norm() / before.norm() < (1e-3 if biased else 1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_scaling_before_rounding_pays_where_channels_are_loud(tmp_path: Path, name: str) -> None:
    dense = loud(name, tmp_path / "dense", quiet_weights=True)
    rounding = {"quantize": {**COARSE, "weighted": True, "ignore": ignored(name)}}
    source = ids_file(tmp_path)
    plain = compress(dense, recipe(source, rounding), tmp_path / "plain")
    scaled = compress(
        dense, recipe(source, {"scale": {"method": "awq", "steps": 8, "ignore": ignored(name)}}, rounding), tmp_path / "scaled"
    )

    def total(report: dict[str, Any]) -> float:
        return float(sum(block["relative_error"] for block in report["blocks"][:-1]))

    assert total(scaled) < 0.8 * total(plain)


def test_a_block_without_sites_is_an_error(tmp_path: Path) -> None:
    dense = zoo.save("gpt2", tmp_path / "dense")
    only = ["re:.*mlp.c_proj"]
    stages = [{"scale": {"method": "awq", "targets": only}}, {"quantize": {**COARSE, "targets": only}}]
    with pytest.raises(BadInput, match=r"no producer .* can take up the scales"):
        compress(dense, recipe(ids_file(tmp_path), *stages), tmp_path / "out")


def test_linears_that_no_site_reaches_say_so(tmp_path: Path) -> None:
    """GELU lets no factor through, and the values are a part of a fused matrix: GPT-2's two c_proj cannot be scaled."""
    dense = zoo.save("gpt2", tmp_path / "dense")
    stages = [{"scale": {"method": "awq"}}, {"quantize": {**COARSE}}]
    report = compress(dense, recipe(ids_file(tmp_path), *stages), tmp_path / "out")
    notes = {row["name"]: row["notes"].get("scale") for block in report["blocks"] for row in block["layers"]}
    left = {name for name, note in notes.items() if note}
    assert left == {name for name in notes if name.endswith("c_proj")} != set()
    assert all("can take up the scales" in str(notes[name]) for name in left)
    (size,) = [table for table in tables(report) if table.title == "Size"]
    assert f"{len(left)} of {len(notes)} linears were not scaled" in size.note


def test_rows_of_layers_count_their_tokens(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    source = ids_file(tmp_path)
    seen = compress(
        dense, recipe(source, {"scale": {"method": "awq"}}, {"quantize": {**COARSE, "weighted": True}}), tmp_path / "a"
    )
    blind = compress(dense, recipe(None, {"quantize": COARSE}), tmp_path / "b")
    tokens = {row["tokens"] for block in seen["blocks"] for row in block["layers"]}
    assert tokens == {seen["calibration"]["tokens"]}
    assert {row["tokens"] for block in blind["blocks"] for row in block["layers"]} == {0}


def test_the_head_takes_no_scale(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    stages = [{"scale": {"method": "awq", "ignore": []}}, {"quantize": {**COARSE, "ignore": []}}]
    with pytest.raises(BadInput, match="lm_head lies outside the blocks, where no scale can be folded"):
        compress(dense, recipe(ids_file(tmp_path), *stages), tmp_path / "out")
