"""Perplexity of both models, and how far the compressed one strays from the dense one: KL and top-1 agreement.

Shape legend: W windows, T tokens per window, C tokens per chunk, D hidden size, V vocabulary.

The text is cut into W windows of T tokens that do not overlap; within a window every token but the first is predicted
from the ones before it, so W * (T - 1) predictions are scored. With p the dense and q the compressed distribution,

    perplexity = exp(mean over predictions of -log q(token))
    KL         = mean of sum_v p(v) (log p(v) - log q(v))      in nats per token, of dense from compressed
    top-1      = share of predictions with argmax p = argmax q

KL and top-1 compare the models with each other and not with the text, so they show damage that a perplexity, which
averages luck with loss, can hide. Standard errors are those of the mean over windows: tokens of one text depend on each
other, windows much less. The relative increase of perplexity has its own error from the paired differences per window,
which is far smaller than what the errors of the two perplexities suggest.

Cost: one forward pass per model, two heads per token. Logits exist for one chunk at a time (`body.py`), and with
`evaluate_pair` only one of the two models is in memory. Sums are accumulated in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from aerogel.errors import BadInput, RunFailed
from aerogel.eval.body import HiddenStore, Split, vocabulary_of
from aerogel.eval.settings import Numerics
from aerogel.eval.significance import exponential, mean_and_error
from aerogel.model.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_PER_CHUNK = 1 << 24
"""Logits of one model held at once: 64 MiB of float32, whatever the vocabulary."""

WhileLoaded: TypeAlias = "Callable[[str, PreTrainedModel], None]"
"""Called as `also("dense" | "compressed", model)` while that model is whole and in memory."""


@dataclass
class Scores:
    """Per window means over its T-1 predictions, and the KL of every single prediction."""

    loss_W: list[float] = field(default_factory=list)
    dense_loss_W: list[float] = field(default_factory=list)
    kl_W: list[float] = field(default_factory=list)
    same_W: list[float] = field(default_factory=list)
    kl_tokens: list[Tensor] = field(default_factory=list)


def check_windows(ids_WT: Tensor, vocabulary: int) -> None:
    """Raise BadInput unless `ids_WT` is int64 [W >= 1, T >= 2] with every id inside the vocabulary."""
    if ids_WT.dtype != torch.int64 or ids_WT.ndim != 2 or ids_WT.shape[0] < 1 or ids_WT.shape[1] < 2:
        raise BadInput(
            "evaluation needs token ids of shape [windows, tokens], int64, at least one window of two tokens; "
            f"found {ids_WT.dtype} {tuple(ids_WT.shape)}: use a longer text or shorter windows"
        )
    low, high = int(ids_WT.min()), int(ids_WT.max())
    if low < 0 or high >= vocabulary:
        raise BadInput(
            f"evaluation text has token ids from {low} to {high}, the model's vocabulary ends at {vocabulary - 1}: "
            "tokenize the text with the tokenizer of this model"
        )


def _log_probabilities(split: Split, hidden_CD: Tensor, window: int, which: str) -> Tensor:
    """float32 [C, V]; raises RunFailed on a NaN, naming the window. (-inf is legal: some models mask ids that way.)"""
    log_CV = torch.log_softmax(split.logits(hidden_CD), dim=-1)
    if torch.isnan(log_CV).any():
        raise RunFailed(
            f"the {which} model gives logits that are not finite in evaluation window {window}: its weights are broken "
            "or overflow in its data type (try evaluate.numerics: float32)"
        )
    return log_CV


def _loss(log_CV: Tensor, target_C: Tensor) -> float:
    return -float(log_CV.gather(1, target_C[:, None]).double().sum())


def divergence(log_p_CV: Tensor, log_q_CV: Tensor) -> Tensor:
    """KL of each row, float32 [C], from log probabilities; ids that p gives no probability count nothing."""
    terms_CV = log_p_CV.exp() * (log_p_CV - log_q_CV)
    return torch.where(torch.isneginf(log_p_CV), 0.0, terms_CV).sum(-1)


def _chunks(predictions: int, vocabulary: int) -> list[slice]:
    size = max(1, LOGITS_PER_CHUNK // vocabulary)
    return [slice(start, min(start + size, predictions)) for start in range(0, predictions, size)]


@torch.inference_mode()
def record(split: Split, ids_WT: Tensor, *, batch: int = 1, progress: Progress = silent) -> HiddenStore:
    """Run the body over all windows, `batch` at a time, and keep the hidden states on the CPU (or on disk)."""
    store: HiddenStore | None = None
    for start in range(0, len(ids_WT), batch):
        hidden = split.hidden(ids_WT[start : start + batch])
        store = store or HiddenStore(len(ids_WT), hidden[0])
        store.states_WTD[start : start + batch] = hidden.cpu()
        progress("perplexity: dense", min(start + batch, len(ids_WT)), len(ids_WT))
    if store is None:
        raise BadInput("evaluation has no windows: use a longer text or shorter windows")
    return store


@torch.inference_mode()
def score(
    split: Split,
    ids_WT: Tensor,
    *,
    dense: tuple[Split, HiddenStore] | None = None,
    batch: int = 1,
    progress: Progress = silent,
) -> Scores:
    """Score the windows with one model and compare it with `dense` (a head and recorded states) where that is given."""
    scores = Scores()
    name = "perplexity: compressed" if dense else "perplexity"
    for start in range(0, len(ids_WT), batch):
        hidden_WTD = split.hidden(ids_WT[start : start + batch])
        for offset in range(len(hidden_WTD)):
            window = start + offset
            recorded = (dense[0], dense[1].states_WTD[window]) if dense else None
            _score_window(scores, split, hidden_WTD[offset], ids_WT[window], window, recorded)
        progress(name, min(start + batch, len(ids_WT)), len(ids_WT))
    return scores


def _score_window(
    scores: Scores, split: Split, hidden_TD: Tensor, ids_T: Tensor, window: int, dense: tuple[Split, Tensor] | None
) -> None:
    loss = dense_loss = 0.0
    kl: list[Tensor] = []
    same = 0
    predictions = len(ids_T) - 1
    for part in _chunks(predictions, vocabulary_of(split.model)):
        log_q_CV = _log_probabilities(split, hidden_TD[part], window, "compressed" if dense else "evaluated")
        target_C = ids_T[1:][part].to(log_q_CV.device)
        loss += _loss(log_q_CV, target_C)
        if dense is None:
            continue
        log_p_CV = _log_probabilities(dense[0], dense[1][part], window, "dense").to(log_q_CV.device)
        if log_p_CV.shape[1] != log_q_CV.shape[1]:
            raise BadInput(
                f"the dense model has {log_p_CV.shape[1]} logits, the compressed one {log_q_CV.shape[1]}: "
                "compare a model with the one it was made from"
            )
        dense_loss += _loss(log_p_CV, target_C)
        kl.append(divergence(log_p_CV, log_q_CV).double().cpu())
        same += int((log_p_CV.argmax(-1) == log_q_CV.argmax(-1)).sum())
    scores.loss_W.append(loss / predictions)
    if dense is not None:
        scores.dense_loss_W.append(dense_loss / predictions)
        scores.kl_W.append(float(torch.cat(kl).sum()) / predictions)
        scores.same_W.append(same / predictions)
        scores.kl_tokens.extend(kl)


def perplexity_of(loss_W: list[float]) -> dict[str, object]:
    """Perplexity with its standard error (delta method: perplexity times the error of the mean loss)."""
    mean, error = mean_and_error(loss_W)
    value = exponential(mean)
    return {
        "perplexity": value,
        "perplexity_se": None if error is None else value * error,
        "loss": mean,
        "loss_se": error,
        "loss_by_window": loss_W,
    }


def increase_of(dense_loss_W: list[float], loss_W: list[float]) -> dict[str, float | None]:
    """Relative increase of perplexity (0.05 is five per cent) with the error from differences paired by window."""
    mean, error = mean_and_error([after - before for before, after in zip(dense_loss_W, loss_W, strict=True)])
    ratio = exponential(mean)
    return {"increase": ratio - 1, "increase_se": None if error is None else ratio * error}


def divergence_of(scores: Scores) -> dict[str, object]:
    """KL (mean, error; median, 99th percentile, largest of single predictions) and top-1 agreement with its error."""
    kl, kl_error = mean_and_error(scores.kl_W)
    same, same_error = mean_and_error(scores.same_W)
    tokens = torch.cat(scores.kl_tokens).sort().values
    return {
        "kl": kl,
        "kl_se": kl_error,
        "kl_median": float(tokens[len(tokens) // 2]),
        "kl_p99": float(tokens[math.ceil(0.99 * len(tokens)) - 1]),
        "kl_max": float(tokens[-1]),
        "top1": same,
        "top1_se": same_error,
        "kl_by_window": scores.kl_W,
        "unit": "nats per token",
    }


def scheme(ids_WT: Tensor, source: Mapping[str, object], numerics: Numerics) -> dict[str, object]:
    """How the text was scored: what `source` says about it (`source`, `bos`, `sha256`, ...) and the windows."""
    windows, length = ids_WT.shape
    return {
        "source": "unnamed token ids",
        "bos": "as in the given ids: none was added",
        **source,
        "windows": windows,
        "sequence_length": length,
        "overlap": 0,
        "predictions": windows * (length - 1),
        "numerics": numerics,
    }


def evaluate_pair(
    load_dense: Callable[[], PreTrainedModel],
    load_compressed: Callable[[], PreTrainedModel],
    ids_WT: Tensor,
    *,
    source: Mapping[str, object] | None = None,
    numerics: Numerics = "stored",
    batch: int = 1,
    also: WhileLoaded | None = None,
    progress: Progress = silent,
) -> dict[str, object]:
    """Perplexity of both models, KL and top-1 agreement, with one of the two in memory at a time.

    load_dense, load_compressed: give the model ready to run; called once each, dense first, which is freed but for its
    head before the second is loaded. ids_WT: int64 [W, T]. source: what the text is. numerics: what the loaders
    were told, for the result. also: run while each model is loaded (tasks, memory). Returns `perplexity` and
    `divergence` as the report has them. Raises BadInput for unusable ids, RunFailed for logits that are not numbers.
    """
    dense = Split(load_dense())
    check_windows(ids_WT, vocabulary_of(dense.model))
    store = record(dense, ids_WT, batch=batch, progress=progress)
    if also is not None:
        also("dense", dense.model)
    dense.drop_body()
    try:
        compressed = Split(load_compressed())
        check_windows(ids_WT, vocabulary_of(compressed.model))
        scores = score(compressed, ids_WT, dense=(dense, store), batch=batch, progress=progress)
        if also is not None:
            also("compressed", compressed.model)
    finally:
        store.close()
    return {
        "perplexity": {
            **scheme(ids_WT, source or {}, numerics),
            "dense": perplexity_of(scores.dense_loss_W),
            "compressed": perplexity_of(scores.loss_W),
            **increase_of(scores.dense_loss_W, scores.loss_W),
        },
        "divergence": divergence_of(scores),
    }


def evaluate_one(
    model: PreTrainedModel,
    ids_WT: Tensor,
    *,
    source: Mapping[str, object] | None = None,
    numerics: Numerics = "stored",
    batch: int = 1,
    progress: Progress = silent,
) -> dict[str, object]:
    """Perplexity of one model alone, as `perplexity` with the single entry `model`. Raises as `evaluate_pair`."""
    check_windows(ids_WT, vocabulary_of(model))
    scores = score(Split(model), ids_WT, batch=batch, progress=progress)
    return {"perplexity": {**scheme(ids_WT, source or {}, numerics), "model": perplexity_of(scores.loss_W)}}
