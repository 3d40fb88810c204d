"""Reads a safetensors checkpoint one tensor at a time, and believes nothing that its headers say until it is checked.

A safetensors file is an 8-byte little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, and
the bytes. Tensors are read with plain `readinto`, not through a memory map: mapped pages count as resident memory and
would hide how little a run really needs.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aerogel.errors import BadInput

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100 * 1024 * 1024
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: its file, dtype, shape, and the byte range [begin, end) counted from the file's start."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.begin


class CheckpointReader:
    """The tensors of a local checkpoint folder, sharded or not; headers are validated on opening, data on reading.

    Args:
        folder: holds `model.safetensors`, or shards with `model.safetensors.index.json`.

    Raises:
        BadInput: no safetensors files, a shard missing or truncated, an index that names a tensor no shard holds, or a
            header whose offsets, dtypes and shapes do not agree with each other and with the file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        for file, wanted in sorted(_shards(self.folder).items()):
            found = read_header(file)
            absent = sorted(wanted - found.keys()) if wanted is not None else []
            if absent:
                raise BadInput(
                    f"{self.folder / INDEX_NAME} says that {absent[0]!r} is in {file.name}, which does not hold it"
                    f" ({len(absent)} such tensors); download the checkpoint again"
                )
            for name, entry in found.items():
                if wanted is None or name in wanted:
                    self.entries[name] = entry

    @property
    def names(self) -> list[str]:
        """All tensor names, in the order of the shards."""
        return list(self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, headers not counted."""
        return sum(entry.nbytes for entry in self.entries.values())

    def entry(self, name: str) -> Entry:
        """The place of tensor `name`; `BadInput` when the checkpoint has none."""
        if name not in self.entries:
            raise BadInput(f"{self.folder} holds no tensor {name!r}; it has {len(self.entries)} others")
        return self.entries[name]

    def read(self, name: str, *, finite: bool = False) -> Tensor:
        """Tensor `name` in its stored dtype, in fresh CPU memory.

        Args:
            finite: also refuse NaN and infinity, naming the tensor.

        Raises:
            BadInput: the file ends early, or a value is not finite where it must be.
        """
        entry = self.entry(name)
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        with entry.file.open("rb") as stream:
            stream.seek(entry.begin)
            got = stream.readinto(buffer.numpy().data) if entry.nbytes else 0
        if got != entry.nbytes:
            raise BadInput(f"{entry.file} ended {entry.nbytes - got} bytes before the end of {name!r}; download it again")
        tensor = buffer.view(entry.dtype).reshape(entry.shape)
        if finite and tensor.is_floating_point() and not _is_finite(tensor):
            raise BadInput(f"{name!r} in {entry.file.name} holds NaN or infinity; the checkpoint is damaged, get it again")
        return tensor

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; float8 has no `isfinite` of its own, and a whole copy would cost memory."""
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.float16)
    flat = tensor.reshape(-1)
    # A sum is not finite when any term is not; only an overflowing sum needs the slower look.
    return all(
        bool(part.sum(dtype=torch.float64).isfinite()) or bool(part.isfinite().all()) for part in torch.split(flat, 1 << 24)
    )


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of `folder` and which tensors each must hold (None: whatever it holds)."""
    index = folder / INDEX_NAME
    single = folder / SINGLE_NAME
    if not index.exists():
        if single.exists():
            return {single: None}
        held = sorted(path.name for path in folder.iterdir())[:6] if folder.is_dir() else []
        raise BadInput(
            f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME} (found: {', '.join(held) or 'nothing'});"
            " give a folder with safetensors weights"
        )
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{index} is not a safetensors index ({error}); download it again") from error
    shards: dict[Path, set[str] | None] = {}
    for name, file in pairs:
        if Path(file).name != file or file in ("", ".", ".."):
            raise BadInput(f"{index} puts {name!r} into {file!r}, outside the folder; only plain file names are allowed")
        names = shards.setdefault(folder / file, set())
        if names is not None:
            names.add(name)
    for path in shards:
        if not path.is_file():
            raise BadInput(f"{index} names the shard {path.name}, which is not there; download the missing file")
    return shards


def read_header(file: Path) -> dict[str, Entry]:
    """The entries of one safetensors file, each checked against the file's real size, its dtype, shape and neighbours.

    Raises:
        BadInput: with the file and the first thing that is wrong.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if length < 2 or length > MAX_HEADER_BYTES or 8 + length > size:
            raise BadInput(f"{file} is not a whole safetensors file (header of {length} bytes in {size}); get it again")
        raw = stream.read(length)
    try:
        table = json.loads(raw)
        table.pop("__metadata__", None)
        entries = {str(name): _entry(file, 8 + length, str(name), row) for name, row in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{file} has a damaged safetensors header ({error}); get it again") from error
    position = 8 + length
    for entry in sorted(entries.values(), key=lambda e: (e.begin, e.end)):
        if entry.begin != position:
            raise BadInput(f"{file}: the header puts {entry.name!r} at byte {entry.begin}, not at {position}; get it again")
        position = entry.end
    if position != size:
        raise BadInput(f"{file} has {size} bytes where its header describes {position}; it is cut off or damaged, get it again")
    return entries


def _entry(file: Path, base: int, name: str, row: dict[str, object]) -> Entry:
    dtype = DTYPES.get(str(row["dtype"]))
    if dtype is None:
        raise BadInput(f"{file}: {name!r} has the unknown dtype {row['dtype']!r}; known are {', '.join(DTYPES)}")
    shape = tuple(int(n) for n in row["shape"])  # type: ignore[attr-defined]
    begin, end = (int(n) for n in row["data_offsets"])  # type: ignore[attr-defined]
    if min((0, begin, *shape)) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise BadInput(
            f"{file}: the header gives {name!r} {end - begin} bytes where {row['dtype']} of shape {list(shape)} needs"
            f" {math.prod(shape) * dtype.itemsize}; the file is damaged, get it again"
        )
    return Entry(name, file, dtype, shape, base + begin, base + end)
