"""Streamed text equals text decoded at once, whatever the tokens; stop strings cut exactly."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from aerogel.kernels.decode.text import TextStream


def bytes_tokenizer() -> Any:
    """One token per byte: the hardest case, since a character takes up to four."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tool = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tool.pre_tokenizer, tool.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tool)


TOKENIZER = bytes_tokenizer()


def streamed(text: str, stop: list[str]) -> tuple[str, bool]:
    words = TextStream(TOKENIZER, stop)
    pieces = [words.push(token) for token in TOKENIZER(text)["input_ids"]]
    return "".join(pieces) + words.finish(), words.stopped


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=12))
def test_pieces_make_the_whole(text: str) -> None:
    assert streamed(text, []) == (text, False)


@given(st.text("abé€", max_size=14), st.lists(st.text("abé", min_size=1, max_size=3), min_size=1, max_size=2))
def test_stop_strings_cut_at_their_first_place(text: str, stop: list[str]) -> None:
    places = [text.find(word) for word in stop if word in text]
    found, stopped = streamed(text, stop)
    assert stopped == bool(places)
    # The stop string that is complete first ends the text; no other stop string is in what was given out.
    if places:
        first = min(text.find(word) + len(word) for word in stop if word in text)
        begins = [text.find(word) for word in stop if word in text and text.find(word) + len(word) == first]
        assert found == text[: min(begins)]
    else:
        assert found == text


def test_a_beginning_of_a_stop_string_is_held_back() -> None:
    words = TextStream(TOKENIZER, ["stop"])
    pieces = [words.push(token) for token in TOKENIZER("a sto")["input_ids"]]
    assert "".join(pieces) == "a "
    assert words.finish() == "sto"


@pytest.mark.parametrize("text", ["", "plain"])
def test_no_stop_strings(text: str) -> None:
    assert streamed(text, []) == (text, False)
