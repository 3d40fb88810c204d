"""A run that is killed at any instant goes on where it stopped, and writes what an uninterrupted run writes."""

from __future__ import annotations

import builtins
import fcntl
import functools
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import zoo
from tests.model.tiny import GPTQ, RTN, Wrapped, digest, ids_file, recipe
from transformers import LlamaConfig, LlamaForCausalLM

from aerogel.errors import BadInput
from aerogel.model.compress import compress
from aerogel.model.structure import discover
from aerogel.recipes.schema import Recipe


class Killed(BaseException):
    """Stands for the kill; nothing may catch it."""


class Disk:
    """Counts every step that changes the disk below a folder, and kills at one of them.

    A killed write leaves half of its bytes behind, as a real kill may. Writes to one file count up to the second.
    """

    def __init__(self, patch: pytest.MonkeyPatch, inside: Path) -> None:
        self.inside = inside
        self.start(-1)
        for name in ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir"):
            self._count(patch, name)
        plain = io.open

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            stream = plain(file, mode, *args, **kwargs)
            if "b" not in mode or not {"w", "x", "a"} & set(mode) or self.inside not in Path(str(file)).parents:
                return stream
            self.hit(f"open {file}", stream.close)
            return _Written(stream, self)

        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)

    def start(self, at: int) -> None:
        """Counts from the beginning and kills at step `at`."""
        self.step, self.at = 0, at
        self.log: list[str] = []

    def hit(self, what: str, before: Callable[[], Any] | None = None) -> None:
        self.log.append(what)
        self.step += 1
        if self.step == self.at + 1:
            if before is not None:
                before()
            raise Killed

    def _count(self, patch: pytest.MonkeyPatch, name: str) -> None:
        plain = getattr(os, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if name == "fsync" or self.inside in Path(str(args[0])).parents or kwargs.get("dir_fd") is not None:
                self.hit(f"{name} {args[0]}")
            return None if name == "fsync" else plain(*args, **kwargs)

        patch.setattr(os, name, counted)


class _Written(Wrapped):
    """A file open for writing whose first two writes are steps."""

    def __init__(self, stream: Any, disk: Disk) -> None:
        super().__init__(stream)
        self.disk, self.writes = disk, 0

    def write(self, data: Any) -> Any:
        self.writes += 1
        if self.writes <= 2:
            self.disk.hit(f"write {self.stream.name}", lambda: self.stream.write(bytes(data)[: len(bytes(data)) // 2]))
        return self.stream.write(data)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what costs time and has nothing to do with the disk."""
    monkeypatch.setattr("aerogel.model.compress.discover", functools.cache(discover))
    monkeypatch.setattr("aerogel.model.compress.versions", lambda: {"aerogel": "0"})
    monkeypatch.setattr("aerogel.model.compress.machine", dict)
    monkeypatch.setattr("aerogel.model.plan.matmul_rate", lambda: 1e9)


FAST = {"quantize": {"method": "rtn", "bits": 4, "group_size": 16, "clip": "none"}}


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_kill_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None, overwrite: bool) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    chosen = recipe(None, FAST)
    compress(dense, chosen, tmp_path / "wanted")
    wanted = digest(tmp_path / "wanted")
    compress(dense, recipe(None, {"quantize": {**FAST["quantize"], "bits": 3}}), tmp_path / "before")
    old = digest(tmp_path / "before") if overwrite else {}
    place = tmp_path / "place"
    disk = Disk(monkeypatch, place)
    steps = 0
    for at in itertools.count():
        out = place / f"{at}" / "out"
        out.parent.mkdir(parents=True)
        if overwrite:
            shutil.copytree(tmp_path / "before", out)
        disk.start(at)
        try:
            compress(dense, chosen, out, overwrite=overwrite)
        except Killed:
            steps += 1
            where = f"killed at step {at}: {disk.log[-3:]}"
            check_nothing_is_half_written(out, wanted, old, where)
            disk.start(-1)
            compress(dense, chosen, out, overwrite=overwrite)
            assert digest(out) == wanted, where
            assert [path.name for path in out.parent.iterdir()] == ["out"], where
            shutil.rmtree(out.parent)
        else:
            break
    assert digest(out) == wanted
    assert steps > 60


def test_killed_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), GPTQ)
    compress(dense, chosen, tmp_path / "wanted")
    wanted = digest(tmp_path / "wanted")
    out = tmp_path / "place" / "out"
    disk = Disk(monkeypatch, out.parent)
    draw = random.Random(0)
    kills = 0
    while True:
        disk.start(draw.randrange(45))
        try:
            compress(dense, chosen, out)
        except Killed:
            kills += 1
            check_nothing_is_half_written(out, wanted, {}, f"kill {kills}")
        else:
            break
    assert kills >= 5
    assert digest(out) == wanted
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def check_nothing_is_half_written(out: Path, wanted: dict[str, str], old: dict[str, str], where: str) -> None:
    """Under the final name lies nothing, all of the old, or all of the new; the old goes only when the new is whole."""
    if out.exists():
        assert digest(out) in (wanted, old), where
    elif old:
        # Between two renames the old output lies aside, whole.
        assert digest(out.with_name("out.partial") / "replaced") == old, where


def test_another_recipe_discards_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    source = ids_file(tmp_path)
    other = {"quantize": {"method": "gptq", "bits": 3, "group_size": 16}}
    compress(dense, recipe(source, other), tmp_path / "wanted")
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    seen = _interrupt(dense, recipe(source, GPTQ), out)
    assert seen == [0, 1]
    resumed: list[int] = []
    compress(dense, recipe(source, other), out, progress=lambda stage, done, total, facts=None: resumed.append(done))
    assert resumed == [0, 1, 2, 3]
    assert digest(out) == digest(tmp_path / "wanted")


def _interrupt(dense: Path, chosen: Recipe, out: Path) -> list[int]:
    """Kills a run after its first finished block; returns what the progress callback saw."""
    seen: list[int] = []

    def watch(stage: str, done: int, total: int, facts: Any = None) -> None:
        seen.append(done)
        if done == 1:
            raise Killed

    with pytest.raises(Killed):
        compress(dense, chosen, out, progress=watch)
    return seen


def test_the_same_recipe_goes_on_at_the_next_block(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), GPTQ)
    compress(dense, chosen, tmp_path / "wanted")
    assert _interrupt(dense, chosen, tmp_path / "out") == [0, 1]
    seen: list[int] = []
    compress(dense, chosen, tmp_path / "out", progress=lambda stage, done, total, facts=None: seen.append(done))
    assert seen == [1, 2, 3]
    assert digest(tmp_path / "out") == digest(tmp_path / "wanted")


GPTAQ = {"quantize": {**GPTQ["quantize"], "gptaq": True}}
AWQ = {"scale": {"method": "awq", "steps": 4}}
WALKS: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
    ("gpt2", [GPTQ], {}),
    ("gpt2", [GPTAQ], {}),
    ("gpt2", [GPTAQ], {"activations": "disk"}),
    ("falcon", [GPTAQ], {}),
    ("llama", [AWQ, GPTAQ], {}),
    ("llama", [AWQ, RTN], {}),
    ("gemma2", [AWQ, GPTQ], {}),
    ("mixtral", [GPTQ], {}),
    ("gpt_oss", [GPTQ], {"activations": "disk"}),
    ("deepseek_v3", [GPTQ], {}),
    ("mamba2", [GPTQ], {}),
    ("gpt2", [{"prune": {"method": "wanda", "pattern": "2:4"}}], {}),
    ("mixtral", [{"prune": {"method": "sparsegpt", "pattern": "2:4"}}, GPTQ], {}),
]
ROUNDED = [WALKS[1], WALKS[4], WALKS[8], WALKS[11], WALKS[12]]
"""Those whose dense weights are written in another type than they are read: with a cross moment, folded scales, activations on
disk, pruned weights and experts that stay dense. How blocks were discovered makes no difference to that."""


@pytest.mark.parametrize(
    ("name", "stages", "calibration", "dtype"),
    [*((*walk, "source") for walk in WALKS), *((*walk, "float16") for walk in ROUNDED)],
)
def test_a_resumed_walk_stands_where_the_killed_one_stood(
    tmp_path: Path, name: str, stages: list[dict[str, Any]], calibration: dict[str, Any], dtype: str
) -> None:
    dense = zoo.save(name, tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), *stages, pack={"dtype": dtype}, **calibration)
    compress(dense, chosen, tmp_path / "wanted")
    _interrupt(dense, chosen, tmp_path / "out")
    compress(dense, chosen, tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "wanted")


def test_an_old_output_comes_back_when_another_command_follows_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    out = tmp_path / "place" / "out"
    compress(dense, recipe(None, FAST), out)
    old = digest(out)
    disk = Disk(monkeypatch, out.parent)
    for at in itertools.count():
        disk.start(at)
        with pytest.raises(Killed):
            compress(dense, recipe(None, RTN), out, overwrite=True)
        if not out.exists():
            break
    disk.start(-1)
    with pytest.raises(BadInput, match="already exists"):
        compress(dense, recipe(None, {"quantize": {**FAST["quantize"], "bits": 3}}), out)
    assert digest(out) == old


def test_two_processes_do_not_write_the_same_output(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    work = tmp_path / "out.partial"
    work.mkdir()
    with (work / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match=r"another process is writing .*out now"):
            compress(dense, recipe(None, RTN), tmp_path / "out")
    compress(dense, recipe(None, RTN), tmp_path / "out")


def test_a_finished_output_is_done_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), GPTQ)
    first = compress(dense, chosen, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("aerogel.model.compress.Walk", None)
    again = compress(dense, chosen, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert again["tensors"] == first["tensors"]
    with pytest.raises(BadInput, match="already exists"):
        compress(dense, recipe(None, RTN), tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_failing_run_leaves_the_old_output_alone(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    compress(dense, recipe(None, RTN), tmp_path / "out")
    before = digest(tmp_path / "out")
    chosen = recipe(ids_file(tmp_path), GPTQ)

    def watch(stage: str, done: int, total: int, facts: Any = None) -> None:
        if done == total:
            raise Killed

    with pytest.raises(Killed):
        compress(dense, chosen, tmp_path / "out", overwrite=True, progress=watch)
    assert digest(tmp_path / "out") == before
    report = compress(dense, chosen, tmp_path / "out", overwrite=True)
    assert digest(tmp_path / "out") != before
    assert json.loads((tmp_path / "out" / "aerogel_report.json").read_text())["fingerprint"] == report["fingerprint"]


KILLS = 12


def test_real_processes_that_are_really_killed(tmp_path: Path) -> None:
    """SIGKILL at random instants, until there were a dozen; then the same call ends with the same bytes.

    Processes are forked from one that has torch loaded already, so that a try costs a second and not ten.
    """
    torch.manual_seed(0)
    dense = tmp_path / "dense"
    LlamaForCausalLM(LlamaConfig(**{**zoo.ZOO["llama"], "num_hidden_layers": 6})).save_pretrained(dense)
    chosen = recipe(ids_file(tmp_path), GPTQ).as_dict()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["aerogel.model.compress", "aerogel.quantize.gptq", "transformers.models.llama"])

    def start(folder: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=compress, args=(dense, chosen, folder))
        process.start()
        return process

    start(tmp_path / "first").join()
    begin = time.monotonic()
    clean = start(tmp_path / "wanted")
    clean.join()
    whole = time.monotonic() - begin
    assert clean.exitcode == 0
    wanted, out, draw = digest(tmp_path / "wanted"), tmp_path / "out", random.Random(0)
    killed = finished = 0
    while killed < KILLS:
        process = start(out)
        process.join(draw.random() * whole * 0.7)
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was quicker: from the beginning again
            finished += 1
            assert digest(out) == wanted
            shutil.rmtree(out)
            assert finished < 50, "every run ended before its kill"
            continue
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        assert not out.exists() or digest(out) == wanted
    last = start(out)
    last.join()
    assert last.exitcode == 0
    assert digest(out) == wanted
    assert not out.with_name("out.partial").exists()
