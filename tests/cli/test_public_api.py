"""What other people's programs may rely on. A change here is a change of the contract."""

from __future__ import annotations

import inspect

import aerogel


def test_five_functions_and_nothing_else() -> None:
    assert sorted(aerogel.__all__) == ["benchmark", "compress", "evaluate", "load", "plan"]


def test_their_parameters() -> None:
    parameters = {name: list(inspect.signature(getattr(aerogel, name)).parameters) for name in aerogel.__all__}
    assert parameters["compress"][:3] == ["model", "recipe", "out"]
    assert parameters["plan"] == ["model", "recipe"]
    assert parameters["load"][0] == "path"
    assert parameters["evaluate"][:2] == parameters["benchmark"][:2]


def test_the_recipe_is_frozen_in_shape() -> None:
    from aerogel.recipes.schema import Recipe

    assert list(Recipe.model_fields) == [
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
