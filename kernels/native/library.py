"""The compiled CPU kernels, called through ctypes: loading, structs, and what each path and status means.

The library is found beside this file, or where AEROGEL_NATIVE_LIBRARY says. It has no state that a caller must free, and
ctypes releases the interpreter's lock while it runs. The structs mirror kernels/native/layout.h.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

from aerogel.errors import BadInput, RunFailed
from aerogel.kernels.native.build import FOLDER, LIBRARY

logger = logging.getLogger(__name__)

VERSION = 17
"""Of the C interface: structs, codes and layout."""

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SCALES = {**TYPES, torch.float8_e4m3fn: 3, torch.float8_e8m0fnu: 4, torch.uint8: 5}
"""Types of the scales of tables."""
NUMERICS = {"exact": 0, "int8": 1, "int8-token": 2}
PATHS = ("portable", "avx2", "avxvnni", "avx512", "avx512bf16", "amx", "neon")
"""Instruction-set paths by their number."""
BFLOAT16_PATHS = ("avx512bf16", "amx")
"""Those that multiply bfloat16."""

STATUS = {
    1: "bits must lie between 1 and 8",
    2: "a shape is empty or too large",
    3: "the group size must not be negative, and for tables of rows a multiple of 16 or all columns",
    4: "a number type is none of float32, float16, bfloat16",
    5: "the codes have another size than shape and bits imply",
    6: "the scales have another size than shape and group imply",
    7: "the zero points have another size than shape and group imply",
    8: "codes must begin at a multiple of 64 bytes and other tensors at a multiple of their element",
    9: "this machine or this build has no such instruction-set path",
    10: "activations, result or bias have another size than the shapes imply",
    12: "the tables have another size than their number implies, or a group picks one that is not there",
    13: "a row is asked for that is not there",
    14: "the columns of outliers must ascend within their row and lie inside the weight",
}
OUT_OF_MEMORY = 11


class Weight(ctypes.Structure):
    """A packed weight: pointers, their sizes, and the shape."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "table", "pick")),
        *((name + "_bytes", ctypes.c_int64) for name in ("codes", "scale", "zero", "table", "pick")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group")),
        ("factor", ctypes.c_float),
        ("bits", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
    ]


class Lookup(ctypes.Structure):
    """A packed weight whose codes point into tables; kernels/native/lookup.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "pick", "number", "fixed", "unit")),
        *((name + "_bytes", ctypes.c_int64) for name in ("codes", "scale", "pick", "number", "fixed", "unit")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group", "tables")),
        ("factor", ctypes.c_float),
        ("bits", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
    ]


class OwnTables(ctypes.Structure):
    """A packed weight whose rows have tables of their own; kernels/native/own.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "table")),
        *((name, ctypes.c_int64) for name in ("codes_bytes", "table_bytes", "rows", "columns", "group", "shared")),
        ("bits", ctypes.c_int32),
    ]


class Beside(ctypes.Structure):
    """What is added to a product; kernels/native/layout.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "out", "start", "column", "value", "index", "kept_value", "tiles")),
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "columns", "outliers", "kept", "tiles_bytes")),
        *((name, ctypes.c_int32) for name in ("type", "column_bytes", "value_type", "kept_type", "threads")),
    ]


class Call(ctypes.Structure):
    """One matmul: activations, result, bias, how to compute, and what is added."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("x_bytes", "y_bytes", "bias_bytes", "tokens")),
        *((name, ctypes.c_int32) for name in ("x_type", "bias_type", "numerics", "path", "threads")),
        ("beside", ctypes.POINTER(Beside)),
    ]


class Rows(ctypes.Structure):
    """Rows of a packed weight that are wanted, decoded."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ids", "to")),
        *((name, ctypes.c_int64) for name in ("count", "to_bytes")),
        ("type", ctypes.c_int32),
    ]


class RowSums(ctypes.Structure):
    """Sums of some rows that join a product; kernels/native/step_structs.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("part", "index", "y")),
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "count")),
        ("type", ctypes.c_int32),
    ]


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    place = Path(os.environ.get("AEROGEL_NATIVE_LIBRARY", FOLDER / LIBRARY))
    if not place.is_file():
        return (
            "was not compiled when aerogel was installed; install a C++ compiler (g++ or clang) and then aerogel once more"
            " (`pip install -v` says what the compiler said), or run `python kernels/native/build.py` in a checkout"
        )
    try:
        library = ctypes.CDLL(str(place))
        version = library.aerogel_native_version()
    except (OSError, AttributeError) as error:
        return f"cannot be loaded ({error}); reinstall aerogel"
    if version != VERSION:
        return f"was compiled from other sources (version {version}, wanted {VERSION}); reinstall aerogel"
    library.aerogel_native_gemm.argtypes = [ctypes.POINTER(Weight), ctypes.POINTER(Call)]
    library.aerogel_native_rows.argtypes = [ctypes.POINTER(Weight), ctypes.POINTER(Rows)]
    library.aerogel_native_lookup.argtypes = [ctypes.POINTER(Lookup), ctypes.POINTER(Call)]
    library.aerogel_native_own.argtypes = [ctypes.POINTER(OwnTables), ctypes.POINTER(Call)]
    library.aerogel_native_own_check.argtypes = [ctypes.POINTER(OwnTables)]
    library.aerogel_native_lookup_check.argtypes = [ctypes.POINTER(Lookup)]
    library.aerogel_native_beside.argtypes = [ctypes.POINTER(Beside)]
    library.aerogel_native_outlier_tiles.argtypes = [ctypes.POINTER(Beside), ctypes.c_void_p, ctypes.c_int64]
    library.aerogel_native_outlier_tiles.restype = ctypes.c_int64
    library.aerogel_native_check.argtypes = [ctypes.POINTER(Weight)]
    library.aerogel_native_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
    library.aerogel_native_read.restype = ctypes.c_double
    library.aerogel_native_program.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    library.aerogel_native_own_pool.argtypes = [ctypes.c_int32]
    library.aerogel_native_choose_among.argtypes = [ctypes.c_uint32]
    library.aerogel_native_use_team.argtypes = [ctypes.c_void_p]
    _borrow_threads(library)
    library.aerogel_native_built.restype = library.aerogel_native_able.restype = ctypes.c_uint32
    return library


