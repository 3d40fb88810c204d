"""One entry of `stages:` resolved: which method, with which options, on which weights.

An entry is a mapping with one key, the kind (`prune`, `scale` or `quantize`), whose value holds `method`, `targets`,
`ignore` and the options of that method. A `scale` stage is a site stage: it moves scale between the linears of a site
before the quantize stage behind it rounds them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from aerogel.errors import BadInput
from aerogel.lazy import load, nearest
from aerogel.quantize import GRIDS
from aerogel.recipes.files import Document, Key, describe
from aerogel.recipes.options import option_model, options
from aerogel.recipes.overrides import STAGE_KINDS
from aerogel.recipes.problems import first_problem

Kind = Literal["prune", "scale", "quantize"]
Patterns = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False, min_length=1)]
Activations = Literal["none", "int8", "fp8", "int8-static", "fp8-static"]
STATIC = ("int8-static", "fp8-static")
"""Those that are rounded with one stored scale, which calibration measures."""
KEEP = {"keep": "aerogel.quantize.outliers:Keep", "columns": "aerogel.quantize.columns:KeepColumns"}
"""What every quantize stage may ask of weights that are kept beside its codes, by the field of `sidecars.Keeping`."""
MORE = "aerogel.quantize.rows:MoreBits"
"""What every quantize stage may ask of rows that get more bits than the rest."""
MIX = "aerogel.quantize.rotation:Mix"
"""What every quantize stage may do to the basis in which it rounds."""
BESIDE = {**KEEP, "rows": MORE, "mix": MIX}
"""All rules about what is stored beside codes."""

GRANULARITY = "aerogel.quantize.granularity:Granularity"
"""How a stage whose format has groups decides their size."""


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """A stage of the recipe with the weights it is meant for.

    kind: prune, scale or quantize.
    method_name: the name in the table of that kind, such as `gptq`.
    stage: the method, a frozen dataclass that is callable (`Layer -> Layer`; a scale stage works on a site).
    targets, ignore: patterns; exact checkpoint name without `.weight`, a class such as `Linear`, or `re:regex`.
    activations: what inputs are rounded to at run time; `none` keeps them. Only quantize stages have another value.
    options: every other key with its value, defaults included; plain JSON values.
    """

    kind: Kind
    method_name: str
    stage: Any
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ("lm_head",)
    activations: Activations = "none"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def keeps(self) -> bool:
        """Whether weights, or a rotation, are kept beside the codes, which only aerogel loads."""
        return any(self.options.get(rule, "none") != "none" for rule in ("outliers", "columns", "rows", "transform"))

    @property
    def has_beside(self) -> bool:
        """Whether anything is stored beside the codes: such weights, or the scale of inputs."""
        return self.keeps or self.activations in STATIC

    @property
    def adaptive(self) -> bool:
        """Whether the group size is decided by each weight."""
        return bool(self.options.get("granularity", "fixed") != "fixed")

    @property
    def granularity(self) -> Any:
        """The rule that decides the group size."""
        cls = load(GRANULARITY)
        return cls(**{name: self.options[name] for name in options(cls)})

    def sized(self, group_size: int | None) -> StageSpec:
        """The same stage with this group size for good."""
        from aerogel.quantize.scales import name_of

        fixed = {**self.options, "group_size": group_size, "granularity": "fixed"}
        built = {**fixed, "scale_dtype": name_of(self.stage.grid.scale_dtype)}  # `at` may have decided it
        return replace(self, options=fixed, stage=_build_stage(self.kind, self.method_name, built, self.activations))

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that this stage asks calibration for; empty for a method that needs no data."""
        return frozenset(getattr(self.stage, "needs", frozenset()))

    def at(self, dtype: str) -> StageSpec:
        """The same stage with `scale_dtype: auto` resolved to `dtype` (`bfloat16`, ...), the type of the checkpoint."""
        if self.options.get("scale_dtype") != "auto":
            return self
        options = {**self.options, "scale_dtype": dtype}
        return replace(self, stage=_build_stage(self.kind, self.method_name, options, self.activations))

    def as_dict(self) -> dict[str, Any]:
        """The entry as it would be written in a recipe with nothing left out."""
        shared: dict[str, Any] = {
            "method": self.method_name,
            "targets": list(self.targets),
            "ignore": list(self.ignore),
        }
        if self.kind == "quantize":
            shared["activations"] = self.activations
        return {self.kind: {**shared, **self.options}}


