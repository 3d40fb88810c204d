"""The weights of iFairy checkpoints, and those of MatMul-free models, as the models themselves round them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.linear import Linear
from aerogel.pack.ifairy import ifairy_weights
from aerogel.quantize.codes import quantized
from aerogel.quantize.complex_codes import quantize_complex
from aerogel.quantize.formats.ternary import Ternary


def saved(folder: Path, **tensors: Tensor) -> Path:
    folder.mkdir()
    save_file({f"model.layers.0.mlp.up_proj.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def by_phase(u: float, v: float) -> complex:
    """The sector of one weight, from its angle."""
    phase = math.atan2(v, u)
    if -math.pi / 4 <= phase < math.pi / 4:
        return 1
    if math.pi / 4 <= phase < 3 * math.pi / 4:
        return 1j
    return -1j if -3 * math.pi / 4 <= phase < -math.pi / 4 else -1


def test_a_layer_multiplies_as_iFairy_does(tmp_path: Path) -> None:  # noqa: N802
    random = torch.Generator().manual_seed(0)
    u, v = (torch.randn(6, 20, generator=random) for _ in range(2))
    folder = saved(tmp_path / "a", weight_real=u, weight_imag=v, act=torch.ones(3))
    ((name, codes),) = ifairy_weights(folder)
    assert name == "model.layers.0.mlp.up_proj"
    wanted = torch.tensor(
        [[by_phase(float(a), float(b)) for a, b in zip(*rows, strict=True)] for rows in zip(u, v, strict=True)]
    )
    real, imaginary = (u[wanted.real != 0].abs().mean(), v[wanted.imag != 0].abs().mean())
    w = torch.complex(wanted.real * real, wanted.imag * imaginary)
    torch.testing.assert_close(codes.decode(), w)
    x = torch.randn(3, 20, generator=random, dtype=torch.complex64)
    y = Linear.from_codes(codes.real())(torch.cat([x.real, x.imag], 1))
    re = x.real @ w.real.T + x.imag @ w.imag.T
    im = x.real @ w.imag.T - x.imag @ w.real.T
    torch.testing.assert_close(y, torch.cat([re, im], 1), rtol=1e-5, atol=1e-5)


def test_ties_go_where_the_angle_says() -> None:
    for u in (-1.0, 0.0, 1.0):
        for v in (-1.0, 0.0, 1.0):
            found = quantize_complex(torch.complex(torch.tensor([[u]]), torch.tensor([[v]])))
            assert int(found.values_NK) == {1: 0, 1j: 1, -1: 2, -1j: 3}[by_phase(u, v)], (u, v)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no iFairy checkpoint"):
        next(ifairy_weights(saved(tmp_path / "a", weight=torch.ones(2, 2))))
    with pytest.raises(BadInput, match="weight_imag of its shape"):
        next(ifairy_weights(saved(tmp_path / "b", weight_real=torch.ones(2, 2), weight_imag=torch.ones(2, 3))))


def test_matmul_free_weights_are_ternary_with_one_scale() -> None:
    """Zhu et al. 2024: codes clip(round(w / s), -1, 1) with s the mean magnitude of the whole weight."""
    w = torch.randn(8, 40, generator=torch.Generator().manual_seed(1)) * 0.03
    grid = Ternary(scales="tensor")
    scale = w.abs().mean()
    torch.testing.assert_close(quantized(grid, w, grid.fit(w)).decode(), (w / scale).round().clamp(-1, 1) * scale)
