"""What the tests of the walk share: calibration ids, small recipes, and ways to compare folders and models."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from aerogel.recipes.schema import Recipe

GPTQ: dict[str, Any] = {"quantize": {"method": "gptq", "bits": 4, "group_size": 16}}
RTN: dict[str, Any] = {"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}
IDS = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(5))


def ids_file(folder: Path, rows: int = 8, length: int = 16, vocabulary: int = 128) -> str:
    """Random token ids as a calibration source."""
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))
    file = folder / "ids.safetensors"
    save_file({"ids": ids}, file)
    return f"{file}:ids"


def recipe(
    source: str | None, *stages: dict[str, Any], pack: dict[str, Any] | None = None, samples: int = 8, **calibration: Any
) -> Recipe:
    """A recipe with these stages on 8 x 16 tokens in float32, without measurements."""
    data = {"source": source or "default", "samples": samples, "sequence_length": 16, "batch": 4, "compute": "float32"}
    return Recipe.load(
        {
            "aerogel": 1,
            "calibration": {**data, **calibration},
            "stages": list(stages),
            "pack": pack or {},
            "evaluate": None,
            "bench": None,
        }
    )


def digest(folder: Path) -> dict[str, str]:
    """Every file of a folder, hidden ones too, by its content."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits.float()
    return found


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    return float((found - wanted).norm() / wanted.norm())


class Wrapped:
    """A file object that stands in front of another; tests override what they want to watch or break."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
