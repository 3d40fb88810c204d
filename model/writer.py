"""Writes safetensors so that a kill, a full disk or a lost power line never leaves half a file under its final name.

Every file is written under a temporary name, flushed to the disk, and renamed; a folder is whole or it is not there.
The bytes of a file depend on its tensors alone (fixed order, fixed header), so equal runs give equal files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from aerogel.errors import BadInput, RunFailed
from aerogel.model.reader import DTYPES, Entry, read_header

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


def _header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, list[str]]:
    """The header bytes, and the order in which the data must follow."""
    order = [name for name, _ in sorted(((n, d) for n, (d, _) in tensors.items()), key=_order)]
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        dtype, shape = tensors[name]
        size = dtype.itemsize
        for n in shape:
            size *= n
        table[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw, order


def header_bytes(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """How many bytes of a file with these tensors are not tensor data."""
    return len(_header(tensors)[0])


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file with `tensors` (any device, any strides)."""
    head, order = _header({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    with whole_file(path) as stream:
        stream.write(head)
        for name in order:
            data = tensors[name].detach().cpu().contiguous()
            stream.write(data.reshape(-1).view(torch.uint8).numpy().data)


def merge_files(path: Path, entries: Iterable[Entry]) -> None:
    """One safetensors file with tensors copied from other files, a few megabytes at a time."""
    by_name = {entry.name: entry for entry in entries}
    head, order = _header({name: (e.dtype, e.shape) for name, e in by_name.items()})
    with whole_file(path) as stream:
        stream.write(head)
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
    if len(shards) == 1:
        merge_files(folder / "model.safetensors", shards[0])
        return ["model.safetensors"]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    for name, entries in zip(names, shards, strict=True):
        merge_files(folder / name, entries)
        weight_map |= {entry.name: name for entry in entries}
    total = sum(entry.nbytes for entries in shards for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
    return [*names, "model.safetensors.index.json"]
