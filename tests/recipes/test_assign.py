from __future__ import annotations

from typing import Any

import pytest

from aerogel.errors import BadInput
from aerogel.recipes.assign import assign, matches
from aerogel.recipes.schema import Recipe

MODULES = [
    ("model.embed_tokens", "Embedding"),
    ("model.layers.0.attn.q_proj", "Linear"),
    ("model.layers.0.mlp.down_proj", "Linear"),
    ("model.layers.0.mlp.experts.0.up", "Expert"),
    ("h.0.c_attn", "Conv1D"),
    ("lm_head", "Linear"),
]


def planned(*stages: dict[str, Any], modules: list[tuple[str, str]] = MODULES) -> dict[str, list[str]]:
    recipe = Recipe.load({"aerogel": 1, "stages": list(stages)})
    found = assign(recipe.stages, modules)
    return {name: [f"{spec.kind}:{spec.options.get('bits', '')}" for spec in specs] for name, specs in found.items()}


def quantize(**options: object) -> dict[str, Any]:
    return {"quantize": {"method": "rtn", "bits": 4, **options}}


def prune(**options: object) -> dict[str, Any]:
    return {"prune": {"method": "magnitude", "sparsity": 0.5, **options}}


def test_linear_covers_every_linear_map_but_the_head() -> None:
    treated = [name for name, specs in planned(quantize()).items() if specs]
    assert treated == [name for name, kind in MODULES if kind != "Embedding" and name != "lm_head"]


def test_stages_come_in_order_and_mix_bits() -> None:
    plan = planned(
        prune(targets=["re:.*mlp.*"]), quantize(ignore=["lm_head", "re:.*q_proj"]), quantize(targets=["re:.*q_proj"], bits=8)
    )
    assert plan["model.layers.0.mlp.down_proj"] == ["prune:", "quantize:4"]
    assert plan["model.layers.0.attn.q_proj"] == ["quantize:8"]


def test_a_regular_expression_matches_at_the_start() -> None:
    assert matches("re:model", "model.layers.0", "Linear")
    assert not matches("re:layers", "model.layers.0", "Linear")
    assert matches("lm_head", "lm_head", "Linear")
    assert not matches("lm", "lm_head", "Linear")
    assert matches("Expert", "x", "Expert")
    assert not matches("Expert", "x", "Linear")


@pytest.mark.parametrize("options", [{"format": "bipolar"}, {"transform": "hadamard"}])
def test_pruning_before_numbers_without_zero_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"stages.0.prune sets weights to zero, and .* cannot hold"):
        planned(prune(), quantize(**options))
    planned(prune(targets=["re:.*q_proj"]), quantize(**options, ignore=["lm_head", "re:.*q_proj"]))


def test_the_default_ignore_pattern_may_match_nothing() -> None:
    assert planned(quantize(), modules=MODULES[:2])["model.layers.0.attn.q_proj"] == ["quantize:4"]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([quantize(targets=["model.layers.0.mlp.down_prj"])], ["stages.0.quantize.targets", "down_proj'?"]),
        ([quantize(targets=["down_proj"])], ["'down_proj' matches nothing", "'re:.*down_proj'"]),
        ([quantize(targets=["re:.*nothing"])], ["re:.*nothing", "matches nothing", "names look like"]),
        ([quantize(ignore=["lm_head", "Conv2D"])], ["stages.0.quantize.ignore", "'Conv2D'", "Conv1D"]),
        ([quantize(), quantize(targets=["lm_head", "Linear"])], ["claimed by", "stages.0", "stages.1"]),
        ([quantize(), prune()], ["stages.1.prune comes after stages.0.quantize"]),
        ([quantize(targets=["lm_head"])], ["leaves nothing"]),
        ([{"scale": {"method": "awq"}}], ["no quantize stage treats"]),
    ],
)
def test_patterns_that_cannot_be_meant(stages: list[dict[str, Any]], words: list[str]) -> None:
    with pytest.raises(BadInput) as caught:
        planned(*stages)
    for word in words:
        assert word in str(caught.value)
