"""What each format's paper rests on, and the table of errors that tells them apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.quantize.conftest import MakeLayer

from aerogel.quantize.awq import Awq
from aerogel.quantize.codes import Params, quantized
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.floats import Float, float_numbers
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.formats.rf8 import Rf8
from aerogel.quantize.gptq import Gptq
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.rtn import RoundToNearest
from aerogel.quantize.site import Site

NORMAL = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
torch.manual_seed(0)
STUDENT = torch.distributions.StudentT(5.0).sample((512, 2048))

ERRORS = [
    (IntGrid(bits=4, group_size=128, symmetric=False), 0.0101, 0.0179),
    (Float(kind="e2m1", group_size=128), 0.0119, 0.0153),
    (Bitmod(bits=4, group_size=128), 0.0099, 0.0115),
    (Nf4(group_size=128), 0.0092, 0.0139),
    (Nf4(group_size=64), 0.0085, 0.0110),
    (Mx(), 0.0133, 0.0159),
    (Nvfp4(), 0.0091, 0.0085),
    (IntGrid(bits=3, group_size=128, symmetric=False), 0.0466, 0.0808),
    (Float(kind="e2m0", group_size=128), 0.0571, 0.0965),
    (Bitmod(bits=3, group_size=128), 0.0380, 0.0542),
]
"""Grid, |W - Q|^2 / |W|^2 on N(0, 1) and on Student's t with 5 degrees of freedom; scale from the largest magnitude."""


def error(grid: Any, w: torch.Tensor, search: str = "minmax", importance: torch.Tensor | None = None) -> float:
    params = grid.fit(w, importance, None, search)
    back = grid.decode(grid.encode(w, params), params)
    return float((w - back).square().sum() / w.square().sum())


@pytest.mark.parametrize(("grid", "normal", "student"), ERRORS, ids=str)
def test_error_of_each_format(grid: Any, normal: float, student: float) -> None:
    assert error(grid, NORMAL) == pytest.approx(normal, rel=0.03)
    assert error(grid, STUDENT) == pytest.approx(student, rel=0.03)


def test_error_of_symmetric_integers_whose_lowest_code_is_the_largest_magnitude() -> None:
    grid = IntGrid(bits=4, group_size=128)
    for w, expected in ((NORMAL, 0.0112), (STUDENT, 0.0240)):
        scale = w.unflatten(1, (-1, 128)).abs().amax(2) / 8
        back = grid.decode(grid.encode(w, Params(scale_NG=scale)), Params(scale_NG=scale))
        assert float((w - back).square().sum() / w.square().sum()) == pytest.approx(expected, rel=0.03)


def test_nf4_uses_its_codes_about_equally_often_and_integers_do_not() -> None:
    def shares(grid: Any, codes: torch.Tensor) -> torch.Tensor:
        return torch.bincount((codes.long() - int(codes.min())).flatten(), minlength=16) / codes.numel()

    w = NORMAL / NORMAL.abs().max()  # quantiles are those of the distribution when the scale is one of it
    spread = {}
    for grid in (Nf4(group_size=64), IntGrid(bits=4, group_size=64)):
        found = shares(grid, grid.encode(w, grid.fit(w)))
        spread[type(grid)] = float(-(found[found > 0] * found[found > 0].log2()).sum())
    assert spread[Nf4] > 3.8 > spread[IntGrid] + 0.1


def test_double_quantization_of_nf4_costs_little() -> None:
    plain, double = (error(Nf4(scale_dtype=dtype), NORMAL, "mse") for dtype in (torch.float32, torch.float8_e4m3fn))
    assert plain < double < 1.06 * plain


def test_floats_are_the_hardware_s_and_waste_no_codes() -> None:
    for kind, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        finite = numbers.isfinite()
        assert torch.equal(torch.tensor(float_numbers(kind))[finite], numbers[finite])
        assert bool(torch.tensor(float_numbers(kind))[~finite].isnan().all())
    assert float_numbers("e2m1")[:8] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert (max(float_numbers("e3m2")), max(float_numbers("e2m3"))) == (28, 7.5)
    for kind in ("e3m2", "e2m3", "e3m1", "e2m2", "e2m1", "e3m0", "e1m1", "e2m0"):
        assert len(set(float_numbers(kind))) == len(float_numbers(kind)) - 1  # the two zeros


def test_mx_scales_are_the_standard_s_and_the_search_beats_them() -> None:
    w = torch.tensor([[7.9] + [0.1] * 31, [4.0] + [0.1] * 31, [0.49] + [0.1] * 31])
    params = Mx().fit(w)
    assert params.scale_NG.float().flatten().tolist() == [1.0, 1.0, 0.0625]
    assert error(Mx(), NORMAL, "mse") < 0.96 * error(Mx(), NORMAL)


