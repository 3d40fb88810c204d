from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from aerogel.errors import BadInput
from aerogel.eval import gate
from aerogel.eval.junit import junit, write_junit
from aerogel.eval.run import measured
from aerogel.eval.settings import BenchSettings, QualitySettings

HOLDS = {
    "max_kl": 0.05,
    "max_perplexity_increase": 0.02,
    "min_top1": 0.85,
    "min_compression": 3.0,
    "min_decode_speedup": 1.0,
    "max_memory": "2kB",
    "max_task_drop": 0.05,
}
FAILS = {
    "max_kl": 0.03,
    "max_perplexity_increase": 0.001,
    "min_top1": 0.95,
    "min_compression": 5.0,
    "min_decode_speedup": 1.5,  # batch 1 reaches 2, batch 4 only 1: the gate holds for both or not at all
    "max_memory": 1000,
    "max_task_drop": 0.01,
}
MEASURED = {"max_kl": 0.04, "max_perplexity_increase": 0.01, "min_top1": 0.9, "min_compression": 4.0} | {
    "min_decode_speedup": 1.0,
    "max_memory": 1200,
    "max_task_drop[piqa]": 0.04,
}


@pytest.mark.parametrize(("gates", "holds"), [(HOLDS, True), (FAILS, False)], ids=["pass", "fail"])
def test_every_gate(report: dict[str, Any], gates: dict[str, object], holds: bool) -> None:
    rows = gate.judge(gates, report)
    assert {row["name"]: row["measured"] for row in rows} == MEASURED
    assert [row["passed"] for row in rows] == [holds] * len(gates)
    assert gate.passed(rows) is holds


def test_a_limit_that_is_met_exactly_holds(report: dict[str, Any]) -> None:
    assert gate.passed(gate.judge({"max_kl": 0.04, "min_top1": 0.9}, report))


def test_no_gates_pass(report: dict[str, Any]) -> None:
    assert gate.judge({"max_kl": None}, report) == []
    assert gate.passed([])


@pytest.mark.parametrize(
    ("name", "enable"),
    [
        ("max_kl", "evaluate.divergence"),
        ("min_top1", "evaluate.divergence"),
        ("max_perplexity_increase", "evaluate.perplexity"),
        ("min_decode_speedup", "bench"),
        ("max_memory", "bench"),
        ("min_compression", "compress"),
        ("max_task_drop", "evaluate.tasks"),
    ],
)
def test_a_gate_without_its_measurement_says_what_to_enable(name: str, enable: str) -> None:
    with pytest.raises(BadInput, match=enable):
        gate.judge({name: 1.0}, {"aerogel": "1"})
    with pytest.raises(BadInput, match=enable):
        gate.check({name: 1.0}, set())


def test_what_settings_measure_is_known_before_the_run() -> None:
    found = measured(QualitySettings(divergence=False, tasks=("piqa",)), None)
    gate.check({"max_perplexity_increase": 0.1, "max_task_drop": 0.1, "max_memory": 5, "min_compression": 2}, found)
    with pytest.raises(BadInput, match="max_kl"):
        gate.check({"max_kl": 0.1}, found)
    gate.check({"min_decode_speedup": 1.1}, measured(None, BenchSettings()))


def test_an_unknown_gate_is_named() -> None:
    with pytest.raises(BadInput, match=r"max_kk.*max_kl"):
        gate.judge({"max_kk": 1}, {})


def test_what_is_not_a_number_fails(report: dict[str, Any]) -> None:
    broken = copy.deepcopy(report)
    broken["evaluation"]["divergence"]["kl"] = math.nan
    assert not gate.passed(gate.judge({"max_kl": 1.0}, broken))


def test_task_drops_by_task(report: dict[str, Any]) -> None:
    assert gate.judge({"max_task_drop": {"piqa": 0.05}}, report)[0]["name"] == "max_task_drop[piqa]"
    with pytest.raises(BadInput, match=r"add boolq to evaluate\.tasks"):
        gate.judge({"max_task_drop": {"boolq": 0.05}}, report)


@pytest.mark.parametrize(("text", "size"), [("3GB", 3 * 10**9), ("1.5 KiB", 1536), ("7", 7), (12, 12), ("2 tb", 2 * 10**12)])
def test_sizes(text: object, size: int) -> None:
    assert gate.size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "3 XB", "-1", None, True])
def test_sizes_that_are_none(text: object) -> None:
    with pytest.raises(BadInput, match="512MiB"):
        gate.size_in_bytes(text)


def test_compression_falls_back_to_the_disk(report: dict[str, Any]) -> None:
    del report["size"]
    assert gate.compression_of(report) == 4.0


def test_junit_names_each_gate_and_its_failure(report: dict[str, Any], tmp_path: Path) -> None:
    rows = gate.judge({"max_kl": 0.05, "min_top1": 0.95}, report)
    write_junit(tmp_path / "out" / "junit.xml", rows, suite='<odd> & "name"\x00', seconds=1.5)
    root = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()
    suite = root.find("testsuite")
    assert suite is not None
    assert (root.tag, suite.get("tests"), suite.get("failures"), suite.get("time")) == ("testsuites", "2", "1", "1.500")
    assert suite.get("name") == '<odd> & "name"\N{REPLACEMENT CHARACTER}'
    cases = {case.get("name"): case for case in suite}
    assert cases["max_kl"].find("failure") is None
    failure = cases["min_top1"].find("failure")
    assert failure is not None
    assert failure.get("message") == "min_top1: measured 0.9, limit 0.95"


def test_junit_without_gates_is_an_empty_suite() -> None:
    assert ElementTree.fromstring(junit([])).get("tests") == "0"
