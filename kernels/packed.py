"""What modules share whose weights stay packed: tensors that move and are never cast, and a kernel's layout that follows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from aerogel.kernels.problem import Problem
from aerogel.pack.scheme import Scheme


class Uncast(nn.Module):
    """A module whose buffers keep their types: `model.half()` must not round scales."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves, but never casts."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in kept.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class Packed(Uncast, ABC):
    """A weight packed by `scheme`, in the layout of the file or, once it is prepared, of a kernel.

    in_features, out_features: K and N.
    compute_dtype: of the activations that `prepare` plans for.
    kernel_name: who runs it; None until `prepare` has chosen.
    """

    in_features: int
    out_features: int
    scheme: Scheme
    compute_dtype: torch.dtype
    kernel_name: str | None
    _problem: Problem | None

    @abstractmethod
    def prepare(self, dtype: torch.dtype | None = None) -> Self:
        """Chooses the kernel for activations of `dtype` and brings the weight into its layout."""

    @abstractmethod
    def restore(self) -> None:
        """Brings the weight back into the layout of the file; `prepare` undoes it."""

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return next(iter(self._tensors().values())).device

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes these tensors as the weight's, in the place of those it has."""
        for name in self._tensors():
            del self._buffers[name]
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def extra_repr(self) -> str:
        """Shape, numbers and kernel."""
        grid = self.scheme.grid
        group = "channel" if grid.group_size is None else grid.group_size
        bits = getattr(grid, "bits", "?")
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" format={self.scheme.format}, bits={bits}, group={group}, kernel={self.kernel_name or 'not chosen'}"
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {name: held for name, held in self._buffers.items() if held is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A new device may mean a new kernel."""
        prepared = self._problem is not None
        self.restore()
        dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.device)).dtype
        super()._apply(fn, recurse)
        self.compute_dtype = dtype
        return self.prepare() if prepared and self.device.type != "meta" else self
