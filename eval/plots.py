"""The report's plots as inline SVG, drawn by matplotlib and coloured by the page.

A picture with colours of its own looks wrong on a page that follows the reader's light or dark theme. So matplotlib
draws with stand-in colours, one per role, and the finished SVG gets CSS variables in their place; text stays text in
the page's font. Ids inside each SVG are salted with the plot's name, or several pictures on one page would share them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = Mapping[str, Any]

INK, MUTED, GRID, DENSE, COMPRESSED = "#010101", "#020202", "#030303", "#040404", "#050505"
PARTS = ("#060606", "#070707", "#080808", "#090909")
ROLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--line", DENSE: "--dense", COMPRESSED: "--accent",
    PARTS[0]: "--part-1", PARTS[1]: "--part-2", PARTS[2]: "--part-3", PARTS[3]: "--part-4",
}  # fmt: skip
GROUPS = ("attention", "feed-forward", "embeddings and head", "other")
STYLE: Any = {
    "svg.fonttype": "none", "font.size": 9, "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": GRID,
    "xtick.color": MUTED, "ytick.color": MUTED, "axes.titlesize": 10, "axes.titlelocation": "left",
    "axes.titlecolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True,
    "ytick.left": False, "legend.frameon": False, "legend.labelcolor": MUTED, "figure.constrained_layout.use": True,
}  # fmt: skip


def _figure(width: float, height: float, panels: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, [figure.add_subplot(1, panels, index + 1) for index in range(panels)]


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an <svg> element for a page: no prolog, no metadata, roles instead of colours."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for color, variable in ROLES.items():
        text = text.replace(color, f"var({variable})")
    # Matplotlib draws what has no colour of ours, such as tick marks by reference, in black.
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" class="plot" ', 1)


def block_plot(report: Report) -> str | None:
    """Relative output error of each block, as bars in the order of the model."""
    blocks = [block for block in report.get("blocks") or [] if block.get("relative_error") is not None]
    if not blocks:
        return None
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _figure(9.6, 2.6, 1)
        axes.bar(range(len(blocks)), [100 * block["relative_error"] for block in blocks], color=COMPRESSED, width=0.7)
        axes.set_title("Relative output error of each block")
        axes.set_ylabel("per cent")
        axes.set_xlabel("block")
        axes.set_xlim(-0.6, max(len(blocks), 8) - 0.4)
        _whole_numbers(axes)
        return _svg(figure, "blocks", "Relative output error of each block")


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def group_of(tensor: Mapping[str, Any]) -> str:
    """Which part of a transformer a tensor belongs to, by its name: one of GROUPS."""
    name = str(tensor["name"]).lower()
    if re.search(r"embed|lm_head|wte|wpe|output\.weight", name):
        return GROUPS[2]
    if len(tensor.get("shape") or ()) < 2:
        return GROUPS[3]
    if re.search(r"attn|attention", name):
        return GROUPS[0]
    return GROUPS[1] if re.search(r"mlp|ffn|feed_forward|expert|moe", name) else GROUPS[3]


def size_plot(report: Report) -> str | None:
    """Left: bytes before and after, stacked by part of the model. Right: bits per weight of each matrix."""
    tensors = report.get("tensors") or []
    if not tensors:
        return None
    import matplotlib

    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure, (left, right) = _figure(9.6, 2.6, 2)
        _stack(left, tensors)
        _bits(right, tensors)
        return _svg(figure, "size", "Bytes by part of the model, and bits per weight")


def _stack(axes: Axes, tensors: Sequence[Mapping[str, Any]]) -> None:
    largest = sum(tensor.get("source_bytes") or 0 for tensor in tensors)
    unit, name = (1e9, "GB") if largest >= 1e9 else (1e6, "MB") if largest >= 1e6 else (1e3, "kB")
    starts = [0.0, 0.0]
    for group, color in zip(GROUPS, PARTS, strict=True):
        members = [tensor for tensor in tensors if group_of(tensor) == group]
        widths = [sum(tensor.get(key) or 0 for tensor in members) / unit for key in ("bytes", "source_bytes")]
        axes.barh([0, 1], widths, left=starts, color=color, height=0.55, label=group)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for row, total in enumerate(starts):
        axes.annotate(f"{total:.3g} {name}", (total, row), xytext=(5, 0), textcoords="offset points", va="center", color=INK)
    axes.set_xlim(0, max(starts) * 1.16 or 1)
    axes.set_yticks([0, 1], ["compressed", "dense"])
    axes.set_title(f"Size by part of the model ({name})")
    axes.figure.legend(loc="outside lower left", ncols=4, fontsize=8, handlelength=1)


def _bits(axes: Axes, tensors: Sequence[Mapping[str, Any]]) -> None:
    matrices = [tensor for tensor in tensors if tensor.get("bits_per_weight") and len(tensor.get("shape") or ()) >= 2]
    for group, color in zip(GROUPS, PARTS, strict=True):
        found = [(place, item["bits_per_weight"]) for place, item in enumerate(matrices) if group_of(item) == group]
        if found:
            axes.plot(*zip(*found, strict=True), linestyle="none", marker="o", markersize=3, color=color)
    axes.set_ylim(0, max([item["bits_per_weight"] for item in matrices] or [16]) * 1.1)
    axes.set_title("Bits per weight of each matrix")
    axes.set_xlabel("matrix, in the order of the model")
    axes.grid(axis="x", visible=False)
    axes.grid(axis="y", visible=True)


def speed_plot(report: Report) -> str | None:
    """Time to first token, prefill and decode for each batch size: medians, with the whole range as whiskers."""
    rows = [row for row in (report.get("bench") or {}).get("rows") or [] if "dense" in row and "compressed" in row]
    if not rows:
        return None
    import matplotlib

    panels = (
        ("first_token_seconds", "Time to first token (s), lower is better"),
        ("prefill_tokens_per_second", "Prefill (tokens/s)"),
        ("decode_tokens_per_second", "Decode (tokens/s)"),
    )
    with matplotlib.rc_context(STYLE):
        figure, all_axes = _figure(9.6, 2.8, 3)
        for axes, (quantity, title) in zip(all_axes, panels, strict=True):
            for shift, name, color in ((-0.2, "dense", DENSE), (0.2, "compressed", COMPRESSED)):
                values = [row[name][quantity] for row in rows]
                middle = [value["median"] for value in values]
                below = [value["median"] - value["min"] for value in values]
                above = [value["max"] - value["median"] for value in values]
                places = [place + shift for place in range(len(rows))]
                axes.bar(places, middle, width=0.36, color=color, label=name)
                axes.errorbar(places, middle, yerr=[below, above], fmt="none", ecolor=INK, elinewidth=1, capsize=2)
            axes.set_xticks(range(len(rows)), [f"batch {row['batch']}" for row in rows])
            axes.set_xlim(-0.7, max(len(rows), 2) - 0.3)
            axes.set_title(title)
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=2, fontsize=8, handlelength=1)
        return _svg(figure, "speed", "Speed of the dense and the compressed model")


def quality_plot(report: Report) -> str | None:
    """Left: loss of both models in each window of text. Right: KL of the compressed from the dense one."""
    evaluation = report.get("evaluation") or {}
    text, kl = evaluation.get("perplexity") or {}, evaluation.get("divergence") or {}
    if not (text.get("dense") or {}).get("loss_by_window"):
        return None
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, all_axes = _figure(9.6, 2.8, 2 if kl.get("kl_by_window") else 1)
        for name, color in (("dense", DENSE), ("compressed", COMPRESSED)):
            values = text[name]["loss_by_window"]
            all_axes[0].plot(range(len(values)), values, color=color, marker="o", markersize=3, linewidth=1.4, label=name)
        all_axes[0].set_title("Loss by window (nats per token; perplexity is e to its mean)")
        all_axes[0].legend(loc="upper right", ncols=2, fontsize=8)
        all_axes[0].margins(y=0.22)
        if len(all_axes) > 1:
            values = kl["kl_by_window"]
            all_axes[1].bar(range(len(values)), values, color=COMPRESSED, width=0.7)
            all_axes[1].axhline(kl["kl"], color=INK, linewidth=1, linestyle="--", label=f"mean {kl['kl']:.4g}")
            all_axes[1].set_title("KL from dense by window (nats per token)")
            all_axes[1].legend(loc="upper right", fontsize=8)
            all_axes[1].margins(y=0.22)
        for axes in all_axes:
            axes.set_xlabel("window")
            _whole_numbers(axes)
        return _svg(figure, "quality", "Loss and KL divergence by window")
