"""Lossless entropy coding of a checkpoint: fewer bytes on disk, every bit of every weight as it was.

A bfloat16 number is a sign, eight bits of exponent and seven of mantissa. In trained weights sign and mantissa look like
noise, but exponents do not: a few values make up nearly all of them, and 2.6 bits hold what 8 are spent on (Zhang et al.,
"70% Size, 100% Accuracy: Lossless LLM Compression via Dynamic-Length Float", 2025). So exponents are Huffman coded and
the rest is kept, one byte each: about 68 % of the size. Packed integers are coded byte by byte; how much that saves depends
on the solver's scales (a 4-bit code in groups of 128 holds 3.4 bits), and what it saves is printed, not promised.

On disk a tensor `x.weight` becomes

    x.weight_coded          uint8 [bytes]         the coded runs, see kernels/entropy/ref.py
    x.weight_coded_runs     int16 [runs]          bytes of each run of 256 symbols
    x.weight_coded_bits     uint8 [256]           length of each symbol's code
    x.weight_coded_rest     uint8 [n]             sign and mantissa of each number; bfloat16 only
    x.weight_coded_shape    int64 [1 + dims]      the number of its dtype in DTYPES, then its shape

and config.json says so under `entropy`, beside whatever else the weights are (`quant_method: aerogel`: no other loader
knows it). A tensor that would save less than 2 % stays as it is. Loading decodes each weight when it is placed; one at a
time is in memory twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.entropy import choose
from aerogel.kernels.entropy.ref import Coded, entropy
from aerogel.pack.scheme import NotServed, Scheme
from aerogel.pack.source import Columns, Source, open_source

MARK = "_coded"
PARTS = ("", "_runs", "_bits", "_rest", "_shape")
VERSION = 1
DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int32,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int64,
    torch.float8_e4m3fn,
)
"""Numbers of dtypes in files: append only."""
LEAST_BYTES = 1 << 14
"""Smaller tensors are not worth a code of their own."""
WORTH = 0.98
"""A tensor is coded where that takes at most this share of its bytes."""
LEFT = ("_scale", "_zero_point", "_shape", "_g_idx", "_bias")
"""Tensors beside the weights, which loaders want to see before anything is decoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What coding did to one tensor: bytes before and after, and the entropy in bits of one of its symbols (exponents of
    bfloat16, bytes of everything else)."""

    name: str
    dtype: str
    before: int
    after: int
    entropy: float

    def as_row(self) -> dict[str, Any]:
        """Plain JSON values."""
        share = self.after / self.before
        return {"name": self.name, "dtype": self.dtype, "bytes": self.before, "coded_bytes": self.after, "share": share,
                "entropy_bits": self.entropy}  # fmt: skip


def coded_tensors(name: str, tensor: Tensor) -> tuple[dict[str, Tensor], Saving | None]:
    """A tensor as it is stored: in parts, with what they save, or under its own name where coding saves nothing."""
    whole = {name: tensor}
    if tensor.nbytes < LEAST_BYTES or tensor.ndim < 2 or tensor.dtype not in DTYPES or name.endswith(LEFT):
        return whole, None
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    rest = None
    if tensor.dtype == torch.bfloat16:
        symbols, rest = choose.split_bfloat16(flat)
    else:
        symbols = flat.view(torch.uint8)
    coded = choose.encode(symbols)
    parts = {
        "": coded.stream,
        "_runs": coded.lengths,
        "_bits": coded.code,
        "_shape": torch.tensor([DTYPES.index(tensor.dtype), *tensor.shape]),
    }
    if rest is not None:
        parts["_rest"] = rest
    after = sum(part.nbytes for part in parts.values())
    if after > WORTH * tensor.nbytes:
        return whole, None
    found = entropy(choose.counts(symbols))
    kind = str(tensor.dtype).removeprefix("torch.")
    saving = Saving(name=name, dtype=kind, before=tensor.nbytes, after=after, entropy=found)
    return {f"{name}{MARK}{part}": held for part, held in parts.items()}, saving


def decoded_tensor(parts: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor back, bit for bit, from `parts` by the suffixes in PARTS, on their device.

    Raises:
        BadInput: parts are missing or do not belong together; `name` is whose they are.
    """
    missing = [part for part in PARTS if part not in parts and part != "_rest"]
    if missing:
        raise BadInput(f"{name} is entropy coded, but {name}{MARK}{missing[0]} is missing; the checkpoint is not whole")
    number, *shape = parts["_shape"].tolist()
    if not 0 <= number < len(DTYPES):
        raise BadInput(f"{name} is coded from a type number {number}; a newer aerogel wrote it, update yours")
    dtype, count = DTYPES[number], torch.Size(shape).numel()
    coded = Coded(stream=parts[""], lengths=parts["_runs"], code=parts["_bits"], count=count * _symbols(dtype))
    try:
        if dtype != torch.bfloat16:
            return choose.decode(coded).view(dtype).reshape(shape)
        rest = parts.get("_rest")
        if rest is None or rest.numel() != count:
            raise BadInput(f"{count} numbers need as many bytes of sign and mantissa")
        return choose.decode_bfloat16(coded, rest).reshape(shape)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from error


