"""Reader and writer against the safetensors library, and against headers that make no sense."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from aerogel.errors import BadInput
from aerogel.model.reader import DTYPES, CheckpointReader, read_header
from aerogel.model.writer import assemble, write_json, write_tensors

TYPES = sorted(DTYPES.values(), key=str)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
TABLES = st.dictionaries(NAMES, st.tuples(st.sampled_from(TYPES), SHAPES, st.integers(0, 999)), min_size=1, max_size=6)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def filled(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random bytes as a tensor; for bool, random truths."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = int(torch.Size(shape).numel()) * dtype.itemsize
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in type, shape and every bit."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
    )


@QUICK
@given(TABLES)
def test_we_read_what_the_library_writes(tmp_path: Path, table: dict[str, Any]) -> None:
    tensors = {name: filled(*row) for name, row in table.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reader = CheckpointReader(tmp_path)
    assert set(reader.names) == set(tensors)
    assert all(same(reader.read(name), tensor) for name, tensor in tensors.items())
    assert reader.nbytes == sum(tensor.nbytes for tensor in tensors.values())


@QUICK
@given(TABLES, st.integers(1, 200))
def test_the_library_reads_what_we_write(tmp_path: Path, table: dict[str, Any], limit: int) -> None:
    tensors = {name: filled(*row) for name, row in table.items()}
    write_tensors(tmp_path / "part", tensors)
    found = load_file(tmp_path / "part")
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensor) for name, tensor in tensors.items())
    shutil.rmtree(tmp_path / "folder", ignore_errors=True)
    (tmp_path / "folder").mkdir()
    assemble([tmp_path / "part"], tmp_path / "folder", limit)
    reader = CheckpointReader(tmp_path / "folder")
    assert all(same(reader.read(name), tensor) for name, tensor in tensors.items())
    for file in (tmp_path / "folder").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert all(same(opened.get_tensor(name), tensors[name]) for name in opened.keys())  # noqa: SIM118


def test_strides_do_not_matter(tmp_path: Path) -> None:
    x = torch.arange(24.0).reshape(4, 6)
    write_tensors(tmp_path / "file", {"t": x.T, "s": x[:, ::2], "n": torch.tensor(3)})
    found = load_file(tmp_path / "file")
    assert torch.equal(found["t"], x.T)
    assert torch.equal(found["s"], x[:, ::2])
    assert found["n"].shape == ()


@settings(QUICK, max_examples=400)
@given(st.data())
def test_no_damage_to_a_header_does_more_than_refuse(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5, dtype=torch.int8)}, file)
    raw = bytearray(file.read_bytes())
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    try:
        reader = CheckpointReader(tmp_path)
        for name in reader.names:
            reader.read(name)
    except BadInput as error:
        assert "model.safetensors" in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ROWS = st.fixed_dictionaries(
    {}, optional={"dtype": st.sampled_from([*DTYPES, "?"]) | JSON, "shape": JSON, "data_offsets": JSON}
)


@settings(QUICK, max_examples=200)
@given(st.dictionaries(st.text(max_size=5), ROWS | JSON, max_size=3) | JSON, st.binary(max_size=20))
def test_no_json_as_a_header_does_more_than_refuse(tmp_path: Path, header: Any, data: bytes) -> None:
    file = tmp_path / "file"
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    try:
        entries = read_header(file)
    except BadInput as error:
        assert str(file) in str(error)
    else:
        assert sum(entry.nbytes for entry in entries.values()) == len(data)


def test_json_is_whole_or_not_there(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ä": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"bad": object()})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"ä": 1}
