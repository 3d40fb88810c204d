"""Inputs of the small operations, ragged on purpose; slots that must not be read hold NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# B, H, J, D, E, L, slot, window, softcap, sinks, rotated
ATTENTION = [
    (1, 8, 2, 64, 64, 128, 0, 0, 0.0, False, True),
    (2, 8, 2, 64, 64, 256, 200, 0, 0.0, False, True),
    (2, 6, 2, 16, 16, 192, 130, 40, 0.0, True, False),
    (3, 4, 4, 24, 40, 320, 300, 0, 5.0, False, True),
    (1, 3, 1, 64, 64, 256, 5, 0, 0.0, True, True),
    (1, 4, 1, 80, 80, 704, 703, 0, 0.0, False, True),
    (2, 8, 2, 64, 64, 256, 200, 64, 30.0, True, True),
]


def attention(case: tuple[Any, ...], dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    B, H, J, D, E, L, n, window, softcap, sinks, rotated = case
    torch.manual_seed(n)
    q, k, v = (torch.randn(B, 1, h, d).transpose(1, 2) for h, d in ((H, D), (J, D), (J, E)))
    keys, values = torch.randn(B, J, L, D), torch.randn(B, J, L, E)
    start = torch.randint(0, max(1, n // 2), (B,))
    for held in (keys, values):
        held[:, :, n + 1 :] = float("nan")
        for row in range(B):
            held[row, :, : start[row]] = float("nan") if device != "cpu" else 1e4
    angle = torch.randn(B, 1, D)
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "cos": angle.cos(), "sin": angle.sin(), "keys": keys, "values": values}
    given = {name: x.to(dtype).to(device) for name, x in given.items()}
    if not rotated:
        given |= {"cos": None, "sin": None}
    given |= {"slot": torch.tensor([n], device=device), "start": start.to(device), "scale": D**-0.5, "window": window}
    return given | {"softcap": softcap, "sinks": torch.randn(H).to(dtype).to(device) if sinks else None}


def wide(given: dict[str, Any]) -> dict[str, Any]:
    """The same in float64."""
    return {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in given.items()}


def textbook(given: dict[str, Any]) -> Tensor:
    """Attention by the formula, one head at a time, in float64: [B, 1, H, E]."""
    x = wide(given)
    q, k, v, n = x["q"], x["k"], x["v"], int(x["slot"])
    if x["cos"] is not None:
        half = q.shape[-1] // 2
        q, k = (t * x["cos"][:, None] + torch.cat([-t[..., half:], t[..., :half]], -1) * x["sin"][:, None] for t in (q, k))
    B, H, J = q.shape[0], q.shape[1], k.shape[1]
    out = torch.empty(B, 1, H, v.shape[-1], dtype=torch.float64, device=q.device)
    for b in range(B):
        first = max(int(x["start"][b]), n - x["window"] + 1 if x["window"] else 0)
        for h in range(H):
            j = h * J // H
            keys = torch.cat([x["keys"][b, j, first:n], k[b, j]])
            values = torch.cat([x["values"][b, j, first:n], v[b, j]])
            score = keys @ q[b, h, 0] * x["scale"]
            if x["softcap"]:
                score = x["softcap"] * torch.tanh(score / x["softcap"])
            if x["sinks"] is not None:
                score = torch.cat([score, x["sinks"][h : h + 1]])
            out[b, 0, h] = torch.softmax(score, 0)[: len(values)] @ values
    return out


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
