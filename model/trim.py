"""Hands freed memory back to the operating system.

glibc keeps what was freed below something still in use. A run allocates and frees matrices of many sizes, and over 36
blocks of a model with 4 billion parameters the kept part grew by a gigabyte: the memory of one block would become that
of the whole run. Asking for it back costs milliseconds.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any


def trim() -> None:
    """Returns freed pages where the C library has a call for it (glibc); others return them by themselves."""
    call = _malloc_trim()
    if call is not None:
        call(0)


@functools.cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
