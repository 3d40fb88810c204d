"""The model card: README.md of a compressed checkpoint, with the metadata that hubs read and the measured numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from aerogel.eval import table

Report = Mapping[str, Any]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def front_matter(report: Report, *, license_name: str | None = None) -> dict[str, object]:
    """The metadata block. `base_model` only where the source is a hub id: a folder's name means nothing elsewhere."""
    model = str(report.get("model") or "")
    methods = _methods(report)
    data: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if license_name:
        data["license"] = license_name
    if HUB_ID.fullmatch(model):
        data |= {"base_model": model, "base_model_relation": "quantized"}
    return data | {"tags": ["aerogel", "compressed", *dict.fromkeys(methods)]}


def _methods(report: Report) -> list[str]:
    stages: Sequence[Mapping[str, Any]] = (report.get("recipe") or {}).get("stages") or []
    return [
        str(body["method"]) for stage in stages for body in stage.values() if isinstance(body, Mapping) and "method" in body
    ]


def markdown(found: table.Table) -> str:
    """A table in Markdown, its note below it."""
    heads = "| " + " | ".join(_cell(name) for name, _ in found.columns) + " |"
    rule = "|" + "|".join("--:" if align == "right" else "---" for _, align in found.columns) + "|"
    body = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in found.rows]
    return "\n".join([f"## {found.title}", "", heads, rule, *body, *(["", _line(found.note)] if found.note else [])])


def _line(text: str) -> str:
    """Text on one line that cannot start markup: names come from other people's files."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]<>#])", r"\\\1", flat)


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def card(report: Report, *, license_name: str | None = None) -> str:
    """README.md of the compressed checkpoint: what it is, how to load it, what was measured and how it was made.

    license_name: the licence identifier of the source model where it is known; it goes into the metadata.
    """
    import yaml

    model = str(report.get("model") or "a model")
    if not HUB_ID.fullmatch(model):
        model = model.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    recipe = report.get("recipe") or {}
    header = yaml.safe_dump(front_matter(report, license_name=license_name), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{header}---",
        f"# {_line(model.rsplit('/', 1)[-1])}, compressed with aerogel",
        _line(f"Made from {model}. {recipe.get('about') or ''}").strip(),
        "```python\nimport aerogel\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/of/this/model")\n```',
        *(markdown(found) for found in table.tables(report)),
    ]
    if recipe:
        body = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        parts.append(f"## Recipe\n\n````yaml\n{body}````")
    versions = ", ".join(f"{name} {version}" for name, version in (report.get("versions") or {}).items())
    parts.append(_line(f"Made by aerogel {report.get('aerogel') or ''}" + (f" with {versions}" if versions else "")) + ".")
    return "\n\n".join(parts) + "\n"