ALSO_CALLED = {
    **{f"int{bits}": f"format: int, bits: {bits}" for bits in range(2, 9)},
    "mxfp4": "format: mx",
    "mxfp6": "format: mx, kind: e2m3",
    "mxfp8": "format: mx, kind: e4m3",
    "fp3": "format: float, kind: e2m0",
    "fp4": "format: float, kind: e2m1",
    "fp5": "format: float, kind: e2m2",
    "fp6": "format: float, kind: e2m3",
    "e4m3": "format: fp8",
    "e5m2": "format: float, kind: e5m2",
    "binary": "format: planes, bits: 1",
    "bcq": "format: planes, bits: 3",
}
"""What papers call a format -> how a recipe says it."""


def methods(kind: str) -> dict[str, str]:
    """The table of lazy method names for a kind of stage; costs no import of the methods themselves."""
    table = {
        "prune": "aerogel.prune:METHODS",
        "scale": "aerogel.quantize:SCALES",
        "quantize": "aerogel.quantize:METHODS",
    }
    found: dict[str, str] = load(table[kind])
    return found


@cache
def stage_model(kind: str, method: str, grid: str | None) -> type[BaseModel]:
    """The closed model of the keys that a stage of this kind, method and grid format accepts."""
    keys: dict[str, tuple[Any, Any]] = {
        "method": (Literal[method], ...),
        "targets": (Patterns, ("Linear",)),
        "ignore": (Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)], ("lm_head",)),
    }
    if grid is not None:
        keys |= {"activations": (Activations, "none"), "format": (Literal[tuple(GRIDS)], default_format(method))}
        keys |= options(load(GRIDS[grid]))
        for rule in BESIDE.values():
            keys |= options(load(rule))
        if "group_size" in keys:
            keys |= options(load(GRANULARITY))
    name = f"{kind} ({method}, {grid})" if grid else f"{kind} ({method})"
    return option_model(name, keys | options(load(methods(kind)[method]), without=frozenset({"grid"})))


def default_format(method: str) -> str:
    """The format of a quantize stage that names none: the only one its method makes, else integers."""
    found: str = getattr(load(methods("quantize")[method]), "makes", "int")
    return found


def parse_stages(document: Document) -> tuple[StageSpec, ...]:
    """The resolved `stages:` of a document. Raises `BadInput` naming the place and the nearest word that exists."""
    stages = document.tree.get("stages")
    pack = document.tree.get("pack")
    lossless = isinstance(pack, dict) and pack.get("entropy") is True
    if not isinstance(stages, list) or not (stages or lossless):
        found = "found none" if "stages" not in document.tree else f"found {describe(stages)}"
        begin = "; begin each stage with `- `" if isinstance(stages, dict) else ""
        raise document.problem(("stages",), f"must list at least one stage ({', '.join(STAGE_KINDS)}), {found}{begin}")
    return tuple(_parse_stage(document, index, entry) for index, entry in enumerate(stages))


def _parse_stage(document: Document, index: int, entry: object) -> StageSpec:
    key: Key = ("stages", index)
    if not isinstance(entry, dict) or len(entry) != 1:
        raise document.problem(key, f"a stage is one of {', '.join(STAGE_KINDS)} with its options, found {_words(entry)}")
    ((kind, body),) = entry.items()
    key = (*key, kind)
    if kind not in STAGE_KINDS:
        raise document.problem(key, f"unknown kind of stage{nearest(kind, STAGE_KINDS)}")
    if not isinstance(body, dict):
        raise document.problem(key, f"must be a mapping such as {{method: ...}}, found {describe(body)}")
    method = _chosen(document, (*key, "method"), body.get("method"), methods(kind))
    grid = None
    if kind == "quantize":
        grid = _chosen(document, (*key, "format"), body.get("format", default_format(method)), GRIDS)
        if "bits" in body and "bits" not in options(load(GRIDS[grid])):
            by = "its kind" if "kind" in options(load(GRIDS[grid])) else "the format itself"
            raise document.problem((*key, "bits"), f"unknown key: the bits of {grid} are decided by {by}; leave it out")
    model = stage_model(kind, method, grid)
    try:
        checked = model.model_validate(body).model_dump()
    except ValidationError as error:
        raise first_problem(error, model, document, key) from None
    return _spec(document, key, kind, checked)


