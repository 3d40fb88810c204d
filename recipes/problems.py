"""Turns the first thing a pydantic model disliked into one line: where it is, what was found and what to write."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from aerogel.errors import BadInput
from aerogel.lazy import nearest
from aerogel.recipes.files import Document, Key, describe

EXPECTED = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list such as [a, b]",
    "tuple_type": "must be a list such as [a, b]",
    "model_type": "must be a mapping of keys",
    "model_attributes_type": "must be a mapping of keys",
    "dict_type": "must be a mapping of keys",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length} entry",
    "string_too_short": "must not be empty",
    "none_required": "must be null",
}
"""What to say for pydantic's error types; anything else keeps pydantic's own words."""


def first_problem(error: ValidationError, model: type[BaseModel], document: Document, base: Key = ()) -> BadInput:
    """The `BadInput` for `error`, raised by `model` for the part of `document` that stands under `base`.

    An unknown key comes first when there is one: it is often the reason why another key is missing.
    """
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    location = _without_tags(problem["loc"], model)
    key = (*base, *location)
    if problem["type"] == "extra_forbidden":
        owner = _model_at(model, location[:-1])
        # Only the models of stages have a name with a bracket, such as `quantize (gptq, int)`: it explains the keys.
        whose = f" of {owner.__name__}" if "(" in owner.__name__ else ""
        return document.problem(key, f"unknown key{whose}{nearest(str(location[-1]), owner.model_fields)}")
    if problem["type"] == "missing":
        return document.problem(key, f"is missing; add `{location[-1]}: ...`")
    return document.problem(key, _message(problems, problem))


def _message(problems: list[Any], problem: Any) -> str:
    """What was expected and what was found. Several errors at one place are the branches of a union."""
    found = describe(problem["input"])
    branches = [other for other in problems if other["loc"][:1] == problem["loc"][:1] and other["input"] is problem["input"]]
    words = list(dict.fromkeys(_expected(branch) for branch in branches))
    message = f"{' or '.join(words)}, found {found}"
    choices = [word.strip("'") for word in _choices(problem)]
    return message + (nearest(str(problem["input"]), choices) if choices and isinstance(problem["input"], str) else "")


def _expected(problem: Any) -> str:
    """The rule that was broken, in words."""
    context = problem.get("ctx", {})
    if problem["type"] == "literal_error":
        return f"must be {context['expected']}"
    if problem["type"] == "value_error":
        return str(context["error"])
    if problem["type"] in EXPECTED:
        return EXPECTED[problem["type"]].format(**context)
    text = str(problem["msg"])
    return text[:1].lower() + text[1:]


def _choices(problem: Any) -> list[str]:
    """The words a Literal allows."""
    if problem["type"] != "literal_error":
        return []
    return [word for part in str(problem["ctx"]["expected"]).split(", ") for word in part.split(" or ")]


def _without_tags(location: tuple[int | str, ...], model: type[BaseModel]) -> Key:
    """pydantic adds the branch of a union (`int`, `Perplexity`) to a location; only keys and indices are kept."""
    kept: list[int | str] = []
    for position, part in enumerate(location):
        fields = _model_at(model, tuple(kept)).model_fields
        # An unknown key is no field, but it stands at the end of the location and directly in a model.
        unknown = position == len(location) - 1 and bool(fields)
        if part in fields or isinstance(part, int) or unknown:
            kept.append(part)
    return tuple(kept)


class _Leaf(BaseModel):
    """Stands for everything that has no keys of its own."""


def _model_at(model: type[BaseModel], location: Key) -> type[BaseModel]:
    """The model whose keys are written at `location`, or `_Leaf`."""
    for part in location:
        field = model.model_fields.get(str(part))
        model = _inner_model(field.annotation) if field else _Leaf
    return model


def _inner_model(annotation: Any) -> type[BaseModel]:
    """The pydantic model inside an annotation such as `Perplexity | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [_inner_model(argument) for argument in get_args(annotation)]
    return next((found for found in inner if found is not _Leaf), _Leaf)
