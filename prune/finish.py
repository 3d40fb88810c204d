"""What every pruning method does before and after its own idea: checks, the mask, the optional refit, the loss.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.model.layer import Layer
from aerogel.prune.patterns import Pattern
from aerogel.prune.refit import refit_rows
from aerogel.quantize.problem import check_weight, prepare, relative_loss, second_moment


def check(layer: Layer, pattern: Pattern, method: str) -> None:
    """Raises `BadInput` or `RunFailed` for what cannot be pruned."""
    if layer.codes is not None:
        raise BadInput(f"{layer.name} is quantized already; write the prune stage before the quantize stage")
    check_weight(layer, method)
    pattern.check(layer.name, *layer.weight_NK.shape)


def with_earlier_mask(score_NK: Tensor, layer: Layer) -> Tensor:
    """Scores in which weights that an earlier stage pruned come lowest."""
    return score_NK if layer.mask_NK is None else score_NK.masked_fill(~layer.mask_NK, -torch.inf)


def finish(layer: Layer, weight_NK: Tensor, mask_NK: Tensor, *, refit: bool, damping: float, method: str) -> Layer:
    """The pruned layer: kept weights refitted if asked, its loss where the data for it exist."""
    notes: dict[str, object] = {"sparsity": 1 - float(mask_NK.float().mean())}
    weight_NK = weight_NK * mask_NK
    moment_KK = None if layer.stats is None else layer.stats.second_moment_KK
    if refit:
        moment_KK = second_moment(layer, f"{method} (refit)")
        problem = prepare(moment_KK, name=layer.name, damping=damping, act_order=False)
        weight_NK, iterations = refit_rows(layer.weight_NK.float(), problem.h_KK, mask_NK, weight_NK)
        notes |= {**problem.notes, "refit_iterations": iterations}
    loss = None if moment_KK is None else relative_loss(layer.weight_NK, weight_NK, moment_KK)
    return layer.with_(weight_NK=weight_NK, mask_NK=mask_NK, loss=loss, notes=notes)
