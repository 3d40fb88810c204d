"""The report as JSON: what every other rendering (table, page, model card, JUnit) is made from.

Numbers that are not finite become null, since JSON has no word for them and readers disagree about the invented ones.
Files are written whole or not at all: to a temporary name beside the target, flushed to the disk, then renamed over it.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aerogel.errors import BadInput


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to `path` atomically: a reader or a crash sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def plain(value: Any) -> Any:
    """`value` as JSON values: what is not finite becomes None, what JSON does not know its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def to_json(report: Mapping[str, Any]) -> str:
    """The report as indented JSON with a final line end."""
    return json.dumps(plain(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report as JSON, atomically."""
    write_text(path, to_json(report))


def read_report(path: Path) -> dict[str, Any]:
    """Read a report. Raises BadInput when the file is missing, is not JSON, or is JSON of something else."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"no report at {path}: give the file that a run wrote with --json, or aerogel_report.json") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as a JSON report: {error}") from error
    if not isinstance(report, dict) or "aerogel" not in report:
        raise BadInput(f"{path} is JSON, but no report of aerogel (it has no key 'aerogel')")
    return report