def test_nvfp4_gains_by_its_scales_and_ue5m3_by_their_range() -> None:
    # Half the group and three mantissa bits in the scale; the second alone, at groups of 32, is worth more.
    assert error(Nvfp4(), NORMAL) < error(Nvfp4(group_size=32), NORMAL) < error(Mx(), NORMAL)
    assert error(Nvfp4(group_size=32), NORMAL) - error(Nvfp4(), NORMAL) < error(Mx(), NORMAL) - error(
        Nvfp4(group_size=32), NORMAL
    )
    assert error(Nvfp4(), NORMAL, "mse") < 0.85 * error(Nvfp4(), NORMAL)
    wide = NORMAL[:16].clone()
    wide[:, 512:] *= 2.0**-20
    tail = wide[:, 512:]
    lost = {}
    for dtype in (torch.float8_e4m3fn, torch.uint8):
        grid = Nvfp4(scale_dtype=dtype)
        params = grid.fit(wide)
        lost[dtype] = float((grid.decode(grid.encode(wide, params), params)[:, 512:] - tail).norm() / tail.norm())
    assert lost[torch.uint8] < 0.15 < 0.5 < lost[torch.float8_e4m3fn]


def test_bitmod_picks_are_all_used_and_beat_every_single_table() -> None:
    for bits in (3, 4):
        grid = Bitmod(bits=bits)
        params = grid.fit(NORMAL, search="mse")
        assert params.pick_NG is not None
        assert bool((torch.bincount(params.pick_NG.flatten().long(), minlength=4) > 0.03 * params.pick_NG.numel()).all())
        one = type("One", (Bitmod,), {"numbers": lambda self: Bitmod(bits=self.bits).numbers()[:1]})(bits=bits)
        assert error(grid, STUDENT) < 0.93 * error(one, STUDENT)


def test_codebooks_follow_the_importance_and_beat_integers() -> None:
    w = STUDENT[:32, :512]
    importance = torch.ones(512)
    importance[::8] = 100.0

    def weighted(grid: Any, given: torch.Tensor | None) -> float:
        params = grid.fit(w, given, None, "mse")
        back = grid.decode(grid.encode(w, params), params)
        return float(((w - back).square() * importance).sum())

    grid = KMeans(bits=4)
    assert weighted(grid, importance) < 0.8 * weighted(grid, None)
    assert weighted(grid, importance) < 0.5 * weighted(IntGrid(bits=4, symmetric=False), importance)
    errors = [error(KMeans(bits=3, rounds=rounds), w) for rounds in (1, 3, 10, 50)]
    assert errors == sorted(errors, reverse=True)
    mask = torch.rand(32, 512, generator=torch.Generator().manual_seed(1)) > 0.5
    codes = quantized(grid, w * mask, grid.fit(w, None, mask))
    assert bool((codes.decode()[~mask] == 0).all())


def test_rf8_keeps_the_first_two_binary_digits() -> None:
    numbers = Rf8().tables[0]
    octave = sorted(set(numbers[(numbers >= 1) & (numbers < 2)].tolist()))
    assert octave == [1 + 1 / 16, 1 + 1 / 8, 1 + 1 / 4, 1 + 1 / 2]
    x = torch.linspace(0.01, 1.4, 5000)[None]
    params = Params(scale_NG=torch.ones(1, 1), table_TE=Rf8().tables)
    back = Rf8().decode(Rf8().encode(x, params), params)
    assert float(((back - x) / x).abs().max()) <= 0.18


GRIDS = [Nf4(), Mx(), Nvfp4(), Bitmod(bits=3, group_size=64), KMeans(bits=3), Float(kind="e2m1", group_size=32)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_beats_rounding_and_awq_is_never_worse_than_nothing(make_layer: MakeLayer, grid: Any) -> None:
    layer = make_layer(64, 192)
    rounded = RoundToNearest(grid=grid, weighted=True)(layer)
    solved = Gptq(grid=grid)(layer)
    assert solved.loss is not None and rounded.loss is not None and solved.loss < 0.75 * rounded.loss
    assert solved.codes is not None and torch.equal(solved.codes.decode(), solved.weight_NK)
    site = Awq(steps=4)(Site(name="norm", consumers=(layer,), grids=(grid,)))
    assert site.scale_K is not None and float(site.notes["loss_against_unscaled"]) <= 1.0  # type: ignore[arg-type]
