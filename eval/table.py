"""A report as tables of text: the command line draws them with rich, the page as HTML, the model card as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Report = Mapping[str, Any]
Align = Literal["left", "right"]
NOTHING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Table:
    """A title, column heads with their alignment, and rows of text; `note` is one sentence below it.

    marks: per row "good", "bad" or "" (how the row may be coloured); empty when no row is marked.
    """

    title: str
    columns: tuple[tuple[str, Align], ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    marks: tuple[str, ...] = ()


def columns(*names: str) -> tuple[tuple[str, Align], ...]:
    """Column heads: the first one left-aligned text, the others right-aligned numbers; a name in <...> is text too."""
    return tuple(
        (name.strip("<>"), "left" if index == 0 or name.startswith("<") else "right") for index, name in enumerate(names)
    )


def size(count: float | None) -> str:
    """Bytes for people, in powers of 1000: 1.53 MB."""
    if count is None:
        return NOTHING
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB" if value < 999.5 else f"{value:.0f} TB"


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits; a dash for None."""
    if value is None:
        return NOTHING
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"


def percent(value: float | None, places: int = 2) -> str:
    """A share as per cent; a dash for None."""
    return NOTHING if value is None else f"{100 * value:.{places}f} %"


def seconds(value: float | None) -> str:
    """A duration: 12.3 ms, 4.56 s, 3 min 20 s."""
    if value is None:
        return NOTHING
    if value < 0.9995:
        return f"{1000 * value:.3g} ms"
    return f"{value:.3g} s" if value < 99.95 else f"{value // 60:.0f} min {value % 60:.0f} s"


def with_error(value: float | None, error: float | None, digits: int = 4) -> str:
    """`value ± standard error`."""
    return number(value, digits) if error is None else f"{number(value, digits)} ± {number(error, 2)}"


def percent_with_error(value: float | None, error: float | None, places: int = 2) -> str:
    """`12.34 ± 0.05 %`."""
    if value is None or error is None:
        return percent(value, places)
    return f"{100 * value:.{places}f} ± {100 * error:.{places}f} %"


def spread(values: Mapping[str, Any] | None, digits: int = 4) -> str:
    """`median [min - max]` of a Spread as the report has it."""
    if not values:
        return NOTHING
    median, low, high = (number(values[name], digits) for name in ("median", "min", "max"))
    return f"{median}  [{low} {NOTHING} {high}]"


def _shape(shape: Sequence[int] | None) -> str:
    return f" {TIMES} ".join(map(str, shape)) if shape else NOTHING


def quality_table(report: Report) -> Table | None:
    """Perplexity, KL and top-1, with standard errors."""
    evaluation = report.get("evaluation") or {}
    text, kl = evaluation.get("perplexity"), evaluation.get("divergence")
    if not text:
        return None
    rows: list[tuple[str, str, str]] = []
    for name, label in (
        ("model", "perplexity"),
        ("dense", "perplexity, dense"),
        ("compressed", "perplexity, compressed"),
    ):
        if name in text:
            rows.append((label, with_error(text[name]["perplexity"], text[name].get("perplexity_se")), "e^loss, ± s.e."))
    if "increase" in text:
        value = percent_with_error(text["increase"], text.get("increase_se"))
        rows.append(("perplexity increase", value, "paired by window"))
    if "rounding" in text:
        value = percent_with_error(text["rounding"]["increase"], text["rounding"].get("increase_se"))
        rows.append(("perplexity increase by int8 activations", value, "of that, paired by window"))
    if kl:
        rows.append(("KL(dense ‖ compressed)", with_error(kl["kl"], kl.get("kl_se")), "nats per token"))
        tail = f"{number(kl.get('kl_median'))} / {number(kl.get('kl_p99'))}"
        rows.append(("KL median / 99th percentile", tail, "of single tokens"))
        rows.append(("top-1 agreement", percent_with_error(kl["top1"], kl.get("top1_se")), "same most likely token"))
    note = (
        f"{text['windows']} windows of {text['sequence_length']} tokens, not overlapping; source: {text['source']}; "
        f"BOS: {_yes(text.get('bos'))}; "
        + ("computed in float32" if text.get("numerics") == "float32" else "computed in the checkpoint's own type")
        + ("; activations rounded to int8" if "rounding" in text else "")
    )
    return Table("Quality", columns("measure", "value", "<unit>"), tuple(rows), note)


