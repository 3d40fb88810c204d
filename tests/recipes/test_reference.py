from __future__ import annotations

from pathlib import Path

from aerogel.recipes.reference import reference
from aerogel.recipes.schema import Recipe, shipped


def test_the_page_is_what_the_code_says() -> None:
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    assert page.read_text("utf-8") == reference(), "run: python -m aerogel.recipes.reference > docs/recipes.md"


def test_every_key_has_a_meaning() -> None:
    for line in reference().splitlines():
        assert not line.endswith("|  |"), f"no meaning: {line}"


def test_the_page_names_every_section_and_recipe() -> None:
    text = reference()
    for name in (*Recipe.model_fields, *shipped()):
        assert f"`{name}`" in text
