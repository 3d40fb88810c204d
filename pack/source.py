"""Reading quantized checkpoints, whoever wrote them: which tensors belong to one weight, and what they decode to.

A `Source` is made from a `quantization_config`. It groups the checkpoint's tensor names into packed weights, tells the
`Scheme` of each, and turns the tensors of one into `Columns`: codes on one of our grids, exactly, whatever the layout
they came in. Formats with activation order assign columns to groups through an index; since the groups are of equal
size, sorting the columns by group gives ordinary codes and one permutation of the input:

    y = W x = W[:, order] x[order]

The rare index whose groups are not of equal size becomes one scale per column, which decodes exactly but is not worth
keeping packed.

Shape legend: N out features, K in features, G groups along K.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.lazy import load
from aerogel.pack import SOURCES
from aerogel.pack.scheme import NotServed, Scheme
from aerogel.quantize.grids import Codes, IntGrid

if TYPE_CHECKING:
    from aerogel.model.reader import Entry


@dataclass(frozen=True, slots=True)
class Columns:
    """A decoded packed weight whose columns may stand in another order.

    codes: [N, K]; its column j is column `order[j]` of the weight.
    order: int64 [K] permutation, or None when the columns stand in their own order.
    """

    codes: Codes
    order: Tensor | None = None

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] in `dtype`, columns in their own order."""
        weight = self.codes.decode(dtype)
        if self.order is None:
            return weight
        restored = torch.empty_like(weight)
        restored[:, self.order] = weight
        return restored


class Source(ABC):
    """One way of storing quantized checkpoints. Subclasses are made from the `quantization_config` dict.

    Raises (on construction):
        NotServed: the config is valid but uses something aerogel does not run; the message says what.
    """

    suffixes: frozenset[str]
    """Local names of the tensors that make a packed weight."""
    markers: ClassVar[frozenset[str]]
    """Local names of which at least one shows that the weight beside it is packed."""
    index: ClassVar[str]
    """Local name of the column-to-group index."""
    turned: ClassVar[bool] = False
    """Whether matrices of whole stacks lie as [K, N], as in the models whose stacks these are."""

    @abstractmethod
    def __init__(self, config: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def scheme(self, names: Sequence[str], header: Mapping[str, torch.dtype], class_names: Sequence[str]) -> Scheme:
        """How the weight called `names` is quantized.

        Args:
            names: what it is called on disk and, where that differs, in the model.
            header: dtype of each of its tensors, by local name.
            class_names: the classes it counts as.

        Raises:
            BadInput: the config does not cover this weight.
        """

    def scheme_of(self, names: Sequence[str], entries: Mapping[str, Entry], class_names: Sequence[str]) -> Scheme:
        """As `scheme`, for sources that must see the shapes of its tensors as well: entries of the file by local name."""
        return self.scheme(names, {local: entry.dtype for local, entry in entries.items()}, class_names)

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Columns:
        """The codes of one weight from its tensors by local name. Raises `BadInput` when shapes disagree."""

    def columns(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Columns:
        """As `read`, for sources that must know which weight it is."""
        return self.read(tensors, scheme)

    def plain_groups(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Tensors that are not packed but stored in parts: {name of the dense tensor: {local name: tensor name}}. None."""
        return {}

    def of_expert(self, tensors: Mapping[str, Tensor], expert: int) -> dict[str, Tensor]:
        """The tensors of one expert among those of a whole stack, as `read` wants them."""
        return {local: tensor[expert] for local, tensor in tensors.items()}

    def opened(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one weight as `read` and the format want them, by local name; "" is one that is not packed."""
        return dict(tensors)

    def groups(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Packed weights among tensor names: {weight name: {local name: tensor name}}, in order of appearance."""
        found: dict[str, dict[str, str]] = {}
        for name in names:
            prefix, _, local = name.rpartition(".")
            if local in self.suffixes:
                found.setdefault(prefix, {})[local] = name
        return {prefix: held for prefix, held in found.items() if self.markers & held.keys()}


def open_source(config: Mapping[str, Any]) -> Source:
    """The source that reads checkpoints with this `quantization_config`.

    Raises:
        NotServed: a `quant_method`, or something in the config, that aerogel does not read; the message names it.
    """
    method = "entropy" if config.get("entropy") else str(config.get("quant_method"))
    if method not in SOURCES:
        raise NotServed(f"quant_method {method!r} is not read by aerogel; it reads {', '.join(sorted(SOURCES))}")
    source: Source = load(SOURCES[method])(config)
    return source


def order_of(index_K: Tensor, group_size: int | None) -> Tensor | None:
    """The permutation that sorts columns by group.

    Args:
        index_K: integer [K], the group of each column.
        group_size: columns per group, None when there is one group.

    Returns:
        int64 [K], or None when the columns are sorted already.

    Raises:
        UnevenGroups: a group other than the last has not exactly `group_size` columns.
    """
    index_K = index_K.long()
    natural = torch.arange(len(index_K), device=index_K.device) // (group_size or max(len(index_K), 1))
    if torch.equal(index_K, natural):
        return None
    order: Tensor = torch.argsort(index_K, stable=True)
    if not torch.equal(index_K[order], natural):
        raise UnevenGroups(f"the column index has groups that are not {group_size} columns each")
    return order


class UnevenGroups(BadInput):
    """A column index whose groups differ in size."""


def arranged(values_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, grid: IntGrid, index_K: Tensor | None) -> Columns:
    """Codes with a column index as `Columns`: sorted by group, or with one scale per column where sizes are uneven."""
    if index_K is None:
        return Columns(Codes(values_NK=values_NK, scale_NG=scale_NG, zero_NG=zero_NG, grid=grid))
    if len(index_K) != values_NK.shape[1] or int(index_K.min()) < 0 or int(index_K.max()) >= scale_NG.shape[1]:
        raise BadInput(
            f"a column index of {len(index_K)} entries up to {int(index_K.max())} does not fit {values_NK.shape[1]}"
            f" columns in {scale_NG.shape[1]} groups; the file is damaged"
        )
    try:
        order = order_of(index_K, grid.group_size)
    except UnevenGroups:
        single = IntGrid(bits=grid.bits, group_size=1, symmetric=grid.symmetric, scale_dtype=grid.scale_dtype)
        wide = index_K.long()
        zero = None if zero_NG is None else zero_NG[:, wide]
        return Columns(Codes(values_NK=values_NK, scale_NG=scale_NG[:, wide], zero_NG=zero, grid=single))
    values_NK = values_NK if order is None else values_NK[:, order]
    return Columns(Codes(values_NK=values_NK, scale_NG=scale_NG, zero_NG=zero_NG, grid=grid), order)


def scale_dtype(header: Mapping[str, torch.dtype], local: str, name: str) -> torch.dtype:
    """The dtype of a weight's scales from the file's header. Raises `BadInput` when it has none."""
    if local not in header:
        raise BadInput(f"{name} is quantized but has no tensor {local!r}; the checkpoint is not whole, get it again")
    return header[local]


def integer_grid(scheme: Scheme) -> IntGrid:
    """The scheme's grid, which must be an integer one. Raises `BadInput`."""
    if not isinstance(scheme.grid, IntGrid):
        raise BadInput("the config says fp8 where the file holds packed integers; the config does not belong to this file")
    return scheme.grid
