"""Tokens to text while they come, and where to stop.

A token is not a piece of text: a character may take several, and what a token looks like may depend on the one before
it. So the last few tokens are decoded with and without the new one, and the difference is new text once it ends in whole
characters. Text that might be the beginning of a stop string is held back until it is clear that it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"
"""What tokenizers decode half a character to."""


class TextStream:
    """Feed it one sequence's tokens; `stopped` says that a stop string was met (it is not part of the text)."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(word for word in stop if word)
        self.stopped = False
        self._ids: list[int] = []
        self._first = self._read = 0  # tokens from `first` on are decoded again; those before `read` have been given out
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain after one more token."""
        if self.stopped:
            return ""
        self._ids.append(token)
        before, now = self._decoded(self._first, self._read), self._decoded(self._first, len(self._ids))
        if now.endswith(UNFINISHED) or len(now) <= len(before):
            return ""
        self._first, self._read = self._read, len(self._ids)
        return self._release(now[len(before) :], last=False)

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        rest = self._decoded(self._first, len(self._ids))[len(self._decoded(self._first, self._read)) :]
        self._read = len(self._ids)
        return self._release(rest, last=True)

    def _decoded(self, begin: int, end: int) -> str:
        found: str = self.tokenizer.decode(self._ids[begin:end], skip_special_tokens=True)
        return found

    def _release(self, text: str, last: bool) -> str:
        text, self._held = self._held + text, ""
        places = [place for place in (text.find(word) for word in self.stop) if place >= 0]
        if places:
            self.stopped = True
            return text[: min(places)]
        keep = 0 if last else max((_overlap(text, word) for word in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, word: str) -> int:
    """How many characters at the end of `text` could be the beginning of `word`."""
    return next((size for size in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:size])), 0)
