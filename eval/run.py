"""`aerogel.evaluate` and `aerogel.benchmark`: a checkpoint, alone or against the dense one it was made from."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.eval.memory import disk_bytes, peak_bytes, tensor_bytes
from aerogel.eval.quality import evaluate_one, evaluate_pair, increase_of
from aerogel.eval.settings import Activations, BenchSettings, Numerics, QualitySettings
from aerogel.eval.speed import Model, time_models
from aerogel.eval.tasks import Suite
from aerogel.kernels.decode.direct import Direct
from aerogel.kernels.decode.merge import merge, merging
from aerogel.kernels.linear import round_activations
from aerogel.model.direct import load_to_decode
from aerogel.model.pipeline import tokenizer_of
from aerogel.model.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Load(Protocol):
    """Loads a checkpoint ready to run: `dtype` None keeps the stored one."""

    def __call__(self, path: Path, /, *, device: str, dtype: torch.dtype | None) -> PreTrainedModel:
        """The model of `path` on `device`."""


class LoadToDecode(Protocol):
    """The same for models that only decode."""

    def __call__(self, path: Path, /, *, device: str, dtype: torch.dtype | None) -> Model:
        """The model of `path` on `device`."""


def load_checkpoint(path: Path, /, *, device: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """What `aerogel.load` does, imported only when a model is loaded."""
    from aerogel.model.loading import load

    model: PreTrainedModel = load(path, device=device, dtype=dtype)
    return model


def _loaders(
    path: Path, against: Path | None, device: str, numerics: Numerics, load: Load, activations: Activations = "stored"
) -> dict[str, Callable[[], PreTrainedModel]]:
    """One loader for each model, dense first; the names are those of the report. `activations`: of the model that is looked at,
    never of the one it is compared with."""
    dtype = torch.float32 if numerics == "float32" else None

    def loader(place: Path, rounded: bool = False) -> Callable[[], PreTrainedModel]:
        def ready() -> PreTrainedModel:
            model = load(place, device=device, dtype=dtype)
            model.train(mode=False)
            if rounded:
                round_activations(model)
            return model

        return ready

    measured = loader(path, rounded=activations == "int8")
    return {"model": measured} if against is None else {"dense": loader(against), "compressed": measured}


def _decoders(
    path: Path, against: Path | None, device: str, settings: BenchSettings, load: LoadToDecode | None
) -> dict[str, Callable[[], Model]]:
    """The same for models that only decode: merged where that is wanted, and without transformers where possible."""
    dtype = torch.float32 if settings.numerics == "float32" else None

    def loader(place: Path, loop: str, rounded: bool = False) -> Callable[[], Model]:
        def ready() -> Model:
            if load is None:
                model = load_to_decode(place, loop=loop, device=device, dtype=dtype, merge=settings.merge)
            else:
                with merging(settings.merge):
                    model = load(place, device=device, dtype=dtype)
                if settings.merge and not isinstance(model, Direct):
                    merge(model)
            model.train(mode=False)
            if rounded:
                round_activations(model)
            return model

        return ready

    measured = loader(path, settings.loop, rounded=settings.activations == "int8")
    return {"model": measured} if against is None else {"dense": loader(against, settings.loop), "compressed": measured}


def _disk(path: Path, against: Path | None) -> dict[str, dict[str, int]]:
    places = {"model": path} if against is None else {"dense": against, "compressed": path}
    return {name: disk_bytes(place) for name, place in places.items()}


def measured(quality: QualitySettings | None, bench: BenchSettings | None, *, size: bool = True) -> set[str]:
    """Which measurements a run with these settings against a dense model makes, for `gate.check`."""
    found = {"memory"} if quality or bench else set()
    if quality is not None:
        found |= {"perplexity"} if quality.perplexity else set()
        found |= {"divergence"} if quality.perplexity and quality.divergence else set()
        found |= {"tasks"} if quality.tasks else set()
    return found | ({"bench"} if bench else set()) | ({"size"} if size or quality or bench else set())


class _Visitor:
    """What is measured while each model is in memory anyway: its size there, and its answers to the tasks."""

    def __init__(self, settings: QualitySettings, tokenizer: Callable[[], PreTrainedTokenizerBase], progress: Progress) -> None:
        self.settings, self.progress = settings, progress
        self.memory: dict[str, dict[str, int]] = {}
        self.answers: dict[str, dict[str, Any]] = {}
        self.suite: Suite | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        if settings.tasks:
            # Before any model is loaded: a misspelt task should not cost an hour.
            self.suite = Suite(settings.tasks, limit=settings.limit, shots=settings.shots, seed=settings.seed)
            self.tokenizer = tokenizer()

    def __call__(self, which: str, model: PreTrainedModel) -> None:
        self.memory[which] = {"bytes": tensor_bytes(model)}
        if self.suite is not None and self.tokenizer is not None:
            self.answers[which] = self.suite.answers(
                model, self.tokenizer, batch=self.settings.batch, which=which, progress=self.progress
            )

    def tasks(self) -> dict[str, object]:
        if self.suite is None:
            return {}
        if "model" in self.answers:
            return self.suite.alone(self.answers["model"])
        return self.suite.compare(self.answers["dense"], self.answers["compressed"])


def evaluate(
    path: Path,
    against: Path | None,
    settings: QualitySettings,
    *,
    ids_WT: Tensor | None = None,
    source: Mapping[str, object] | None = None,
    device: str = "cpu",
    load: Load = load_checkpoint,
    tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None,
    progress: Progress = silent,
) -> dict[str, object]:
    """Measure the quality of the checkpoint `path`, beside the dense checkpoint `against` where one is given.

    Only one of the two models is in memory at a time. ids_WT: the text to score, int64 [windows, tokens]; needed for
    perplexity and divergence. source: what that text is (`source`, `bos`, `sha256`), repeated in the result.
    tokenizer: gives the tokenizer of the tasks; by default the one of `path`.

    Returns the report's `evaluation`: `perplexity`, `divergence`, `tasks`, `memory` and `disk`; what was not asked
    for is left out. Without `against` each holds the one entry `model`. Raises BadInput for an unknown task or
    unusable ids.
    """
    if settings.perplexity and ids_WT is None:
        raise BadInput("perplexity needs token ids to score: pass ids_WT, or set evaluate.perplexity: null")
    visitor = _Visitor(settings, tokenizer or tokenizer_of(path), progress)
    loaders = _loaders(path, against, device, settings.numerics, load, activations=settings.activations)
    result: dict[str, object] = {}
    if not settings.perplexity or ids_WT is None:
        _visit(loaders, visitor)
    else:
        result = _scores(loaders, ids_WT, settings, source, visitor, progress)
        if settings.activations == "int8":
            exact = _loaders(path, None, device, settings.numerics, load)["model"]()
            add_rounding(result, evaluate_one(exact, ids_WT, batch=settings.batch, progress=progress))
    if tasks := visitor.tasks():
        result["tasks"] = tasks
    return {
        **result,
        "numerics": settings.numerics,
        "activations": settings.activations,
        "device": device,
        "memory": visitor.memory,
        "disk": _disk(path, against),
        "peak_bytes": peak_bytes(),
    }


def _visit(loaders: Mapping[str, Callable[[], PreTrainedModel]], visitor: _Visitor) -> None:
    """Shows the models to the visitor, one after another, where no text is scored."""
    for name, loader in loaders.items():
        model = loader()
        visitor(name, model)
        del model
        gc.collect()


def _scores(
    loaders: Mapping[str, Callable[[], PreTrainedModel]],
    ids_WT: Tensor,
    settings: QualitySettings,
    source: Mapping[str, object] | None,
    visitor: _Visitor,
    progress: Progress,
) -> dict[str, object]:
    """`perplexity`, and `divergence` where there are two models, on ids_WT, int64 [windows, tokens]; each model is shown to the
    visitor while it is in memory."""
    numerics, batch = settings.numerics, settings.batch
    if "dense" in loaders:
        dense, compressed = loaders["dense"], loaders["compressed"]
        result = evaluate_pair(
            dense, compressed, ids_WT, source=source, numerics=numerics, batch=batch, also=visitor, progress=progress
        )
        if not settings.divergence:
            del result["divergence"]
        return result
    model = loaders["model"]()
    visitor("model", model)
    result = evaluate_one(model, ids_WT, source=source, numerics=numerics, batch=batch, progress=progress)
    del model
    gc.collect()
    return result


def add_rounding(result: Mapping[str, Any], exact: Mapping[str, Any]) -> None:
    """Adds what int8 activations cost to `perplexity`: that of the same model without them (`exact`), and the increase."""
    perplexity = result["perplexity"]
    rounded = perplexity.get("compressed") or perplexity["model"]
    without = exact["perplexity"]["model"]
    perplexity["rounding"] = {"exact": without, **increase_of(without["loss_by_window"], rounded["loss_by_window"])}


def benchmark(
    path: Path,
    against: Path | None,
    settings: BenchSettings,
    *,
    device: str = "cpu",
    load: LoadToDecode | None = None,
    progress: Progress = silent,
) -> dict[str, object]:
    """Time the checkpoint `path`, interleaved with the dense checkpoint `against` where one is given.

    Both models are in memory at once. Returns the report's `bench`: load time, time to first token, prefill and decode
    tokens per second with medians and spread for each batch size, speed-ups, bytes in memory and on disk.
    """
    result = time_models(_decoders(path, against, device, settings, load), settings, progress)
    return {**result, "disk": _disk(path, against)}
