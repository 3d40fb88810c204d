"""The small operations of a decode step as compiled CPU code; the definitions are in `ops`.

Plain torch takes four to twelve operators for each of them, five microseconds apiece; here each is one call that reads
and writes a few kilobytes. What the compiled code does not do (softcap, sinks, gelu, mixed types, unusual strides) runs
as defined: the numbers are the same to rounding, only slower.

Shape legend: B sequences, H query heads, J key/value heads, L slots, D and E sizes of keys and values, N features.
"""

from __future__ import annotations

import ctypes
from itertools import pairwise

import torch
from torch import Tensor

from aerogel.kernels.decode import ops
from aerogel.kernels.native import library
from aerogel.kernels.native.library import TYPES

_LARGEST_HEAD, _LARGEST_SHARE = 512, 64


class _Attend(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64) for name in ("q_step", "k_step", "v_step")),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "keys", "values", "start", "slot_at", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "queries", "heads", "slots", "key_size", "value_size", "window")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("type", "angles_per_sequence", "threads")),
    ]


class _Prompt(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "cosine", "sine", "keys", "values", "start", "out")),
        *((name, ctypes.c_int64 * 3) for name in ("q_strides", "k_strides", "v_strides")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "queries", "heads", "tokens", "key_size", "value_size", "slots", "wanted")
        ),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("type", "angles_per_sequence", "threads")),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "weight", "sum", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "size")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("type", "round_first", "threads")),
    ]


class _Gate(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("g", "u", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "size", "g_stride", "u_stride")),
        *((name, ctypes.c_int32) for name in ("type", "threads")),
    ]


