"""Every way a command can end badly, as an exit code and one line.

1 is kept for a failed gate, 2 for what the user can fix before anything ran, 3 for a run that could not finish.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Mapping
from typing import Any

from aerogel.errors import AerogelError

GATE_FAILED, BAD_INPUT, RUN_FAILED = 1, 2, 3

RESUME = "finished blocks are safe on disk; run the same command again to continue"


def explain(error: BaseException, parameters: Mapping[str, Any]) -> tuple[int, str]:
    """Exit code and message for anything that a command raised; `parameters` are the options it was given."""
    hint = f"; {RESUME}" if parameters.get("out") is not None else ""
    if isinstance(error, AerogelError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return RUN_FAILED, f"interrupted{hint}"
    if is_out_of_memory(error):
        return RUN_FAILED, (
            f"out of memory ({first_line(error)}); lower calibration.batch or calibration.samples, or set"
            f" calibration.activations=disk (`aerogel plan` predicts the peak){hint}"
        )
    if isinstance(error, OSError):
        return _operating_system(error, hint)
    return (
        RUN_FAILED,
        f"unexpected {type(error).__name__}: {first_line(error)} (run again with --debug for the traceback)",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, CUDA's and torch's CPU allocator's way of saying so; looks at torch only if it was imported."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def one_line(text: str) -> str:
    """Any message on a single line."""
    return " ".join(text.split())


def first_line(error: BaseException) -> str:
    """The beginning of an exception's text."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _operating_system(error: OSError, hint: str) -> tuple[int, str]:
    where = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RUN_FAILED, f"the disk is full{where and f' ({where.strip()})'}; free some space{hint}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            BAD_INPUT,
            f"no permission for{where or ' a file'}; choose a folder you can write, or change its permissions",
        )
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
        return BAD_INPUT, f"{first_line(error)}; give another path"
    return RUN_FAILED, f"{first_line(error)}{hint}"
