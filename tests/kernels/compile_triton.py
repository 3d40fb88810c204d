"""Compiles the portable kernels for GPUs that are not here: `python -m tests.kernels.compile_triton [TARGET ...]`.

One line per target and kind of number with the bytes of shared memory; status 1 where a build fails, where the loop moves
decoded weights between threads (which its layout is there to avoid), or where it needs more shared memory than the GPU has.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aerogel.kernels.gemm import triton_words
from aerogel.kernels.rounding.triton_columns import ROWS, columns_kernel

TARGETS: dict[str, tuple[GPUTarget, int]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
"""Target and shared memory of a block, bytes."""
BYTES = {"scale_ptr": "*u8", "factor_ptr": "*fp32"}
PROBLEMS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "4 bits": ({"BITS": 4, "ZERO": True}, {}),  # one, two and three limbs
    "3 bits": ({"BITS": 3, "ZERO": True}, {}),
    "7 bits": ({"BITS": 7, "ZERO": True}, {}),
    "floating zero points": ({"BITS": 4, "ZERO": True}, {"zero_ptr": "*bf16"}),
    "one table": ({"BITS": 4, "TABLE": 1}, {}),
    "picked tables": ({"BITS": 4, "TABLE": 3}, {}),
    "nvfp4": ({"BITS": 4, "FLOATS": 1, "SCALE": 1, "FACTOR": True, "GROUP": 16}, BYTES),
    "mxfp8": ({"BITS": 8, "FLOATS": 3, "SCALE": 2, "GROUP": 32}, BYTES),
}
"""Constants and types of arguments that differ from those below."""
AS_BEFORE = {("sm_80", "picked tables")}
"""What takes longest to build, and is built for one generation of NVIDIA's and for AMD's."""


def build(
    target: GPUTarget, given: dict[str, Any], types: dict[str, str], config: triton_words.Config
) -> triton.compiler.CompiledKernel:
    """`linear_kernel` for bfloat16 and groups of 128, as a launch would build it."""
    kernel = triton_words.linear_kernel
    pointers = {"codes_ptr": "*u8", "zero_ptr": "*u8", "table_ptr": "*fp32", "pick_ptr": "*u8", **types}
    flags = {"ZERO": False, "TABLE": 0, "FLOATS": 0, "SCALE": 0, "FACTOR": False, "BIAS": True, "EVEN": True, "WIDE": False}
    constants = {"GROUP": 128, "BN": config.rows, "BM": config.tokens, **flags, **given}
    signature = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    signature |= pointers | dict.fromkeys(constants, "constexpr")
    place = {name: index for index, name in enumerate(kernel.arg_names)}
    aligned = [name for name in place if name.endswith("_ptr") or name in ("N", "K", "ROWS")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(place[name],): value for name, value in constants.items()},
        attrs={(place[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=target, options={"num_warps": config.warps, "num_stages": config.stages})


def build_columns(target: GPUTarget, mode: int) -> triton.compiler.CompiledKernel:
    """`columns_kernel` for masked columns, as a launch would build it."""
    constants = {"MODE": mode, "BITS": 4, "MASKED": True, "RANGES": mode == 0, "ROWS": ROWS}
    types = {"order_ptr": "*i32", "pick_ptr": "*i64", "low": "fp32", "high": "fp32"}
    names = columns_kernel.arg_names
    signature = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in names}
    signature |= types | dict.fromkeys(constants, "constexpr")
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(columns_kernel, signature, constexprs), target=target, options={"num_warps": 1})


def main(names: list[str]) -> int:
    wrong = 0
    for name in names or TARGETS:
        target, most = TARGETS[name]
        for problem, (given, types) in PROBLEMS.items():
            if (name, problem) in AS_BEFORE:
                continue
            made = build(target, given, types, triton_words.Config(64, 16, 1, 4, 2 if target.backend == "hip" else 4))
            loop = re.search(r"scf\.for.*?scf\.yield", made.asm["ttgir"], re.DOTALL)
            moved = len(re.findall(r"ttg\.convert_layout [^\n]*x16x", loop.group())) if loop else -1
            shared = made.metadata.shared
            wrong += moved != 0 or shared > most
            print(f"{name} {problem}: {shared} bytes of shared memory, {moved} layouts converted in the loop")
        for mode in range(4):
            shared = build_columns(target, mode).metadata.shared
            wrong += shared > 0
            print(f"{name} columns, mode {mode}: {shared} bytes of shared memory")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
