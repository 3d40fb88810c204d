from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from aerogel.errors import BadInput
from aerogel.recipes.schema import Recipe, shipped
from aerogel.recipes.stages import ALSO_CALLED, methods

BASE: dict[str, Any] = {"aerogel": 1, "stages": [{"quantize": {"method": "rtn", "bits": 4, "group_size": 64}}]}


def with_stage(kind: str, **options: object) -> dict[str, Any]:
    return {"aerogel": 1, "stages": [{kind: options}]}


def test_defaults_are_complete_and_reproduce_the_recipe() -> None:
    recipe = Recipe.load(BASE)
    content = recipe.as_dict()
    assert json.loads(json.dumps(content)) == content
    assert Recipe.load(content).as_dict() == content
    assert list(content) == [
        "aerogel",
        "about",
        "model",
        "calibration",
        "stages",
        "pack",
        "evaluate",
        "bench",
        "gate",
    ]
    assert content["stages"][0]["quantize"]["targets"] == ["Linear"]
    assert content["stages"][0]["quantize"]["ignore"] == ["lm_head"]


def test_a_recipe_is_frozen() -> None:
    recipe = Recipe.load(BASE)
    with pytest.raises(Exception, match="frozen"):
        recipe.about = "other"  # type: ignore[misc]


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_recipes_load_and_say_what_they_are(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.about
    assert Recipe.load(recipe.as_dict()).as_dict() == recipe.as_dict()
    lines = shipped()[name].read_text("utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert lines[1].startswith("# measured:")


def test_recipes_without_data_need_none() -> None:
    assert not Recipe.load("w8").needs_data
    assert not Recipe.load("w4-fast").needs_data
    assert Recipe.load("w4").needs_data
    assert Recipe.load("w4-awq").needs_data


def test_every_method_can_be_written_with_its_defaults() -> None:
    for name in methods("quantize"):
        spec = Recipe.load(with_stage("quantize", method=name, bits=4)).stages[0]
        assert spec.stage.grid.bits == 4
    for kind in ("prune", "scale"):
        for name in methods(kind):
            extra = {"sparsity": 0.5} if kind == "prune" else {}
            assert Recipe.load(with_stage(kind, method=name, **extra)).stages[0].method_name == name


def test_auto_scales_take_the_type_of_the_checkpoint() -> None:
    spec = Recipe.load(BASE).stages[0]
    assert spec.at("bfloat16").stage.grid.scale_dtype is torch.bfloat16
    assert spec.at("bfloat16").options == spec.options
    fixed = Recipe.load(BASE, ["quantize.scale_dtype=float16"]).stages[0]
    assert fixed.at("bfloat16").stage.grid.scale_dtype is torch.float16


def test_fp8_has_the_keys_of_its_own_grid() -> None:
    spec = Recipe.load(with_stage("quantize", method="rtn", format="fp8", strategy="block", activations="fp8")).stages[0]
    assert spec.stage.grid.strategy == "block"
    assert spec.activations == "fp8"
    with pytest.raises(BadInput, match=r"group_size: unknown key of quantize \(rtn, fp8\)"):
        Recipe.load(with_stage("quantize", method="rtn", format="fp8", group_size=64))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "mxfp4"}, "format: mx`"),
        ({"format": "FP6"}, "format: float, kind: e2m3`"),
        ({"format": "nf4", "bits": 4}, "bits: .*nf4 are decided by the format itself; leave it out"),
        ({"format": "float", "bits": 4}, "bits: .*float are decided by its kind"),
    ],
)
def test_names_of_papers_and_bits_of_formats_that_have_their_own(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Recipe.load({"aerogel": 1, "stages": [{"quantize": {"method": "rtn", **options}}]})


def test_what_papers_call_a_format_is_said_in_words_that_are_understood() -> None:
    for said in ALSO_CALLED.values():
        stage = {"quantize": {"method": "rtn", **yaml.safe_load(f"{{{said}}}")}}
        assert Recipe.load({"aerogel": 1, "stages": [stage]})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "gptq", "format": "complex"}, "only rounded to: write method: rtn"),
        *(({"method": "rtn", "format": name, "outliers": "sigma"}, "at zero") for name in ("bipolar", "complex", "affine")),
        ({"method": "gptq", "format": "planes", "bits": 3, "columns": "largest"}, "bit planes cannot hold"),
        *(({"method": name, "format": "planes", "bits": 3, "clip": "fisher"}, "inputs only") for name in ("rtn", "gptq")),
        ({"method": "rtn", "format": "complex", "clip": "fisher"}, "write clip: mse"),
        *(
            ({"method": "rtn", "rounding": "stochastic", "format": name, **more}, "rounding: stochastic needs")
            for name, more in (("kmeans", {}), ("bitmod", {"bits": 3}), ("planes", {"bits": 2}), ("complex", {}))
        ),
    ],
)
def test_what_a_format_cannot_do_is_refused_before_the_run(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Recipe.load({"aerogel": 1, "stages": [{"quantize": options}]})


def test_a_file_keeps_its_lines_and_its_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("aerogel: 1\nstages:\n  - quantize:\n      method: rtn\n      bitz: 4\n")
    with pytest.raises(BadInput, match=r"^mine.yaml:5: stages.0.quantize.bitz: unknown key .*did you mean 'bits'\?"):
        Recipe.load(file)
    file.write_text("aerogel: 1\nstages:\n  - quantize: {method: rtn, bits: 4}\n")
    assert Recipe.load(str(file)).name == "mine"


def test_measurements_can_be_switched_off() -> None:
    recipe = Recipe.load({**BASE, "evaluate": None, "bench": None})
    assert recipe.evaluate is None
    assert recipe.bench is None


@pytest.mark.parametrize(("value", "expected"), [("3GB", 3_000_000_000), ("1.5 GiB", 1_610_612_736), (7, 7), ("512MiB", 2**29)])
def test_sizes(value: object, expected: int) -> None:
    assert Recipe.load({**BASE, "gate": {"max_memory": value}}).gate.max_memory == expected


def test_a_drop_may_be_given_per_task() -> None:
    content = {**BASE, "evaluate": {"tasks": ["piqa"]}, "gate": {"max_task_drop": {"piqa": 0.02}}}
    assert Recipe.load(content).gate.max_task_drop == {"piqa": 0.02}


def test_overrides_of_a_recipe_object() -> None:
    recipe = Recipe.load(Recipe.load("w4"), ["quantize.bits=3", "calibration.samples=16"])
    assert recipe.stages[0].stage.grid.bits == 3
    assert recipe.calibration.samples == 16
    assert recipe.name == "w4"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(["about", "calibration", "stages", "pack", "evaluate", "bench", "gate", "model", "aerogel"])


@given(st.dictionaries(keys, values, max_size=3))
def test_any_content_is_a_recipe_or_one_line_of_bad_input(content: dict[str, Any]) -> None:
    try:
        Recipe.load({**BASE, **content})
    except BadInput as error:
        assert str(error)