def _borrow_threads(library: ctypes.CDLL) -> None:
    """Lets loops run on the threads of torch's OpenMP, where torch brings one; else the library keeps its own pool.

    Two pools on the same cores each wait actively for work, and take the cores from each other while they do.
    """
    for place in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            openmp = ctypes.CDLL(str(place), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            library.aerogel_native_use_team(ctypes.cast(openmp.GOMP_parallel, ctypes.c_void_p))
        except (OSError, AttributeError):
            continue
        return


_THREADS: ContextVar[int | None] = ContextVar("aerogel_threads", default=None)


def threads() -> int:
    """How many threads our loops run on: torch's number, also inside `own_pool`."""
    return _THREADS.get() or torch.get_num_threads()


@contextmanager
def own_pool() -> Iterator[None]:
    """Our loops inside run on our own threads, torch's operators on one.

    For stretches where nearly all work is ours. Torch's threads wait for each other actively and as a whole: where the machine
    is busy elsewhere, one of them that has lost its core holds up every operation for milliseconds; our pool goes on without.
    """
    count = threads()
    if missing() is not None or count == 1:
        yield
        return
    token = _THREADS.set(count)
    torch.set_num_threads(1)
    library().aerogel_native_own_pool(1)
    try:
        yield
    finally:
        library().aerogel_native_own_pool(0)
        torch.set_num_threads(count)
        _THREADS.reset(token)


def missing() -> str | None:
    """Why the compiled kernels cannot be used here, or None."""
    found = _load()
    return found if isinstance(found, str) else None


@functools.cache
def say_missing() -> None:
    """A warning, the first time, where the compiled kernels are missing and other code does what they would do."""
    reason = missing()
    if reason is not None:
        logger.warning("the compiled CPU library %s; slower code runs in its place", reason)


def library() -> ctypes.CDLL:
    """The loaded library. Raises `BadInput` with the reason when there is none."""
    found = _load()
    if isinstance(found, str):
        raise BadInput(f"the compiled CPU library {found}")
    return found


def paths(able: bool = True) -> list[str]:
    """Names of the paths that were built, only those this machine can run unless `able` is False."""
    bits = library().aerogel_native_able() if able else library().aerogel_native_built()
    return [name for number, name in enumerate(PATHS) if bits >> number & 1]


@contextmanager
def only(*names: str) -> Iterator[None]:
    """Inside, in the whole process, paths are chosen as on a machine that has these and the portable one. For tests."""
    library().aerogel_native_choose_among(sum(1 << PATHS.index(name) for name in names))
    try:
        yield
    finally:
        library().aerogel_native_choose_among((1 << len(PATHS)) - 1)


def best(numerics: str = "exact") -> str:
    """The path that runs unless one is asked for."""
    return PATHS[library().aerogel_native_best(NUMERICS[numerics])]


def check(status: int, what: str) -> None:
    """Raises for any status but 0: `RunFailed` without memory, else `BadInput`; the text names `what`."""
    if status == OUT_OF_MEMORY:
        raise RunFailed(f"{what}: out of memory for the activations; run fewer tokens at a time")
    if status:
        raise BadInput(f"{what} cannot be run: {STATUS.get(status, f'status {status}')}; the tensors do not belong together")


def number(tensor: torch.Tensor) -> float:
    """The one float32 of a tensor in main memory, unlike torch's `item` at a small part of what a product of one token takes.

    Raises:
        BadInput: it is of another type, or elsewhere.
    """
    if tensor.dtype != torch.float32 or not tensor.is_cpu:
        raise BadInput(f"a number beside a weight must be float32 in main memory, found {tensor.dtype} on {tensor.device}")
    return ctypes.c_float.from_address(tensor.data_ptr()).value


def read_bandwidth(memory: torch.Tensor, threads: int) -> float:
    """Bytes per second at which `threads` threads read `memory` (uint8, contiguous) once, in whole pieces of 128 KiB."""
    return float(library().aerogel_native_read(memory.data_ptr(), memory.nbytes, threads))
