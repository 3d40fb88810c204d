"""What plans and reports say of a stage tells it from all others."""

from __future__ import annotations

from typing import Any

import pytest

from aerogel.quantize import GRIDS
from aerogel.recipes.schema import Recipe, shipped
from aerogel.recipes.words import words


def said(K: int | None = None, **options: Any) -> str:
    stage = {"quantize": {"method": "rtn", **options}}
    return words(Recipe.load({"aerogel": 1, "stages": [stage]}).stages[0], K)


def test_recipes_that_do_other_things_say_so() -> None:
    found: dict[str, Any] = {}
    for name in shipped():
        stages = Recipe.load(name).stages
        text = " -> ".join(map(words, stages))
        assert found.setdefault(text, [spec.as_dict() for spec in stages]) == [spec.as_dict() for spec in stages], name


def test_every_format_is_named() -> None:
    for name in GRIDS:
        bits = {"bits": 4} if name in ("int", "planes") else {}
        assert ("4 bits" if name == "int" else name) in said(format=name, **bits)


@pytest.mark.parametrize(
    ("options", "K", "wanted"),
    [
        ({"bits": 4, "group_size": 128}, 576, "rtn 4 bits, groups of 128, the last of 64"),
        ({"bits": 4, "group_size": 64}, 576, "rtn 4 bits, groups of 64"),
        ({"bits": 4, "group_size": 64}, None, "rtn 4 bits, groups of 64"),
        ({"bits": 4, "group_size": 1000}, 576, "rtn 4 bits, groups of 1000"),
        ({"bits": 3, "symmetric": False}, 576, "rtn 3 bits with zero points, per channel"),
        ({"format": "nvfp4", "scale_dtype": "ue5m3"}, 576, "rtn nvfp4, groups of 16, ue5m3 scales"),
        ({"format": "float", "kind": "e4m3", "group_size": 128, "block": True}, 576, "rtn float e4m3, per block"),
        ({"format": "ternary", "scales": "tensor", "group_size": None}, 576, "rtn ternary, one scale"),
        ({"bits": 4, "outliers": "sigma", "outlier_share": 0.005}, 8, "rtn 4 bits, per channel, outliers by sigma up to 0.5 %"),
        ({"bits": 4, "clip": "fisher"}, 8, "rtn 4 bits, per channel, fitted by gradients"),
        ({"bits": 8, "activations": "int8"}, 8, "rtn 8 bits, per channel, inputs int8"),
    ],
)
def test_the_words(options: dict[str, Any], K: int | None, wanted: str) -> None:
    assert said(K, **options) == wanted
