"""Reports as rich tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aerogel.eval.table import Table as Plain

STYLES = {"good": "green", "bad": "bold red", "": ""}
VERDICTS = {"pass": "✓ pass", "FAIL": "✗ FAIL"}


def rich_table(table: Plain) -> Table:
    """A table of text as rich draws it; marked rows are coloured, verdicts get a tick or a cross."""
    drawn = Table(
        title=Text(table.title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        caption=Text(table.note) if table.note else None,
        caption_justify="left",
    )
    for index, (name, align) in enumerate(table.columns):
        drawn.add_column(Text(name), justify=align, overflow="fold", no_wrap=index == 0)
    marks = table.marks or ("",) * len(table.rows)
    for row, mark in zip(table.rows, marks, strict=True):
        drawn.add_row(*(Text(VERDICTS.get(cell, cell)) for cell in row), style=STYLES[mark])
    return drawn


def summary(report: Mapping[str, Any]) -> list[RenderableType]:
    """What a person wants to see of a report: gates, size, quality, tasks, speed."""
    from aerogel.eval.table import tables

    return [rich_table(table) for table in tables(report)]


def plain_table(title: str, heads: Iterable[str], rows: Iterable[Iterable[object]], note: str = "") -> Table:
    """A small table; a head that begins with `>` is a column of numbers."""
    drawn = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        caption=Text(note) if note else None,
        caption_justify="left",
    )
    for index, head in enumerate(heads):
        justify: Literal["left", "right"] = "right" if head.startswith(">") else "left"
        drawn.add_column(head.lstrip(">"), justify=justify, overflow="fold", no_wrap=index == 0)
    for row in rows:
        drawn.add_row(*(Text("–" if cell is None else str(cell)) for cell in row))
    return drawn


def count(number: float | None) -> str:
    """A large count for people: 134 M."""
    if number is None:
        return "–"
    for unit in ("", " k", " M", " G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"
