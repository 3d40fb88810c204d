from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aerogel.errors import BadInput
from aerogel.recipes import files


def test_scalars_follow_yaml_1_2() -> None:
    text = "a: 1e-3\nb: 2:4\nc: on\nd: 2024-01-01\ne: 007\nf: ~\ng: true\nh: '4'\ni: -3\nj: .5\nk: 1_000\nl: 0x10\n"
    assert files.parse(text, "r").tree == {
        "a": 0.001,
        "b": "2:4",
        "c": "on",
        "d": "2024-01-01",
        "e": 7,
        "f": None,
        "g": True,
        "h": "4",
        "i": -3,
        "j": 0.5,
        "k": "1_000",
        "l": "0x10",
    }


def test_every_key_knows_its_line() -> None:
    document = files.parse("a: 1\nb:\n  - c: 2\n    d: 3\n", "r.yaml")
    assert document.blame(("b", 0, "d")) == "r.yaml:4"
    assert document.blame(("b", 0, "unwritten")) == "r.yaml:3"
    assert document.blame(("elsewhere",)) == "r.yaml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x 1\nb: *x\n", ["r.yaml:1", "anchors", "&x"]),
        ("a: [1]\nb: *x\n", ["r.yaml:2", "anchors"]),
        ("a: !!python/object/apply:os.system ['true']\n", ["r.yaml:1", "tag"]),
        ("a: !mine 3\n", ["tag !mine"]),
        ("a: 1\na: 2\n", ["r.yaml:2", "a is written twice", "r.yaml:1"]),
        ("a:\n  b: 1\n  b: 2\n", ["r.yaml:3", "a.b is written twice"]),
        ("[" * 40 + "]" * 40, ["nested deeper"]),
        ("a: 1\n---\nb: 2\n", ["second YAML document"]),
        ("a: [1, 2\n", ["not valid YAML"]),
        ("- 1\n", ["mapping of keys", "a list of 1"]),
        ("", ["nothing (null)"]),
        ("a: \x00\n", ["not valid YAML"]),
        ("? [1, 2]\n: 3\n", ["a key must be a word"]),
        ("a: 1e999\n", ["too large"]),
        ("a: {<<: {b: 1}, &y c: 2}\n", ["anchors"]),
    ],
)
def test_what_a_recipe_must_not_hold(text: str, words: list[str]) -> None:
    with pytest.raises(BadInput) as caught:
        files.parse(text, "r.yaml")
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_merge_key_is_just_a_key() -> None:
    assert files.parse("<<: {a: 1}\n", "r").tree == {"<<": {"a": 1}}


def test_a_file_that_is_too_large_or_not_text(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (files.LIMIT_BYTES + 1))
    with pytest.raises(BadInput, match="larger than"):
        files.read(large)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"a: \xff\xfe")
    with pytest.raises(BadInput, match="byte 3 is not UTF-8"):
        files.read(binary)
    with pytest.raises(BadInput, match="does not exist"):
        files.read(tmp_path / "none.yaml")
    with pytest.raises(BadInput, match="folder"):
        files.read(tmp_path)


@given(st.text(max_size=60))
def test_any_text_is_a_document_or_bad_input(text: str) -> None:
    try:
        tree = files.parse(text, "r.yaml").tree
    except BadInput as error:
        assert "r.yaml" in str(error)
    else:
        assert isinstance(tree, dict)
