"""Rounded activations are asked for, are named in every result, and come with what they cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aerogel.kernels.native import library

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))


def test_they_run_only_where_they_are_asked_for_and_say_what_they_cost(aerogel, recipe: Path, tiny: Path) -> None:
    assert aerogel("compress", tiny, "-r", recipe, "-o", "out").code == 0
    exact, rounded = (
        json.loads(aerogel("eval", "out", "--against", tiny, "--json", "-", *more).stdout)["evaluation"]
        for more in ((), ("--activations", "int8"))
    )
    assert exact["activations"] == "stored" and "rounding" not in exact["perplexity"]
    assert rounded["activations"] == "int8"
    without, cost = rounded["perplexity"]["rounding"]["exact"], rounded["perplexity"]["rounding"]["increase"]
    assert without["loss_by_window"] == exact["perplexity"]["compressed"]["loss_by_window"]
    found = rounded["perplexity"]["compressed"]["perplexity"]
    assert found != without["perplexity"] and cost == pytest.approx(found / without["perplexity"] - 1)
    assert rounded["perplexity"]["dense"] == exact["perplexity"]["dense"], "the dense model stays what it is"

    for command in (("bench", "out", "--speed-only"), ("generate", "out", "w1", "-n", 3)):
        for more, kernel in (((), "cpu"), (("--activations", "int8"), "cpu-int8")):
            report = json.loads(aerogel(*command, "--json", "-", *more).stdout)
            ran = report["ran"] if "ran" in report else report["bench"]["rows"][0]["model"]["ran"]
            assert set(ran["kernels"]) == {kernel} and ran.get("rounding", 0) == (ran["kernels"].get("cpu-int8", 0))
            assert (report.get("bench") or report)["activations"] == ("int8" if more else "stored")
    assert "round their inputs" in aerogel("generate", "out", "w1", "-n", 3, "--activations", "int8").stderr


def test_where_nothing_rounds_it_is_an_error(aerogel, tiny: Path) -> None:
    found = aerogel("generate", tiny, "w1", "-n", 2, "--activations", "int8")
    assert found.code == 2 and "no packed linears" in found.stderr
    assert aerogel("generate", tiny, "w1", "-n", 2, "--activations", "int4").code == 2
    assert aerogel("bench", tiny, "--activations", "int4").code == 2
