"""The whole chain of a recipe: compress, evaluate, benchmark, gate, and the files that say so.

What can be wrong with the evaluation (a misspelt task, too little text) is found before the compression starts. The
checkpoint is complete on disk before anything is measured; a run that stops later is taken up there by the same
command.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from aerogel.errors import BadInput
from aerogel.lazy import load
from aerogel.model.progress import Progress, silent
from aerogel.recipes.schema import Recipe
from aerogel.recipes.sections import Bench, Evaluate

REPORT, PAGE, VERDICT = "aerogel_report.json", "aerogel_report.html", "aerogel_junit.xml"


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    model: str | Path | None = None,
    out: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    device: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    command: str = "",
) -> tuple[dict[str, Any], bool]:
    """Everything a recipe says, in order. Returns the report and whether every gate passed.

    Args:
        recipe: a shipped name, a file, its content, or a Recipe.
        model: folder, hub id or GGUF file; None takes `model:` of the recipe.
        out: folder of the checkpoint and of the report; None names it after model and recipe.

    Raises:
        BadInput: anything that is wrong with the input, before the compression starts.
        RunFailed: disk, memory, numerics; the message says what is safe.
    """
    start = time.perf_counter()
    checked = Recipe.load(recipe, overrides)
    source = source_of(model, checked)
    folder = Path(out) if out is not None else default_out(source, checked)
    place = pick_device(device)
    prepared = _prepare(source, checked.evaluate, trust_remote_code)
    report: dict[str, Any] = load("aerogel.model.compress:compress")(
        source,
        checked,
        folder,
        device=place,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=progress,
        command=command,
    )
    report["recipe"] = checked.as_dict()
    report |= measure(folder, source, checked.evaluate, checked.bench, device=place, progress=progress, prepared=prepared)
    judge = load("aerogel.eval.gate:judge")
    report["gate"] = judge(checked.gate.model_dump(), report)
    report["seconds"] = time.perf_counter() - start
    write(folder, report)
    return report, all(row["passed"] for row in report["gate"])


def source_of(model: str | Path | None, recipe: Recipe) -> str:
    """The model to compress: the argument, or what the recipe fixes. Raises `BadInput` when neither names one."""
    if model is None and recipe.model is None:
        raise BadInput("no model given; name a folder, hub id or GGUF file, or write `model:` in the recipe")
    return str(model if model is not None else recipe.model)


def default_out(model: str, recipe: Recipe) -> Path:
    """`MODEL-RECIPE` in the working directory."""
    return Path(f"{Path(model).resolve().name.removesuffix('.gguf')}-{recipe.name}")


def measure(
    model: str | Path,
    against: str | Path | None,
    evaluate: Evaluate | None,
    bench: Bench | None,
    *,
    device: str = "auto",
    progress: Progress = silent,
    prepared: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Quality and speed of a checkpoint, beside the dense one where given: the report's `evaluation` and `bench`."""
    from aerogel.eval import run as measurements
    from aerogel.eval.settings import BenchSettings
    from aerogel.model.source import resolve

    target = resolve(model)
    dense = resolve(against) if against is not None else None
    place = pick_device(device)
    found: dict[str, Any] = {}
    if evaluate is not None:
        ready = prepared if prepared is not None else _prepare(dense or target, evaluate)
        found["evaluation"] = measurements.evaluate(
            target, dense, quality_settings(evaluate, dense is not None), device=place, progress=progress, **ready
        )
    if bench is not None:
        settings = BenchSettings(**bench.model_dump())
        found["bench"] = measurements.benchmark(target, dense, settings, device=place, progress=progress)
    return found


def quality_settings(section: Evaluate, paired: bool) -> Any:
    """The evaluate section as `aerogel.eval` takes it; divergence needs a second model."""
    from aerogel.eval.settings import QualitySettings

    values = section.model_dump(exclude={"perplexity", "divergence"})
    return QualitySettings(**values, perplexity=section.perplexity is not None, divergence=section.divergence and paired)


def pick_device(name: str) -> str:
    """`auto` as cuda where there is a GPU, else cpu; any other name checked. Raises `BadInput` for what is not there."""
    import torch

    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise BadInput(f"unknown device '{name}'; write auto, cpu, cuda or cuda:N")
    if kind == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"device '{name}': torch finds no CUDA GPU here; use --device cpu")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise BadInput(f"device '{name}': there are {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return name


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """The report as JSON, as a page and as JUnit XML, beside the checkpoint, and the model card renewed."""
    from aerogel.eval.card import card
    from aerogel.eval.html import write_html
    from aerogel.eval.junit import write_junit
    from aerogel.eval.report import write_report, write_text

    write_report(folder / REPORT, report)
    write_html(folder / PAGE, report)
    write_text(folder / "README.md", card(report))
    if report.get("gate"):
        write_junit(folder / VERDICT, report["gate"], suite=folder.name, seconds=float(report.get("seconds") or 0.0))


def tokenizer_of(folder: Path) -> Callable[[], Any]:
    """Loads the tokenizer of a checkpoint when called. The call raises `BadInput` when there is none."""

    def call() -> Any:
        try:
            return _tokenizer_class(folder).from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise BadInput(f"{folder} has no tokenizer that loads ({str(error).splitlines()[0]}); add its files") from error

    return call


def _tokenizer_class(folder: Path) -> Any:
    """The class that loads the tokenizer: transformers' automatic one, or what that would choose for a Llama whose files name
    no class of their own. Choosing reads the model's config, which imports all that models need: two seconds and 150 MB."""
    named = [folder / "config.json", folder / "tokenizer_config.json", folder / "tokenizer.json"]
    if all(file.is_file() for file in named):
        model, tokenizer = (json.loads(file.read_text("utf-8")) for file in named[:2])
        generic = tokenizer.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
        if generic and "auto_map" not in tokenizer and model.get("model_type") == "llama":
            return load("transformers:PreTrainedTokenizerFast")
    return load("transformers:AutoTokenizer")


def _prepare(model: str | Path, section: Evaluate | None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Text and tasks of an evaluation, checked and tokenized before hours of work depend on them."""
    if section is None:
        return {}
    from aerogel.model.calibration import load_tokens
    from aerogel.model.source import resolve

    tokenizer = tokenizer_of(resolve(model, trust_remote_code=trust_remote_code))
    if section.tasks:
        load("aerogel.eval.tasks:Suite")(section.tasks, limit=section.limit, shots=section.shots, seed=section.seed)
    if section.perplexity is None:
        return {"tokenizer": tokenizer}
    text = section.perplexity
    tokens = load_tokens(
        text.source,
        tokenizer,
        rows=text.windows,
        length=text.sequence_length,
        seed=None,
        purpose="evaluation",
        column=text.column,
        bos=text.bos,
    )
    return {"tokenizer": tokenizer, "ids_WT": tokens.ids, "source": tokens.facts()}
