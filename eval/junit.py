"""The verdict as JUnit XML, the format in which CI systems show tests: one test case per gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from aerogel.eval.report import write_text


def junit(rows: Sequence[Mapping[str, Any]], *, suite: str = "aerogel gate", seconds: float = 0.0) -> str:
    """JUnit XML of gate rows (`gate.judge`): a gate that does not hold is a failure with limit and measurement.

    suite: what was judged, for instance the name of the compressed model. seconds: duration of the run.
    """
    failures = sum(not row["passed"] for row in rows)
    counts = {"tests": str(len(rows)), "failures": str(failures), "errors": "0", "time": f"{seconds:.3f}"}
    root = ElementTree.Element("testsuites", counts)
    element = ElementTree.SubElement(root, "testsuite", {"name": _printable(suite), "skipped": "0", **counts})
    for row in rows:
        name = _printable(str(row["name"]))
        case = ElementTree.SubElement(element, "testcase", {"classname": "aerogel.gate", "name": name, "time": "0"})
        summary = f"measured {row['measured']:g}, limit {row['limit']:g}"
        if row["passed"]:
            ElementTree.SubElement(case, "system-out").text = summary
        else:
            ElementTree.SubElement(case, "failure", {"type": "gate", "message": f"{name}: {summary}"}).text = summary
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _printable(text: str) -> str:
    """XML 1.0 has no way at all to write control characters."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def write_junit(path: Path, rows: Sequence[Mapping[str, Any]], *, suite: str = "aerogel gate", seconds: float = 0.0) -> None:
    """Write `junit(...)` to `path`, whole or not at all."""
    write_text(path, junit(rows, suite=suite, seconds=seconds))
