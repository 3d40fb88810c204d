"""How many planes to read of weights that are stored as bit planes, said around a whole run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_BITS: ContextVar[int | None] = ContextVar("aerogel_bits", default=None)


@contextmanager
def at_bits(bits: int | None) -> Iterator[None]:
    """Inside, quantized models are loaded with their first `bits` planes; None for all that is stored."""
    token = _BITS.set(bits)
    try:
        yield
    finally:
        _BITS.reset(token)


def bits_wanted() -> int | None:
    """The number that `at_bits` was given, None outside."""
    return _BITS.get()
