from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aerogel.errors import BadInput, RunFailed


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def compress(*arguments: object, **options: object) -> dict[str, Any]:
        raise error

    monkeypatch.setattr("aerogel.model.compress.compress", compress)


def test_0_for_a_run_whose_gate_passed(aerogel, recipe: Path, tiny: Path, tmp_path: Path) -> None:
    found = aerogel("run", recipe, tiny, "-o", tmp_path / "out", "--threads", 1)
    assert found.code == 0, found.stderr
    assert "pass" in found.stdout
    assert "perplexity" in found.stdout
    report = json.loads((tmp_path / "out" / "aerogel_report.json").read_text())
    assert [gate["name"] for gate in report["gate"]] == ["max_kl", "min_compression"]
    assert report["evaluation"]["divergence"]["kl"] >= 0
    assert report["bench"]["rows"]
    assert report["command"].split()[0] == "aerogel"
    for name in ("README.md", "aerogel_report.html", "aerogel_junit.xml", "tokenizer.json", "model.safetensors"):
        assert (tmp_path / "out" / name).is_file()
    again = aerogel("run", recipe, tiny, "-o", tmp_path / "out", "--threads", 1, "--quiet")
    assert (again.code, again.stdout, again.stderr) == (0, "", "")


def test_1_for_a_gate_that_failed(aerogel, recipe: Path, tiny: Path, tmp_path: Path) -> None:
    changes = ("--set", "gate.min_compression=100", "--set", "bench=null", "--threads", 1)
    found = aerogel("run", "-r", recipe, tiny, "-o", tmp_path / "out", *changes)
    assert found.code == 1, found.stderr
    assert "FAIL" in found.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert 'failures="1"' in (tmp_path / "out" / "aerogel_junit.xml").read_text()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (BadInput("the model is odd;\nwrite another"), 2, ["the model is odd; write another"]),
        (RunFailed("block 3 is not finite"), 3, ["block 3 is not finite"]),
        (KeyboardInterrupt(), 3, ["interrupted", "run the same command again"]),
        (MemoryError(), 3, ["out of memory", "calibration.batch", "run the same command again"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), 3, ["out of memory", "CUDA"]),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 3, ["out of memory"]),
        (OSError(errno.ENOSPC, "No space left on device", "x.safetensors"), 3, ["disk is full", "x.safetensors"]),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, ["no permission", "/x"]),
        (KeyError("q_proj"), 3, ["unexpected KeyError", "q_proj", "--debug"]),
    ],
)
def test_every_error_is_one_line(aerogel, tiny: Path, monkeypatch, error: BaseException, code: int, words: list[str]) -> None:
    raising(monkeypatch, error)
    found = aerogel("compress", tiny, "-r", "w4-fast", "-o", "out")
    assert found.code == code
    assert len(found.stderr.splitlines()) == 1, found.stderr
    for word in words:
        assert word in found.stderr
    assert found.stdout == ""


def test_debug_shows_the_traceback(aerogel, tiny: Path, monkeypatch) -> None:
    raising(monkeypatch, KeyError("q_proj"))
    found = aerogel("compress", tiny, "-r", "w4-fast", "-o", "out", "--debug")
    assert found.code == 3
    assert "Traceback" in found.stderr
    assert found.stderr.splitlines()[-1].startswith("error: unexpected KeyError")


def test_a_process_ends_with_the_code() -> None:
    call = [sys.executable, "-m", "aerogel.cli.app", "list", "nothing"]
    found = subprocess.run(call, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.startswith("error: there is no list 'nothing'")


def test_a_reader_that_closes_early_is_no_failure() -> None:
    call = f"{sys.executable} -m aerogel.cli.app list architectures | head -n 1"
    found = subprocess.run(["bash", "-o", "pipefail", "-c", call], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
