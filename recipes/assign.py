"""Which stages treat which weight. Every pattern must match something, and no weight is rounded twice.

A pattern is the exact name of a matrix in the checkpoint (without `.weight`), its class, or `re:` and a regular
expression that must match at the start of the name. The class `Linear` covers every linear map however an
architecture stores it: `nn.Linear`, the transposed `Conv1D` of GPT-2, and each expert of a fused stack. `Expert`
covers experts alone. The output head has the class `lm_head` whatever it is called, so that `ignore: [lm_head]` means it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache

from aerogel.errors import BadInput
from aerogel.lazy import nearest
from aerogel.recipes.stages import StageSpec

LINEAR_CLASSES = frozenset({"Linear", "Conv1D", "Expert", "lm_head"})
"""What the class name `Linear` stands for. Experts are linears: a recipe that forgot them would leave most of a
mixture-of-experts model dense."""

ALWAYS_ALLOWED = "lm_head"
"""The default ignore pattern: a model with a tied head has no such module, and that is no mistake of the user."""


def matches(pattern: str, name: str, module_class: str) -> bool:
    """Whether `pattern` covers the module `name` of class `module_class`."""
    if pattern.startswith("re:"):
        return _compiled(pattern[3:]).match(name) is not None
    return pattern in (name, module_class) or (pattern == "Linear" and module_class in LINEAR_CLASSES)


def assign(stages: Sequence[StageSpec], modules: Iterable[tuple[str, str]]) -> dict[str, list[StageSpec]]:
    """For each module name the stages that treat it, in order; an empty list where none does.

    Args:
        stages: of a recipe.
        modules: (checkpoint name without `.weight`, class name) of every weight that can be treated or kept by name.

    Raises:
        BadInput: a pattern matches nothing, a weight is claimed by two quantize stages, a stage comes after
            the one that rounds the weight, or a scale stage has no quantize stage behind it.
    """
    known = list(modules)
    for index, spec in enumerate(stages):
        for key in ("targets", "ignore"):
            for pattern in getattr(spec, key):
                _check_pattern(f"stages.{index}.{spec.kind}.{key}", key, pattern, known)
    plan: dict[str, list[StageSpec]] = {name: [] for name, _ in known}
    claims: dict[str, list[int]] = {name: [] for name, _ in known}
    for index, spec in enumerate(stages):
        for name in _claimed(spec, index, known):
            plan[name].append(spec)
            claims[name].append(index)
    for name, indices in claims.items():
        _check_order(name, indices, stages)
    return plan


def _claimed(spec: StageSpec, index: int, known: list[tuple[str, str]]) -> list[str]:
    """The names that one stage treats: targets less ignore. Raises `BadInput` when nothing is left."""
    found = [
        name
        for name, module_class in known
        if any(matches(pattern, name, module_class) for pattern in spec.targets)
        and not any(matches(pattern, name, module_class) for pattern in spec.ignore)
    ]
    if not found:
        raise BadInput(
            f"stages.{index}.{spec.kind}: ignore {list(spec.ignore)} leaves nothing of targets {list(spec.targets)};"
            " shorten ignore or widen targets"
        )
    return found


def _check_pattern(place: str, key: str, pattern: str, known: list[tuple[str, str]]) -> None:
    """A pattern that matches nothing is a typing error more often than not, and silently skips weights."""
    if key == "ignore" and pattern == ALWAYS_ALLOWED:
        return
    if not any(matches(pattern, name, module_class) for name, module_class in known):
        raise BadInput(f"{place}: '{pattern}' matches nothing in this model{_hint(pattern, known)} (see `aerogel plan`)")


def _hint(pattern: str, known: list[tuple[str, str]]) -> str:
    """What may have been meant by a pattern that matches nothing."""
    names = [name for name, module_class in known if module_class in LINEAR_CLASSES]
    if not pattern.startswith("re:"):
        if any(pattern in name for name in names):
            return f"; for a part of a name write 're:.*{re.escape(pattern)}'"
        # Comparing with every expert of a large model would take minutes.
        hint = nearest(pattern, {*names[:2000], *LINEAR_CLASSES})
        if "did you mean" in hint:
            return hint
    return f"; names look like {names[0] if names else 'none'}"


def _check_order(name: str, indices: list[int], stages: Sequence[StageSpec]) -> None:
    """At most one quantize stage per weight, and it is the last one."""
    rounding = [index for index in indices if stages[index].kind == "quantize"]
    if len(rounding) > 1:
        first, second = rounding[:2]
        raise BadInput(
            f"{name} is claimed by stages.{first}.quantize and stages.{second}.quantize; narrow the targets of one"
            " or add the weight to its ignore"
        )
    if rounding and rounding[0] != indices[-1]:
        late = next(index for index in indices if index > rounding[0])
        raise BadInput(
            f"{name}: stages.{late}.{stages[late].kind} comes after stages.{rounding[0]}.quantize, which already"
            " rounded it; move it in front"
        )
    if rounding and (numbers := _without_zero(stages[rounding[0]])):
        pruned = next((index for index in indices if stages[index].kind == "prune"), None)
        if pruned is not None:
            from aerogel.quantize.codes import no_zeros

            raise BadInput(f"{name}: stages.{pruned}.prune sets weights to zero, and {no_zeros(numbers)}")
    scaling = [index for index in indices if stages[index].kind == "scale"]
    if scaling and not rounding:
        raise BadInput(
            f"{name}: stages.{scaling[0]}.scale prepares rounding, but no quantize stage treats this weight; give both"
            " the same targets and ignore"
        )


def _without_zero(spec: StageSpec) -> str:
    """The numbers of a quantize stage where 0 is none of them, else nothing."""
    if spec.options.get("transform", "none") != "none":
        return "rotated weights"
    return str(getattr(spec.stage.grid, "without_zero", ""))


@cache
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)
