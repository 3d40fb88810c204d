"""Every number format there is, through every weight that breaks formats, to the disk and back in another process.

`CASES` must name every format of `GRIDS`, so a new one cannot stay away.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.model.test_loading import REPOSITORY
from tests.model.test_table_formats import FRESH
from torch import Tensor

from aerogel.errors import BadInput, RunFailed
from aerogel.model.layer import Layer
from aerogel.pack.config import choose_format, quantization_config
from aerogel.quantize import GRIDS
from aerogel.quantize.codes import quantized
from aerogel.quantize.formats.affine import Affine
from aerogel.quantize.formats.bipolar import Bipolar
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.complex import Complex
from aerogel.quantize.formats.floats import Float
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.formats.rf8 import Rf8
from aerogel.quantize.formats.ternary import Ternary
from aerogel.quantize.grids import Fp8Grid, IntGrid
from aerogel.quantize.planes import PlaneGrid
from aerogel.quantize.rtn import RoundToNearest

CASES: dict[str, list[Any]] = {
    "int": [IntGrid(bits=bits, group_size=32, symmetric=bits % 2 == 0) for bits in range(2, 9)]
    + [IntGrid(bits=4, scale_dtype=torch.float16), IntGrid(bits=3, group_size=7, symmetric=False, scale_dtype=torch.bfloat16)],
    "fp8": [Fp8Grid(strategy=strategy) for strategy in ("channel", "block", "tensor")],  # type: ignore[arg-type]
    "float": [
        *(Float(kind=kind, group_size=32) for kind in ("e2m0", "e1m1", "e2m1", "e3m0", "e2m2", "e3m1")),  # type: ignore[arg-type]
        *(Float(kind=kind) for kind in ("e3m2", "e2m3", "e5m2")),  # type: ignore[arg-type]
        Float(kind="e4m3", group_size=128, block=True),
    ],
    "affine": [
        *(Affine(bits=bits, group_size=32) for bits in range(1, 9)),
        Affine(group_size=7, scale_dtype=torch.float16),
        Affine(bits=2, group_size=None, scale_dtype=torch.bfloat16),
    ],
    "nf4": [Nf4(), Nf4(scale_dtype=torch.float8_e4m3fn)],
    "mx": [Mx(), Mx(kind="e4m3"), Mx(kind="e2m3")],
    "nvfp4": [Nvfp4(), Nvfp4(scale_dtype=torch.uint8), Nvfp4(scale_dtype=torch.float32)],
    "bitmod": [Bitmod(bits=3, group_size=32), Bitmod(scale_dtype=torch.float16)],
    "kmeans": [KMeans(bits=3, rounds=5)],
    "rf8": [Rf8()],
    "bipolar": [Bipolar(bits=2, group_size=32), Bipolar(bits=4), Bipolar(bits=8)],
    "complex": [Complex()],
    "ternary": [Ternary(group_size=32), Ternary(scales="tensor")],
    "planes": [
        PlaneGrid(bits=1, group_size=32),
        PlaneGrid(bits=3, group_size=32, offset="scale"),
        PlaneGrid(bits=2, group_size=32, power_of_two=True),
        PlaneGrid(bits=3, group_size=32, block_rows=8),
        PlaneGrid(bits=4, group_size=32, offset="float32"),
    ],
}
ALL = [(name, grid) for name, grids in CASES.items() for grid in grids]


def weights() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    w = torch.randn(6, 160, generator=random)
    zeros = w.clone()
    zeros[:, 32:128] = 0
    constant = w.clone()
    constant[:, 32:64] = 0.75
    return {
        "ordinary": w,
        "ragged": w[:, :150],
        "odd": w[:5, :149],
        "one row": w[:1],
        "one row of one": w[:1, :1],
        "all-zero groups": zeros,
        "all zero": torch.zeros(4, 64),
        "constant group": constant,
        "constant": torch.full((4, 96), -2.5),
        "one far weight": torch.cat([w[:, :95], torch.full((6, 1), 300.0)], 1),
        "subnormal": w * 1e-39,
        "tiny": w * 1e-30,
        "huge": w * 1e30,
    }


REFUSED = {
    ("complex", "odd"): "pairs",
    ("complex", "one row"): "pairs",
    ("complex", "one row of one"): "pairs",
    ("nvfp4", "odd"): "table-packed",
    ("nvfp4", "one row of one"): "table-packed",
    ("mx", "odd"): "table-packed",
    ("mx", "one row of one"): "table-packed",
    ("int", "huge"): "float16",
    ("affine", "huge"): "float16",
    ("bitmod", "huge"): "float16",
}
"""What a format may refuse, and the word of its message that says why."""
SIZES = ("all zero", "subnormal", "tiny", "huge")
"""Where being near is not asked of scales in eight bits and powers of two: only to stay finite and not to grow."""


@functools.cache
def stored(name: str, grid: Any, weight: str) -> tuple[Tensor, dict[str, Tensor]] | None:
    """The decoded weight and its tensors, or None where the format refuses for the reason it may."""
    w_NK = weights()[weight]
    try:
        codes = quantized(grid, w_NK, grid.fit(w_NK, search="mse"))
        return codes.decode(), choose_format(grid).encode(codes)
    except BadInput as error:
        assert REFUSED[name, weight] in str(error)
        return None


def test_no_format_is_left_out() -> None:
    assert CASES.keys() == GRIDS.keys()


def test_what_may_be_refused_is_refused() -> None:
    """By one grid of the format at least: a refusal that is gone would still be allowed."""
    found = {(name, weight) for name, grid in ALL for weight in weights() if stored(name, grid, weight) is None}
    assert found == set(REFUSED)


@pytest.mark.parametrize("weight", weights())
@pytest.mark.parametrize(("name", "grid"), ALL, ids=str)
def test_it_survives(name: str, grid: Any, weight: str) -> None:
    found = stored(name, grid, weight)
    if found is None:
        return
    back, tensors = found
    w_NK = weights()[weight]
    assert bool(back.isfinite().all())
    assert torch.equal(choose_format(grid).decode(tensors, grid), back)
    assert float(back.abs().max()) <= 4 * float(w_NK.abs().max()) + 2.0**-120
    if weight == "all zero":
        assert not back.any() or float(back.abs().max()) <= 2.0**-120
    if weight not in SIZES:
        # Where the scale is a mean magnitude, a weight far out keeps next to nothing of itself.
        bound = 0.85 if grid.bits > 2 else 0.95 if weight != "one far weight" else 1.0
        assert float((back - w_NK).norm()) <= bound * float(w_NK.norm())
    if weight == "all-zero groups" and grid.group_size == 32:
        assert not back[:, 32:128].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("name", "grid"), ALL, ids=str)
def test_what_is_no_number_is_refused_by_the_tensor_s_name(name: str, grid: Any, value: float) -> None:
    w_NK = torch.randn(4, 64)
    w_NK[1, 2] = value
    with pytest.raises(RunFailed, match=r"model\.layers\.7\.k_proj"):
        RoundToNearest(grid=grid)(Layer(name="model.layers.7.k_proj", weight_NK=w_NK))


def test_a_fresh_process_decodes_all_of_it_to_the_same_bits(tmp_path: Path) -> None:
    wanted = {}
    for number, (name, grid) in enumerate(ALL):
        for weight in weights():
            found = stored(name, grid, weight)
            if found is None:
                continue
            folder = tmp_path / f"{number:02d} {weight}".replace(" ", "-")
            folder.mkdir()
            save_file({f"a.{local}": tensor.contiguous() for local, tensor in found[1].items()}, folder / "w.safetensors")
            (folder / "config.json").write_text(json.dumps(quantization_config([("a", grid, "none")])))
            wanted[folder.name] = hashlib.sha256(found[0].numpy().tobytes()).hexdigest()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", FRESH, tmp_path], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert dict(line.split() for line in done.stdout.splitlines()) == wanted
    assert len(wanted) > 0.95 * len(ALL) * len(weights())
