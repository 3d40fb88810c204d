"""Memory errors and races in shared memory of all CUDA kernels: `make gpu-sanitize`.

compute-sanitizer needs seconds for each kernel, and compiling them takes processors. So `gpu_sanitize.py` runs in many shares,
as many at a time as there are processors, spread over all devices. A share passes when the tool has found nothing, no result
was wrong, and there were results. What the tool said in others is printed whole.

The tool is that of CUDA 13.5 (2026.4), from the package nvidia-cuda-sanitizer-api. To 2025.3 whatever is written before a named
barrier and read behind it is a race where threads have arrived at another one without waiting.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tests.gpus import seats

SCRIPT = Path(__file__).with_name("gpu_sanitize.py")
MATMULS = ("scales", "tables", "floats", "planes", "outliers")
ALONE = ("kept", "rounded", "grouped", "blocks", "others")
"""Sections that are one share each; they compare their own results."""
PARTS = {"memcheck": (["1", "2", "3", "4", "5", "6", "7", "8", *MATMULS], 8), "racecheck": (["3", "4", "8", *MATMULS], 16)}
"""Of each tool the sections with matmuls, and into how many shares they are cut."""
OPTIONS = {"memcheck": [], "racecheck": ["--show-backtrace", "no"]}
LONGEST = 240
"""Seconds for a share. They need 20 to 115 with a processor each; one that waits for itself would never end."""
RUNNING: set[int] = set()
"""Processes that lead a group of their own, which an interrupt at the terminal does not reach."""
PROCESS_MEMORY = 4 << 30
"""Bytes of a device for each share."""
FOUND = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)")
COUNTED = re.compile(r"(\d+) matmuls of weights alone; (\d+) wrong")


@dataclass(frozen=True)
class Share:
    """A process. tool: a key of PARTS. words: for gpu_sanitize.py. alone: its section of ALONE, None where it takes matmuls."""

    tool: str
    words: tuple[str, ...]
    alone: str | None

    @property
    def name(self) -> str:
        """As progress shows it."""
        return f"{self.tool} {self.alone or 'matmuls ' + self.words[0]}"


@dataclass(frozen=True)
class Outcome:
    """found: what the tool reported, None where it did not come to its end. wrong: results; None likewise."""

    share: Share
    seconds: float
    code: int
    text: str
    found: int | None
    matmuls: int
    wrong: int | None

    @property
    def passed(self) -> bool:
        """Whether everything was checked and nothing found."""
        there = f"{self.share.alone}: 0 wrong" in self.text if self.share.alone else self.matmuls > 0
        return self.code == 0 and self.found == 0 and self.wrong == 0 and there


def shares(tool: str) -> list[Share]:
    """All that a tool checks."""
    sections, count = PARTS[tool]
    matmuls = [Share(tool, (f"{part}/{count}", *sections), None) for part in range(1, count + 1)]
    return [*(Share(tool, (section,), section) for section in ALONE), *matmuls]


def sanitizer() -> str:
    """Where the package has put the tool in this environment. Exits with what to do where it has not."""
    tool = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "compute-sanitizer", "compute-sanitizer")
    if not tool.is_file():
        raise SystemExit(f"{tool} is missing: pip install 'nvidia-cuda-sanitizer-api>=13.5'")
    return str(tool)


def run(tool: str, share: Share, free: queue.Queue[str]) -> Outcome:
    """Runs a share on the next device that has a seat for it."""
    gpu = free.get()
    options = ["--tool", share.tool, "--error-exitcode", "1", "--check-tensor-ops", "yes", *OPTIONS[share.tool]]
    words = [*share.words, *(["racecheck"] if share.tool == "racecheck" else [])]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    started = time.perf_counter()
    try:
        code, said = run_within(LONGEST, [tool, *options, sys.executable, str(SCRIPT), *words], environment)
    finally:
        free.put(gpu)
    found, counted = FOUND.search(said), COUNTED.search(said)
    return Outcome(
        share=share,
        seconds=time.perf_counter() - started,
        code=code,
        text=said,
        found=sum(int(number or 0) for number in found.groups()) if found else None,
        matmuls=int(counted[1]) if counted else 0,
        wrong=int(counted[2]) if counted else None,
    )


def run_within(seconds: float, command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """(exit code, what it said) of a command. One that takes longer is killed with all that it started: the code is negative,
    and the last that it said names the kernel that did not end."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    ) as process:  # fmt: skip
        RUNNING.add(process.pid)
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            said += f"\nkilled after {seconds:.0f} s\n"
        RUNNING.remove(process.pid)
    return process.returncode, said