def _spec(document: Document, key: Key, kind: str, checked: dict[str, Any]) -> StageSpec:
    """The stage built from checked options; what its own `__post_init__` refuses is blamed on the right key."""
    shared = {name: checked.pop(name) for name in ("method", "targets", "ignore")}
    activations = checked.pop("activations", "none")
    for name in ("targets", "ignore"):
        for position, pattern in enumerate(shared[name]):
            _check_pattern(document, (*key, name, position), pattern)
    if checked.get("columns") == "dynamic" and activations == "none":
        raise document.problem((*key, "columns"), "dynamic is for rounded inputs; write activations: int8, or another rule")
    if checked.get("granularity", "fixed") != "fixed" and checked["group_size"] is None:
        raise document.problem((*key, "group_size"), "is the smallest group where granularity is not fixed; write a number")
    try:
        if "granularity" in checked:
            load(GRANULARITY)(**{name: checked[name] for name in options(load(GRANULARITY))})
        stage = _build_stage(kind, shared["method"], checked, activations)
    except BadInput as error:
        guilty = [name for name in checked if re.search(rf"\b{name}\b", str(error))]
        raise document.problem((*key, *guilty[:1]), str(error)) from None
    return StageSpec(
        kind=kind,  # type: ignore[arg-type]
        method_name=shared["method"],
        stage=stage,
        targets=shared["targets"],
        ignore=shared["ignore"],
        activations=activations,
        options=checked,
    )


def _build_stage(kind: str, method: str, checked: dict[str, Any], activations: Activations) -> Any:
    """An instance of the method's class, with its grid when it rounds; inside the stage that measures inputs where they are
    rounded with a stored scale."""
    cls = load(methods(kind)[method])
    own = {name: checked[name] for name in options(cls, without=frozenset({"grid"}))}
    if kind == "quantize":
        own["grid"] = _build_grid(checked)
        stage = _beside(cls(**own), checked)
        if activations not in STATIC:
            return stage
        if checked["transform"] != "none":
            raise BadInput("transform changes the inputs whose peaks static activations store; write activations per token")
        if checked["rows"] != "none":
            raise BadInput("rows of more bits do not go with static activations; write rows: none, or activations per token")
        return load("aerogel.quantize.input_scale:Measured")(method=stage, activations=activations)
    return cls(**own)


def _beside(method: Any, checked: dict[str, Any]) -> Any:
    """`method`, inside the stage that takes weights out before it or adds bits after it where the options ask for that."""
    rules = {key: load(rule)(**{name: checked[name] for name in options(load(rule))}) for key, rule in BESIDE.items()}
    more, mix = rules.pop("rows"), rules.pop("mix")
    keeps = rules["keep"].outliers != "none" or rules["columns"].columns != "none"
    if mix.transform != "none":
        if keeps or more.rows != "none":
            raise BadInput(
                "transform goes together with neither outliers, columns nor rows; write transform: none, or leave those out"
            )
        return load("aerogel.quantize.rotation:Rotated")(method=method, mix=mix)
    if more.rows == "none":
        return load("aerogel.quantize.sidecars:Keeping")(method=method, **rules) if keeps else method
    if keeps:
        raise BadInput("rows of more bits go together with neither outliers nor columns; write rows: none, or leave those out")
    return load("aerogel.quantize.rows:Refining")(method=method, more=more)


def _build_grid(checked: dict[str, Any]) -> Any:
    """The grid of a quantize stage. `scale_dtype: auto` stands as float32 until the checkpoint's type is known."""
    from aerogel.quantize.scales import TYPES

    cls = load(GRIDS[checked["format"]])
    values = {name: checked[name] for name in options(cls)}
    if "scale_dtype" in values:
        name = values["scale_dtype"]
        values["scale_dtype"] = TYPES["float32" if name == "auto" else name]
    return cls(**values)


def _chosen(document: Document, key: Key, word: object, table: Mapping[str, str]) -> str:
    """`word` if the table has it; else the error that names the nearest one."""
    what = key[-1]
    if word is None:
        raise document.problem(key, f"is missing; add `{what}:` with one of {', '.join(sorted(table))}")
    if not isinstance(word, str) or word not in table:
        if what == "format" and (said := ALSO_CALLED.get(str(word).lower())):
            raise document.problem(key, f"unknown format {describe(word)}; write `{said}`")
        raise document.problem(key, f"unknown {what} {describe(word)}{nearest(str(word), table)}")
    return word


def _check_pattern(document: Document, key: Key, pattern: str) -> None:
    """Refuses a `re:` pattern that is no regular expression."""
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise document.problem(key, f"'{pattern}' is not a regular expression ({error})") from None


def _words(entry: object) -> str:
    """What stands where a stage was expected."""
    if isinstance(entry, dict) and entry:
        return f"the keys {', '.join(map(str, entry))}: begin each stage with its own `- `"
    return describe(entry)
