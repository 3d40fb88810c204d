from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "{tiny}", "-r", "w4-fast"),
        ("inspect", "{tiny}"),
        ("list", "recipes"),
        ("list", "methods"),
        ("list", "formats"),
        ("list", "kernels"),
        ("list", "tasks"),
        ("compress", "{tiny}", "-r", "w4-fast", "-o", "out", "--threads", "1"),
        ("generate", "{tiny}", "w1 w2", "-n", "2"),
        ("eval", "{tiny}", "--set", "evaluate.perplexity.source={text}", "--windows", "1", "--sequence-length", "16"),
        ("bench", "{tiny}", "--prompt", "2", "--new-tokens", "2", "--repeats", "1", "--set", "bench.loads=1"),
    ],
)
def test_stdout_is_one_json_object(aerogel, tiny: Path, text: Path, arguments: tuple[str, ...]) -> None:
    found = aerogel(*(argument.format(tiny=tiny, text=text) for argument in arguments), "--json", "-")
    assert found.code == 0, found.stderr
    assert isinstance(json.loads(found.stdout), dict)


def test_a_run_in_json(aerogel, recipe: Path, tiny: Path) -> None:
    found = aerogel("run", recipe, tiny, "-o", "out", "--json", "-", "--set", "bench=null", "--threads", 1)
    assert found.code == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["gate"][0]["passed"] is True
    assert "pass" in found.stderr


def test_a_file_and_tables_at_once(aerogel, tiny: Path) -> None:
    found = aerogel("plan", tiny, "-r", "w8", "--json", "plan.json")
    assert found.code == 0
    assert "down_proj" in found.stdout
    assert json.loads(Path("plan.json").read_text())["size"]["bytes"] > 0


def test_quiet_shows_nothing(aerogel, tiny: Path) -> None:
    for arguments in (("plan", tiny), ("inspect", tiny), ("list", "recipes")):
        found = aerogel(*arguments, "--quiet")
        assert (found.code, found.stdout, found.stderr) == (0, "", "")
