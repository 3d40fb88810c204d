"""Where things go: results to stdout, progress and errors to stderr, JSON where `--json` says.

With `--json -` stdout carries exactly one JSON object. Libraries that print on stdout are redirected for that reason.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aerogel.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


@dataclass
class Output:
    """The streams of one command."""

    json: str | None
    quiet: bool
    stdout: Any

    def show(self, *parts: RenderableType) -> None:
        """Prints tables and lines for people: on stdout, on stderr when stdout is for JSON, nowhere when quiet."""
        if not self.quiet:
            for part in parts:
                self.console().print(part, soft_wrap=isinstance(part, str))

    def note(self, text: str) -> None:
        """A line beside a result, on stderr: how it came about."""
        if not self.quiet:
            sys.stderr.write(text + "\n")

    def console(self) -> Console:
        """A rich console for results."""
        from rich.console import Console

        file = sys.stderr if self.json == "-" else self.stdout
        # A pipe or a log file has no width of its own, and tables need more than rich's 80 columns.
        return Console(file=file, highlight=False, markup=False, width=None if file.isatty() else 132)

    def result(self, report: Mapping[str, Any]) -> None:
        """Writes the JSON that was asked for."""
        if self.json is None:
            return
        from aerogel.eval.report import to_json, write_report

        if self.json == "-":
            self.stdout.write(to_json(report))
            self.stdout.flush()
        else:
            write_report(Path(self.json), report)


@contextlib.contextmanager
def session(*, json: str | None, quiet: bool, debug: bool, threads: int | None = None) -> Iterator[Output]:
    """Everything around the work of a command: checks `--json`, calms libraries, sets threads, guards stdout."""
    _check_target(json)
    output = Output(json=json, quiet=quiet, stdout=sys.stdout)
    with contextlib.ExitStack() as stack:
        _calm_libraries(stack, debug)
        if quiet:
            log = logging.getLogger("aerogel")
            stack.callback(log.setLevel, log.level)
            log.setLevel(logging.ERROR)
        if threads is not None:
            import torch

            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield output


def _calm_libraries(stack: contextlib.ExitStack, debug: bool) -> None:
    """No bars but ours, and no warnings about what the user cannot change; `--debug` shows the warnings."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "transformers" in sys.modules:
        from transformers.utils import logging as library

        library.disable_progress_bar()  # type: ignore[no-untyped-call]
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:
        stack.callback(library.set_verbosity, library.get_verbosity())
        library.set_verbosity(logging.ERROR)
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")


def _check_target(json: str | None) -> None:
    """`--json` must name a file that can be written, before hours are spent on what goes in."""
    if json is None or json == "-":
        return
    path = Path(json)
    if not json or path.is_dir():
        raise BadInput(f"--json '{json}' is a folder; give a file name, or - for stdout")
    if not path.parent.is_dir():
        raise BadInput(f"--json {json}: the folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise BadInput(f"--json {json}: no permission to write in {path.parent}; give another file")
