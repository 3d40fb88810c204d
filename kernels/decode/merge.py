"""One matmul for linears that read the same input: q, k and v; gate and up; whatever a model has.

    y_q, y_k, y_v = split(x @ [W_q; W_k; W_v].T)

Three launches become one, and a weight too small to fill a device on its own is read at full bandwidth beside the others.
Which linears those are is not listed: the model runs once on one token, with every linear answering zeros, and siblings
(linears of one parent module) that are handed the very same tensor form a group. So it holds for any architecture, costs
no weight, and works before weights are in their kernel's layout, or even there.

The model keeps its modules. Dense ones stay `nn.Linear`, their weights become views into the merged matrix; packed ones
become `Part`s, which give codes, dense weights and stored tensors of their rows when asked. The first of a group that is
called computes for all, the others take their columns.

A group is merged if the kernel of the merged weight is at least as good as those of its parts in the dispatcher's order.

Shape legend: N out features (of part i: N_i), K in features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from aerogel.errors import BadInput
from aerogel.kernels import layouts
from aerogel.kernels.dispatch import GEMM, choose
from aerogel.kernels.linear import Linear
from aerogel.kernels.problem import Problem
from aerogel.kernels.sidecars import SidecarLinear
from aerogel.pack.source import Columns
from aerogel.quantize.codes import Codes, stacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WANTED: ContextVar[bool] = ContextVar("aerogel_merging", default=False)


@contextmanager
def merging(wanted: bool = True) -> Iterator[None]:
    """Checkpoints loaded inside are merged before their weights are brought into a kernel's layout."""
    token = _WANTED.set(wanted)
    try:
        yield
    finally:
        _WANTED.reset(token)


def merging_wanted() -> bool:
    """Whether a checkpoint that is being loaded should be merged."""
    return _WANTED.get()


def siblings(model: PreTrainedModel) -> list[list[str]]:
    """Names of linears that share parent and input, in the order they are called."""
    linears = {name: module for name, module in model.named_modules() if _free(module)}
    parents = Counter(name.rpartition(".")[0] for name in linears)
    if max(parents.values(), default=0) < 2:
        return []  # none has a sibling: the model need not run
    seen: dict[tuple[str, int], list[str]] = {}
    alive: list[Tensor] = []  # keeps identities from being used twice

    def stand_in(name: str, module: Any) -> Callable[[Tensor], Tensor]:
        def answer(x: Tensor) -> Tensor:
            names = seen.setdefault((name.rpartition(".")[0], id(x)), [])
            if name not in names:
                names.append(name)
            alive.append(x)
            return x.new_zeros(*x.shape[:-1], module.out_features)

        return answer

    ids_11 = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    # Without a cache transformers looks whether positions are those of several sequences, which a meta tensor cannot tell.
    on_meta = model.device.type == "meta"
    with _replaced({module: stand_in(name, module) for name, module in linears.items()}), torch.inference_mode():
        model(input_ids=ids_11, use_cache=on_meta)
    return [names for names in seen.values() if len(names) > 1]


def _free(module: nn.Module) -> bool:
    """An ordinary linear that nobody has changed."""
    return type(module) in (nn.Linear, Linear, SidecarLinear) and "forward" not in vars(module)