def _yes(value: object) -> str:
    return {True: "first in each window", False: "none"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _score(metrics: Mapping[str, Any] | None, metric: str) -> str:
    found = (metrics or {}).get(metric)
    return percent_with_error(found["value"], found.get("se"), 1) if found else NOTHING


def task_table(report: Report) -> Table | None:
    """Accuracies of both models, the drop, flips in both directions, and McNemar's p."""
    tasks = (report.get("evaluation") or {}).get("tasks")
    if not tasks:
        return None
    rows = []
    for name, task in tasks.items():
        if "model" in task:
            metric = next(iter(task["model"]))
            rows.append((name, metric, str(task["documents"]), _score(task["model"], metric), *[NOTHING] * 4))
            continue
        metric, pair = task["metric"], task["paired"].get(task["metric"], {})
        flips = f"{pair['lost']} / {pair['gained']}" if pair else NOTHING
        both = (_score(task["dense"], metric), _score(task["compressed"], metric))
        drop = f"{0.0 - 100 * task['drop']:+.1f}"  # no change is +0.0, not -0.0
        rows.append((name, metric, str(task["documents"]), *both, drop, flips, number(pair.get("p"), 3)))
    heads = columns("task", "<metric>", "documents", "dense", "compressed", "change", "lost / gained", "McNemar p")
    sources = sorted({f"{task['source']}, {task['split']} split" for task in tasks.values()})
    return Table("Tasks", heads, tuple(rows), "documents: " + "; ".join(sources) + "; ± is one standard error")


def bench_table(report: Report) -> Table | None:
    """Time to first token, prefill and decode speed per batch size, medians with their range."""
    bench = report.get("bench") or {}
    rows: list[tuple[str, ...]] = []
    for row in bench.get("rows") or []:
        dense, small = row.get("dense"), row.get("compressed") or row.get("model")
        for quantity, label, key in (
            ("first_token_seconds", "first token, s", "first_token"),
            ("prefill_tokens_per_second", "prefill, tokens/s", "prefill"),
            ("decode_tokens_per_second", "decode, tokens/s", "decode"),
        ):
            ratio = (row.get("speedup") or {}).get(key)
            speedup = f"{ratio['median']:.2f}{TIMES}  [{ratio['min']:.2f} {NOTHING} {ratio['max']:.2f}]" if ratio else NOTHING
            both = (spread((dense or {}).get(quantity), 3), spread(small.get(quantity), 3))
            rows.append((f"batch {row['batch']}: {label}", *both, speedup))
    if not rows:
        return None
    load = bench["load_seconds"]
    loaded = (spread(load.get("dense"), 3), spread(load.get("compressed") or load.get("model"), 3))
    rows.append(("load, s", *loaded, NOTHING))
    note = (
        f"median [min {NOTHING} max] of {bench['repeats']} interleaved repetitions; prompt {bench['prompt']}, new tokens "
        f"{bench['new_tokens']}; {bench['device']}, {bench['threads']} threads; speed-up is paired"
        f"{'; activations of the compressed model rounded to int8' if bench.get('activations') == 'int8' else ''}{ran(bench)}"
    )
    return Table("Speed", columns("measure", "dense", "compressed", "speed-up"), tuple(rows), note)


def ran(bench: Mapping[str, Any]) -> str:
    """Which decode loop and which kernels ran, as the end of a sentence; empty for reports that do not say."""
    said: dict[str, None] = {}
    for row in bench.get("rows") or []:
        for name in ("dense", "compressed", "model"):
            facts = (row.get(name) or {}).get("ran")
            if facts:
                loop = f"{facts['loop']} loop" + (" in a CUDA graph" if facts.get("graph") else "")
                said[f"{name}: {', '.join([loop, *sorted(facts['kernels'])])}"] = None
    return "".join(f"; {text}" for text in said)


def size_table(report: Report) -> Table | None:
    """Bytes on disk and in memory."""
    total, bench, quality = (report.get(key) or {} for key in ("size", "bench", "evaluation"))
    rows: list[tuple[str, ...]] = []
    if total.get("source_bytes") and total.get("bytes"):
        rows.append(_sizes("checkpoint tensors", total["source_bytes"], total["bytes"]))
    disk = bench.get("disk") or quality.get("disk") or {}
    memory = bench.get("memory") or quality.get("memory") or {}
    if "compressed" in disk:
        for key, label in (("weights", "weight files on disk"), ("total", "all files on disk")):
            rows.append(_sizes(label, disk["dense"][key], disk["compressed"][key]))
    if "compressed" in memory:
        rows.append(_sizes("parameters in memory", memory["dense"]["bytes"], memory["compressed"]["bytes"]))
    for label, found in (("weight files on disk", disk), ("parameters in memory", memory)):
        if "model" in found:
            value = found["model"].get("weights", found["model"].get("bytes"))
            rows.append((label, NOTHING, size(value), NOTHING))
    bits = total.get("bits_per_weight")
    notes = [f"{number(bits)} bits per compressed weight, scales and zero points included"] if bits else []
    notes += filter(None, [_unscaled(report)])
    return Table("Size", columns("what", "dense", "compressed", "smaller by"), tuple(rows), "; ".join(notes)) if rows else None


NOT_CODED = Table("Entropy coding", columns("tensors of", "count"), (("nothing", "0"),), "no tensor would save 2 %")
"""What a run says that was to code and found nothing worth it."""


def coding_table(report: Report) -> Table | None:
    """What entropy coding saved, by type of number; None where it was not asked for."""
    coded = report.get("entropy")
    if not coded:
        asked = ((report.get("recipe") or {}).get("pack") or {}).get("entropy")
        return NOT_CODED if asked else None
    rows = []
    for kind in sorted({row["dtype"] for row in coded}):
        mine = [row for row in coded if row["dtype"] == kind]
        before, after = (sum(row[key] for row in mine) for key in ("bytes", "coded_bytes"))
        mean = sum(row["entropy_bits"] * row["bytes"] for row in mine) / before
        what = "exponent" if kind == "bfloat16" else "byte"
        rows.append((kind, str(len(mine)), size(before), size(after), percent(after / before, 1), f"{mean:.2f} of 8 ({what})"))
    heads = columns("tensors of", "count", "before", "coded", "share", "entropy, bits")
    return Table("Entropy coding", heads, tuple(rows), "lossless; the JSON has each tensor's own share and entropy")


def _sizes(label: str, before: float, after: float) -> tuple[str, ...]:
    return label, size(before), size(after), f"{before / after:.2f}{TIMES}" if after else NOTHING


def gate_table(report: Report) -> Table | None:
    """Limits, measurements and verdicts."""
    gates = report.get("gate")
    if not gates:
        return None

    def show(gate: Mapping[str, Any], key: str) -> str:
        return size(gate[key]) if gate["name"] == "max_memory" else number(gate[key])

    rows = tuple(
        (gate["name"], show(gate, "limit"), show(gate, "measured"), "pass" if gate["passed"] else "FAIL") for gate in gates
    )
    marks = tuple("good" if gate["passed"] else "bad" for gate in gates)
    return Table("Gates", columns("gate", "limit", "measured", "<verdict>"), rows, marks=marks)


def block_table(report: Report) -> Table | None:
    """One row per decoder block."""
    blocks = report.get("blocks")
    if not blocks:
        return None
    rows = []
    for block in blocks:
        layers = block.get("layers") or []
        small, big = (sum(layer.get(key) or 0 for layer in layers) for key in ("bytes", "source_bytes"))
        losses = [layer["loss"] for layer in layers if layer.get("loss") is not None]
        worst = percent(max(losses), 3) if losses else NOTHING
        error = percent(block.get("relative_error"), 3)
        rows.append((block["name"], error, worst, size(big), size(small), seconds(block.get("seconds"))))
    heads = columns("block", "output error", "worst layer loss", "source", "compressed", "time")
    return Table("Blocks one by one", heads, tuple(rows), "output error: relative Frobenius error of the block's output")


def _unscaled(report: Report) -> str:
    """How many linears a scale stage could not treat, as a sentence; empty if it treated all."""
    layers = [layer for block in report.get("blocks") or [] for layer in block.get("layers") or []]
    left = sum("scale" in (layer.get("notes") or {}) for layer in layers)
    return f"{left} of {len(layers)} linears were not scaled: nothing before them can take up the scales" if left else ""


def tensor_table(report: Report) -> Table | None:
    """What happened to every parameter tensor."""
    tensors = report.get("tensors")
    if not tensors:
        return None
    rows = tuple(
        (
            tensor["name"],
            tensor["fate"],
            tensor.get("why") or NOTHING,
            _shape(tensor.get("shape")),
            number(tensor.get("bits_per_weight"), 4),
            size(tensor.get("source_bytes")),
            size(tensor.get("bytes")),
        )
        for tensor in tensors
    )
    heads = columns("tensor", "<fate>", "<how / why>", "shape", "bits", "source", "stored")
    return Table("Every tensor", heads, rows)


def expert_table(report: Report) -> Table | None:
    """Tokens that calibration sent to each expert of a mixture."""
    experts = report.get("experts")
    if not experts:
        return None
    rows = tuple(
        (
            str(row["module"]),
            str(len(row["tokens"])),
            f"{min(row['tokens']):,}",
            f"{sum(row['tokens']) / len(row['tokens']):,.0f}",
        )
        for row in experts
        if row.get("tokens")
    )
    return Table("Experts", columns("module", "experts", "fewest tokens", "mean tokens"), rows)


def tables(report: Report) -> list[Table]:
    """The summary tables a report has: gates, size, entropy coding, quality, tasks, speed. The long ones are asked for."""
    makers = (gate_table, size_table, coding_table, quality_table, task_table, bench_table)
    return [table for maker in makers if (table := maker(report)) is not None]
