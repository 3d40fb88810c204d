"""The recipe: one YAML file that is the whole chain, checked to the last key before anything runs.

    aerogel: 1                       # version of this schema
    about: GPTQ, 4 bits, groups of 64
    model: null                      # given on the command line, or fixed here
    calibration: {source: default, samples: 128, sequence_length: 512, seed: 0}
    stages:                          # in order, each with its targets and ignore patterns
      - quantize: {method: gptq, bits: 4, group_size: 64}
    pack: {format: auto, dtype: source}
    evaluate: {divergence: true, tasks: [piqa]}
    bench: {batch: [1]}
    gate: {max_kl: 0.05, min_compression: 3.0}

`Recipe.load` reads a shipped recipe or a file, applies overrides, and returns a frozen object or raises one `BadInput`
that says where the recipe is wrong, what was found and what to write. `Recipe.as_dict` is the same recipe with nothing
left out: written into the report, it reproduces the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PrivateAttr, ValidationError

from aerogel.errors import BadInput
from aerogel.eval.gate import check
from aerogel.lazy import nearest
from aerogel.recipes import files
from aerogel.recipes.files import Document
from aerogel.recipes.options import STRICT
from aerogel.recipes.overrides import apply
from aerogel.recipes.problems import first_problem
from aerogel.recipes.sections import Bench, Calibration, Evaluate, Gate, Pack, Place, Section
from aerogel.recipes.stages import StageSpec, parse_stages


class Recipe(Section):
    """A validated recipe. Frozen; build it with `Recipe.load`."""

    model_config = ConfigDict(**{**STRICT, "arbitrary_types_allowed": True})

    aerogel: Literal[1] = Field(description="version of the recipe schema")
    about: str = Field(default="", description="one line for people")
    model: Place | None = Field(default=None, description="folder, GGUF file or hub id; or on the command line")
    calibration: Calibration = Field(default=Calibration(), description="data that the methods see")
    stages: Annotated[tuple[StageSpec, ...], Field(strict=False)] = Field(description="what is done to the weights, in order")
    pack: Pack = Field(default=Pack(), description="how the result is stored")
    evaluate: Evaluate | None = Field(default=Evaluate(), description="quality measurements; null for none")
    bench: Bench | None = Field(default=Bench(), description="speed measurements; null for none")
    gate: Gate = Field(default=Gate(), description="limits that decide the exit code of `aerogel run`")
    _name: str = PrivateAttr(default="recipe")

    @property
    def name(self) -> str:
        """What the recipe is called: its file name without the suffix. Not part of its content."""
        return self._name

    @property
    def needs_data(self) -> bool:
        """Whether any stage asks calibration for statistics."""
        return any(spec.needs for spec in self.stages)

    @classmethod
    def load(cls, source: Recipe | str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
        """The recipe that `source` names, with `path.to.key=value` overrides applied.

        Args:
            source: a shipped name (`w4`), a YAML file, a mapping with the same content, or a Recipe.
            overrides: as behind `--set`, in order.

        Raises:
            BadInput: with the place, what was found and what to write instead.
        """
        changes = list(overrides)
        if isinstance(source, Recipe):
            return source if not changes else _validate(_document(source.as_dict(), source.name), source.name, changes)
        if isinstance(source, Mapping):
            return _validate(_document(source, "recipe"), "recipe", changes)
        path = find(str(source))
        return _validate(files.read(path), path.stem, changes)

    def with_layout(self, choose: Callable[[str], str]) -> Recipe:
        """The same recipe with `pack.layout` as `choose` gives it: "native" becomes the layout of one device."""
        return self.model_copy(update={"pack": self.pack.model_copy(update={"layout": choose(self.pack.layout)})})

    def as_dict(self) -> dict[str, Any]:
        """Every key with its value, defaults included, in the order of the schema; plain JSON values."""
        return {
            **self.model_dump(mode="json", exclude={"stages"}, include={"aerogel", "about", "model", "calibration"}),
            "stages": [spec.as_dict() for spec in self.stages],
            **self.model_dump(mode="json", include={"pack", "evaluate", "bench", "gate"}),
        }


def shipped() -> dict[str, Path]:
    """Name -> file of the recipes that come with aerogel."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def find(name: str) -> Path:
    """The file of a shipped recipe or the file that `name` is. Raises `BadInput` with the nearest shipped name."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or "/" in name or "\\" in name or path.is_file():
        return path
    known = shipped()
    if name not in known:
        raise BadInput(f"there is no recipe '{name}'{nearest(name, known)} (a file ends in .yaml)")
    return known[name]


def _document(content: Mapping[str, Any], name: str) -> Document:
    """A document around content that was never a file; tuples become lists as YAML would have them."""

    def plain(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {str(key): plain(child) for key, child in part.items()}
        return [plain(child) for child in part] if isinstance(part, list | tuple) else deepcopy(part)

    return Document(name, plain(content))


def _validate(document: Document, name: str, changes: list[str]) -> Recipe:
    """A document with its overrides as a `Recipe`."""
    apply(document, changes)
    _check_top(document)
    tree = {**document.tree, "stages": parse_stages(document)}
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise first_problem(error, Recipe, document) from None
    recipe._name = name
    _check_measurements(recipe, document)
    _check_formats(recipe, document)
    return recipe


def _check_top(document: Document) -> None:
    """Version and top-level keys, before the stages are looked at: a wrong file should say so first."""
    if "aerogel" not in document.tree:
        raise document.problem((), "the version key is missing; begin the recipe with `aerogel: 1`")
    version = document.tree["aerogel"]
    if type(version) is not int or version != 1:
        raise document.problem(("aerogel",), f"this aerogel reads recipes of version 1, found {files.describe(version)}")
    for key in document.tree:
        if key not in Recipe.model_fields:
            raise document.problem((key,), f"unknown key{nearest(key, Recipe.model_fields)}")


def _check_measurements(recipe: Recipe, document: Document) -> None:
    """Every gate must judge something that is measured."""
    evaluate = recipe.evaluate
    if evaluate is not None and evaluate.divergence and evaluate.perplexity is None:
        raise document.problem(
            ("evaluate", "divergence"),
            "is measured on the windows of evaluate.perplexity, which is null; set one or neither",
        )
    enabled = {"size"}
    if evaluate is not None:
        wanted = {"perplexity": evaluate.perplexity, "divergence": evaluate.divergence, "tasks": evaluate.tasks}
        enabled |= {"memory", *(name for name, value in wanted.items() if value)}
    if recipe.bench is not None:
        enabled |= {"memory", "bench"}
    for gate, limit in recipe.gate.model_dump().items():
        try:
            check({gate: limit}, enabled)
        except BadInput as error:
            raise BadInput(f"{document.blame(('gate', gate))}: {error}") from None


def _check_formats(recipe: Recipe, document: Document) -> None:
    """Every quantize stage must round to a grid that the pack section can store."""
    from aerogel.pack.config import choose_format

    if recipe.pack.layout != "portable" and not any(spec.kind == "quantize" for spec in recipe.stages):
        raise document.problem(("pack", "layout"), "is for quantized weights; add a quantize stage or write `portable`")
    for index, spec in enumerate(recipe.stages):
        if spec.kind == "quantize":
            try:
                choose_format(spec.stage.grid, spec.activations, recipe.pack.format)
            except BadInput as error:
                raise document.problem(("stages", index, spec.kind), str(error)) from None
