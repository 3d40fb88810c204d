"""Writes safetensors so that a kill, a full disk or a lost power line never leaves half a file under its final name.

Every file is written under a temporary name, flushed to the disk, and renamed; a folder is whole or it is not there.
The bytes of a file depend on its tensors alone (fixed order, fixed header), so equal runs give equal files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from aerogel.errors import BadInput, RunFailed
from aerogel.model.reader import DTYPES, INDEX_NAME, SINGLE_NAME, Entry, read_header

Table = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensors of a file, in order: {name: (dtype, shape)}."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
COPY_BYTES = 16 * 1024 * 1024


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says about the disk into what the user can do about it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunFailed(
                f"the disk is full ({path} could not be written); blocks already finished are safe, free some space and run"
                " the same command again to go on"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise BadInput(
                f"{path} cannot be written ({error.strerror}); choose an output folder that you may write to"
            ) from error
        raise RunFailed(f"writing {path} failed ({error.strerror}); finished blocks are safe, run the command again") from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is complete and on the disk."""
    draft = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        with draft.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: object) -> None:
    """`value` as readable JSON with a fixed key order, whole or not at all."""
    with whole_file(path) as stream:
        stream.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _order(item: tuple[str, torch.dtype]) -> tuple[int, str]:
    # Wide types first keeps every tensor aligned without padding, as the reference writer does.
    return -item[1].itemsize, item[0]


def portable_order(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Table:
    """The tensors in the order in which a portable file has them."""
    return {name: tensors[name] for name, _ in sorted(((n, d) for n, (d, _) in tensors.items()), key=_order)}


def _header(tensors: Table, align: int = 8) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header bytes of a file with `tensors` in this order, and where the bytes of each begin and end in the file."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        size = dtype.itemsize * math.prod(shape)
        table[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % align)
    places, position = {}, 8 + len(raw)
    for name, (dtype, shape) in tensors.items():
        size = dtype.itemsize * math.prod(shape)
        places[name] = (position, position + size)
        position += size
    return struct.pack("<Q", len(raw)) + raw, places


def header_bytes(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """How many bytes of a file with these tensors are not tensor data."""
    return len(_header(portable_order(tensors))[0])


def write_placed(path: Path, table: Table, tensors: Iterable[tuple[str, Tensor]], *, align: int) -> None:
    """One safetensors file whose order is that of `table` and whose data begins at a multiple of `align` bytes.

    Args:
        tensors: those of the table, each once, in any order; one at a time is held.
    """
    head, places = _header(table, align)
    left = set(places)
    with whole_file(path) as stream:
        stream.write(head)
        for name, tensor in tensors:
            left.remove(name)
            begin, end = places[name]
            data = _bytes_of(tensor)
            if len(data) != end - begin or (tensor.dtype, tuple(tensor.shape)) != table[name]:
                raise RunFailed(
                    f"{name} was planned as {table[name]} and came as {tensor.dtype} {list(tensor.shape)}; this is a"
                    " mistake in aerogel, report it"
                )
            stream.seek(begin)
            stream.write(data)
        if left:
            raise RunFailed(f"{min(left)} was planned for {path.name} and never came; this is a mistake in aerogel, report it")


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor (any device, any strides)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file with `tensors` (any device, any strides)."""
    order = portable_order({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    with whole_file(path) as stream:
        stream.write(_header(order)[0])
        for name in order:
            stream.write(_bytes_of(tensors[name]))


def merge_files(path: Path, entries: Iterable[Entry]) -> None:
    """One safetensors file with tensors copied from other files, a few megabytes at a time."""
    by_name = {entry.name: entry for entry in entries}
    order = portable_order({name: (e.dtype, e.shape) for name, e in by_name.items()})
    with whole_file(path) as stream:
        stream.write(_header(order)[0])
        for name in order:
            entry = by_name[name]
            with entry.file.open("rb") as source:
                source.seek(entry.begin)
                left = entry.nbytes
                while left:
                    part = source.read(min(COPY_BYTES, left))
                    if not part:
                        raise RunFailed(f"{entry.file} ended early while it was copied; run the same command again")
                    stream.write(part)
                    left -= len(part)


def shard(parts: Iterable[Path], limit: int) -> list[list[Entry]]:
    """The tensors of several files, in order, cut into shards of at most `limit` bytes of data each."""
    shards: list[list[Entry]] = [[]]
    held = 0
    for part in parts:
        for entry in read_header(part).values():
            if held + entry.nbytes > limit and shards[-1]:
                shards.append([])
                held = 0
            shards[-1].append(entry)
            held += entry.nbytes
    return shards


def assemble(parts: list[Path], folder: Path, limit: int) -> list[str]:
    """Writes the tensors of `parts` as a checkpoint into `folder`: one file, or shards with an index.

    Returns:
        The names of the files written.
    """
    shards = shard(parts, limit)
    names = shard_names(len(shards))
    for name, entries in zip(names, shards, strict=True):
        merge_files(folder / name, entries)
    if len(shards) == 1:
        return names
    write_json(folder / INDEX_NAME, index_of(shards))
    return [*names, INDEX_NAME]


def shard_names(count: int) -> list[str]:
    """Names of the files of a checkpoint of `count` files."""
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def index_of(shards: list[list[Entry]]) -> dict[str, Any]:
    """The index of a checkpoint of several files."""
    weight_map = {entry.name: name for name, part in zip(shard_names(len(shards)), shards, strict=True) for entry in part}
    total = sum(entry.nbytes for part in shards for entry in part)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
