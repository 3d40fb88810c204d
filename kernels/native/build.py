"""Compiles the CPU kernels into one shared library with a plain C interface. Standard library only: setup.py runs it.

Each instruction set is one source file with its own flags, so one library runs on every machine of its architecture and
chooses at run time. A file whose flags the compiler does not know is left out; the library then says that this path was
not built. `AEROGEL_NATIVE=0` builds nothing, `CXX` names another compiler.

    python kernels/native/build.py                  the library beside this file, for a checkout that is not installed
    python kernels/native/build.py OUT --sanitize   with AddressSanitizer and UndefinedBehaviorSanitizer
    python kernels/native/build.py OUT --sanitize-threads   with ThreadSanitizer
    python kernels/native/build.py OUT --emulate-tiles      with functions in the place of AMX's instructions
    python kernels/native/build.py OUT --machine aarch64    with a cross compiler named by CXX
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
LIBRARY = "libaerogel_native.so"

COMMON = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized")
SANITIZERS = {"--sanitize": "address,undefined", "--sanitize-threads": "thread"}
SANITIZE = ("-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1", "-O0", "-DAEROGEL_SANITIZE")
"""Without optimisation, nothing inlined by force and fewer sizes of loops: a minute or two instead of half an hour."""
SHARED_SOURCES = (
    "api.cpp",
    "boundary.cpp",
    "entropy.cpp",
    "lookup.cpp",
    "outlier_tiles.cpp",
    "own.cpp",
    "paths.cpp",
    "pool.cpp",
    "rows.cpp",
    "scratch.cpp",
)

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
UNITS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512bf16": (*_AVX512, "-mavx512bf16", "-mavx512vbmi", "-mavx512vbmi2"),
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avxvnni": (*_AVX2, "-mavxvnni"),
        "amx": (*_AVX512, "-mamx-tile", "-mamx-int8"),
    },
    "aarch64": {"neon": ("-march=armv8.2-a+dotprod+fp16",)},
}
"""Flags of each unit beyond the portable one, by architecture; those that take longest to compile first."""
HELPFUL: dict[str, tuple[str, ...]] = {"avx512bf16": ("-fno-tree-coalesce-vars",)}
"""Flags of a unit that a compiler need not know. GCC joins what a sum is before and behind a turn of a loop, finds no register
for the whole, and copies sixteen sums twice in each turn; left alone, they stay where they are."""


class BuildError(Exception):
    """No compiler, or it failed; the text says which."""


def compiler() -> list[str]:
    """The C++ compiler: `CXX`, words and all, or the first of the usual names. Raises BuildError when there is none."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        words = shlex.split(name)
        if shutil.which(words[0]):
            return words
    raise BuildError(
        f"no C++ compiler found (looked for {wanted or 'g++, clang++, c++'}); install one"
        " (`apt install g++`, `dnf install gcc-c++`), or set CXX"
    )


def build(
    out: Path = FOLDER / LIBRARY, *, sanitize: str = "", machine: str | None = None, emulate_tiles: bool = False
) -> list[str]:
    """Writes the library to `out` and returns the names of the units that the compiler could not build.

    sanitize: what `-fsanitize` is given, a value of `SANITIZERS`; nothing for the library that is used.
    machine: the architecture, this machine's unless given.
    emulate_tiles: AMX's instructions are done in memory, so that its path runs on any machine with AVX-512.

    Raises:
        BuildError: no compiler, or a part that every machine needs did not compile.
    """
    found, machine = compiler(), machine or platform.machine()
    flags = (*COMMON, *((f"-fsanitize={sanitize}", *SANITIZE) if sanitize else ()))
    flags += ("-DAEROGEL_EMULATE_TILES",) if emulate_tiles else ()
    units = UNITS.get(machine, {})
    helpful = {name: tuple(flag for flag in more if _knows(found, (flag,))) for name, more in HELPFUL.items()}
    usable = {name: (*more, *helpful.get(name, ())) for name, more in units.items() if _knows(found, more)}
    defines = tuple(f"-DHAVE_{name.upper()}" for name in usable)
    jobs = {f"unit_{name}.cpp": more for name, more in usable.items()} | {"unit_portable.cpp": ()}
    jobs |= dict.fromkeys(SHARED_SOURCES, defines)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(folder) / f"{source}.o" for source in jobs]
        commands = [
            [*found, *flags, *more, "-c", str(FOLDER / source), "-o", str(made)]
            for (source, more), made in zip(jobs.items(), objects, strict=True)
        ]
        list(pool.map(_run, commands))
        whole = Path(folder) / LIBRARY
        _run([*found, "-shared", *flags, "-o", str(whole), *map(str, objects), "-lpthread"])
        out.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a process that has the old file mapped keeps it.
        staged = out.with_name(out.name + ".new")
        shutil.copyfile(whole, staged)
        os.replace(staged, out)
    return [name for name in units if name not in usable]


def _knows(found: list[str], flags: tuple[str, ...]) -> bool:
    command = [*found, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({error})") from error
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{result.stderr[-4000:]}")


def main(arguments: list[str]) -> int:
    """The command line; see the module's text."""
    places = [argument for argument in arguments if argument.endswith(".so")]
    machine = arguments[arguments.index("--machine") + 1] if "--machine" in arguments else None
    out = Path(places[0]) if places else FOLDER / LIBRARY
    sanitize = next((value for flag, value in SANITIZERS.items() if flag in arguments), "")
    try:
        missing = build(out, sanitize=sanitize, machine=machine, emulate_tiles="--emulate-tiles" in arguments)
    except BuildError as error:
        sys.stderr.write(f"error: {error}\n")
        return 3
    sys.stderr.write(f"{out}{' without ' + ', '.join(missing) if missing else ''}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
