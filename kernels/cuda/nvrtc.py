"""CUDA C++ compiled at run time, by the compiler that torch brings.

torch's CUDA builds depend on NVIDIA's run-time compiler NVRTC, so whoever can run torch on a GPU has it, and nobody needs
nvcc or a toolkit. It is called through ctypes: a program is made from source text, compiled for one architecture, and
handed back as machine code (a cubin). Sources include no system header, only each other, from memory; a kernel takes a
fraction of a second to a second.

What was compiled is kept on disk, under the hash of everything that decides the result: sources, defines, architecture
and compiler version. A file is written under a temporary name and renamed, so several processes may share the folder.

The cache lies in `$AEROGEL_CACHE`, else `$XDG_CACHE_HOME/aerogel`, else `~/.cache/aerogel`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from aerogel.errors import RunFailed

NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", "nvrtc64_130_0.dll", "nvrtc64_120_0.dll")
WHEELS = ("cu13/lib", "cuda_nvrtc/lib", "cu13/bin/x86_64", "cuda_nvrtc/bin")
"""Where the wheels that torch depends on keep the library, below the namespace package `nvidia`: CUDA 13, then 12."""
OPTIONS = ("--std=c++17", "-default-device")
FAMILY_SUFFIX = {9: "a", 10: "a", 12: "a"}
"""Generations whose own instructions (warpgroup matrix multiply, register reallocation) need the suffix `a`."""

Capability = tuple[int, int]
Defines = Mapping[str, int | str]


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What a listener hears after each compilation. seconds: wall time of the compiler; cached: nothing had to be done."""

    name: str
    seconds: float
    cached: bool


Listener = Callable[[Compiled], None]
_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Calls `listener` after each kernel that is compiled or found on disk, so that a first load can show that it works."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def cache_folder() -> Path:
    """Where compiled kernels and tuned tables are kept; not created here."""
    chosen = os.environ.get("AEROGEL_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aerogel"


def candidates() -> list[str]:
    """Names to load NVRTC by, best first: the wheels torch depends on, then whatever the system's loader finds."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    wheels = [str(root / folder / name) for folder in WHEELS for root in roots for name in NAMES]
    return [*(path for path in wheels if Path(path).is_file()), *NAMES]


class Compiler:
    """NVRTC, loaded. Raises `ImportError` (so that a kernel refuses with it) where there is none."""

    def __init__(self) -> None:
        self._library, self.path = _load()
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = (major.value, minor.value)

    def architectures(self) -> list[int]:
        """What it compiles for: 80, 89, 90, 100, ..."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        found = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(found))
        return list(found)

    def compile(self, name: str, sources: Mapping[str, str], defines: Defines, capability: Capability) -> bytes:
        """The cubin of `sources[name]`, always compiled anew.

        Args:
            name: the file to compile; it may include the others by their names.
            sources: file names and their text.
            defines: macros.
            capability: the device's compute capability.

        Raises:
            RunFailed: the compiler's log, when it does not compile, or an architecture it does not know.
        """
        architecture = capability[0] * 10 + capability[1]
        if architecture not in self.architectures():
            known = ", ".join(map(str, self.architectures()))
            raise RunFailed(
                f"NVRTC {self.version[0]}.{self.version[1]} ({self.path}) does not compile for compute capability"
                f" {capability[0]}.{capability[1]} (it knows {known}); install the torch build of a newer CUDA"
            )
        others = {other: text for other, text in sources.items() if other != name}
        headers = (ctypes.c_char_p * len(others))(*(text.encode() for text in others.values()))
        names = (ctypes.c_char_p * len(others))(*(other.encode() for other in others))
        program = ctypes.c_void_p()
        create = self._library.nvrtcCreateProgram
        self._check(create(ctypes.byref(program), sources[name].encode(), name.encode(), len(others), headers, names))
        try:
            flags = [
                f"--gpu-architecture={target(capability)}",
                *OPTIONS,
                *(f"-D{key}={value}" for key, value in defines.items()),
            ]
            options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
            if self._library.nvrtcCompileProgram(program, len(flags), options):
                log = self._read(program, "ProgramLog").decode(errors="replace").strip("\0\n")
                raise RunFailed(f"{name} does not compile with {' '.join(flags)}:\n{log}")
            return self._read(program, "CUBIN")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, code: int) -> None:
        if code:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise RunFailed(f"NVRTC ({self.path}) failed: {self._library.nvrtcGetErrorString(code).decode()}")


def target(capability: Capability) -> str:
    """`sm_80`, `sm_90a`, ...: with the generation's own instructions where it has any."""
    suffix = FAMILY_SUFFIX.get(capability[0], "") if capability[1] == 0 else ""
    return f"sm_{capability[0]}{capability[1]}{suffix}"


@functools.cache
def compiler() -> Compiler:
    """The process' compiler. Raises `ImportError` where NVRTC cannot be found."""
    return Compiler()


def cubin(name: str, sources: Mapping[str, str], defines: Defines, capability: Capability) -> bytes:
    """The cubin of `sources[name]`, from the disk where it was compiled before. Arguments as in `Compiler.compile`."""
    started = time.perf_counter()
    tool = compiler()
    facts = [
        name,
        dict(sources),
        {key: str(value) for key, value in defines.items()},
        target(capability),
        tool.version,
        OPTIONS,
    ]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    kept = cache_folder() / "cubin" / f"{Path(name).stem}-{target(capability)}-{digest[:32]}.cubin"
    cached = kept.is_file()
    code = kept.read_bytes() if cached else tool.compile(name, sources, defines, capability)
    if not cached:
        keep(kept, code)
    for listener in _listeners:
        listener(Compiled(name=name, seconds=time.perf_counter() - started, cached=cached))
    return code


def keep(path: Path, content: bytes) -> None:
    """Writes a file of the cache, whole or not at all; warns once per process where the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError as error:
        warnings.warn(
            f"compiled kernels cannot be kept in {path.parent} ({error.strerror}), every process will compile them anew;"
            " set AEROGEL_CACHE to a folder that can be written",
            RuntimeWarning,
            stacklevel=2,
        )


def _load() -> tuple[ctypes.CDLL, str]:
    tried = candidates()
    for path in tried:
        try:
            # NVRTC asks the loader for its table of builtins by name only, which finds it where it is loaded already.
            for builtins in sorted(Path(path).parent.glob("*nvrtc-builtins.so*")) if Path(path).is_absolute() else ():
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(path), path
        except OSError:
            continue
    raise ImportError(
        "NVRTC, the run-time compiler of CUDA, was not found (looked for "
        + ", ".join(tried)
        + "); torch's CUDA builds depend on it, otherwise install the package nvidia-cuda-nvrtc"
    )
