"""Damaged checkpoints and failing disks: the right error, naming the file and the tensor, and nothing left half done."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import zoo
from tests.model.tiny import GPTQ, RTN, Wrapped, digest, ids_file, recipe

from aerogel.errors import AerogelError, BadInput, RunFailed
from aerogel.model.compress import compress
from aerogel.model.reader import CheckpointReader

DAMAGED = "model.layers.1.mlp.down_proj.weight"
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save("llama", tmp_path_factory.mktemp("whole") / "dense")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save("llama", tmp_path_factory.mktemp("sharded") / "dense", shard="30KB")


@pytest.fixture
def dense(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "dense"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "shards"))


def refuses(model: Path, tmp_path: Path, kind: type[AerogelError], *words: str) -> None:
    """Compressing raises `kind` on one line with all `words`, and leaves nothing under the final name."""
    with pytest.raises(kind) as caught:
        compress(model, recipe(None, RTN), tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert not (tmp_path / "out").exists()


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(file: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    header, data = split(file)
    change(header)
    join(file, header, data)


# ---- damaged checkpoints ----------------------------------------------------------------------------------------------


def test_a_truncated_file(dense: Path, tmp_path: Path) -> None:
    file = dense / "model.safetensors"
    for size in (file.stat().st_size - 1, file.stat().st_size // 2, 300, 8, 3, 0):
        os.truncate(file, size) if size < file.stat().st_size else None
        refuses(dense, tmp_path, BadInput, "model.safetensors")


def test_a_file_with_something_behind_it(dense: Path, tmp_path: Path) -> None:
    with (dense / "model.safetensors").open("ab") as stream:
        stream.write(b"\0")
    refuses(dense, tmp_path, BadInput, "model.safetensors")


def test_a_truncated_shard(shards: Path, tmp_path: Path) -> None:
    file = sorted(shards.glob("*.safetensors"))[-1]
    os.truncate(file, file.stat().st_size - 4)
    refuses(shards, tmp_path, BadInput, file.name)


def test_a_shard_that_shrinks_while_it_is_read(dense: Path) -> None:
    reader = CheckpointReader(dense)
    last = max(reader, key=lambda entry: entry.end)
    os.truncate(last.file, last.end - 5)
    with pytest.raises(BadInput, match=rf"model\.safetensors ended 5 bytes before the end of '{last.name}'"):
        reader.read(last.name)


@pytest.mark.parametrize(
    "header", [b"{", b"[]", b"null", b"\xff\xfe{}", b'{"a": 3}', b'{"a": {"dtype": "F32"}}', b'"text"', b"[1]" * 50]
)
def test_a_header_that_is_no_header(dense: Path, tmp_path: Path, header: bytes) -> None:
    file = dense / "model.safetensors"
    join(file, header, split(file)[1])
    refuses(dense, tmp_path, BadInput, "model.safetensors")


LIES: list[Callable[[dict[str, Any]], object]] = [
    lambda row: row.update(dtype="F64"),
    lambda row: row.update(dtype="F16"),
    lambda row: row.update(dtype="X7"),
    lambda row: row.update(dtype=None),
    lambda row: row.update(shape=[32, 49]),
    lambda row: row.update(shape=[-32, -48]),
    lambda row: row.update(shape=[1 << 62, 1 << 62]),
    lambda row: row.update(shape="32x48"),
    lambda row: row.update(shape=[[32], 48]),
    lambda row: row.update(data_offsets=[0, 4]),
    lambda row: row.update(data_offsets=[-4, 6140]),
    lambda row: row.update(data_offsets=[row["data_offsets"][0] + 4, row["data_offsets"][1] + 4]),
    lambda row: row.update(data_offsets=[row["data_offsets"][0] - 4, row["data_offsets"][1] - 4]),
    lambda row: row.update(data_offsets=[0, row["data_offsets"][1] - row["data_offsets"][0]]),
    lambda row: row.update(data_offsets=[1 << 70, (1 << 70) + 6144]),
    lambda row: row.update(data_offsets=[1]),
    lambda row: row.update(data_offsets=None),
]


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(dense: Path, tmp_path: Path, lie: Callable[[dict[str, Any]], object]) -> None:
    change_header(dense / "model.safetensors", lambda header: lie(header[DAMAGED]) and None)
    refuses(dense, tmp_path, BadInput, "model.safetensors")


def test_a_dtype_that_nobody_knows_is_named(dense: Path, tmp_path: Path) -> None:
    change_header(dense / "model.safetensors", lambda header: header[DAMAGED].update(dtype="X7"))
    refuses(dense, tmp_path, BadInput, DAMAGED, "X7", "F32")


def test_a_tensor_of_another_shape(dense: Path, tmp_path: Path) -> None:
    change_header(dense / "model.safetensors", lambda header: header[DAMAGED].update(shape=[48, 32]))
    refuses(dense, tmp_path, BadInput, DAMAGED, "48")


def test_a_missing_tensor(dense: Path, tmp_path: Path) -> None:
    tensors = load_file(dense / "model.safetensors")
    del tensors[DAMAGED]
    save_file(tensors, dense / "model.safetensors")
    refuses(dense, tmp_path, BadInput, DAMAGED)


def change_index(shards: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))


def test_an_index_that_names_a_missing_tensor(shards: Path, tmp_path: Path) -> None:
    first = min(path.name for path in shards.glob("*.safetensors"))
    change_index(shards, lambda table: table.update({"model.ghost.weight": first}))
    refuses(shards, tmp_path, BadInput, "model.ghost.weight", first)


def test_a_missing_shard(shards: Path, tmp_path: Path) -> None:
    file = max(shards.glob("*.safetensors"))
    file.unlink()
    refuses(shards, tmp_path, BadInput, file.name)


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", ""])
def test_an_index_that_climbs_out(shards: Path, tmp_path: Path, place: str) -> None:
    shutil.copy(min(shards.glob("*.safetensors")), tmp_path / "outside.safetensors")
    change_index(shards, lambda table: table.update({DAMAGED: place}))
    refuses(shards, tmp_path, BadInput, "model.safetensors.index.json", DAMAGED)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}', "\0"]
)
def test_an_index_that_is_no_index(shards: Path, tmp_path: Path, text: str) -> None:
    (shards / "model.safetensors.index.json").write_text(text)
    refuses(shards, tmp_path, BadInput, str(shards))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [DAMAGED, "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_no_numbers(dense: Path, tmp_path: Path, dtype: torch.dtype, value: float, name: str) -> None:
    tensors = {n: t.to(dtype) for n, t in load_file(dense / "model.safetensors").items()}
    tensors[name].view(-1)[7] = value
    save_file(tensors, dense / "model.safetensors")
    refuses(dense, tmp_path, BadInput, name, "NaN or infinity")


@pytest.mark.parametrize("name", [DAMAGED, "model.embed_tokens.weight", "lm_head.weight"])
def test_weights_that_are_no_numbers_with_calibration(dense: Path, tmp_path: Path, name: str) -> None:
    tensors = load_file(dense / "model.safetensors")
    tensors[name].view(-1)[7] = float("nan")
    save_file(tensors, dense / "model.safetensors")
    with pytest.raises(BadInput, match="NaN or infinity"):
        compress(dense, recipe(ids_file(tmp_path), GPTQ), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- disks ------------------------------------------------------------------------------------------------------------


class _Full(Wrapped):
    """A file whose disk has room for so many bytes."""

    def __init__(self, stream: Any, disk: dict[str, int]) -> None:
        super().__init__(stream)
        self.disk = disk

    def write(self, data: Any) -> Any:
        size = memoryview(data).nbytes
        if size > self.disk["left"]:
            raise OSError(self.disk["errno"], os.strerror(self.disk["errno"]))
        self.disk["left"] -= size
        return self.stream.write(data)


def fill(patch: pytest.MonkeyPatch, left: int, number: int = errno.ENOSPC) -> dict[str, int]:
    disk = {"left": left, "errno": number}
    plain = io.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        stream = plain(file, mode, *args, **kwargs)
        return _Full(stream, disk) if mode == "wb" and ".partial" in str(file) else stream

    patch.setattr(io, "open", opened)
    return disk


@pytest.fixture(scope="module")
def written(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a disk with room enough has in the end."""
    out = tmp_path_factory.mktemp("written") / "out"
    compress(whole, recipe(None, RTN), out)
    return digest(out)