def _symbols(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.bfloat16 else dtype.itemsize


def split_name(name: str) -> tuple[str, str] | None:
    """(name of the tensor, part) of a stored tensor that is a part of a coded one, else None."""
    base, mark, part = name.rpartition(MARK)
    return (base, part) if mark and part in PARTS else None


class EntropyCoded(Source):
    """Reads checkpoints whose tensors may be coded, whatever they are when decoded: dense, or of another source."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        version = config.get("entropy", {}).get("version")
        if version != VERSION:
            raise NotServed(f"entropy coding of version {version!r} is not read by this aerogel, which writes {VERSION}")
        below = plain_config(config)
        self._inner: Source | None = None if below is None else open_source(below)

    suffixes: frozenset[str] = frozenset()
    markers: ClassVar[frozenset[str]] = frozenset()
    index: ClassVar[str] = "weight_g_idx"

    def groups(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """The packed weights of the source below; a coded tensor stands there with all its parts."""
        if self._inner is None:
            return {}
        parts = coded_parts(names)
        bases = dict.fromkeys(split[0] if (split := split_name(name)) else name for name in names)
        return {
            prefix: {
                local + rest: stored for local, base in held.items() for rest, stored in parts.get(base, {"": base}).items()
            }
            for prefix, held in self._inner.groups(bases).items()
        }

    def plain_groups(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Coded tensors that are no packed weight's: {name of the dense tensor: {part with its mark: stored name}}."""
        names = list(names)
        taken = {stored for held in self.groups(names).values() for stored in held.values()}
        return {base: held for base, held in coded_parts(names).items() if not taken & set(held.values())}

    def opened(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of one weight by local name, those that are coded decoded."""
        found = {name: tensor for name, tensor in tensors.items() if split_name(name) is None}
        coded: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if (split := split_name(name)) is not None:
                coded.setdefault(split[0], {})[split[1]] = tensor
        return found | {base: decoded_tensor(parts, base or "a weight") for base, parts in coded.items()}

    def scheme(self, names: Sequence[str], header: Mapping[str, torch.dtype], class_names: Sequence[str]) -> Scheme:
        """As the source below has it; scales are never coded, so their types are in the header."""
        return self._below().scheme(names, header, class_names)

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Columns:
        """The codes of one weight."""
        return self._below().read(self.opened(tensors), scheme)

    def columns(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Columns:
        """As `read`, by the source below."""
        return self._below().columns(name, self.opened(tensors), scheme)

    def _below(self) -> Source:
        if self._inner is None:
            raise BadInput("this checkpoint's config describes no packed weights; it does not belong to these files")
        return self._inner


def coded_parts(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """{coded tensor: {mark and part: stored name}}."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if (split := split_name(name)) is not None:
            found.setdefault(split[0], {})[MARK + split[1]] = name
    return found


def coding_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint once it is coded. Raises `BadInput` for configs that cannot say so."""
    if config is not None and "entropy" in config:
        raise BadInput("this checkpoint is entropy coded already; there is nothing to do")
    if config is not None and "layout" in config:
        raise BadInput("native layouts are mapped from disk as they are; write the checkpoint portable, then code it")
    if config is not None and config.get("quant_method") not in ("compressed-tensors", "aerogel"):
        raise BadInput(f"dense and compressed-tensors checkpoints can be entropy coded, found {config.get('quant_method')}")
    below = config and config["quant_method"]
    return {**(config or {}), "quant_method": "aerogel", "entropy": {"version": VERSION, "quant_method": below}}


def plain_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The inverse of `coding_config`; None where the weights are dense. Raises `BadInput` for one that is not coded."""
    if "entropy" not in config:
        raise BadInput("this checkpoint is not entropy coded")
    below = config["entropy"]["quant_method"]
    return (
        None if below is None else {key: value for key, value in config.items() if key != "entropy"} | {"quant_method": below}
    )
