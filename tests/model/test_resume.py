"""A run that is killed at any instant goes on where it stopped, and writes what an uninterrupted run writes."""

from __future__ import annotations

import builtins
import fcntl
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests import zoo
from tests.model.tiny import GPTQ, RTN, digest, ids_file, recipe

from aerogel.errors import BadInput
from aerogel.model.compress import compress
from aerogel.recipes.schema import Recipe

REPOSITORY = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """Stands for the kill; nothing may catch it."""


class Disk:
    """Counts every step that changes the disk, and kills at one of them.

    A killed write leaves the first half of its bytes behind, as a real kill may.
    """

    def __init__(self, patch: pytest.MonkeyPatch, inside: Path) -> None:
        self.step, self.at, self.inside = 0, -1, inside
        self.log: list[str] = []
        for name in ("replace", "fsync", "mkdir", "unlink", "rmdir", "rename"):
            self._wrap(patch, os, name)
        plain_open = io.open
        disk = self

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            stream = plain_open(file, mode, *args, **kwargs)
            if "w" not in mode or not isinstance(file, str | Path) or not Path(file).is_relative_to(inside):
                return stream
            write = stream.write

            def half(data: Any) -> Any:
                disk.hit(f"write {Path(file).name}", lambda: (write(data[: len(data) // 2]), stream.flush()))
                return write(data)

            stream.write = half
            return stream

        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)

    def _wrap(self, patch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        plain = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            first = args[0]
            if name == "fsync" or self.inside in Path(str(first)).parents or "dir_fd" in kwargs:
                self.hit(f"{name} {first}")
            return plain(*args, **kwargs)

        patch.setattr(module, name, counted)

    def hit(self, what: str, before: Callable[[], Any] | None = None) -> None:
        if self.step == self.at:
            self.step += 1
            if before is not None:
                before()
            raise Killed
        self.log.append(what)
        self.step += 1


def small(folder: Path, blocks: int = 2) -> Path:
    """A llama of a few blocks."""
    zoo.ZOO["resumed"] = {**zoo.ZOO["llama"], "num_hidden_layers": blocks}
    return zoo.save("llama", folder / "dense") if blocks == 2 else _longer(folder, blocks)


def _longer(folder: Path, blocks: int) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**zoo.ZOO["llama"], "num_hidden_layers": blocks})).save_pretrained(folder / "dense")
    return folder / "dense"


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_every_step_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool) -> None:
    dense = small(tmp_path)
    chosen = recipe(ids_file(tmp_path), GPTQ)
    compress(dense, chosen, tmp_path / "wanted")
    wanted = digest(tmp_path / "wanted")
    place = tmp_path / "place"
    place.mkdir()
    out = place / "out"
    old: dict[str, str] = {}
    if overwrite:
        compress(dense, recipe(None, RTN), out)
        old = digest(out)
    disk = Disk(monkeypatch, place)
    done, kills = False, 0
    while not done:
        # Each attempt resumes what the one before it left, and is killed one step after its own first new one.
        disk.step, disk.at = 0, kills % 29
        try:
            compress(dense, chosen, out, overwrite=overwrite)
            done = True
        except Killed:
            kills += 1
            _check_nothing_is_half_written(out, wanted, old)
        assert kills < 2000
    assert kills > 20
    assert digest(out) == wanted
    assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_kill_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool) -> None:
    dense = small(tmp_path)
    chosen = recipe(None, RTN)
    compress(dense, chosen, tmp_path / "wanted")
    wanted = digest(tmp_path / "wanted")
    compress(dense, recipe(None, {"quantize": {"method": "rtn", "bits": 3, "group_size": 16}}), tmp_path / "before")
    old = digest(tmp_path / "before")
    place = tmp_path / "place"
    place.mkdir()
    disk = Disk(monkeypatch, place)
    for at in range(10_000):
        out = place / f"{at}" / "out"
        out.parent.mkdir()
        if overwrite:
            _copy(tmp_path / "before", out)
        disk.step, disk.at, disk.log = 0, at, []
        try:
            compress(dense, chosen, out, overwrite=overwrite)
        except Killed:
            _check_nothing_is_half_written(out, wanted, old if overwrite else {})
            disk.at = -1
            compress(dense, chosen, out, overwrite=overwrite)
            survived = False
        else:
            survived = True
        assert digest(out) == wanted, f"killed at step {at}: {disk.log[at - 3 : at]}"
        assert [path.name for path in out.parent.iterdir()] == ["out"], f"killed at step {at}: {disk.log[at - 3 : at + 2]}"
        if survived:
            break
    assert at > 40


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def _check_nothing_is_half_written(out: Path, wanted: dict[str, str], old: dict[str, str]) -> None:
    """Under the final name lies nothing, all of the old, or all of the new."""
    if out.exists():
        assert digest(out) in (wanted, old)
    elif old:
        # Between two renames the old output lies aside, whole.
        assert digest(out.with_name("out.replaced")) == old


