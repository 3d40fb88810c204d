from __future__ import annotations

import pytest

from aerogel.errors import BadInput
from aerogel.recipes import files
from aerogel.recipes.overrides import apply

TEXT = "aerogel: 1\nstages:\n  - prune: {sparsity: 0.5}\n  - quantize: {bits: 4}\nbench: null\n"
TWO = "stages:\n  - quantize: {bits: 4}\n  - quantize: {bits: 3}\n"


def changed(text: str, *overrides: str) -> dict[str, files.Plain]:
    document = files.parse(text, "r.yaml")
    apply(document, overrides)
    return document.tree


@pytest.mark.parametrize("path", ["stages.1.quantize.bits", "quantize.bits"])
def test_full_and_short_paths(path: str) -> None:
    assert changed(TEXT, f"{path}=3")["stages"] == [{"prune": {"sparsity": 0.5}}, {"quantize": {"bits": 3}}]


def test_values_are_yaml() -> None:
    tree = changed(TEXT, "bench.batch=[1, 16]", "a=null", "b=1e-2", "c='4'", "d={e: true}")
    assert tree["bench"] == {"batch": [1, 16]}
    assert [tree[key] for key in "abcd"] == [None, 0.01, "4", {"e": True}]


def test_later_ones_win_and_values_may_hold_equal_signs() -> None:
    assert changed(TEXT, "about=x", "about=a=b")["about"] == "a=b"


def test_the_override_is_blamed_for_what_it_wrote() -> None:
    document = files.parse(TEXT, "r.yaml")
    apply(document, ["quantize.bits=9"])
    assert document.blame(("stages", 1, "quantize", "bits")) == "--set quantize.bits=9"
    assert document.blame(("stages", 0, "prune", "sparsity")) == "r.yaml:3"


@pytest.mark.parametrize(
    ("text", "override", "words"),
    [
        (TWO, "quantize.bits=3", ["2 stages", "stages.0.quantize.bits or stages.1.quantize.bits"]),
        (TEXT, "scale.method=awq", ["no scale stage"]),
        (TEXT, "quantize.bits", ["expected path.to.key=value"]),
        (TEXT, "=3", ["expected path.to.key=value"]),
        (TEXT, "quantize.bits=", ["no value", "null"]),
        (TEXT, "a..b=1", ["empty part"]),
        (TEXT, "stages.2.quantize.bits=3", ["a list of 2", "0 to 1", "'2'"]),
        (TEXT, "stages.-1.quantize.bits=3", ["'-1'"]),
        (TEXT, "stages.first.bits=3", ["'first'"]),
        (TEXT, "aerogel.x=1", ["aerogel is 1", "no key 'x'"]),
        (TEXT, "about=[", ["not valid YAML"]),
        (TEXT, "about=&a 1", ["anchors"]),
        (TEXT, "about=!!python/name:os.system x", ["tag"]),
    ],
)
def test_paths_that_lead_nowhere(text: str, override: str, words: list[str]) -> None:
    with pytest.raises(BadInput) as caught:
        changed(text, override)
    assert f"--set {override}" in str(caught.value)
    for word in words:
        assert word in str(caught.value)
