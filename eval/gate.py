"""Gates: the limits a recipe sets, held against what was measured. The verdict decides the exit code.

A gate never passes by not being measured: asking for one without the measurement it needs is an error, found before the
run by `check` and again afterwards by `judge`. A measurement that is not a number fails its gate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aerogel.errors import BadInput

Report = Mapping[str, Any]
Row = dict[str, object]

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def size_in_bytes(value: object) -> int:
    """A size as bytes: a number, or a text such as "3GB" (10^9) or "3GiB" (2^30). Raises BadInput otherwise."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return int(value)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if found is None or found[2].upper() not in UNITS:
        raise BadInput(f"size {value!r} is not understood: write bytes as a number, or for instance 3GB or 512MiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _at(report: Report, path: str) -> Any:
    """The value at `a.b.c`, or None."""
    found: Any = report
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _first(report: Report, *paths: str) -> Any:
    return next((value for path in paths if (value := _at(report, path)) is not None), None)


def compression_of(report: Report) -> float | None:
    """How many times smaller the compressed checkpoint is: as the compression run reported it, else from the disk."""
    stated = _first(report, "size.compression")
    if stated is not None:
        return float(stated)
    for part in ("evaluation.disk", "bench.disk"):
        dense, small = _at(report, f"{part}.dense.weights"), _at(report, f"{part}.compressed.weights")
        if dense and small:
            return float(dense) / float(small)
    return None


def decode_speedup_of(report: Report) -> float | None:
    """The decode speed-up at the batch size where it is smallest: a gate holds at every batch size benchmarked."""
    rows = _at(report, "bench.rows") or []
    values = [row["speedup"]["decode"]["median"] for row in rows if "speedup" in row]
    return min(values) if values else None


@dataclass(frozen=True)
class Gate:
    """measure: finds the number in the report. needs: the part of a run that measures it. enable: how to ask for it."""

    measure: Callable[[Report], float | None]
    needs: str
    enable: str


GATES: dict[str, Gate] = {
    "max_kl": Gate(lambda r: _at(r, "evaluation.divergence.kl"), "divergence", "set evaluate.divergence: true"),
    "min_top1": Gate(lambda r: _at(r, "evaluation.divergence.top1"), "divergence", "set evaluate.divergence: true"),
    "max_perplexity_increase": Gate(
        lambda r: _at(r, "evaluation.perplexity.increase"), "perplexity", "add evaluate.perplexity"
    ),
    "min_compression": Gate(compression_of, "size", "compress the model in this run, or evaluate it against its dense one"),
    "min_decode_speedup": Gate(decode_speedup_of, "bench", "add a bench section, for instance bench: {batch: [1]}"),
    "max_memory": Gate(
        lambda r: _first(
            r,
            *(f"{part}.memory.{name}.bytes" for part in ("bench", "evaluation") for name in ("compressed", "model")),
        ),
        "memory",
        "add an evaluate or a bench section",
    ),
}
"""All gates with one number. `max_task_drop` has one per task, see `_task_rows`."""

TASKS_ENABLE = "list tasks in evaluate.tasks, for instance [piqa, arc_easy]"


def check(gates: Mapping[str, object], enabled: set[str]) -> None:
    """Raise BadInput when a gate is unknown, or asks for what this run will not measure.

    enabled: which of "divergence", "perplexity", "tasks", "bench", "size", "memory" the run measures.
    """
    for name, limit in gates.items():
        if limit is None:
            continue
        if name == "max_task_drop":
            if "tasks" not in enabled:
                raise _missing(name, TASKS_ENABLE)
        elif name not in GATES:
            raise BadInput(f"unknown gate {name!r}: known are {', '.join([*GATES, 'max_task_drop'])}")
        elif GATES[name].needs not in enabled:
            raise _missing(name, GATES[name].enable)


def judge(gates: Mapping[str, object], report: Report) -> list[Row]:
    """Hold every gate against the report: rows {name, limit, measured, passed}, in the order of `gates`.

    `max_task_drop` is a largest drop of accuracy (0.02 is two points) for every task, or a mapping from task to it, and
    gives one row per task. Raises BadInput for an unknown gate or a missing measurement, naming what to enable.
    """
    rows: list[Row] = []
    for name, limit in gates.items():
        if limit is None:
            continue
        if name == "max_task_drop":
            rows += _task_rows(limit, _at(report, "evaluation.tasks") or {})
            continue
        check({name: limit}, {gate.needs for gate in GATES.values()})
        measured = GATES[name].measure(report)
        if measured is None:
            raise _missing(name, GATES[name].enable)
        bound = size_in_bytes(limit) if name == "max_memory" else _number(name, limit)
        rows.append(_row(name, bound, float(measured)))
    return rows


def passed(rows: list[Row]) -> bool:
    """Whether every gate holds (no gate: yes)."""
    return all(bool(row["passed"]) for row in rows)


def _task_rows(limit: object, tasks: Mapping[str, Any]) -> list[Row]:
    if not tasks:
        raise _missing("max_task_drop", TASKS_ENABLE)
    limits = limit if isinstance(limit, Mapping) else dict.fromkeys(tasks, limit)
    rows = []
    for task, bound in limits.items():
        if _at(tasks, f"{task}.drop") is None:
            raise _missing(f"max_task_drop of {task}", f"add {task} to evaluate.tasks and compare with the dense model")
        name = f"max_task_drop[{task}]"
        rows.append(_row(name, _number(name, bound), float(tasks[task]["drop"])))
    return rows


def _row(name: str, limit: float, measured: float) -> Row:
    holds = measured >= limit if name.startswith("min_") else measured <= limit
    return {"name": name, "limit": limit, "measured": measured, "passed": holds and math.isfinite(measured)}


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadInput(f"gate.{name} must be a number, found {value!r}")
    return float(value)


def _missing(name: str, enable: str) -> BadInput:
    return BadInput(f"gate.{name} is asked for, but this run does not measure it: {enable}, or remove the gate")
