"""The two ways a run ends early, each with the exit code it stands for.

Every message is an instruction: what was wrong, what was found, what to write instead. The command line prints it on
one line and exits with `exit_code`; nothing below `cli/` ever calls `sys.exit`.
"""

from __future__ import annotations


class AerogelError(Exception):
    """Base of every error that aerogel raises on purpose."""

    exit_code: int = 3


class BadInput(AerogelError):  # noqa: N818  (what happened, said where it is raised)
    """The recipe, the model, the data or an option is wrong: the user can fix it before anything ran (exit code 2)."""

    exit_code = 2


class RunFailed(AerogelError):  # noqa: N818
    """The run could not finish: disk, memory, numerics. The message says what is safe and how to go on (exit code 3)."""

    exit_code = 3
