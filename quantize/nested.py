"""Nested precision: a base of few bits and binary planes that each halve what is left; every prefix is a model.

The base is a few planes and an offset solved by GPTQ; then, plane by plane, the residual W - Q is approximated by
alpha b with b in {-1, +1}, signs by the same solver and one alpha per group by least squares on the layer's output:

    Q_k = Q_(k-1) + alpha_k b_k,    alpha_k, b_k = argmin tr((W - Q_k) H (W - Q_k)^T)

One file of k planes serves any width from the base's up, and a mixture of experts can load more planes for the experts that
matter (MWQ of D2MoE, 2025; the idea of nested widths is Any-Precision LLM's, Park et al. 2024, arXiv 2402.10517). D2MoE
has an integer base. Planes of their own scales take as many bits (two scales and an offset for a scale and a zero point) and
leave a sixth less error, at every width; and their offset has 16 bits, where an integer's zero point times its scale
needs more.

Cost: one GPTQ solve for the base and one per further plane.
Shape legend: N out features, K in features, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from aerogel.errors import BadInput
from aerogel.model.layer import Layer, Need
from aerogel.quantize.codes import Codes, Grid
from aerogel.quantize.gptq import Gptq
from aerogel.quantize.planes import PlaneGrid, first_planes
from aerogel.quantize.problem import relative_loss, second_moment


@dataclass(frozen=True, kw_only=True)
class Nested:
    """Stage `Layer -> Layer`.

    grid: the planes; `bits` of them. They have an offset, as wide as their scales where nothing is written.
    base_bits: planes of the smallest model.
    act_order, damping, refit: of the solver, as for gptq.
    """

    makes: ClassVar[str] = "planes"
    needs: ClassVar[frozenset[Need]] = frozenset({"second_moment"})

    grid: Grid
    base_bits: int = 2
    act_order: bool = True
    damping: float = 0.05
    refit: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.grid, PlaneGrid):
            raise BadInput("method nested makes bit planes; write format: planes")
        if self.grid.power_of_two or self.grid.block_rows != 1:
            raise BadInput("method nested takes neither power_of_two nor block_rows")
        if self.grid.offset == "none":
            object.__setattr__(self, "grid", replace(self.grid, offset="scale"))
        if not 2 <= self.base_bits <= self.grid.bits:
            raise BadInput(f"base_bits must lie between 2 and bits ({self.grid.bits}), found {self.base_bits}")

    def __call__(self, layer: Layer) -> Layer:
        """The layer with codes. Raises `RunFailed` where calibration saw nothing of it."""
        return self.call_group((layer,))[0]

    def call_group(self, layers: Sequence[Layer]) -> list[Layer]:
        """Several layers; those whose statistics are the same tensor share the factorisations."""
        for layer in layers:
            if layer.mask_NK is not None:
                raise BadInput(f"{layer.name} is pruned, and bit planes cannot hold zeros; write method: gptq, format: int")
        grid = self._planes()
        found = [_codes(solved) for solved in self._solver(grid.first(self.base_bits)).call_group(layers)]
        solver = self._solver(replace(grid, bits=1, offset="none"))
        for _ in range(self.base_bits, self.grid.bits):
            rests = [
                layer.with_(weight_NK=layer.weight_NK.float() - codes.decode())
                for layer, codes in zip(layers, found, strict=True)
            ]
            planes = [_codes(solved) for solved in solver.call_group(rests)]
            found = [joined(codes, plane) for codes, plane in zip(found, planes, strict=True)]
        return [self._done(layer, codes) for layer, codes in zip(layers, found, strict=True)]

    def _planes(self) -> PlaneGrid:
        if not isinstance(self.grid, PlaneGrid):
            raise TypeError("the constructor takes bit planes only")
        return self.grid

    def _solver(self, grid: Grid) -> Gptq:
        return Gptq(grid=grid, act_order=self.act_order, damping=self.damping, refit=self.refit)

    def _done(self, layer: Layer, codes: Codes) -> Layer:
        """The layer with all planes, and the loss of every prefix in its notes."""
        h_KK = second_moment(layer, "nested")
        losses = {
            f"loss_at_{bits}_bits": relative_loss(layer.weight_NK, first_planes(codes, bits).decode(), h_KK)
            for bits in range(self.base_bits, self.grid.bits + 1)
        }
        return layer.with_(weight_NK=codes.decode(), codes=codes, loss=losses[f"loss_at_{self.grid.bits}_bits"], notes=losses)


def joined(codes: Codes, plane: Codes) -> Codes:
    """Planes with one more plane behind them."""
    grid = codes.grid
    if not isinstance(grid, PlaneGrid):
        raise BadInput(f"joining planes works on bit planes, not on a {type(grid).__name__}; write format: planes")
    wider = replace(grid, bits=grid.bits + 1)
    return Codes(
        values_NK=(codes.values_NK << 1) | plane.values_NK,
        scale_NG=torch.cat([codes.scale_NG, plane.scale_NG], -1),
        zero_NG=codes.zero_NG,
        grid=wider,
    )


def _codes(layer: Layer) -> Codes:
    if layer.codes is None:
        raise BadInput(f"{layer.name} came back from its solver without codes; this is a mistake in aerogel")
    return layer.codes
