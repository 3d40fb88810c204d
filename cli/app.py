"""`aerogel`: the commands and what turns any error into one line and an exit code.

0 done (and the gate passed), 1 a gate failed, 2 bad input, 3 the run failed. Nothing heavy is imported before a
command runs, so help and typing errors answer at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand

from aerogel.cli import allocate, bench, compress, evaluate, export, generate, inspect, listing, plan, run, tune
from aerogel.cli.failures import BAD_INPUT, RUN_FAILED, explain, one_line


class Command(TyperCommand):
    """A command whose errors become one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command. Raises `typer.Exit` with the code."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            code, message = explain(error, ctx.params)
            complain(message)
            raise typer.Exit(code) from None


app = typer.Typer(
    name="aerogel",
    help="Make language models light: smaller, faster, and provably about as good.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compress", cls=Command)(compress.command)
app.command("run", cls=Command)(run.command)
app.command("eval", cls=Command)(evaluate.command)
app.command("bench", cls=Command)(bench.command)
app.command("plan", cls=Command)(plan.command)
app.command("inspect", cls=Command)(inspect.command)
app.command("export", cls=Command)(export.command)
app.command("generate", cls=Command)(generate.command)
app.command("list", cls=Command)(listing.command)
app.command("tune", cls=Command)(tune.command)
app.command("allocate", cls=Command)(allocate.command)


@app.callback(invoke_without_command=True)
def version(
    ctx: typer.Context,
    show: bool = typer.Option(False, "--version", help="Show the version and exit."),
) -> None:
    """Make language models light: smaller, faster, and provably about as good."""
    if show:
        from aerogel.version import __version__

        typer.echo(f"aerogel {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def complain(message: str) -> None:
    """The one line that says what went wrong."""
    sys.stderr.write(f"error: {one_line(message)}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line with `arguments` (default: those of the process) and returns the exit code."""
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="aerogel", standalone_mode=False)
    except typer.Abort:
        complain("aborted")
        return RUN_FAILED
    except typer.TyperException as error:
        complain(_usage(error))
        return BAD_INPUT
    except BrokenPipeError:
        # The reader of our output closed it, as `head` does; what it wanted, it got.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        return 0
    # typer turns an interrupt outside a command into 130; the table of exit codes has 3 for it.
    return RUN_FAILED if code == 130 else int(code or 0)


def _usage(error: typer.TyperException) -> str:
    """A typing error with the help that would have shown it."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "aerogel"
    # typer checks values with pydantic, whose error knows what was found.
    details = getattr(error.__cause__, "errors", None)
    found = f", found {details()[0]['input']!r}" if callable(details) else ""
    return f"{error.format_message().rstrip('.')}{found}; `{path} --help` shows what it takes"


if __name__ == "__main__":
    sys.exit(main())
