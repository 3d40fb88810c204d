"""Activations rounded to 8 bits on CUDA, a scale for each token, as they are or where they are made: the host's side of
`quantize.cu`.

Shape legend: M tokens, K in features.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aerogel.kernels.gemm.cuda_made import Made
from aerogel.kernels.gemm.cuda_wgmma_plan import in_pieces

if TYPE_CHECKING:
    from aerogel.kernels.cuda.launch import Launch
    from aerogel.kernels.gemm.cuda_kept import KeptColumns

SOURCE, KERNEL = "quantize.cu", "quantize_tokens"
INT8, E4M3, ROUNDED = 0, 1, 2
"""What comes out: int8 codes, e4m3 codes, or the rounded numbers in the type they came in."""
MOST_THREADS, MOST_CHUNKS = 512, 4
"""Of a block, and pieces of 16 columns that each of them keeps in registers."""


class Arguments(ctypes.Structure):
    """`Arguments` of quantize.cu, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "u", "weight", "codes", "scale", "fixed", "mask", "index", "chosen")),
        *((name, ctypes.c_int) for name in ("K", "x_stride", "u_stride", "columns", "kept", "kept_columns")),
        ("eps", ctypes.c_float),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """Rounds x [M, K] bf16 or fp16 of one type on one device.

    output: INT8, E4M3 or ROUNDED. permuted: int8 codes in the order that the integer matmul wants, inside each 16 columns.
    columns: of the result, at least K, a multiple of 16; those beyond K are zeros. keeps: some columns are kept as they are.
    """

    dtype: torch.dtype
    device: torch.device
    output: int
    columns: int
    permuted: bool = False
    keeps: bool = False

    def __call__(
        self,
        x: Tensor | Made,
        fixed: Tensor | None = None,
        kept: KeptColumns | None = None,
        chosen_MC: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Codes [M, columns] and float32 scales [M]: x ~ code * scale. `fixed`: a float32 scale [1] for all tokens.

        kept, where it `keeps`: columns that do not count for the scale and get the code 0, or stay as they are (ROUNDED).
        chosen_MC: filled with what they are, [M, `kept.columns`] of x's type.

        x may be what a norm or a gate makes: its codes are those of `x.settled()`, but for the few whose 16 bits come out one
        unit off. A token with an infinity or a NaN gets a scale that is not finite, and so does all that is computed with it.
        """
        x_MK, made = _source(x if kept is None or isinstance(x, Tensor) else x.settled())
        M, K = x_MK.shape
        kind = (torch.int8, torch.float8_e4m3fn, x_MK.dtype)[self.output]
        codes = torch.empty(M, self.columns, dtype=kind, device=x_MK.device)
        scale = torch.empty(M, dtype=torch.float32, device=x_MK.device)
        launch = _launch(self, M, K, () if made is None else tuple(made.macros().items()))
        with _LOCK:
            arguments: Any = launch.arguments
            arguments.x, arguments.codes, arguments.scale = x_MK.data_ptr(), codes.data_ptr(), scale.data_ptr()
            arguments.fixed = None if fixed is None else fixed.data_ptr()
            arguments.x_stride = x_MK.stride(0)
            if kept is not None:
                arguments.mask, arguments.index = kept.mask.data_ptr(), kept.index_C.data_ptr()
                arguments.kept, arguments.kept_columns = len(kept.index_C), kept.columns
                arguments.chosen = None if chosen_MC is None else chosen_MC.data_ptr()
            for name, value in {} if made is None else made.arguments().items():
                setattr(arguments, name, value)
            launch(torch._C._cuda_getCurrentRawStream(self.device.index))
        return codes, scale


def rounded(x_MK: Tensor) -> Tensor:
    """x [M, K] bf16 or fp16 rounded to int8, a scale for each token, in its own type; an operator."""
    found: Tensor = torch.ops.aerogel.rounded_tokens.default(x_MK)
    return found


def _rounded_cuda(x: Tensor) -> Tensor:
    K = x.shape[1]
    if x.numel() == 0:
        return x.clone()
    with torch.cuda.device(x.device):
        rounding = Quantizer(dtype=x.dtype, device=x.device, output=ROUNDED, columns=-(-K // 16) * 16)
        return rounding(x)[0][:, :K].contiguous()


_library = torch.library.Library("aerogel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("rounded_tokens(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
_library.impl("rounded_tokens", _rounded_cuda, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("aerogel::rounded_tokens", lambda x: x.new_empty(x.shape), lib=_library)

_LOCK = threading.Lock()
"""Held from filling a launch's arguments until it is queued."""


def _source(x: Tensor | Made) -> tuple[Tensor, Made | None]:
    """What the kernel reads, 16 bytes at a time, and what it makes of that."""
    if isinstance(x, Tensor):
        return in_pieces(x), None
    return (x.x, x) if x.in_pieces() else (in_pieces(x.settled()), None)


def macros(quantizer: Quantizer, K: int, made: tuple[tuple[str, int], ...] = ()) -> dict[str, int]:
    """What specialises the source: threads enough to keep a token of K numbers in registers, as far as it fits."""
    pieces = -(-quantizer.columns // 16)
    chunks = min(MOST_CHUNKS, -(-pieces // MOST_THREADS))
    threads = min(MOST_THREADS, -(-pieces // (32 * chunks)) * 32)
    own = {"OUTPUT": quantizer.output, "PERMUTED": int(quantizer.permuted), "FP16": int(quantizer.dtype == torch.float16)}
    cut = {"THREADS": threads, "CHUNKS": chunks, "LONGER": int(pieces > threads * chunks), "RAGGED": int(K % 16 > 0)}
    return {"MADE": 0, "KEPT": int(quantizer.keeps), **cut, **own, **dict(made)}


@functools.lru_cache(maxsize=1024)
def _launch(quantizer: Quantizer, M: int, K: int, made: tuple[tuple[str, int], ...]) -> Launch:
    """The kernel for M tokens of K numbers; its addresses are filled in by each call."""
    from aerogel.kernels.cuda.launch import Launch
    from aerogel.kernels.cuda.sources import function

    wanted = macros(quantizer, K, made)
    kernel = function(SOURCE, KERNEL, wanted, quantizer.device)
    early = torch.cuda.get_device_capability(quantizer.device) >= (9, 0)
    return Launch(kernel, Arguments(K=K, columns=quantizer.columns), grid=(M,), block=wanted["THREADS"], early=early)
