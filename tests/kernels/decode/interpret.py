"""Run with TRITON_INTERPRET=1: the Triton kernels on the CPU against the formulas. The interpreter has no bfloat16 products."""

from __future__ import annotations

import sys

import torch
from tests.kernels.decode.cases import ATTENTION, attention, distance, textbook

from aerogel.kernels.decode import ops, triton_ops


def main() -> int:
    worst = 0.0
    for case in ATTENTION:
        given = attention(case, torch.float32)
        expected = textbook(given)
        worst = max(worst, distance(triton_ops.attend(**given), expected))
        given["values"][:, :, int(given["slot"])] = float("nan")
        worst = max(worst, distance(triton_ops.attend(**given), expected))
    for N in (32, 100, 576):
        x, y, w, pair = torch.randn(3, 1, N), torch.randn(3, 1, N), torch.randn(N), torch.randn(3, 1, 2 * N)
        for first in (True, False):
            for found, sure in zip(
                triton_ops.add_rms_norm(x, y, w, 1e-5, first), ops.add_rms_norm(x, y, w, 1e-5, first), strict=True
            ):
                worst = max(worst, distance(found, sure))
        for act in ("silu", "gelu", "gelu_tanh"):
            worst = max(
                worst, distance(triton_ops.gate(pair[..., :N], pair[..., N:], act), ops.gate(pair[..., :N], pair[..., N:], act))
            )
    for B, H, T, D in ((1, 4, 5, 16), (2, 3, 4, 24)):
        x, cos, sin = torch.randn(B, T, 2 * H, D)[:, :, :H].transpose(1, 2), torch.randn(B, T, D), torch.randn(1, T, D)
        worst = max(worst, distance(triton_ops.rotate(x, cos, sin.expand(B, -1, -1)), ops.rotate(x, cos, sin)))
        worst = max(worst, distance(triton_ops.rotate(x, sin, sin), ops.rotate(x, sin, sin)))
    print(f"worst relative distance {worst:.2g}")
    return int(not worst < 2e-6)


if __name__ == "__main__":
    sys.exit(main())
