from __future__ import annotations

import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from aerogel.errors import BadInput
from aerogel.eval import card, table
from aerogel.eval import report as reports
from aerogel.eval.html import html, write_html

HOSTILE = '</script><script>alert("1")</script><img src=x onerror=alert(1)>'


def test_a_report_survives_writing_and_reading(report: dict[str, Any], tmp_path: Path) -> None:
    reports.write_report(tmp_path / "new" / "report.json", report)
    assert reports.read_report(tmp_path / "new" / "report.json") == report
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.json"]


def test_what_is_not_finite_becomes_null_and_the_rest_text() -> None:
    found = json.loads(reports.to_json({"a": math.inf, "b": (1, math.nan), "c": Path("x"), 4: True}))
    assert found == {"a": None, "b": [1, None], "c": "x", "4": True}


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.json"
    reports.write_report(target, {"aerogel": "old"})

    def crash(source: object, destination: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="no space"):
        reports.write_report(target, {"aerogel": "new"})
    assert reports.read_report(target)["aerogel"] == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"other": 1}', "\x00"])
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=r"report\.json"):
        reports.read_report(tmp_path / "report.json")


def test_a_missing_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--json"):
        reports.read_report(tmp_path / "none.json")


class Page(HTMLParser):
    """Collects the tags of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_has_all_plots_and_needs_nothing_else(report: dict[str, Any], tmp_path: Path) -> None:
    report["gate"] = [{"name": "max_kl", "limit": 0.1, "measured": 0.04, "passed": True}]
    write_html(tmp_path / "report.html", report)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    labels = {attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg"}
    assert len(labels) == 4
    assert not {"script", "link", "img", "iframe", "image"} & set(names)
    for _, attributes in page.tags:
        for key in ("src", "href", "xlink:href"):
            assert (attributes.get(key) or "#").startswith("#")
    assert not re.search(r"@import|url\((?!#)", text)
    assert "gate passed" in text
    assert text.count("<details>") >= 2
    for place in ("model.layers.0.mlp.up_proj.weight", "aerogel run w4.yaml model", "prefers-color-scheme: dark"):
        assert place in text


def test_ids_in_the_page_are_unique(report: dict[str, Any]) -> None:
    ids = [value for _, attributes in Page(html(report)).tags if (value := attributes.get("id"))]
    svg_parts = [
        value for value in ids if not re.match(r"(figure|axes|patch|line2d|text|matplotlib|xtick|ytick|legend|Line)", value)
    ]
    assert len(svg_parts) == len(set(svg_parts))


def test_the_same_report_gives_the_same_page(report: dict[str, Any]) -> None:
    assert html(report) == html(report)


def test_hostile_names_stay_text(report: dict[str, Any]) -> None:
    report["model"] = report["command"] = HOSTILE
    report["recipe"]["about"] = HOSTILE
    report["tensors"][0]["name"] = HOSTILE
    report["blocks"][0]["name"] = HOSTILE
    report["evaluation"]["perplexity"]["source"] = HOSTILE
    report["evaluation"]["tasks"] = {HOSTILE: report["evaluation"]["tasks"]["piqa"]}
    report["gate"] = [{"name": HOSTILE, "limit": 1, "measured": 2, "passed": False}]
    text = html(report)
    assert not {"script", "img"} & {tag for tag, _ in Page(text).tags}
    assert "&lt;script&gt;" in text
    assert "gate failed" in text


@pytest.mark.parametrize("keep", [(), ("size",), ("evaluation",), ("bench",), ("tensors",), ("blocks",)])
def test_a_report_with_parts_missing_still_gives_everything(report: dict[str, Any], keep: tuple[str, ...]) -> None:
    partial = {"aerogel": "1", **{key: report[key] for key in keep}}
    assert "<h1>" in html(partial)
    assert card.card(partial).startswith("---\n")
    table.tables(partial)


def test_a_report_of_one_model_alone() -> None:
    loss = {"perplexity": None, "perplexity_se": None, "loss": 900.0, "loss_se": 1.0, "loss_by_window": [900.0, 900.0]}
    text = {"source": "text", "windows": 2, "sequence_length": 8, "bos": True, "model": loss}
    evaluation = {"perplexity": text, "memory": {"model": {"bytes": 12}}, "disk": {"model": {"total": 9, "weights": 8}}}
    found = table.tables({"aerogel": "1", "evaluation": evaluation})
    assert [item.title for item in found] == ["Size", "Quality"]
    assert found[1].rows[0][:2] == ("perplexity", table.NOTHING)
    assert "first in each window" in found[1].note


@pytest.mark.parametrize(("drop", "said"), [(0.0, "+0.0"), (0.04, "-4.0"), (-0.02, "+2.0")])
def test_no_change_has_no_minus(drop: float, said: str, report: dict[str, Any]) -> None:
    report["evaluation"]["tasks"]["piqa"]["drop"] = drop
    found = table.task_table(report)
    assert found is not None and found.rows[0][5] == said


def test_entropy_coding_says_what_it_saved_or_that_it_saved_nothing() -> None:
    row = {"name": "a", "dtype": "int32", "bytes": 4000, "coded_bytes": 3750, "share": 0.9375, "entropy_bits": 7.4}
    found = table.coding_table({"entropy": [row, {**row, "bytes": 2000, "coded_bytes": 1500, "entropy_bits": 5.9}]})
    assert found is not None
    assert found.rows == (("int32", "2", "6 kB", "5.25 kB", "87.5 %", "6.90 of 8 (byte)"),)
    assert table.coding_table({"entropy": [], "recipe": {"pack": {"entropy": True}}}) is table.NOT_CODED
    assert table.coding_table({"entropy": [], "recipe": {"pack": {"entropy": False}}}) is None
    assert table.coding_table({"aerogel": "1"}) is None


def test_tables_have_as_many_cells_as_columns(report: dict[str, Any]) -> None:
    makers = (table.tensor_table, table.block_table, table.expert_table)
    found = [*table.tables(report), *(item for maker in makers if (item := maker(report)))]
    assert [item.title for item in found] == [
        "Size",
        "Quality",
        "Tasks",
        "Speed",
        "Every tensor",
        "Blocks one by one",
        "Experts",
    ]
    for item in found:
        assert {len(row) for row in item.rows} == {len(item.columns)}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1530, "1.53 kB"), (999_600, "1 MB"), (2.5e13, "25 TB"), (None, table.NOTHING)],
)
def test_sizes_for_people(count: float | None, text: str) -> None:
    assert table.size(count) == text


def test_durations_for_people() -> None:
    assert [table.seconds(value) for value in (0.0123, 4.56, 200.0)] == ["12.3 ms", "4.56 s", "3 min 20 s"]


def test_the_card_has_the_metadata_of_a_hub(report: dict[str, Any]) -> None:
    text = card.card(report, license_name="apache-2.0")
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["base_model"] == "maker/model"
    assert header["base_model_relation"] == "quantized"
    assert header["library_name"] == "transformers"
    assert header["license"] == "apache-2.0"
    assert header["tags"] == ["aerogel", "compressed", "gptq"]
    assert "| KL(dense" in text
    assert "bits: 4" in text


def test_the_card_of_a_local_model_names_no_base_and_no_folder(report: dict[str, Any]) -> None:
    report["model"] = "/home/someone/secret/model"
    text = card.card(report)
    assert "base_model" not in text
    assert "someone" not in text


def test_the_card_cannot_be_broken_by_names(report: dict[str, Any]) -> None:
    report["evaluation"]["tasks"] = {"a|b\n# head <b>": report["evaluation"]["tasks"]["piqa"]}
    assert r"a\|b \# head \<b\>" in card.card(report)
