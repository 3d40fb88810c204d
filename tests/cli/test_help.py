from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "datasets", "lm_eval", "numpy", "yaml")
COMMANDS = ("compress", "run", "eval", "bench", "plan", "inspect", "export", "generate", "list", "tune")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["compress", "--help"], ["compres"]])
def test_help_and_typing_errors_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom aerogel.cli.app import main\n"
        f"main({arguments!r})\n"
        f"sys.stderr.write('loaded:' + ','.join(name for name in {HEAVY!r} if name in sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr.splitlines()[-1] == "loaded:"


def test_help_is_quick() -> None:
    """Most of its time goes to what prints it. In processor time, and beside that alone: machines differ, and are busy."""
    timed = "\nimport sys, time\nsys.stderr.write(str(time.process_time()))"
    ours = "import sys\nsys.argv = ['aerogel', '--help']\nfrom aerogel.cli.app import main\nmain()" + timed
    printing = "import typer.main, typer.rich_utils, rich.console" + timed
    took: dict[str, list[float]] = {ours: [], printing: []}
    for _ in range(3):
        for code, times in took.items():
            found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            times.append(float(found.stderr))
    assert min(took[ours]) < 1.8 * min(took[printing]), took


def test_help_names_every_command(aerogel) -> None:
    found = aerogel("--help")
    assert found.code == 0
    for command in COMMANDS:
        assert command in found.stdout
        help_text = aerogel(command, "--help")
        assert help_text.code == 0
        assert "--json" in help_text.stdout


def test_version(aerogel) -> None:
    import aerogel as package

    assert aerogel("--version").stdout.strip() == f"aerogel {package.__version__}"