def arguments() -> tuple[list[Share], list[str]]:
    """What is asked for: the shares, and a device for each process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="auto", help="at a time; auto: as processors and memory of devices allow")
    parser.add_argument(
        "only", nargs="*", help="shares whose names hold all of this: racecheck, kept, 'matmuls 3/'; none for all"
    )
    asked = parser.parse_args()
    every = [share for tool in PARTS for share in shares(tool)]
    todo = [share for share in every if all(part in share.name for part in asked.only)]
    if not todo:
        parser.error(
            f"no share has {' and '.join(asked.only)} in its name; there are: {', '.join(share.name for share in every)}"
        )
    there = seats(PROCESS_MEMORY)
    if not there:
        parser.error("there is no CUDA device")
    if asked.processes == "auto":
        return todo, there
    if not asked.processes.isdigit() or not int(asked.processes):
        parser.error(f"--processes {asked.processes}: write a number, or auto")
    return todo, [there[seat % len(there)] for seat in range(int(asked.processes))]


def main() -> int:
    """0 when every share passed."""
    (todo, there), tool, outcomes = arguments(), sanitizer(), []
    free: queue.Queue[str] = queue.Queue()
    for gpu in there:
        free.put(gpu)
    print(f"{len(todo)} shares, {len(there)} at a time on {len(set(there))} GPUs", flush=True)
    with ThreadPoolExecutor(len(there)) as pool:
        try:
            for done in as_completed([pool.submit(run, tool, share, free) for share in todo]):
                outcomes.append(done.result())
                tell(outcomes[-1], f"{len(outcomes)}/{len(todo)}")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for group in list(RUNNING):
                with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                    os.killpg(group, signal.SIGKILL)
            raise
    return conclude(outcomes)


def tell(outcome: Outcome, progress: str) -> None:
    """A line, and what the tool said where something is wrong."""
    said = "did not end" if outcome.found is None else f"{outcome.found} found"
    results = f"{outcome.matmuls} matmuls" if outcome.share.alone is None else "results"
    wrong = "not all compared" if outcome.wrong is None else f"{outcome.wrong} wrong"
    print(f"[{progress}] {outcome.share.name}: {said}, {results}, {wrong}, {outcome.seconds:.0f} s", flush=True)
    if not outcome.passed:
        print(f"---- {outcome.share.name} failed (exit code {outcome.code}):\n{outcome.text}----", flush=True)


def conclude(outcomes: list[Outcome]) -> int:
    """The sums of each tool and the names of what failed; the exit code."""
    failed = [outcome.share.name for outcome in outcomes if not outcome.passed]
    for tool in PARTS:
        of_tool = [outcome for outcome in outcomes if outcome.share.tool == tool]
        if of_tool:
            found, matmuls = sum(outcome.found or 0 for outcome in of_tool), sum(outcome.matmuls for outcome in of_tool)
            sections = ", ".join(outcome.share.alone for outcome in of_tool if outcome.share.alone)
            print(f"{tool}: {found} errors or warnings in {matmuls} matmuls{' and ' if sections else ''}{sections}")
    print(f"{len(failed)} of {len(outcomes)} shares failed{': ' if failed else ''}{', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
