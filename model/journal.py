"""What a run has finished, so that the same command goes on where a killed one stopped.

Beside the output folder OUT lies `OUT.partial/` while a run works: `journal.json` says what run this is (a fingerprint of
the weights, the recipe and the versions), each finished block is one safetensors file with its report row, and `final/`
is the folder that becomes OUT by one rename. A block counts as finished when its row is there, because the row is
written after its tensors. Nothing is ever taken from a journal whose fingerprint differs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from aerogel.errors import BadInput
from aerogel.model.reader import CheckpointReader
from aerogel.model.writer import disk_errors, sync_folder, write_json, write_tensors

REPLACED = "replaced"
"""Inside the work folder: the old output, between its being moved aside and its being deleted."""


def fingerprint(facts: Mapping[str, object]) -> str:
    """A short digest of everything that decides the bytes of the result."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def weights_digest(reader: CheckpointReader) -> str:
    """A digest of a checkpoint: file names, sizes, times of change and all headers. Reading all weights would cost too much."""
    seen = hashlib.sha256()
    for file in sorted({entry.file for entry in reader}):
        status = file.stat()
        seen.update(f"{file.name}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    for entry in reader:
        seen.update(f"{entry.name}:{entry.dtype}:{entry.shape}:{entry.begin}\n".encode())
    return seen.hexdigest()


def work_folder(out: Path) -> Path:
    """Where a run that writes `out` keeps what it has finished."""
    return out.with_name(f"{out.name}.partial")


def restore(out: Path) -> None:
    """Puts back an output that was to be overwritten, where a kill fell between the two renames of `Journal.publish`."""
    work = work_folder(out)
    if (work / REPLACED).is_dir() and not out.exists():
        with _alone(work) as mine, disk_errors(out):
            if mine and not out.exists():
                os.replace(work / REPLACED, out)


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[bool]:
    """Whether this process is the only one that works in `work`; if so it stays that until the end."""
    with disk_errors(work):
        lock = (work / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@dataclass(frozen=True, slots=True)
class Journal:
    """The work folder of one run. Open it with `Journal.open`."""

    out: Path
    work: Path
    key: str

    @classmethod
    @contextlib.contextmanager
    def open(cls, out: Path, key: str) -> Iterator[Journal]:
        """The journal of the run that writes `out`, emptied first if another run left it; held alone until closed.

        Raises:
            BadInput: another process is writing the same output now, or the folder cannot be made.
        """
        work = work_folder(out)
        with disk_errors(work):
            work.mkdir(parents=True, exist_ok=True)
        with _alone(work) as mine:
            if not mine:
                raise BadInput(f"another process is writing {out} now; wait for it or choose another output")
            journal = cls(out, work, key)
            if journal._key_on_disk() != key:
                journal._clear()
                write_json(work / "journal.json", {"fingerprint": key})
            yield journal

    def _key_on_disk(self) -> str | None:
        file = self.work / "journal.json"
        try:
            found = json.loads(file.read_text("utf-8"))
        except (FileNotFoundError, ValueError):  # no run, or a file that no run wrote: start anew
            return None
        return str(found.get("fingerprint")) if isinstance(found, dict) else None

    def _clear(self) -> None:
        """Deletes what another run left, its journal first so that nothing half deleted is ever trusted."""
        (self.work / "journal.json").unlink(missing_ok=True)
        for path in self.work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()

    @property
    def final(self) -> Path:
        """The folder that becomes the output."""
        return self.work / "final"

    def tensors_file(self, part: str) -> Path:
        """Where the tensors of a part (`block-00003`, `outer`) lie."""
        return self.work / f"{part}.safetensors"

    def row(self, part: str) -> dict[str, Any] | None:
        """The report row of a finished part, or None when it is not finished."""
        file = self.work / f"{part}.json"
        return json.loads(file.read_text("utf-8")) if file.exists() else None

    def finish(self, part: str, tensors: Mapping[str, Tensor], row: Mapping[str, Any]) -> None:
        """Puts a part on the disk: tensors, then the row that says they are whole."""
        write_tensors(self.tensors_file(part), tensors)
        write_json(self.work / f"{part}.json", row)

    def publish(self, *, overwrite: bool) -> None:
        """Renames the final folder to the output; an output to be overwritten is moved into the work folder first, which
        `close` deletes last."""
        with disk_errors(self.out):
            aside = self.work / REPLACED
            if overwrite and self.out.exists():
                if aside.exists():
                    shutil.rmtree(aside)
                os.replace(self.out, aside)
            os.replace(self.final, self.out)
            sync_folder(self.out.parent)

    def close(self) -> None:
        """Deletes the work folder of a run that is published."""
        self._clear()
        with disk_errors(self.work):
            (self.work / ".lock").unlink(missing_ok=True)
            self.work.rmdir()
