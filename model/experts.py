"""Which experts of a model can stay packed: found by looking at how their module computes, and trying it.

transformers describes a module of experts by a few attributes (has_gate, is_transposed, ...) and two 3-D parameters, for
every architecture alike. Whether a module really computes what `kernels.experts` computes from them is not believed but
tried: the module's own code runs on a few random tokens with small random weights in the place of its parameters, and must
give the same output. Likewise the matrices on disk that make a parameter are sent through transformers' own conversion
rule with their rows numbered, which shows what becomes of them.

What is not understood keeps working as before, decoded into dense weights, and the reason is told.

Shape legend: E experts, N out features, K in features, I inner size, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import SkipParameters, WeightConverter

from aerogel.kernels.experts import UP
from aerogel.pack.scheme import Scheme

if TYPE_CHECKING:
    from aerogel.model.structure import Matrix, Structure

FLAGS = ("has_gate", "is_transposed", "num_experts")
SMALL = {"E": 3, "H": 8, "I": 6}


@dataclass(frozen=True, slots=True)
class Stack:
    """How one parameter of an experts module is packed.

    experts, n, k: its shape as E matrices [N, K]. scheme: of all of them.
    parts: for each expert the places, in the list of placements, of the matrices that make its rows one after the other.
        The one place there is, where its tensors hold all experts.
    more: how many rows of each expert have more bits at most, and the scheme of what they have more; None where none have.
    apart: why the matrices are linears of their own instead of one stack; None where they are that.
    """

    experts: int
    n: int
    k: int
    scheme: Scheme
    parts: list[list[int]]
    more: tuple[int, Scheme] | None = None
    apart: str | None = None


def stacks_of(
    model: nn.Module, path: str, by_parameter: dict[str, list[Any]], rules: dict[str, WeightConverter]
) -> dict[str, Stack] | str:
    """Stacks by parameter name, or why the experts module at `path` cannot stay packed.

    Args:
        model: on the meta device.
        path: of the experts module.
        by_parameter: the placements of each of its packed parameters.
        rules: transformers' conversion rule of each parameter that has one.
    """
    module = model.get_submodule(path)
    reason = _shape_reason(module) or differs(module)
    if reason:
        return reason
    weights = {f"{path}.{name}" for name in (UP[bool(module.has_gate)], "down_proj")}
    if set(by_parameter) != weights:
        absent = sorted(weights - set(by_parameter))
        return f"{absent[0]} is not packed" if absent else "more is packed than its two weights"
    found: dict[str, Stack] = {}
    for parameter, items in by_parameter.items():
        value = module.get_parameter(parameter.rpartition(".")[2])
        made = _stack(items, value, bool(module.is_transposed), rules.get(parameter))
        if isinstance(made, str):
            return f"{parameter}: {made}"
        found[parameter] = made
    return found


def _shape_reason(module: nn.Module) -> str | None:
    """Whether it is described as transformers describes experts, with parameters of the shapes that go with it."""
    absent = [name for name in FLAGS if not hasattr(module, name)]
    if absent:
        return f"a {type(module).__name__} does not say how it computes (no {absent[0]})"
    names = {UP[bool(module.has_gate)], "down_proj"}
    biases = {f"{name}_bias" for name in names}
    held = dict(module.named_parameters())
    if not names <= set(held) <= names | biases or any(held[name].ndim != 3 for name in names):
        return f"a {type(module).__name__} has other parameters ({', '.join(sorted(held))}) than {' and '.join(sorted(names))}"
    return None


def differs(module: Any) -> str | None:
    """Why the module's own code computes something else than packed experts do, or None. Tries it with small weights."""
    try:
        with torch.device("cpu"), torch.no_grad():
            found, wanted = _twice(module)
    except Exception as error:
        # Whatever a model's code may raise here, it means that it is not called or made as experts usually are.
        return f"a {type(module).__name__} is called otherwise ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-4, atol=1e-5):
        return f"a {type(module).__name__} computes something else than gate, up and down"
    return None


