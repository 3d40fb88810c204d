# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
"""The operations of `ops` for GPUs, in Triton: one launch each.

`attend` is flash decoding (Dao et al. 2023). Each program takes one key/value head of one sequence and a share of its
filled slots, for all query heads that use it: keys and values are read once. The shares of a head are summed by
whichever program of it ends last, in the order of the shares, so the same input gives the same bits and there is no
second launch. The counters that tell who is last go back to zero by that same program.

    share s of n slots:   m_s = max score,  l_s = sum exp(score - m_s),  o_s = sum exp(score - m_s) v
    together:             m = max m_s,  o = sum exp(m_s - m) o_s / sum exp(m_s - m) l_s

The new key is rotated and its score taken by the first share from registers, so nobody waits for it to reach its slot.

On compute capability 9.0 each of them begins while the kernel before it still runs and lets the one behind it begin at once
(EARLY, NVIDIA's programmatic dependent launch): it waits for its inputs itself, and the matmul behind it asks for its weights
meanwhile. Nothing but a norm's weight is touched before the wait, and that is only brought into the L2 cache.

Bytes are those of the filled slots. Measured on an H100 at Llama-3-8B's heads: 6.8 microseconds at 192 filled slots and one
sequence, 9.6 at sixteen sequences, 12.3 at 2200 slots; torch's operators for the same take 38, 43 and 40. The others
are bound by the launch alone. Needs a C compiler on the machine, as Triton does for its launcher.

Shape legend: B sequences, H query heads, J key/value heads, G = H / J, L slots, D and E sizes of keys and values, S shares.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from aerogel.kernels.triton_here import language

triton, tl = language()
OVERRIDE: dict[int, tuple[int, int, int]] = {}
"""Slots -> (tile, shares, warps), for measuring other plans than `plan_of` makes."""
MANY_ROWS = 256
"""From here on a gate is bound by memory and not by the launch, and its programs take more."""
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _begin(EARLY: tl.constexpr):
    """Lets the next kernel begin, then waits until everything before this one has ended and can be read."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _turned(x_ptr, cos_ptr, sin_ptr, rows, stride, D: tl.constexpr, D_PAD: tl.constexpr, valid, ROTATE: tl.constexpr):
    """Rows of x, rotated; rounded after every product as the model's own code is."""
    d = tl.arange(0, D_PAD)
    inside = valid[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride + d[None, :], mask=inside, other=0.0)
    if ROTATE:
        other = tl.where(d < D // 2, d + D // 2, d - D // 2)
        crossed = tl.load(x_ptr + rows[:, None] * stride + other[None, :], mask=inside, other=0.0).to(tl.float32)
        crossed = tl.where((d < D // 2)[None, :], -crossed, crossed)
        cos = tl.load(cos_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        straight = (x.to(tl.float32) * cos[None, :]).to(x.dtype).to(tl.float32)
        x = (straight + (crossed * sin[None, :]).to(x.dtype).to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _capped(score, CAP: tl.constexpr, scale):
    """Scores in units of log 2, soft-capped where there is a cap."""
    score = score * scale
    if CAP > 0:
        twice = tl.exp2(tl.minimum(score / CAP, 20.0) * (2 * LOG2E))
        score = CAP * (twice - 1) / (twice + 1)
    return score * LOG2E


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, slot_ptr, start_ptr, sinks_ptr, out_ptr,
    part_ptr, norm_ptr, count_ptr, scale, q_b, q_h, k_b, k_h, v_b, v_h, cos_b, sin_b,
    J, L,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr,
    SHARES: tl.constexpr, SHARES_PAD: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, ROTATE: tl.constexpr,
    SINKS: tl.constexpr, TILE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    _begin(EARLY)
    share, head = tl.program_id(0), tl.program_id(1)
    b, j = head // J, head % J
    g, d, e = tl.arange(0, G_PAD), tl.arange(0, D_PAD), tl.arange(0, E_PAD)
    n = tl.load(slot_ptr)
    first = tl.load(start_ptr + b)
    if WINDOW > 0:
        first = tl.maximum(first, n - WINDOW + 1)
    length = tl.cdiv(tl.cdiv(n - first, SHARES), TILE) * TILE
    begin = first + share * length
    end = tl.minimum(begin + length, n)

    q = _turned(q_ptr + b * q_b, cos_ptr + b * cos_b, sin_ptr + b * sin_b, j * G + g, q_h, D, D_PAD, g < G, ROTATE)
    top = tl.full([G_PAD], -float("inf"), tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    acc = tl.zeros([G_PAD, E_PAD], tl.float32)
    slots = head.to(tl.int64) * L
    if share == 0:
        one = tl.arange(0, 1)
        k = _turned(k_ptr + b * k_b, cos_ptr + b * cos_b, sin_ptr + b * sin_b, j + one, k_h, D, D_PAD, one < 1, ROTATE)
        v = tl.load(v_ptr + b * v_b + j * v_h + e, mask=e < E, other=0.0)
        tl.store(keys_ptr + (slots + n) * D + d[None, :], k, mask=(d < D)[None, :])
        tl.store(values_ptr + (slots + n) * E + e, v, mask=e < E)
        top = _capped(tl.sum(q.to(tl.float32) * k.to(tl.float32), 1), CAP, scale)
        total += 1.0
        acc += v.to(tl.float32)[None, :]
    for at in range(begin, end, TILE):
        s = at + tl.arange(0, TILE)
        k_DT = tl.load(keys_ptr + (slots + s)[None, :] * D + d[:, None], mask=(s < end)[None, :] & (d < D)[:, None], other=0.0)
        v_TE = tl.load(
            values_ptr + (slots + s)[:, None] * E + e[None, :], mask=(s < end)[:, None] & (e < E)[None, :], other=0.0
        )
        score = _capped(tl.dot(q, k_DT, input_precision="ieee"), CAP, scale)
        score = tl.where((s < end)[None, :], score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v_TE.dtype), v_TE, input_precision="ieee")
        top = higher

    out = out_ptr + head * G * E
    if SHARES == 1:
        if SINKS:
            total += tl.exp2(tl.load(sinks_ptr + j * G + g, mask=g < G, other=0.0).to(tl.float32) * LOG2E - top)
        o = acc / total[:, None]
        tl.store(out + g[:, None] * E + e[None, :], o.to(out_ptr.dtype.element_ty), mask=(g < G)[:, None] & (e < E)[None, :])
    else:
        row = (head * SHARES + share) * G
        tl.store(part_ptr + (row + g)[:, None] * E + e[None, :], acc, mask=(g < G)[:, None] & (e < E)[None, :])
        tl.store(norm_ptr + 2 * (row + g), top, mask=g < G)
        tl.store(norm_ptr + 2 * (row + g) + 1, total, mask=g < G)
        tl.debug_barrier()
        last = tl.atomic_add(count_ptr + head, 1, sem="acq_rel") == SHARES - 1
        tl.debug_barrier()
        if last:
            tl.store(count_ptr + head, 0)
            s = tl.arange(0, SHARES_PAD)
            there = s < SHARES
            for i in tl.static_range(G):
                rows = (head * SHARES + s) * G + i
                tops = tl.load(norm_ptr + 2 * rows, mask=there, other=-float("inf"), cache_modifier=".cg")
                totals = tl.load(norm_ptr + 2 * rows + 1, mask=there, other=0.0, cache_modifier=".cg")
                inside = there[:, None] & (e < E)[None, :]
                parts = tl.load(part_ptr + rows[:, None] * E + e[None, :], mask=inside, other=0.0, cache_modifier=".cg")
                highest = tl.max(tops, 0)
                weight = tl.exp2(tops - highest)
                below = tl.sum(weight * totals, 0)
                if SINKS:
                    below += tl.exp2(tl.load(sinks_ptr + j * G + i).to(tl.float32) * LOG2E - highest)
                o = tl.sum(weight[:, None] * parts, 0) / below
                tl.store(out + i * E + e, o.to(out_ptr.dtype.element_ty), mask=e < E)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def _launch(device: torch.device) -> dict[str, bool]:
    """Options of every launch: early where the device can and the compiler is NVIDIA's."""
    early = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@cache
def _counters(device: torch.device, heads: int) -> Tensor:
    """Zeros, which every launch leaves at zero; shared by all launches on a device, which run one after the other."""
    with torch.inference_mode(False):
        return torch.zeros(heads, dtype=torch.int32, device=device)


def plan_of(device: torch.device, heads: int, slots: int) -> tuple[int, int, int]:
    """(slots read at a time, shares of a head, warps), as measured on an H100 (benchmarks/decode_attention.py).

    Few slots are read fastest by one program per head, since summing shares costs a microsecond; many by as many programs
    as there are processors.
    """
    if slots in OVERRIDE:
        return OVERRIDE[slots]
    if slots <= 256:
        return (128, 1, 8) if heads < _processors(device) // 2 else (64, 1, 4)
    return 64, max(1, min(-(-slots // 128), _processors(device) // heads)), 4


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    start: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """As `ops.attend`."""
    (B, H, _, D), (J, L, E) = q.shape, (keys.shape[1], keys.shape[2], values.shape[3])
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    G = H // J
    tile, shares, warps = plan_of(q.device, B * J, L)
    out = q.new_empty(B, 1, H, E)
    parts = B * J * shares * G if shares > 1 else 0
    part, norm = (torch.empty(parts, width, dtype=torch.float32, device=q.device) for width in (E, 2))
    count = _counters(q.device, B * J)
    cos_, sin_ = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (cos, sin))
    angle = [0 if x is None or x.shape[0] == 1 else x.stride(0) for x in (cos_, sin_)]
    _attend[shares, B * J](
        q, k, v, q if cos_ is None else cos_, q if sin_ is None else sin_, keys, values, slot, start,
        q if sinks is None else sinks, out, part, norm, count, scale,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), angle[0], angle[1], J, L,
        G=G, G_PAD=max(16, triton.next_power_of_2(G)), D=D, D_PAD=max(16, triton.next_power_of_2(D)),
        E=E, E_PAD=max(16, triton.next_power_of_2(E)), SHARES=shares, SHARES_PAD=triton.next_power_of_2(shares),
        WINDOW=window, CAP=softcap, ROTATE=cos is not None, SINKS=sinks is not None, TILE=tile, num_warps=warps,
        **_launch(q.device),
    )  # fmt: skip
    return out


@triton.jit
def _norm(
    a_ptr, b_ptr, weight_ptr, sum_ptr, y_ptr, eps, a_row, b_row,
    N: tl.constexpr, N_PAD: tl.constexpr, ADD: tl.constexpr, ROUND: tl.constexpr, EARLY: tl.constexpr, FETCH: tl.constexpr,
):  # fmt: skip
    if FETCH:
        line = tl.minimum(tl.arange(0, N_PAD // 64 if N_PAD > 64 else 1) * 64, N - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [weight_ptr + line], dtype=tl.int32, is_pure=False, pack=1
        )
    _begin(EARLY)
    row, n = tl.program_id(0).to(tl.int64), tl.arange(0, N_PAD)
    weight = tl.load(weight_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    h = tl.load(a_ptr + row * a_row + n, mask=n < N, other=0.0)
    if ADD:
        h = (h.to(tl.float32) + tl.load(b_ptr + row * b_row + n, mask=n < N, other=0.0).to(tl.float32)).to(h.dtype)
        tl.store(sum_ptr + row * N + n, h, mask=n < N)
    x = h.to(tl.float32)
    y = x / tl.sqrt(tl.sum(x * x, 0) / N + eps)
    if ROUND:
        y = y.to(h.dtype).to(tl.float32)
    tl.store(y_ptr + row * N + n, (y * weight).to(y_ptr.dtype.element_ty), mask=n < N)


def _rows(x: Tensor) -> Tensor:
    """[M, N] with neighbouring elements, a view where possible."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _normed(a: Tensor, b: Tensor | None, weight: Tensor, eps: float, round_first: bool) -> tuple[Tensor, Tensor]:
    N = a.shape[-1]
    y = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    total = y if b is None else torch.empty_like(y)
    x, other = _rows(a), _rows(a if b is None else b)
    size, launch = triton.next_power_of_2(N), _launch(a.device)
    _norm[(len(x),)](
        x, other, weight, total, y, eps, x.stride(0), other.stride(0), N=N, N_PAD=size, ADD=b is not None,
        ROUND=round_first, FETCH=launch["EARLY"] and len(x) <= MANY_ROWS, num_warps=min(16, max(1, size // 512)), **launch,
    )  # fmt: skip
    return total, y


def rms_norm(x: Tensor, weight: Tensor, eps: float, round_first: bool) -> Tensor:
    """As `ops.rms_norm`."""
    return _normed(x, None, weight, eps, round_first)[1]


def add_rms_norm(a: Tensor, b: Tensor, weight: Tensor, eps: float, round_first: bool) -> tuple[Tensor, Tensor]:
    """As `ops.add_rms_norm`."""
    return _normed(a, b, weight, eps, round_first)


@triton.jit
def _gate(g_ptr, u_ptr, y_ptr, g_row, u_row, N, ACT: tl.constexpr, TILE: tl.constexpr, EARLY: tl.constexpr):
    _begin(EARLY)
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    g = tl.load(g_ptr + row * g_row + n, mask=n < N, other=0.0)
    u = tl.load(u_ptr + row * u_row + n, mask=n < N, other=0.0).to(tl.float32)
    x = g.to(tl.float32)
    if ACT == "silu":
        y = x / (1 + tl.exp(-x))
    elif ACT == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x / (1 + tl.exp(-2 * z))
    y = y.to(g.dtype).to(tl.float32) * u
    tl.store(y_ptr + row * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def gate(g: Tensor, u: Tensor, act: str) -> Tensor:
    """As `ops.gate`."""
    N = g.shape[-1]
    y = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    a, b = _rows(g), _rows(u)
    tile = min(2048 if len(a) > MANY_ROWS else 512, triton.next_power_of_2(N))
    _gate[len(a), triton.cdiv(N, tile)](
        a, b, y, a.stride(0), b.stride(0), N, ACT=act, TILE=tile, num_warps=max(2, tile // 256), **_launch(g.device)
    )
    return y


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, y_ptr, x_b, x_h, x_t, angle_b, T,
    H: tl.constexpr, H_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    _begin(EARLY)
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    h, d = tl.arange(0, H_PAD), tl.arange(0, D_PAD)
    angle = b * angle_b + t * D
    y = _turned(x_ptr + b * x_b + t * x_t, cos_ptr + angle, sin_ptr + angle, h, x_h, D, D_PAD, h < H, True)
    tl.store(y_ptr + ((b * T + t) * H + h)[:, None] * D + d[None, :], y, mask=(h < H)[:, None] & (d < D)[None, :])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `ops.rotate`; heads of a token lie side by side in the result."""
    B, H, T, D = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y = x.new_empty(B, T, H, D)
    _rotate[T, B](
        x, cos, sin, y, x.stride(0), x.stride(1), x.stride(2), 0 if len(cos) == 1 else T * D, T,
        H=H, H_PAD=triton.next_power_of_2(H), D=D, D_PAD=triton.next_power_of_2(D), num_warps=4, **_launch(x.device),
    )  # fmt: skip
    return y.transpose(1, 2)