def alike(*tensors: Tensor | None) -> bool:
    """Whether all are contiguous and of one type that the compiled code knows."""
    given = [tensor for tensor in tensors if tensor is not None]
    kind = given[0].dtype
    return kind in TYPES and all(tensor.dtype == kind and tensor.is_contiguous() for tensor in given)


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
    """`ops.attend`: [B, 1, H, E]; writes the new key and value into their slots."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    cos, sin = (None, None) if cos is None or sin is None else (cos.contiguous(), sin.contiguous())
    out = torch.empty(q.shape[0], 1, q.shape[1], v.shape[3], dtype=q.dtype)
    arguments = attend_arguments(out, q, k, v, cos, sin, keys, values, slot, start, scale, window, softcap, sinks)
    if arguments is None:
        return ops.attend(q, k, v, cos, sin, keys, values, slot, start, scale, window, softcap, sinks)
    library.check(library.library().aerogel_native_attend(ctypes.byref(arguments)), "attention of one token")
    return out


def attend_arguments(
    out: Tensor,
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
) -> ctypes.Structure | None:
    """The struct of one attention, or None where the compiled code does not do it."""
    B, H, _, D = q.shape
    J, E = k.shape[1], v.shape[3]
    simple = not softcap and sinks is None and max(D, E) <= _LARGEST_HEAD and H // J <= _LARGEST_SHARE
    simple = simple and q.dtype == k.dtype == v.dtype == keys.dtype
    simple = simple and all(x.stride(1) == x.shape[3] and x.stride(3) == 1 for x in (q, k, v))
    if not simple or not alike(keys, values, cos, sin) or not _fits(q, k, v, cos, sin, keys, values, slot, start):
        return None
    return _Attend(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        *(q.stride(0), k.stride(0), v.stride(0)),
        None if cos is None else cos.data_ptr(),
        None if sin is None else sin.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        start.data_ptr(),
        slot.data_ptr(),
        out.data_ptr(),
        *(B, H, J, keys.shape[2], D, E, window),
        scale,
        *(TYPES[q.dtype], int(cos is not None and cos.shape[0] > 1), library.threads()),
    )


def _fits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    start: Tensor,
) -> bool:
    """Whether every shape is the one the compiled code takes it for: it reads and writes where it is told."""
    B, H, T, D = q.shape
    J, L, E = k.shape[1], keys.shape[2], v.shape[3]
    angles = all(angle is None or (angle.shape[-1] == D and angle.numel() in (D, B * D)) for angle in (cos, sin))
    places = slot.dtype == start.dtype == torch.int64 and slot.numel() == 1 and start.numel() == B
    shapes = [(k, (B, J, 1, D)), (v, (B, J, 1, E)), (keys, (B, J, L, D)), (values, (B, J, L, E))]
    return T == 1 and H % J == 0 and angles and places and all(tensor.shape == shape for tensor, shape in shapes)


def prompt_fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the compiled code does these: q [B, H, T, D], k [B, J, T, D], v [B, J, T, E] on the CPU, rows contiguous."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        return False
    B, H, T, D = q.shape
    J, E = k.shape[1], v.shape[3]
    on_cpu = all(x.device.type == "cpu" and x.stride(3) == 1 for x in (q, k, v))
    same = on_cpu and q.dtype in TYPES and q.dtype == k.dtype == v.dtype
    shapes = k.shape == (B, J, T, D) and v.shape == (B, J, T, E)
    return same and shapes and H % J == 0 and max(D, E) <= _LARGEST_HEAD and q.numel() > 0


def prompt_arguments(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    start: Tensor | None = None,
) -> ctypes.Structure:
    """The struct of causal attention of whole prompts, of tensors that `prompt_fits` accepts.

    Args:
        out: [B, R, H, E] contiguous: the results of the last R tokens.
        q, k, v: see `prompt_fits`; not yet rotated where `cos` is given.
        cos, sin: [B, T, D] or [1, T, D], contiguous, of q's type.
        keys, values: slots [B, J, L, D] and [B, J, L, E], of which the first T receive rotated keys, and values.
        start: int64 [B], the first token of each sequence: results before it are zeros. None for 0.
    """
    B, H, T, D = q.shape
    J, E = k.shape[1], v.shape[3]
    L = T if keys is None else keys.shape[2]
    fits = alike(out, cos, sin, keys, values) and out.dtype == q.dtype and out.shape[::2] == (B, H) and out.shape[3] == E
    fits = fits and 1 <= out.shape[1] <= T <= L
    fits = fits and all(angle is None or angle.shape in ((B, T, D), (1, T, D)) for angle in (cos, sin))
    fits = fits and (keys is None or keys.shape == (B, J, L, D)) and (values is None or values.shape == (B, J, L, E))
    if not fits or not (start is None or (start.dtype == torch.int64 and start.shape == (B,) and start.is_contiguous())):
        raise ValueError("results, angles, slots and starts do not belong to these queries")
    held = (q, k, v, cos, sin, keys, values, start, out)
    return _Prompt(
        *(None if x is None else x.data_ptr() for x in held),
        *((ctypes.c_int64 * 3)(*x.stride()[:3]) for x in (q, k, v)),
        *(B, H, J, T, D, E, L, T - out.shape[1]),
        scale,
        *(TYPES[q.dtype], int(cos is not None and cos.shape[0] > 1), library.threads()),
    )


def norm_fits(a: Tensor, b: Tensor | None, weight: Tensor) -> bool:
    """Whether the compiled norm does these: one type, contiguous, shapes that belong together."""
    return alike(a, b, weight) and weight.shape == a.shape[-1:] and (b is None or b.shape == a.shape)


def norm_arguments(
    a: Tensor, b: Tensor | None, weight: Tensor, total: Tensor | None, y: Tensor, eps: float, round_first: bool
) -> ctypes.Structure:
    """The struct of one norm of tensors that are `alike`; `total` receives a + b where there is a b."""
    size = weight.shape[0]
    return _Norm(
        a.data_ptr(),
        None if b is None else b.data_ptr(),
        weight.data_ptr(),
        None if total is None else total.data_ptr(),
        y.data_ptr(),
        *(a.numel() // size, size),
        eps,
        *(TYPES[a.dtype], int(round_first), library.threads()),
    )


def _norm(a: Tensor, b: Tensor | None, weight: Tensor, eps: float, round_first: bool) -> tuple[Tensor, Tensor]:
    total = None if b is None else torch.empty_like(a)
    y = torch.empty_like(a)
    arguments = norm_arguments(a, b, weight, total, y, eps, round_first)
    library.check(library.library().aerogel_native_norm(ctypes.byref(arguments)), "a norm")
    return a if total is None else total, y


def rms_norm(x: Tensor, weight: Tensor, eps: float, round_first: bool) -> Tensor:
    """`ops.rms_norm`: [..., N]."""
    if not norm_fits(x, None, weight):
        return ops.rms_norm(x, weight, eps, round_first)
    return _norm(x, None, weight, eps, round_first)[1]


def add_rms_norm(a: Tensor, b: Tensor, weight: Tensor, eps: float, round_first: bool) -> tuple[Tensor, Tensor]:
    """`ops.add_rms_norm`: (a + b, its norm)."""
    if not norm_fits(a, b, weight):
        return ops.add_rms_norm(a, b, weight, eps, round_first)
    return _norm(a, b, weight, eps, round_first)


def gate(g: Tensor, u: Tensor, act: str) -> Tensor:
    """`ops.gate`: act(g) * u; both may be halves of one matmul's result."""
    y = torch.empty(g.shape, dtype=g.dtype)
    arguments = gate_arguments(g, u, act, y)
    if arguments is None:
        return ops.gate(g, u, act)
    library.check(library.library().aerogel_native_gate(ctypes.byref(arguments)), "a gate")
    return y


def gate_arguments(g: Tensor, u: Tensor, act: str, y: Tensor) -> ctypes.Structure | None:
    """The struct of one gate, or None where the compiled code does not do it."""
    size = g.shape[-1]
    rows = g.numel() // size if size else 0
    strides = _row_stride(g), _row_stride(u)
    if act != "silu" or g.shape != u.shape or g.dtype != u.dtype or g.dtype not in TYPES or None in strides:
        return None
    return _Gate(g.data_ptr(), u.data_ptr(), y.data_ptr(), rows, size, *strides, TYPES[g.dtype], library.threads())


def _row_stride(x: Tensor) -> int | None:
    """How far apart the rows of [..., N] lie, in elements, where it is the same everywhere and a row is contiguous."""
    size = x.shape[-1]
    axes = [(length, stride) for length, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if length != 1]
    if x.stride(-1) != 1 or any(outer != n * inner for (_, outer), (n, inner) in pairwise(axes)):
        return None
    stride = axes[-1][1] if axes else size
    return stride if stride >= size else None