@contextmanager
def _replaced(forwards: dict[Any, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def merge(model: PreTrainedModel, groups: Sequence[list[str]] | None = None) -> list[list[str]]:
    """Merges every group that can be; returns the names of each. groups: `siblings` of the model, where they are known."""
    done = []
    for names in siblings(model) if groups is None else groups:
        modules: list[Any] = [model.get_submodule(name) for name in names]
        if all(type(module) is nn.Linear for module in modules):
            merged = _merge_dense(modules)
        else:
            merged = all(type(module) in (Linear, SidecarLinear) for module in modules) and _merge_packed(modules)
        if merged:
            done.append(names)
    return done


class _Shared:
    """What the members of a group ask for their columns; remembers the last product until all have taken theirs."""

    def __init__(self, run: Callable[[Tensor], Tensor], widths: Sequence[int]) -> None:
        self.run = run
        self.spans = list(pairwise(accumulate(widths, initial=0)))
        self._x: Tensor | None = None
        self._y: Tensor | None = None
        self._left: set[int] = set()

    def columns(self, x: Tensor, index: int) -> Tensor:
        """Columns of member `index` of the product with `x`."""
        if self._x is not x or self._y is None or index not in self._left:
            self._x, self._y, self._left = x, self.run(x), set(range(len(self.spans)))
        begin, end = self.spans[index]
        found = self._y[..., begin:end]
        self._left.discard(index)
        if not self._left:
            self._x = self._y = None
        return found


class _Dense:
    """The merged matrix of dense linears. They own it, as views; where something moved them apart it is made anew."""

    def __init__(self, members: Sequence[nn.Linear]) -> None:
        self.members = members
        self._join()

    @torch.no_grad()
    def _join(self) -> None:
        with torch.inference_mode(False):
            self.weight_NK = torch.cat([member.weight for member in self.members])
            biases = [member.bias for member in self.members]
            self.bias_N = None if biases[0] is None else torch.cat([bias for bias in biases if bias is not None])
        begin = 0
        for member in self.members:
            rows = slice(begin, begin + member.out_features)
            member.weight.data = self.weight_NK[rows]
            if self.bias_N is not None:
                member.bias.data = self.bias_N[rows]
            begin = rows.stop

    def __call__(self, x: Tensor) -> Tensor:
        """x @ W.T + b of all members."""
        first = self.members[0].weight
        if first.data_ptr() != self.weight_NK.data_ptr() or first.device != self.weight_NK.device:
            self._join()
        return nn.functional.linear(x, self.weight_NK, self.bias_N)


def _merge_dense(members: list[nn.Linear]) -> bool:
    first = members[0]
    for member in members:
        same = member.weight.dtype == first.weight.dtype and member.weight.device == first.weight.device
        if not same or (member.bias is None) != (first.bias is None) or member.weight.is_meta or member._forward_pre_hooks:
            return False
    shared = _Shared(_Dense(members), [member.out_features for member in members])

    def forward_of(member: nn.Linear, index: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if torch.is_grad_enabled() and member.weight.requires_grad:
                return nn.functional.linear(x, member.weight, member.bias)  # gradients go to the member's own parameter
            return shared.columns(x, index)

        return forward

    for index, member in enumerate(members):
        member.forward = forward_of(member, index)  # type: ignore[method-assign, assignment]
    return True


class Merged(Linear):
    """The packed weight of a whole group: a child of its first part. State dicts hold the parts instead."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing."""


class Part(Linear):
    """A packed linear whose weight is some rows of a `Merged` one; made by `merge`, never by hand."""

    _shared: _Shared
    _whole: list[Merged]
    _index: int

    def _join(self, whole: Merged, shared: _Shared, index: int) -> None:
        for name in list(self._buffers):
            self._buffers[name] = None
        # In a list, because a module set as an attribute would be registered as a child of every part.
        self._whole, self._shared, self._index = [whole], shared, index
        self.kernel_name, self._kernel, self._problem = whole.kernel_name, whole._kernel, None
        if self.bias is not None and whole.bias is not None:
            self.bias.data = whole.bias.data[slice(*shared.spans[index])]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self._shared.columns(x, self._index)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._whole[0].device

    def prepare(self, dtype: torch.dtype | None = None, *, overwrite: bool = False) -> Part:
        """Prepares the whole."""
        self._whole[0].prepare(dtype, overwrite=overwrite)
        self.kernel_name = self._whole[0].kernel_name
        return self

    def restore(self) -> None:
        """Nothing: the stored tensors of a part are made when asked for, see `stored`."""

    def columns(self) -> Columns:
        """The codes of its rows, and the order of its columns."""
        found = self._whole[0].columns()
        return Columns(found.codes.rows(slice(*self._shared.spans[self._index])), found.order)

    def stored(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint has for it."""
        return self.encoded(self.columns().codes)

    @property
    def packed_bytes(self) -> int:
        """Its share of the whole's bytes."""
        return self._whole[0].packed_bytes * self.out_features // self._whole[0].out_features

    def _tensors(self) -> dict[str, Tensor]:
        return {}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, tensor in self.stored().items():
            destination[prefix + name] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        raise BadInput(f"{prefix[:-1]} is merged with its siblings and takes no state dict; load the model without merging")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Part:
        """The whole moves with its first part, as a child; the others have only their bias."""
        nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        self.compute_dtype = self._whole[0].compute_dtype
        return self


def alike(members: Sequence[Linear]) -> bool:
    """Whether linears differ in nothing but their rows, as far as that can be said before their weights are there."""
    first = members[0]
    facts = {(member.compute_dtype, member.device, member.bias is None) for member in members}
    rows_apart = getattr(first.scheme.grid, "shared_rows", None) == 1
    return rows_apart and len(facts) == 1 and all(member.scheme == first.scheme for member in members)


def whole_problem(problems: Sequence[Problem]) -> Problem | None:
    """The one matmul of linears that are alike; None where its kernel would be a worse one than theirs."""
    whole = replace(problems[0], N=sum(problem.N for problem in problems))
    return None if _rank(whole) > max(_rank(problem) for problem in problems) else whole


def _merge_packed(members: list[Linear]) -> bool:
    from aerogel.kernels.decode import merge_beside  # whose classes are made of those above

    first = members[0]
    if not alike(members) or first.device.type == "meta":
        return False
    if not all(_same_order(member.column_order, first.column_order) for member in members):
        return False
    beside = merge_beside.tensors_beside(members)
    if beside is None:
        return False
    widths = [member.out_features for member in members]
    if whole_problem([member.problem() for member in members]) is None:
        return False
    whole = whole_of(members, merge_beside.MergedBeside if beside else Merged)
    if whole is None:
        return False
    if isinstance(whole, merge_beside.MergedBeside):
        whole.keep(beside).ready()
        merge_beside.share(whole, members)
    shared = _Shared(whole, widths)
    for index, member in enumerate(members):
        part: Any = member
        part.__class__ = merge_beside.PartBeside if isinstance(part, SidecarLinear) else Part
        part._join(whole, shared, index)
    first.add_module("merged", whole)
    return True


def _same_order(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def whole_of(members: Sequence[Linear], kind: type[Merged] = Merged) -> Merged | None:
    """One linear of several that differ in nothing but their rows: in the kernel's layout without a second copy where that can
    be stacked, else through codes. None where the weights have tables or factors of their own."""
    first = members[0]
    problem = replace(first.problem(), N=sum(member.out_features for member in members))
    biases = [member.bias.data for member in members if member.bias is not None]
    bias_N = torch.cat(biases) if biases else None
    name, kernel = choose(problem)
    if not kernel.runs_stored(problem):
        for member in members:
            member.restore()
        tensors = layouts.stacked(kernel, members, problem)
        if tensors is not None:
            whole = kind(problem.K, problem.N, first.scheme, bias=bias_N is not None, dtype=first.compute_dtype, device="meta")
            whole.adopt(tensors, name, kernel, problem)
            whole.column_order = first.column_order
            if bias_N is not None:
                whole.bias = nn.Parameter(bias_N, requires_grad=False)
            return whole
    codes = [member.columns().codes for member in members]
    params = stacked(codes)
    if params is None:
        return None
    return kind.from_codes(
        Codes.of(torch.cat([part.values_NK for part in codes]), params, codes[0].grid),
        activations=first.scheme.activations,
        bias=bias_N,
        order=first.column_order,
        dtype=first.compute_dtype,
        wanted=first.scheme.format,
    )


def _rank(problem: Problem) -> int:
    return list(GEMM).index(choose(problem)[0])