def test_another_recipe_discards_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = small(tmp_path)
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
    dense = small(tmp_path)
    chosen = recipe(ids_file(tmp_path), GPTQ)
    compress(dense, chosen, tmp_path / "wanted")
    assert _interrupt(dense, chosen, tmp_path / "out") == [0, 1]
    seen: list[int] = []
    compress(dense, chosen, tmp_path / "out", progress=lambda stage, done, total, facts=None: seen.append(done))
    assert seen == [1, 2, 3]
    assert digest(tmp_path / "out") == digest(tmp_path / "wanted")


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gpt_oss", "falcon", "deepseek_v3"])
@pytest.mark.parametrize("kind", ["gptq", "gptaq", "awq", "prune", "disk"])
def test_resumed_walks_stand_where_the_killed_one_stood(tmp_path: Path, name: str, kind: str) -> None:
    if kind == "gptaq" and name in ("mixtral", "gpt_oss", "deepseek_v3"):
        pytest.skip("routed experts have no pairs of dense and compressed tokens")
    if kind == "awq" and name != "falcon":
        pytest.skip("one architecture with sites is enough")
    stages: dict[str, list[dict[str, Any]]] = {
        "gptq": [GPTQ],
        "gptaq": [{"quantize": {**GPTQ["quantize"], "gptaq": True}}],
        "awq": [{"scale": {"method": "awq"}}, {"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}],
        "prune": [{"prune": {"method": "sparsegpt", "pattern": "2:4"}}, {"quantize": {**GPTQ["quantize"], "targets": ["re:.*0"]}}],
        "disk": [GPTQ],
    }
    if kind == "prune":
        stages["prune"] = [{"prune": {"method": "wanda", "pattern": "2:4"}}]
    dense = zoo.save(name, tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), *stages[kind], activations="disk" if kind == "disk" else "memory", pack={"dtype": "float16"})
    compress(dense, chosen, tmp_path / "wanted")
    _interrupt(dense, chosen, tmp_path / "out")
    compress(dense, chosen, tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "wanted")


def test_two_processes_do_not_write_the_same_output(tmp_path: Path) -> None:
    dense = small(tmp_path)
    work = tmp_path / "out.partial"
    work.mkdir()
    with (work / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match=r"another process is writing .*out now"):
            compress(dense, recipe(None, RTN), tmp_path / "out")
    compress(dense, recipe(None, RTN), tmp_path / "out")


def test_a_finished_output_is_done_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = small(tmp_path)
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
    dense = small(tmp_path)
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


def test_a_real_process_that_is_really_killed(tmp_path: Path) -> None:
    dense = _longer(tmp_path, 6)
    chosen = recipe(ids_file(tmp_path), GPTQ).as_dict()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(chosen))
    out = tmp_path / "out"

    def start(folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "aerogel", "compress", str(dense), "-r", str(tmp_path / "recipe.yaml"), "-o", str(folder), "--quiet"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, cwd=tmp_path)

    clean = start(tmp_path / "wanted")
    begin, appeared = time.monotonic(), 0.0
    while clean.poll() is None:
        if not appeared and (tmp_path / "wanted.partial").exists():
            appeared = time.monotonic() - begin
        time.sleep(0.005)
    whole = time.monotonic() - begin
    assert clean.returncode == 0
    draw = random.Random(0)
    kills = 0
    for _ in range(12):
        process = start(out)
        if kills < 4:
            while process.poll() is None and not out.with_name("out.partial").exists():
                time.sleep(0.005)
            time.sleep(draw.random() * (whole - appeared))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
                process.wait()
                assert not out.exists() or digest(out) == digest(tmp_path / "wanted")
                continue
        assert process.wait() == 0
        break
    assert kills >= 1
    assert digest(out) == digest(tmp_path / "wanted")
    assert not out.with_name("out.partial").exists()
