"""Reads the weights of iFairy checkpoints (PKU 2025, arXiv 2508.05571): complex, unrounded, and rounded by every call there.

    NAME.weight_real, NAME.weight_imag  [N, K]      w = u + i v before rounding

Their model (`complexnet`) rounds each weight to the nearest of {1, i, -1, -i} times the mean magnitude on its axis whenever it
multiplies (`quantize.complex_codes`), so nothing that is stored says so: these are the codes that it multiplies with. The
layers around them (complex attention, norms, a squared rectifier) are that model's own code; transformers has no such
architecture, so that the weights load, and the model does not.

Shape legend: N out features, K in features, both complex.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from aerogel.errors import BadInput
from aerogel.model.reader import CheckpointReader
from aerogel.quantize.complex_codes import ComplexCodes, quantize_complex

REAL, IMAGINARY = ".weight_real", ".weight_imag"


def ifairy_weights(folder: str | Path) -> Iterator[tuple[str, ComplexCodes]]:
    """Name and codes of every linear of an iFairy checkpoint, one in memory at a time.

    `codes.real()` is the layer as two-bit integers [2 N, 2 K] from [Re x | Im x] to [Re y | Im y], for `Linear.from_codes`.

    Raises:
        BadInput: no complex linear in the folder, or one half of a weight without the other of its shape.
    """
    reader = CheckpointReader(Path(folder))
    names = [name.removesuffix(REAL) for name in reader.names if name.endswith(REAL)]
    found = [name for name in names if len(reader.entries[name + REAL].shape) == 2]
    if not found:
        raise BadInput(f"{folder} has no matrix NAME{REAL}, so it is no iFairy checkpoint; other models go to aerogel.load")
    for name in found:
        other = reader.entries.get(name + IMAGINARY)
        if other is None or other.shape != reader.entries[name + REAL].shape:
            raise BadInput(f"{name}{REAL} has no {IMAGINARY[1:]} of its shape beside it; the checkpoint is not whole")
        parts = (reader.read(name + half, finite=True).float() for half in (REAL, IMAGINARY))
        yield name, quantize_complex(torch.complex(*parts))
