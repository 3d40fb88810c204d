"""The report as one page of HTML that needs nothing else: styles and plots are inside, scripts there are none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aerogel.eval import table
from aerogel.eval.gate import compression_of
from aerogel.eval.report import plain, write_text

if TYPE_CHECKING:
    from markupsafe import Markup

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """A titled part of the page: a plot (finished SVG or empty), a table, or both; `folded` hides the table."""

    title: str
    plot: Markup | str = ""
    table: table.Table | None = None
    folded: bool = False

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return len(self.table.rows) if self.table else 0


def figures(report: Report) -> list[tuple[str, str]]:
    """The few numbers that a reader looks for first: (value, label)."""
    evaluation, bench = report.get("evaluation") or {}, report.get("bench") or {}
    text, kl = evaluation.get("perplexity") or {}, evaluation.get("divergence") or {}
    found: list[tuple[str, str]] = []
    if (ratio := compression_of(report)) is not None:
        found.append((f"{ratio:.2f}{table.TIMES}", "smaller"))
    if (bits := (report.get("size") or {}).get("bits_per_weight")) is not None:
        found.append((table.number(bits), "bits per compressed weight"))
    if text.get("increase") is not None:
        found.append((f"{100 * text['increase']:+.2f} %", "perplexity against dense"))
    if kl.get("kl") is not None:
        found.append((table.number(kl["kl"], 3), "KL divergence, nats per token"))
    if kl.get("top1") is not None:
        found.append((table.percent(kl["top1"], 1), "top-1 agreement with dense"))
    speedups = [(row["batch"], (row.get("speedup") or {}).get("decode")) for row in bench.get("rows") or []]
    found += [(f"{ratio['median']:.2f}{table.TIMES}", f"decode speed, batch {batch}") for batch, ratio in speedups if ratio]
    return found


def sections(report: Report) -> list[Section]:
    """The parts of the page for what the report has, the short tables first and every tensor's fate last."""
    from markupsafe import Markup

    from aerogel.eval import plots

    def part(title: str, found: table.Table | None, plot: str | None = None) -> list[Section]:
        return (
            [Section(title, Markup(plot or ""), found)] if found or plot else []
        )  # our own SVG, its text escaped by matplotlib

    def folded(found: table.Table | None) -> list[Section]:
        return [Section(found.title, table=found, folded=True)] if found else []

    return [
        *part("Gates", table.gate_table(report)),
        *part("Size", table.size_table(report), plots.size_plot(report)),
        *part("Entropy coding", table.coding_table(report)),
        *part("Quality", table.quality_table(report), plots.quality_plot(report)),
        *part("Tasks", table.task_table(report)),
        *part("Speed", table.bench_table(report), plots.speed_plot(report)),
        *part("Blocks", None, plots.block_plot(report)),
        *part("Experts", table.expert_table(report)),
        *folded(table.block_table(report)),
        *folded(table.tensor_table(report)),
    ]


def facts(report: Report) -> list[tuple[str, str]]:
    """Machine, versions, calibration and duration as (name, value)."""
    machine, calibration = report.get("machine") or {}, report.get("calibration") or {}
    rows: list[tuple[str, str]] = []
    if machine:
        rows.append(("processor", f"{machine.get('cpu')}, {machine.get('cores')} cores, {table.size(machine.get('memory'))}"))
        rows += [("GPU", f"{gpu['name']}, {table.size(gpu['memory'])}") for gpu in machine.get("gpu") or []]
    if versions := report.get("versions"):
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    if calibration:
        rows_of = f"{calibration.get('samples')} {table.TIMES} {calibration.get('sequence_length')}"
        what = f"{rows_of} tokens of {calibration.get('source')}"
        rows.append(("calibration", f"{what}, seed {calibration.get('seed')}, sha256 {str(calibration.get('sha256'))[:16]}"))
    if report.get("started"):
        rows.append(("started", str(report["started"])))
    if report.get("seconds") is not None:
        rows.append(("duration", table.seconds(report["seconds"])))
    if report.get("peak_memory_bytes"):
        rows.append(("peak memory", table.size(report["peak_memory_bytes"])))
    return rows


def html(report: Report) -> str:
    """The page. Everything from the report is escaped; names and commands in it cannot add markup."""
    import yaml
    from jinja2 import Environment, StrictUndefined

    report = plain(report)
    gates, recipe = report.get("gate") or [], report.get("recipe") or {}
    source = resources.files("aerogel.eval").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(source).render(
        title=str(report.get("model") or "model"),
        subtitle=str(recipe.get("about") or "compressed beside dense, measured in one run"),
        verdict=("passed" if all(gate["passed"] for gate in gates) else "failed") if gates else "",
        figures=figures(report),
        sections=sections(report),
        command=str(report.get("command") or ""),
        facts=facts(report),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else "",
        version=str(report.get("aerogel") or ""),
    )


def write_html(path: Path, report: Report) -> None:
    """Write the page to `path`, whole or not at all."""
    write_text(path, html(report))
