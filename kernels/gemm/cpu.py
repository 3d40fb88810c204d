"""The matmul with a packed weight on a CPU: codes are decoded in registers by compiled code, at the speed of memory.

`Native`      y = sum over groups of s * (q - z) . x, products exact and sums in float32. Scales are applied to sums, so the
              weight is never rounded: against float64 the error is that of float32, whatever the activations' type.
`NativeInt8`  the same with activations rounded to int8, one scale per token and at most 128 columns, as llama.cpp does.
              It changes numbers (about 0.5 % of the output's norm), so it runs only where `Problem.fast` allows it.
`NativeDynamic` for checkpoints that say `activations: int8`: one scale per token, integer sums within 128 columns. Without
              the byte dot product of VNNI, signed codes go through |q| and sign(q) x: nothing saturates.

One token costs the bytes of the weight over the bandwidth of memory; up to 16 rows share one decoding; beyond that, panels
of the weight are decoded into the first-level cache and meet blocks of 12 rows. Threads are torch's number of threads, in a
pool of our own; the result has the same bits for any number of them. Layout: `aerogel.pack.native`. Sources: kernels/native.

Shape legend: M tokens, N out features, K in features, G groups along K.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.beside import cpu as beside_cpu
from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.gemm import cpu_table
from aerogel.kernels.native import library
from aerogel.kernels.problem import Kernel, Layout, Problem, Tuned
from aerogel.pack import bits, native
from aerogel.pack.format import Activations, Shapes, take
from aerogel.quantize.formats.affine import Affine
from aerogel.quantize.grids import Codes, IntGrid


def refusal(problem: Problem, fast: bool = False, activations: Activations = "none") -> str | None:
    """Why no kind of arithmetic can run the problem; `fast` only where activations may be rounded."""
    unasked = "rounds activations to int8, which only happens where it was asked for (--activations int8)"
    return (
        problem.needs_device("cpu")
        or (unasked if fast and not problem.fast else None)
        or _unfit(problem, activations, fast)
        or library.missing()
    )


def _unfit(problem: Problem, activations: Activations, fast: bool = False) -> str | None:
    """What no machine changes: numbers that the layout does not hold, types that the kernels do not read."""
    # Rounded inputs are summed as integers, from which a floating zero point cannot be taken out.
    numbers = (IntGrid, Affine) if activations == "none" and not fast else (IntGrid,)
    return problem.needs_numbers(*numbers) or problem.needs_activations(activations) or problem.needs_dtype(*library.TYPES)


class Native(Kernel):
    """Compiled CPU kernels with exact activations, 1 to 8 bits, any shape."""

    about: ClassVar[str] = (
        "compiled for the CPU's widest instructions: exact products, float32 sums, 1 to 8 bits with any zero point"
    )
    numerics: ClassVar[str] = "exact"
    layout: ClassVar[str | None] = "native-cpu"
    adds_beside: ClassVar[bool] = True
    rows: ClassVar[int] = native.STRIP

    @classmethod
    def refuses(cls, problem: Problem) -> str | None:
        """Anything but integer weights, whatever their zero points, on a CPU; everything where the library was not compiled."""
        return refusal(problem)

    @classmethod
    def refuses_layout(cls, problem: Problem) -> str | None:
        """Anything but integer weights with activations that stay floats; floating zero points are not kept on disk so."""
        return problem.needs_numbers(IntGrid) or _unfit(problem, "none")

    @staticmethod
    def shapes(problem: Problem) -> Shapes:
        """Of codes, scale and, with zero points, zero."""
        factors = (-(-problem.N // native.STRIP), problem.grid.groups(problem.K), native.STRIP)
        found: Shapes = {
            "codes": (native.shape_of(problem.N, _columns(problem), problem.grid.bits), torch.uint8),
            "scale": (factors, problem.grid.scale_dtype),
        }
        if problem.integer is not None and not problem.integer.symmetric:
            found["zero"] = (factors, torch.int8)
        return found

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """codes uint8 [strips, tiles, 64 * bits]; scale and zero [strips, G, 16]; see `aerogel.pack.native`."""
        floating = isinstance(codes.grid, Affine)
        values_NK = bits.unsigned_to_signed(codes.values_NK, codes.grid.bits) if floating else codes.values_NK
        layout = {
            "codes": native.pack_codes(native.fill(values_NK, codes.grid.group_size or 0), codes.grid.bits),
            "scale": native.pack_factors(codes.scale_NG),
        }
        if codes.zero_NG is not None:
            layout["zero"] = native.pack_factors(codes.zero_NG.float() if floating else codes.zero_NG)
        return layout

    @staticmethod
    def rearrange(stored: Layout, problem: Problem) -> dict[str, Tensor] | None:
        """Codes of 2, 4 and 8 bits change places inside their words."""
        grid = problem.integer
        if grid is None or problem.format != "pack-quantized" or grid.bits not in (2, 4, 8) or _columns(problem) != problem.K:
            return None
        factors = (problem.N, grid.groups(problem.K))
        words = take(stored, "weight_packed", (problem.N, bits.words(problem.K, grid.bits)), (torch.int32,))
        layout = {
            "codes": native.pack_stream(words, grid.bits),
            "scale": native.pack_factors(take(stored, "weight_scale", factors, (grid.scale_dtype,))),
        }
        if not grid.symmetric:
            rows = (bits.words(problem.N, grid.bits), factors[1])
            zero = bits.unpack_rows(take(stored, "weight_zero_point", rows, (torch.int32,)), grid.bits, problem.N)
            layout["zero"] = native.pack_factors(bits.unsigned_to_signed(zero, grid.bits))
        return layout

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The same codes, scales and zero points."""
        zero, grid = layout.get("zero"), problem.grid
        filled = native.unpack_codes(layout["codes"], grid.bits, problem.N, _columns(problem))
        values_NK = native.unfill(filled, problem.K, grid.group_size or 0)
        zero_NG = None if zero is None else native.unpack_factors(zero, problem.N)
        if isinstance(grid, Affine) and zero_NG is not None:
            values_NK, zero_NG = bits.signed_to_unsigned(values_NK, grid.bits), zero_NG.to(grid.scale_dtype)
        return Codes(
            values_NK=values_NK, scale_NG=native.unpack_factors(layout["scale"], problem.N), zero_NG=zero_NG, grid=grid
        )

    @classmethod
    def tune(cls, problem: Problem, tokens: Sequence[int]) -> Tuned | None:
        """Times every instruction-set path and number of threads of this machine on a random weight of the problem's shape."""
        grid = problem.integer
        if grid is None or cls.refuses(problem) is not None:
            return None
        G = 1 if grid.group_size is None else -(-problem.K // grid.group_size)
        low = -(1 << (grid.bits - 1))
        zero = None if grid.symmetric else torch.zeros(problem.N, G, dtype=torch.int8)
        values = torch.randint(low, -low, (problem.N, problem.K), dtype=torch.int8)
        codes = Codes(values_NK=values, scale_NG=torch.rand(problem.N, G).to(grid.scale_dtype), zero_NG=zero, grid=grid)
        layout = cls.pack(codes, problem)
        copies = min(16, -(-cpu_table.COPY_BYTES // layout["codes"].nbytes))
        held = [layout["codes"], *(layout["codes"].clone() for _ in range(copies - 1))]
        group, numerics = grid.group_size or 0, library.NUMERICS[cls.numerics]
        entries = {}
        for M in sorted({cpu_table.token_class(M) for M in tokens}):
            x = torch.randn(M, problem.K).to(problem.dtype)

            def run(turn: int, how: cpu_table.Choice, x: Tensor = x) -> Tensor:
                path, weight = library.PATHS.index(how.path), held[turn % copies]
                return linear(
                    x, weight, layout["scale"], layout.get("zero"), None, problem.N, group, numerics, path, how.threads
                )

            entries[M] = cpu_table.entry_of(*cpu_table.fastest(run, cpu_table.candidates()))
        shape = (numerics, grid.bits, group, problem.N, problem.K)
        kept = cpu_table.save({cpu_table.key_of(*shape, M): entry for M, entry in entries.items()})
        found = {M: f"{entry['us']} us, {entry['choice']}" for M, entry in entries.items()}
        return Tuned(found=found, kept=kept)

    @classmethod
    def run(cls, x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """One call of the library; as an operator of torch while a graph is being compiled."""
        tensors = layout["codes"], layout["scale"], layout.get("zero"), bias_N
        rest = problem.N, problem.grid.group_size or 0, library.NUMERICS[cls.numerics]
        if torch.compiler.is_compiling():
            y_MN: Tensor = torch.ops.aerogel.native_linear(x_MK, *tensors, *rest)
            return y_MN
        return linear(x_MK, *tensors, *rest, beside=Beside.among(layout))


class NativeInt8(Native):
    """Compiled CPU kernels with activations rounded to int8 per token and group of columns; only where that is allowed."""

    about: ClassVar[str] = "the same with activations rounded to int8 per token and at most 128 columns, as llama.cpp does"
    numerics: ClassVar[str] = "int8"

    @classmethod
    def refuses(cls, problem: Problem) -> str | None:
        """As `Native`, and wherever activations must stay what they are."""
        return refusal(problem, fast=True)


class NativeDynamic(Native):
    """Compiled CPU kernels for checkpoints with int8 activations: one scale per token."""

    about: ClassVar[str] = "compiled int8 x int8 (or fewer bits) with a scale per token, for activations: int8"
    numerics: ClassVar[str] = "int8-token"

    @classmethod
    def refuses(cls, problem: Problem) -> str | None:
        """Anything but integer weights with int8 activations on a CPU."""
        return refusal(problem, activations="int8")


def _columns(problem: Problem) -> int:
    return native.columns(problem.K, problem.grid.group_size or 0)


def linear(
    x_MK: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias_N: Tensor | None,
    N: int,
    group: int,
    numerics: int,
    path: int = -1,
    threads: int | None = None,
    beside: Beside | None = None,
) -> Tensor:
    """x @ W.T (+ bias), [M, N] in x's dtype.

    Args:
        x_MK: float32, float16 or bfloat16 [M, K], contiguous.
        codes, scale, zero: the layout of `aerogel.pack.native`.
        bias_N: [N] of any of the three types, or None.
        N, group: out features; columns that share a scale, 0 for all.
        numerics: a value of `library.NUMERICS`.
        path: an index of `library.PATHS`, -1 for what `cpu_table` has for this machine, else the best.
        threads: torch's number of threads unless given, or what `cpu_table` has where the path is open too.
        beside: what is added, of tensors that `beside.cpu.fits`. Where x is rounded, its kept columns are left out of that.

    Raises:
        BadInput: tensors whose sizes, types or alignment do not agree. Nothing has been read then.
    """
    M, K = x_MK.shape
    y_MN = torch.empty(M, N, dtype=x_MK.dtype)
    weight, call = structs(x_MK, codes, scale, zero, bias_N, y_MN, N, group, numerics, path, threads, beside)
    status = library.library().aerogel_native_gemm(ctypes.byref(weight), ctypes.byref(call))
    if status:
        library.check(status, f"a packed weight [{N}, {K}]")
    return y_MN


def structs(
    x_MK: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias_N: Tensor | None,
    y_MN: Tensor,
    N: int,
    group: int,
    numerics: int,
    path: int = -1,
    threads: int | None = None,
    beside: Beside | None = None,
) -> tuple[library.Weight, library.Call]:
    """What `linear` hands over, for callers that run the same matmul again and again: valid while the tensors live.

    Raises:
        BadInput: tensors that are not contiguous in main memory, or of other types than they must be.
    """
    M, K = x_MK.shape
    for tensor in (x_MK, codes, scale):
        if not tensor.is_contiguous() or not tensor.is_cpu:
            raise BadInput("a CPU matmul wants contiguous tensors in main memory; call .contiguous() and .cpu() on them")
    kinds = library.TYPES
    if x_MK.dtype not in kinds or scale.dtype not in kinds or codes.dtype != torch.uint8:
        raise BadInput(f"a CPU matmul wants uint8 codes and float tensors, found {codes.dtype}, {scale.dtype}, {x_MK.dtype}")
    if bias_N is not None and (bias_N.dtype not in kinds or not bias_N.is_contiguous()):
        raise BadInput(f"a CPU matmul wants a contiguous bias in a float type, found {bias_N.dtype}; cast it")
    if path < 0 and threads is None:
        chosen = cpu_table.choice_for(numerics, codes.shape[-1] // 64, group, N, K, M)
        if chosen is not None:
            path, threads = library.PATHS.index(chosen.path), chosen.threads
    weight = weight_of(codes, scale, zero, N, K, group)
    call = library.Call(
        x_MK.data_ptr(),
        None if bias_N is None else bias_N.data_ptr(),
        y_MN.data_ptr(),
        x_MK.nbytes,
        y_MN.nbytes,
        0 if bias_N is None else bias_N.nbytes,
        M,
        kinds[x_MK.dtype],
        0 if bias_N is None else kinds[bias_N.dtype],
        numerics,
        path,
        threads or library.threads(),
        None if beside is None else ctypes.pointer(beside_cpu.part_of_weight(beside)),
    )
    return weight, call


def weight_of(codes: Tensor, scale: Tensor, zero: Tensor | None, N: int, K: int, group: int) -> library.Weight:
    """The struct of a weight [N, K] of integers in this layout: valid while its tensors live."""
    addresses = (codes.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr(), None, None)
    sizes = (codes.nbytes, scale.nbytes, 0 if zero is None else zero.nbytes, 0, 0)
    return library.Weight(*addresses, *sizes, N, K, group, 1.0, codes.shape[-1] // 64, library.TYPES[scale.dtype])


def _operator(
    x_MK: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias_N: Tensor | None, N: int, group: int, numerics: int
) -> Tensor:
    return linear(x_MK, codes, scale, zero, bias_N, N, group, numerics)


def _fake(
    x_MK: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias_N: Tensor | None, N: int, group: int, numerics: int
) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], N)


_library = torch.library.Library("aerogel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "native_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, SymInt N, int group, int numerics)"
    " -> Tensor"
)
_library.impl("native_linear", _operator, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("aerogel::native_linear", _fake, lib=_library)