def _twice(module: Any) -> tuple[Tensor, Tensor]:
    """The output of the module's own eager code, and of the equations of `kernels.experts`, with the same small weights."""
    generator = torch.Generator().manual_seed(0)
    E, H, inner = SMALL["E"], SMALL["H"], SMALL["I"]
    wide = inner * (2 if module.has_gate else 1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    up, down = UP[bool(module.has_gate)], "down_proj"
    dense = {up: draw(E, wide, H), down: draw(E, H, inner), f"{up}_bias": draw(E, wide), f"{down}_bias": draw(E, H)}
    dense = {name: value for name, value in dense.items() if name in module._parameters}
    twin = copy(module)
    twin.__dict__ = {**module.__dict__, "num_experts": E, "_parameters": {}}
    for name, value in dense.items():
        turned = value.transpose(1, 2).contiguous() if module.is_transposed and value.ndim == 3 else value
        twin._parameters[name] = nn.Parameter(turned, requires_grad=False)
    x = draw(5, H)
    index = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0]])
    weight = draw(5, 2).abs()
    found = inspect.unwrap(type(module).forward)(twin, x, index, weight)
    picked = index.reshape(-1)
    u = torch.einsum("snk,sk->sn", dense[up][picked], x.repeat_interleave(2, 0)) + _bias(dense, up, picked)
    h = twin._apply_gate(u) if module.has_gate else twin.act_fn(u)
    y = torch.einsum("snk,sk->sn", dense[down][picked], h) + _bias(dense, down, picked)
    return found, (y * weight.reshape(-1, 1)).reshape(5, 2, H).sum(1)


def rows_of(structure: Structure, matrix: Matrix) -> Callable[[Tensor], Tensor] | None:
    """What takes the rows of a matrix out of a tensor of the shape of its parameter (its gradient, say), as [N, K]; None where
    the model joins it with others in a way that is not understood."""
    group = next((found for found in structure.groups if matrix.parameter in found.outputs), None)
    if group is None or len(group.outputs) != 1:
        return None
    if group.converter is None:
        return matrix.take
    if matrix.expert is None or matrix.transposed or matrix.index is not None:
        return None
    names = [name for name, _ in group.sources]
    items = [SimpleNamespace(parameter=matrix.parameter, name=n, pattern=p, stack=None) for n, p in group.sources]
    parts = _rows_after(items, matrix.n, group.converter)
    place = names.index(matrix.tensor)
    found = next(((e, one.index(place)) for e, one in enumerate(parts or []) if place in one), None)
    if found is None:
        return None
    expert, part = found
    return lambda whole: whole[expert, part * matrix.n : (part + 1) * matrix.n]


def _bias(dense: dict[str, Tensor], name: str, picked: Tensor) -> Tensor | float:
    bias = dense.get(f"{name}_bias")
    return 0.0 if bias is None else bias[picked]


def _stack(items: Sequence[Any], value: Tensor, transposed: bool, rule: WeightConverter | None) -> Stack | str:
    """How `items` make `value`, or why that cannot stay packed."""
    first = items[0].scheme
    if first is None or any(item.scheme is None for item in items):
        return "its matrices are not all packed"
    apart = "its matrices are not all packed alike" if any(item.scheme != first for item in items) else None
    E, n, k = value.shape[0], value.shape[2 if transposed else 1], value.shape[1 if transposed else 2]
    if items[0].whole:
        return Stack(E, n, k, first, [[0]] * E)
    each, rest = divmod(len(items), E)
    if rest or each == 0 or n % each:
        return f"{len(items)} matrices do not make {E} experts of {n} rows"
    rows, shared = n // each, first.grid.shared_rows
    if shared != 1 and each > 1 and (shared is None or rows % shared):
        apart = f"scales are shared by {shared or 'all'} rows, and matrices of {rows} are joined"
    parts = _rows_after(items, rows, rule)
    if parts is None or len(parts) != E or any(len(one) != each for one in parts):
        return "transformers puts its rows together in another way than one after the other"
    return Stack(E, n, k, first, parts, apart=apart)


def _rows_after(items: Sequence[Any], rows: int, rule: WeightConverter | None) -> list[list[int]] | None:
    """The matrices of each expert in order, from sending numbered rows through the rule; None where rows are mixed."""
    with torch.device("cpu"):
        marks = [torch.arange(rows, dtype=torch.float64)[:, None] + place * rows for place in range(len(items))]
        if items[0].stack is not None:
            places = [item.stack for item in items]
            return [[places.index(e)] for e in range(len(items))] if sorted(places) == list(range(len(items))) else None
        if rule is None:
            return None
        rule = deepcopy(rule)
        for item, mark in zip(items, marks, strict=True):
            rule.add_tensor(item.parameter, item.name, item.pattern or "", mark)  # type: ignore[arg-type, unused-ignore]
        try:
            converted = list(rule.convert(items[0].parameter).values())
        except SkipParameters:
            return None
    if len(converted) != 1:
        return None
    made = converted[0][0] if isinstance(converted[0], list) else converted[0]
    ids = made.flatten(1).long()
    first = ids[:, ::rows]
    whole = (first[:, :, None] + torch.arange(rows, device=ids.device)).flatten(1)
    if not torch.equal(whole, ids) or bool((first % rows).any()):
        return None
    return (first // rows).tolist()  # type: ignore[no-any-return]
