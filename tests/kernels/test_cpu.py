"""The compiled CPU kernels: every instruction-set path of this machine against the definition in float64, every width and
group, ragged shapes; threads change no bit; tensors that do not belong together are refused before they are read."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.errors import BadInput
from aerogel.kernels.dispatch import choose, explain
from aerogel.kernels.gemm.cpu import Native, NativeDynamic, NativeInt8, linear
from aerogel.kernels.gemm.ref import Reference, quantize_int8
from aerogel.kernels.linear import Linear
from aerogel.kernels.native import library
from aerogel.kernels.native.build import FOLDER, LIBRARY, SHARED_SOURCES, UNITS
from aerogel.kernels.problem import Problem
from aerogel.pack import native
from aerogel.quantize.grids import Codes, IntGrid, quantized

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))

TYPES = (torch.float32, torch.float16, torch.bfloat16)
EXACT = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
"""Relative Frobenius error against float64: sums in float32, then one rounding of the result."""
SHAPES = [
    (1, 1, 0),
    (37, 70, 0),
    (70, 200, 32),
    (33, 100, 16),
    (50, 300, 48),
    (130, 520, 128),
    (40, 1000, 256),
    (66, 190, 96),
    (35, 230, 72),
    (20, 700, 40),
    (33, 330, 20),
    (17, 600, 264),
]
"""N, K, group size (0: per channel)."""
TOKENS = (1, 2, 3, 5, 11, 16, 17, 40)


class Weight:
    """Random codes with their layout and the dense weight in float64."""

    def __init__(self, bits: int, N: int, K: int, group: int, *, zero: bool, scale_dtype: torch.dtype, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        low, high = -(1 << (bits - 1)), 1 << (bits - 1)
        G = -(-K // group) if group else 1
        self.bits, self.group, self.N, self.K = bits, group, N, K
        self.values_NK = torch.randint(low, high, (N, K), dtype=torch.int8, generator=random)
        self.scale_NG = (torch.rand(N, G, generator=random) + 0.1).to(scale_dtype)
        self.zero_NG = torch.randint(low, high, (N, G), dtype=torch.int8, generator=random) if zero else None
        self.codes = native.pack_codes(native.fill(self.values_NK, group), bits)
        self.scale = native.pack_factors(self.scale_NG)
        self.zero = None if self.zero_NG is None else native.pack_factors(self.zero_NG)

    def dense(self) -> torch.Tensor:
        spread = lambda x: x.double().repeat_interleave(self.group or self.K, 1)[:, : self.K]  # noqa: E731
        shifted = self.values_NK.double() - (0.0 if self.zero_NG is None else spread(self.zero_NG))
        return shifted * spread(self.scale_NG)

    def run(self, x: torch.Tensor, bias: torch.Tensor | None = None, **how: Any) -> torch.Tensor:
        numerics = library.NUMERICS[how.pop("numerics", "exact")]
        path = library.PATHS.index(how.pop("path")) if "path" in how else -1
        return linear(x, self.codes, self.scale, self.zero, bias, self.N, self.group, numerics, path, **how)


def activations(M: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M * K)).to(dtype)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def int8_rounded(x: torch.Tensor, group: int, numerics: str = "int8") -> torch.Tensor:
    """The definition of int8 activations: over runs of the columns that one scale covers, at most 128, whole tiles of 32
    where groups are made of them; or over the token."""
    if numerics == "int8-token":
        values, scale = quantize_int8(x)
        return (values.float() * scale).double()
    K = x.shape[1]
    filled = native.fill(x.float(), group)
    stored = -(-group // 8) * 8 if 0 < group < K else filled.shape[1]
    size = 128
    if stored < filled.shape[1]:
        parts = -(-stored // 128)
        size = -(-stored // 8 // parts) * 8 if stored % 32 else max(s for s in (32, 64, 96, 128) if stored % s == 0)
    rounded = [rounded_run(run) for of_group in filled.split(stored, 1) for run in of_group.split(size, 1)]
    return native.unfill(torch.cat(rounded, 1), K, group).double()


def rounded_run(x: torch.Tensor) -> torch.Tensor:
    """x to 255 levels with one scale for each row."""
    peak = x.abs().amax(-1, keepdim=True)
    scale = torch.where(peak > 0, peak / 127, torch.ones_like(peak))
    return (x * (1 / scale)).round() * scale


@pytest.mark.parametrize("path", library.PATHS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_path_against_float64(path: str, bits: int) -> None:
    if path not in library.paths():
        pytest.skip(f"{path}: {'this machine has not its instructions' if path in library.paths(able=False) else 'not built'}")
    for index, (N, K, group) in enumerate(SHAPES):
        weight = Weight(bits, N, K, group, zero=(bits + index) % 2 == 0, scale_dtype=TYPES[(bits + index) % 3])
        dense = weight.dense()
        for M in TOKENS:
            dtype = TYPES[(M + index) % 3]
            x, bias = activations(M, K, dtype), torch.randn(N).to(TYPES[M % 3])
            added = (x.double() @ dense.T).norm() + bias.double().norm() * M**0.5
            for numerics in library.NUMERICS:
                found = weight.run(x, bias, numerics=numerics, path=path, threads=1)
                seen = x.double() if numerics == "exact" else int8_rounded(x, group, numerics)
                error = (found.double() - (seen @ dense.T + bias.double())).norm() / added
                # Rounding of ties may differ between x * (1 / s) here and there: one step of one value.
                limit = EXACT[dtype] + (0.0 if numerics == "exact" else 2e-3)
                assert error <= limit, f"{path} {numerics} {bits} bits [{M}, {N}, {K}] group {group} {dtype}: {error:.2e}"
                assert torch.equal(found, weight.run(x, bias, numerics=numerics, path=path, threads=3)), "threads change bits"


@pytest.mark.parametrize("numerics", library.NUMERICS)
def test_threads_change_no_bit(numerics: str) -> None:
    weight = Weight(4, 900, 1024, 64, zero=True, scale_dtype=torch.float16)
    for M in (1, 4, 16, 70):
        x = activations(M, 1024, torch.bfloat16)
        first = weight.run(x, numerics=numerics, threads=1)
        for threads in (2, 3, 8):
            for _ in range(5):
                assert torch.equal(first, weight.run(x, numerics=numerics, threads=threads))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    bits, N, K = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 90)), data.draw(st.integers(1, 300))
    group = data.draw(st.sampled_from([0, 1, 7, 16, 24, 32, 40, 48, 64, 72, 80, 128, 200, 256, 264]))
    M, dtype = data.draw(st.integers(1, 30)), data.draw(st.sampled_from(TYPES))
    weight = Weight(bits, N, K, group, zero=data.draw(st.booleans()), scale_dtype=data.draw(st.sampled_from(TYPES)))
    x = activations(M, K, dtype)
    wanted = x.double() @ weight.dense().T
    scale = (x.double().abs() @ weight.dense().abs().T).norm() / (K**0.5)  # one output may cancel
    assert (weight.run(x).double() - wanted).norm() <= EXACT[dtype] * (wanted.norm() + scale)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), N=st.integers(1, 70), K=st.integers(1, 150), seed=st.integers(0, 9))
def test_the_layout_inverts(bits: int, N: int, K: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    values = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (N, K), dtype=torch.int8, generator=random)
    packed = native.pack_codes(values, bits)
    assert packed.shape == native.shape_of(N, K, bits) and torch.equal(native.unpack_codes(packed, bits, N, K), values)
    factors = torch.randn(N, 3, generator=random).half()
    assert torch.equal(native.unpack_factors(native.pack_factors(factors), N), factors)


def test_what_is_infinite_or_no_number_is_seen() -> None:
    weight = Weight(4, 20, 64, 32, zero=False, scale_dtype=torch.float32)
    for dtype in TYPES:
        for bad in (float("inf"), float("nan")):
            x = activations(3, 64, dtype)
            x[1, 40] = bad
            for numerics in library.NUMERICS:
                finite = torch.isfinite(weight.run(x, numerics=numerics)).all(1).tolist()
                assert finite == [True, False, True], (dtype, bad, numerics)
        largest = torch.full((1, 64), torch.finfo(dtype).max, dtype=dtype) * torch.tensor([[1.0] + [0.0] * 63], dtype=dtype)
        assert torch.isfinite(weight.run(largest).float()[weight.values_NK[:, 0][None] == 0]).all()


def test_outputs_are_written_whole_and_nothing_beyond() -> None:
    weight = Weight(3, 37, 64, 32, zero=False, scale_dtype=torch.float32)
    for M in (1, 7, 30):
        x = activations(M, 64, torch.float32)
        guard = 64
        memory = torch.full((M * 37 + 2 * guard,), torch.nan)
        y = memory[guard : guard + M * 37]
        structs = (
            library.Weight(
                *(weight.codes.data_ptr(), weight.scale.data_ptr(), None, None, None),
                *(weight.codes.nbytes, weight.scale.nbytes, 0, 0, 0),
                *(37, 64, 32, 1.0, 3, 0),
            ),
            library.Call(x.data_ptr(), None, y.data_ptr(), x.nbytes, y.nbytes, 0, M, 0, 0, 0, -1, 2),
        )
        assert library.library().aerogel_native_gemm(*map(ctypes.byref, structs)) == 0
        assert torch.isfinite(y).all() and torch.isnan(memory[:guard]).all() and torch.isnan(memory[guard + M * 37 :]).all()


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    weight = Weight(4, 40, 128, 32, zero=True, scale_dtype=torch.float16)
    x = activations(2, 128, torch.float32)
    whole = (weight.codes, weight.scale, weight.zero)

    def refused(match: str, codes: Any = whole[0], scale: Any = whole[1], zero: Any = whole[2], **more: Any) -> None:
        how = {"bias_N": None, "N": 40, "group": 32, "numerics": 0} | more
        with pytest.raises(BadInput, match=match):
            linear(how.pop("x", x), codes, scale, zero, **how)

    refused("codes have another size", weight.codes[:-1].contiguous())
    refused("codes have another size", x=activations(2, 96, torch.float32))
    refused("scales have another size", scale=weight.scale[:-1].contiguous())
    refused("scales have another size", group=64)
    refused("zero points have another size", zero=weight.zero[:-1].contiguous())
    refused("codes have another size", group=20)
    refused("group size must not be", group=-8)
    refused("another size than the shapes", bias_N=torch.zeros(39))
    other = next(name for name in library.PATHS if name not in library.paths())  # no machine has AMX and NEON
    refused("no such instruction-set path", path=library.PATHS.index(other))
    refused("contiguous", weight.codes.transpose(0, 1))
    refused("uint8 codes", weight.codes.view(torch.int8))
    shifted = torch.empty(weight.codes.nbytes + 64, dtype=torch.uint8)[1:][: weight.codes.nbytes].view(weight.codes.shape)
    refused("multiple of 64 bytes", shifted.copy_(weight.codes))
    assert linear(x[:0], *whole, None, 40, 32, 0).shape == (0, 40)


def test_the_dispatcher_and_the_layer_use_it() -> None:
    grid = IntGrid(bits=4, group_size=32, symmetric=False, scale_dtype=torch.float16)
    problem = Problem(format="pack-quantized", grid=grid, N=48, K=96, dtype=torch.bfloat16)
    assert choose(problem)[1] is Native
    assert choose(Problem(format="pack-quantized", grid=grid, N=48, K=96, fast=True))[1] is NativeInt8
    reasons = dict(explain(problem))
    assert "--activations int8" in (reasons["cpu-int8"] or "")
    for changed, word in (
        ({"device": "cuda"}, "cuda"),
        ({"dtype": torch.float64}, "float64"),
        ({"activations": "int8"}, "activations: none, found int8"),
    ):
        fields = {"format": "pack-quantized", "grid": grid, "N": 48, "K": 96, **changed}
        assert word in (Native.refuses(Problem(**fields)) or "")  # type: ignore[arg-type]
    dense = torch.randn(48, 96)
    params = grid.fit(dense)
    codes = Codes(values_NK=grid.encode(dense, params), scale_NG=params.scale_NG, zero_NG=params.zero_NG, grid=grid)
    layer = Linear.from_codes(codes, bias=torch.randn(48))
    x = torch.randn(5, 96)
    exact = layer(x)
    torch.testing.assert_close(exact, torch.nn.functional.linear(x, codes.decode(), layer.bias))
    held = layer._tensors()["codes"]
    layer.allow_fast_activations()
    assert layer._tensors()["codes"] is held and layer.rounds_activations, "the layout serves both kernels"
    assert layer.kernel_name == "cpu-int8" and 0 < relative(layer(x), exact.double()) < 0.02
    layer.allow_fast_activations(False)
    assert layer.kernel_name == "cpu" and not layer.rounds_activations and torch.equal(layer(x), exact)
    assert torch.equal(layer.dequantize(), codes.decode())


def test_integers_of_any_size_are_summed_exactly() -> None:
    """The largest products there are, of one sign: a sum that saturated anywhere would show."""
    for bits in (7, 8):
        weight = Weight(bits, 32, 256, 0, zero=False, scale_dtype=torch.float32)
        for value in (-(1 << (bits - 1)), (1 << (bits - 1)) - 1):
            weight.values_NK.fill_(value)
            weight.codes = native.pack_codes(weight.values_NK, bits)
            for x in (torch.full((3, 256), 127.0), torch.full((3, 256), -127.0)):
                for path in library.paths():
                    found = weight.run(x, numerics="int8-token", path=path)
                    assert relative(found, x.double() @ weight.dense().T) < 1e-6, (bits, value, path)


def test_a_checkpoint_with_int8_activations_runs_on_it() -> None:
    for grid in (IntGrid(bits=8), IntGrid(bits=8, group_size=64), IntGrid(bits=4, group_size=32)):
        problem = Problem(format="int-quantized", grid=grid, N=70, K=192, activations="int8")
        assert choose(problem)[1] is NativeDynamic
        assert Native.refuses(problem) and NativeDynamic.refuses(replace(problem, activations="none"))
        weight = torch.randn(70, 192)
        codes = quantized(grid, weight, grid.fit(weight))
        for M in (1, 5, 33):
            x = torch.randn(M, 192)
            found = NativeDynamic.run(x, NativeDynamic.pack(codes, problem), problem)
            wanted = Reference.run(x, problem.stored.encode(codes), problem)
            # Rounding of ties may differ between x * (1 / s) and x / s: one step of one value.
            assert relative(found, wanted.double()) < 1e-3, (grid, M)


def test_it_can_be_traced_into_a_graph() -> None:
    grid = IntGrid(bits=4, group_size=32)
    layer = Linear.from_codes(
        Codes(values_NK=torch.randint(-8, 8, (48, 96), dtype=torch.int8), scale_NG=torch.rand(48, 3), zero_NG=None, grid=grid)
    )
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(4, 96)
    assert torch.equal(compiled(x), layer(x))
    weight = layer._tensors()
    arguments = (x, weight["codes"], weight["scale"], None, None, 48, 32, 0)
    torch.library.opcheck(torch.ops.aerogel.native_linear.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_forked_child_has_its_own_threads() -> None:
    weight = Weight(4, 2048, 512, 64, zero=False, scale_dtype=torch.float16)
    x = activations(2, 512, torch.bfloat16)
    wanted = weight.run(x, threads=2)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(weight.run(x, threads=2), wanted) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_without_the_library_the_kernel_refuses_with_the_reason(tmp_path: Path) -> None:
    code = (
        "import torch; from aerogel.kernels.dispatch import explain; from aerogel.kernels.problem import Problem\n"
        "from aerogel.quantize.grids import IntGrid\n"
        "print(dict(explain(Problem(format='pack-quantized', grid=IntGrid(bits=4, group_size=32), N=48, K=96)))['cpu'])"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "AEROGEL_NATIVE_LIBRARY": str(tmp_path / "none.so"), "PYTHONPATH": paths}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "was not compiled" in result.stdout


def test_the_reader_reads_at_a_speed_that_memory_can_have() -> None:
    memory = torch.ones(64 << 20, dtype=torch.uint8)
    for threads in (1, 2):
        assert 1e8 < library.read_bandwidth(memory, threads) < 1e12
    assert library.read_bandwidth(memory[: 1 << 10], 1) == 0.0, "less than a piece is not measured"


def test_every_source_is_compiled() -> None:
    units = {f"unit_{name}.cpp" for units in UNITS.values() for name in units} | {"unit_portable.cpp"}
    assert {file.name for file in FOLDER.glob("*.cpp")} == units | set(SHARED_SOURCES)
    assert library.best() in library.paths() and LIBRARY.endswith(".so")
