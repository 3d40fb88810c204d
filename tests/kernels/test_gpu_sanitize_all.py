"""Shares of `make gpu-sanitize` and their devices, with a stand-in for the tool."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest
from tests import gpus
from tests.gpus import Gpu, seats
from tests.kernels import gpu_sanitize_all
from tests.kernels.gpu_sanitize_all import Outcome, Share, conclude, run

MATMULS = Share("memcheck", ("1/2", "4"), None)
ALONE = Share("racecheck", ("kept",), "kept")


def test_neighbours_sit_on_different_devices_and_memory_limits_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "cores", lambda: 6)
    monkeypatch.setattr(gpus, "gpus", lambda: [Gpu("0", 30), Gpu("3", 80), Gpu("GPU-x", 5)])
    assert seats(10) == ["0", "3", "GPU-x", "0", "3", "0"]
    assert seats(10, apart=25) == ["0", "3", "GPU-x", "3", "3", "3"]
    assert seats(100) == ["0", "3", "GPU-x"]
    monkeypatch.setattr(gpus, "gpus", list)
    assert seats(10) == []


def test_every_matmul_is_in_one_share_of_each_tool() -> None:
    for tool, (_, count) in gpu_sanitize_all.PARTS.items():
        words = [share.words for share in gpu_sanitize_all.shares(tool)]
        assert [found[0] for found in words if "/" in found[0]] == [f"{part + 1}/{count}" for part in range(count)]
        assert {found[0] for found in words if "/" not in found[0]} == set(gpu_sanitize_all.ALONE)


def outcome(folder: Path, share: Share, said: str, code: int = 0) -> Outcome:
    """What comes of a tool that says so."""
    tool = folder / "tool"
    tool.write_text(f"#!/bin/sh\necho on $CUDA_VISIBLE_DEVICES: $@\ncat <<END\n{said}\nEND\nexit {code}\n")
    tool.chmod(0o755)
    free: queue.Queue[str] = queue.Queue()
    free.put("7")
    found = run(str(tool), share, free)
    assert free.get_nowait() == "7" and f"on 7: --tool {share.tool} " in found.text
    return found


FINE = "3 matmuls of weights alone; 0 wrong"
MEMORY, RACES = (
    "========= ERROR SUMMARY: {} errors",
    "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, {} warnings)",
)


def test_what_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matmuls = outcome(tmp_path, MATMULS, f"{FINE}\n{MEMORY.format(0)}")
    alone = outcome(tmp_path, ALONE, f"kept: 0 wrong\n0 matmuls of weights alone; 0 wrong\n{RACES.format(0, 0, 0)}")
    assert matmuls.passed and matmuls.matmuls == 3 and alone.passed
    assert conclude([matmuls, alone]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "memcheck: 0 errors or warnings in 3 matmuls",
        "racecheck: 0 errors or warnings in 0 matmuls and kept",
        "0 of 2 shares failed",
    ]


@pytest.mark.parametrize(
    ("share", "said", "code"),
    [
        (MATMULS, f"{FINE}\n{MEMORY.format(2)}", 1),
        (MATMULS, f"{FINE}\n{MEMORY.format(0)}", 1),
        (MATMULS, f"3 matmuls of weights alone; 1 wrong\n{MEMORY.format(0)}", 0),
        (MATMULS, f"0 matmuls of weights alone; 0 wrong\n{MEMORY.format(0)}", 0),
        (MATMULS, FINE, 0),
        (MATMULS, MEMORY.format(0), 0),
        (ALONE, f"kept: 0 wrong\n0 matmuls of weights alone; 0 wrong\n{RACES.format(1, 0, 1)}", 0),
        (ALONE, f"0 matmuls of weights alone; 0 wrong\n{RACES.format(0, 0, 0)}", 0),
    ],
    ids=["errors", "exit-code", "wrong", "nothing", "no-report", "no-results", "warnings", "section-missing"],
)
def test_what_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str], share: Share, said: str, code: int) -> None:
    found = outcome(tmp_path, share, said, code)
    assert not found.passed and conclude([found]) == 1
    gpu_sanitize_all.tell(found, "1/1")
    assert said in capsys.readouterr().out


def test_a_share_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed with what it has started, counts as failed, and the kernel it stopped at is its last word but one."""
    monkeypatch.setattr(gpu_sanitize_all, "LONGEST", 1)
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\nprintf 'a kernel: '\nsleep 600 &\necho $! > \"$0.child\"\nwait\n")
    tool.chmod(0o755)
    free: queue.Queue[str] = queue.Queue()
    free.put("0")
    found = run(str(tool), MATMULS, free)
    child = Path(f"{tool}.child").read_text().strip()
    assert found.code < 0 and found.found is None and not found.passed
    assert found.text == "a kernel: \nkilled after 1 s\n"
    assert free.get_nowait() == "0"
    assert not is_running(int(child))


def is_running(process: int) -> bool:
    """Whether it is there and no zombie."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