@pytest.mark.parametrize(
    ("left", "number"),
    [
        *((left, errno.ENOSPC) for left in (0, 100, 5_000, 20_000, 40_000, 70_000, 90_000)),
        *((20_000, number) for number in (errno.EDQUOT, errno.EFBIG, errno.EIO)),
    ],
)
def test_a_full_disk_and_then_more_space(
    whole: Path, written: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int, number: int
) -> None:
    with monkeypatch.context() as patch:
        disk = fill(patch, left, number)
        with pytest.raises(RunFailed, match=r"disk is full|writing .* failed") as caught:
            compress(whole, recipe(None, RTN), tmp_path / "out")
        assert caught.value.exit_code == 3
        assert disk["left"] <= left
    assert not (tmp_path / "out").exists()
    compress(whole, recipe(None, RTN), tmp_path / "out")
    assert digest(tmp_path / "out") == written


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root can mount a small disk")
def test_a_disk_that_is_really_full(whole: Path, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(RunFailed, match="disk is full"):
            compress(whole, recipe(None, RTN), place / "out")
        assert not (place / "out").exists()
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_limit_on_the_size_of_files(whole: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(RunFailed, match="disk is full"):
            compress(whole, recipe(None, RTN), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "out").exists()
    compress(whole, recipe(None, RTN), tmp_path / "out")


def test_a_folder_that_cannot_be_written(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and plain(path, mode))
    refuses(whole, tmp_path, BadInput, str(tmp_path), "permission")


def test_permissions_that_change_while_it_runs(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    refuses(whole, tmp_path, BadInput, "out.partial", "Permission denied")


def test_the_output_must_be_a_place_for_a_folder(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        compress(whole, recipe(None, RTN), tmp_path / "file")
    with pytest.raises(BadInput):
        compress(whole, recipe(None, RTN), tmp_path / "file" / "out")
    with pytest.raises(BadInput, match="own folder"):
        compress(whole, recipe(None, RTN), whole / "out")


def test_a_damaged_checkpoint_on_the_command_line(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from aerogel.cli.app import main

    monkeypatch.chdir(tmp_path)
    os.truncate(dense / "model.safetensors", 1000)
    assert main(["compress", str(dense), "-r", "w4-fast", "-o", str(tmp_path / "out")]) == 2
    message = capfd.readouterr().err
    assert "model.safetensors" in message
    assert "Traceback" not in message


def test_the_module_exits_with_the_code_of_the_command(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "aerogel", "compress", "--no-such-option"]
    assert subprocess.run(command, env=environment, capture_output=True, cwd=tmp_path).returncode == 2
