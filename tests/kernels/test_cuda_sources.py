"""The CUDA kernels without a GPU: their arithmetic is exact, their sources compile, their refusals and tables are sound."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import weakref
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aerogel.errors import BadInput, RunFailed
from aerogel.kernels.cuda import launch, nvrtc, sources
from aerogel.kernels.gemm import (
    cuda,
    cuda_dense,
    cuda_few,
    cuda_few_plan,
    cuda_table,
    cuda_tune,
    cuda_wgmma,
    cuda_wgmma_table,
    cuda_wgmma_tune,
)
from aerogel.kernels.gemm.cuda_few import Config, default_config, defines, fits, shared_bytes
from aerogel.kernels.gemm.cuda_outliers import TileOutliers
from aerogel.kernels.gemm.cuda_weight import TileWeight, codes_of, tensors_of
from aerogel.kernels.gemm.plane_tables import MOST_PLANES, OF_ROWS
from aerogel.kernels.problem import Problem
from aerogel.pack import tiles
from aerogel.pack.tile_orders import ROWS, pack_in_order
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.grids import Codes, Fp8Grid, IntGrid, quantized

ROOT = Path(__file__).parents[2]


def weight(N: int, K: int, bits: int = 4, size: int = 128, zero: bool = False) -> TileWeight:
    """Shapes only."""
    R, C = tiles.tile_counts(N, K)
    G = -(-K // size) if size else 1
    scale = torch.empty(R, G, 16, dtype=torch.bfloat16, device="meta")
    return TileWeight(
        codes=torch.empty(R, C, 256 * bits, dtype=torch.uint8, device="meta"),
        scale=scale,
        zero=scale.to(torch.uint8) if zero else None,
        table=None,
        pick=None,
        group_size=size,
        N=N,
        K=K,
    )


def beside_outliers(held: TileWeight) -> TileWeight:
    """The weight with outliers, none of which is there."""
    nothing = {name: torch.empty(0, dtype=torch.int32) for name in TileOutliers.__slots__}
    return replace(held, outliers=TileOutliers(**nothing))


def has_nvrtc() -> str | None:
    try:
        nvrtc.compiler()
    except ImportError as error:
        return str(error)
    return None


needs_nvrtc = pytest.mark.skipif(has_nvrtc() is not None, reason=str(has_nvrtc()))


# ---- arithmetic ------------------------------------------------------------------------------------------------------
def field_bit(width: int, weight_bits: int, mantissa: int, most: int, folded: bool, number: int) -> int:
    """The bit where decode.cuh puts a field, as `Field::bit` has it."""
    least = mantissa - 7 if folded else max(0, mantissa + weight_bits - most)
    reach = (mantissa - width - least) // width + 1
    return least + number % reach * width


@pytest.mark.parametrize(("dtype", "mantissa", "most"), [(torch.bfloat16, 7, 127), (torch.float16, 10, 15)], ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_decoding_is_exact_for_every_code_and_place(bits: int, dtype: torch.dtype, mantissa: int, most: int) -> None:
    """The same sums as the decoders', each rounded to the type: every one must already be exact."""
    widths = tiles.pieces(bits)
    weights = [sum(widths[:place]) for place in range(len(widths))]
    codes = torch.arange(1 << bits)
    centre = 1 << (bits - 1)

    def exact(value: torch.Tensor) -> torch.Tensor:
        rounded = value.to(dtype).double()
        assert torch.equal(rounded, value.double()), (bits, dtype, value)
        return rounded

    for s in range(8):
        for i in range(4):
            raised, powers = [], []
            for width, shift in zip(widths, weights, strict=True):
                number = 4 * (s % (4 // width)) + i
                bit = field_bit(width, shift, mantissa, most, bits <= 2, number)
                assert bit + width <= mantissa
                power = 1 << (mantissa - bit + shift)
                powers.append(power)
                raised.append(exact((power + (((codes >> shift) & ((1 << width) - 1)) << shift)).double()))
            total = exact(raised[-1] + exact(torch.tensor(-float(sum(powers) + centre))))
            for part in reversed(raised[:-1]):
                total = exact(part + total)
            assert torch.equal(total, (codes - centre).double())


@pytest.mark.parametrize(("dtype", "mantissa", "bias"), [(torch.bfloat16, 7, 127), (torch.float16, 10, 15)], ids=str)
def test_a_zero_point_leaves_with_the_power_of_two(dtype: torch.dtype, mantissa: int, bias: int) -> None:
    """As `with_zero` makes the number that is added: by its bits, of a zero point inside the codes or just beyond."""
    codes, zeros = torch.arange(16), torch.arange(17)
    for i in range(4):
        bit = field_bit(4, 0, mantissa, bias, False, i)
        assert bit == field_bit(4, 0, mantissa, bias, False, i % 2)
        power = 1 << (mantissa - bit)
        bits = zeros * (1 << bit) + (0x8000 | (mantissa - bit + bias) << mantissa)
        less = bits.to(torch.uint16).view(dtype)
        assert torch.equal(less.double(), -(power + zeros).double())
        left = (power + codes).to(dtype)[:, None] + less
        assert torch.equal(left.double(), (codes[:, None] - zeros).double())


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("dtype", "mantissa"), [(torch.bfloat16, 7), (torch.float16, 10)], ids=str)
def test_signs_are_exact_in_every_place(dtype: torch.dtype, mantissa: int, folded: bool) -> None:
    """A bit that counts as two over the power of its place, less the power and one; decode.cuh's `Field` of SIGNS."""
    least = (mantissa - 7 if folded else 0) + 1
    for number in range(16):
        bit = least + number % (mantissa - least)
        power = 1 << (mantissa - bit + 1)
        assert bit < mantissa and (not folded or power <= 128)
        for u in range(2):
            raised, offset = torch.tensor([power + 2.0 * u, -power - 1.0]).to(dtype).double()
            assert raised == power + 2 * u and offset == -power - 1 and raised + offset == 2 * u - 1


@pytest.mark.parametrize(("dtype", "mantissa"), [(torch.bfloat16, 7), (torch.float16, 10)], ids=str)
def test_three_bits_are_raised_whole(dtype: torch.dtype, mantissa: int) -> None:
    """`Threes` of decode.cuh on real words: exactly a power of two and the code, and for the last the code less 3.5."""
    codes = torch.randint(0, 8, (16, 128), dtype=torch.uint8)
    packed = tiles.pack_tiles(codes, 3).flatten()
    first, last = packed[:512].view(torch.int32).reshape(8, 4, 4), packed[512:].view(torch.int32).reshape(8, 4, 2)
    words = torch.cat([first, last], -1).long() & 0xFFFFFFFF  # g, t, word
    bias, half_precision = (127, False) if dtype == torch.bfloat16 else (15, True)

    def moved(word: torch.Tensor, right: int) -> torch.Tensor:
        return word >> right if right >= 0 else (word << -right) & 0xFFFFFFFF

    for s in range(8):
        for i in range(4):
            f, three = 4 * (s % 4) + i, words[..., 3 * (s // 4) : 3 * (s // 4) + 3]
            bit = (3, 3, 6, 3, 6)[f % 5] if half_precision else (0, 3, 0, 3, 3)[f % 5]
            assert bit + 3 <= mantissa and mantissa - bit <= 7

            def numbers(both: torch.Tensor, half: int) -> torch.Tensor:
                return (both >> 16 * half & 0xFFFF).short().view(dtype)

            for half in range(2):
                if f < 15:
                    both = torch.full((8, 4), 0x10001 * ((mantissa - bit + bias) << mantissa))
                    both |= moved(three[..., f // 5], 3 * (f % 5) - bit) & 0x10001 * (7 << bit)
                    found = numbers(both, half).float() - (1 << (mantissa - bit))
                else:
                    signed = [
                        numbers(three[..., b] & 0x80008000 ^ 0x10001 * (0x8000 | (b - 1 + bias) << mantissa), half)
                        for b in range(3)
                    ]
                    found = (signed[2] + (signed[0] + signed[1])).float() + 3.5
                row, column = torch.arange(8)[:, None] + 8 * (i % 2), 16 * s + 8 * (i // 2) + 2 * torch.arange(4) + half
                assert torch.equal(found, codes[row, column].float())


def test_single_bits_are_the_places_of_a_sparse_factor() -> None:
    """`multiply_chosen` of few_tokens.cuh on real words, with the instruction played in float64: (bit - 1) times x, exactly."""
    codes = torch.randint(0, 2, (16, 128), dtype=torch.uint8)
    words = tiles.pack_tiles(codes, 1).flatten().view(torch.int32).reshape(8, 4, 2).long() & 0xFFFFFFFF  # g, t, word
    x_KM = torch.randn(128, 8, dtype=torch.float64)
    pieces_KQ = x_KM.reshape(2, 2, 4, 4, 2, 8)  # word, q, t, column pair, e, token: the 16 bytes that a lane loads
    found = torch.zeros(16, 8, dtype=torch.float64)
    for w in range(2):
        upper = words[..., w] & 0x55555555 | 0x88888888
        lower = words[..., w] >> 1 & 0x55555555 | 0x88888888
        for e in range(2):
            places = (upper >> 16 * e & 0xFFFF) | (lower >> 16 * e & 0xFFFF) << 16
            for selector in range(2):
                a = torch.zeros(16, 32, dtype=torch.float64)
                for g, i0, j, n in itertools.product(range(8), range(2), range(2), range(8)):
                    place = int(places[g, 2 * selector + j]) >> (16 * i0 + 2 * n) & 3
                    assert place // 2 == n % 2  # one of each two columns: the places of four are in order
                    a[g + 8 * i0, 16 * j + 4 * (n // 2) + place] = -1
                b = torch.zeros(32, 8, dtype=torch.float64)
                for t, r in itertools.product(range(4), range(4)):
                    b[8 * r + 2 * t] = pieces_KQ[w, r % 2, t, 2 * selector + r // 2, e]
                found += a @ b
    assert torch.allclose(found, (codes.double() - 1) @ x_KM, rtol=0, atol=1e-12)


def permuted(low: int, high: int, selector: int) -> int:
    """The byte permutation of two words: each nibble of the selector takes a byte, or with its upper bit the byte's sign."""
    data, found = high << 32 | low, 0
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = data >> 8 * (nibble & 7) & 0xFF
        found |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * place
    return found


def test_a_table_of_each_row_is_looked_up_by_byte_permutations() -> None:
    """`look_up_row` of tables.cuh on packed words: every register holds its row's entries for its two codes."""
    codes = torch.randint(0, 16, (16, 128), dtype=torch.uint8)
    table = torch.randint(0, 1 << 16, (16, 16))
    words = pack_in_order(codes, 4, ROWS).flatten().view(torch.int32).reshape(2, 8, 4, 4).permute(1, 2, 0, 3).reshape(8, 4, 8)
    for g, t, s in itertools.product(range(8), range(4), range(8)):
        for h in range(2):
            eight = int(words[g, t, (s & ~1) + h]) & 0xFFFFFFFF
            taken, shifted = (eight & 0x77777777) >> 16 * (s % 2) & 0xFFFF, eight << 4 & 0xFFFFFFFF
            entries = [int(entry) for entry in table[g + 8 * h]]
            quads = [
                [sum((e >> 8 * byte & 0xFF) << 8 * i for i, e in enumerate(entries[q : q + 4])) for q in (0, 4, 8, 12)]
                for byte in range(2)
            ]
            upper = permuted(shifted, eight, (0xD9C8, 0xFBEA)[s % 2])
            low, high = (upper & permuted(q[2], q[3], taken) | ~upper & permuted(q[0], q[1], taken) for q in quads)
            for i1, selector in enumerate((0x5140, 0x7362)):
                pair = permuted(low & 0xFFFFFFFF, high & 0xFFFFFFFF, selector)
                column = 16 * s + 8 * i1 + 2 * t
                wanted = [entries[int(codes[g + 8 * h, column + e])] for e in range(2)]
                assert [pair & 0xFFFF, pair >> 16] == wanted


# ---- sources ---------------------------------------------------------------------------------------------------------
@needs_nvrtc
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_sources_compile_for_every_generation(capability: tuple[int, int]) -> None:
    variants = [
        (weight(64, 512), torch.bfloat16, 1),
        (weight(64, 512, 7, 48, zero=True), torch.float16, 16),
        (weight(64, 512, 1, 0, zero=True), torch.bfloat16, 16),
    ]
    rings = [
        Config(ring=True, row_tiles=2, k_warps=4, cluster=2),
        Config(ring=True, row_tiles=1, k_warps=2, x_resident=True),
        Config(ring=True, row_tiles=1, k_warps=2, share=2),
    ]
    for place, (held, dtype, M) in enumerate(variants):
        configs = [Config(ring=False, row_tiles=2, k_warps=4)]
        if capability >= (9, 0):  # all with all for one generation, whose ring the later ones have
            configs += rings if capability == (9, 0) else [rings[place]]
        for config in configs:
            name = f"{config.kernel}.cu"
            code = nvrtc.compiler().compile(name, sources.sources_of(name), defines(held, config, M, dtype), capability)
            assert code[:4] == b"\x7fELF" and config.kernel.encode() in code
    macros = cuda_few.decoder_defines(weight(64, 512, 5, 32), torch.float16)
    assert nvrtc.compiler().compile("dequantize.cu", sources.sources_of("dequantize.cu"), macros, capability)[:4] == b"\x7fELF"


@needs_nvrtc
@pytest.mark.parametrize("share", [1, 2])
def test_the_build_for_racecheck_compiles(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    held, plain = weight(64, 512), Config(ring=True, row_tiles=1, k_warps=2, share=share)
    many = cuda_wgmma.Config(tokens=32, x_stages=4, w_stages=2, share=share)
    compiled = []
    for sanitize in (0, 1):
        monkeypatch.setattr(cuda_wgmma, "RING_BARRIERS", 2 + sanitize)
        for name, macros in (
            ("few_ring.cu", defines(held, plain, 16, torch.bfloat16)),
            ("wgmma.cu", cuda_wgmma.defines(held, many, torch.bfloat16)),
        ):
            macros = {**macros, "SANITIZE": sanitize}
            compiled.append(nvrtc.compiler().compile(name, sources.sources_of(name), macros, (9, 0)))
    assert len(set(compiled)) == 4


@needs_nvrtc
def test_the_cache_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEROGEL_CACHE", str(tmp_path / "cache"))
    text = {
        "one.cu": '#include "two.cuh"\nextern "C" __global__ void one(int* p) { *p = TWO; }',
        "two.cuh": "#define TWO (X + 1)",
    }
    heard: list[nvrtc.Compiled] = []
    with nvrtc.listening(heard.append):
        first = nvrtc.cubin("one.cu", text, {"X": 1}, (9, 0))
        assert nvrtc.cubin("one.cu", text, {"X": 1}, (9, 0)) == first
        nvrtc.cubin("one.cu", text, {"X": 2}, (9, 0))
        nvrtc.cubin("one.cu", {**text, "two.cuh": "#define TWO 7"}, {"X": 1}, (9, 0))
    nvrtc.cubin("one.cu", text, {"X": 1}, (8, 0))
    assert [event.cached for event in heard] == [False, True, False, False]
    assert len(list((tmp_path / "cache" / "cubin").glob("one-sm_*.cubin"))) == 4
    with pytest.raises(RunFailed, match=r"(?s)one\.cu does not compile.*identifier \"X\" is undefined"):
        nvrtc.cubin("one.cu", text, {}, (9, 0))
    with pytest.raises(RunFailed, match=r"compute capability 3\.0"):
        nvrtc.cubin("one.cu", text, {"X": 1}, (3, 0))


@needs_nvrtc
def test_a_cache_that_cannot_be_written_warns_and_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AEROGEL_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="AEROGEL_CACHE"):
        assert nvrtc.cubin("a.cu", {"a.cu": 'extern "C" __global__ void a() {}'}, {}, (9, 0))[:4] == b"\x7fELF"


@needs_nvrtc
def test_no_toolkit_is_needed(tmp_path: Path) -> None:
    """With every trace of a toolkit hidden, the compiler of torch's wheels is found and finds its own builtins."""
    if not Path(nvrtc.candidates()[0]).is_absolute():
        pytest.skip("NVRTC comes from the system here, not from a wheel")
    hidden = {"CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PATH": "/nowhere", "AEROGEL_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    code = (
        "from aerogel.kernels.cuda import nvrtc\n"
        "text = {'a.cu': 'extern \"C\" __global__ void a(float* p) { p[threadIdx.x] = __expf(p[0]); }'}\n"
        "print(nvrtc.cubin('a.cu', text, {}, (9, 0))[:4], nvrtc.compiler().path)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert "ELF" in result.stdout and "nvidia" in result.stdout


def test_without_a_compiler_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "candidates", lambda: ["/nowhere/libnvrtc.so"])
    with pytest.raises(ImportError, match="nvidia-cuda-nvrtc"):
        nvrtc.Compiler()


def test_argument_blocks_are_those_of_the_sources() -> None:
    for module, name in ((cuda_few_plan, "few_tokens.cuh"), (cuda_dense, "dequantize.cu")):
        body = re.search(r"struct Arguments \{(.*?)\};", sources.texts()[name], re.DOTALL)
        assert body is not None
        text = re.sub(r"//.*", "", body[1])
        fields = re.findall(r"\*?\s*(\w+)\s*[,;]", text)
        assert fields == [entry[0] for entry in module.Arguments._fields_]


def test_sources_include_nothing_of_the_toolkit() -> None:
    for name, text in sources.texts().items():
        for included in re.findall(r"#include\s+(\S+)", text):
            assert included.strip('"') in sources.texts(), f"{name} includes {included}"
        assert text.startswith("//") and len(text.splitlines()) <= 400, name


def test_launching_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(launch.ctypes, "CDLL", refuse)
    with pytest.raises(ImportError, match="NVIDIA's driver"):
        launch.driver.__wrapped__()


# ---- problems --------------------------------------------------------------------------------------------------------
def test_refusals_name_the_reason() -> None:
    grid = IntGrid(bits=4, group_size=64)

    def reason(**changes: object) -> str:
        facts: dict[str, object] = {
            "format": "pack-quantized",
            "grid": grid,
            "N": 8,
            "K": 64,
            "dtype": torch.bfloat16,
            "device": "cuda",
        }
        return cuda.Cuda.refuses(Problem(**{**facts, **changes})) or ""  # type: ignore[arg-type]

    assert "cpu" in reason(device="cpu")
    assert "float32" in reason(dtype=torch.float32)
    assert "int8" in reason(activations="int8")
    assert "multiple of 16" in reason(grid=IntGrid(bits=4, group_size=40))
    if not torch.cuda.is_available():
        assert "needs a GPU" in reason()


GRIDS = [
    IntGrid(bits=3, group_size=32, symmetric=False),
    IntGrid(bits=8),
    Fp8Grid(strategy="channel"),
    Fp8Grid(strategy="block"),
    Fp8Grid(strategy="tensor"),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_layout_inverts(grid: IntGrid | Fp8Grid) -> None:
    dense = torch.randn(150, 200, generator=torch.Generator().manual_seed(0))
    codes = quantized(grid, dense, grid.fit(dense))
    layout = tensors_of(codes)
    back: Codes = codes_of(layout, grid, 150, 200)
    assert torch.equal(back.values_NK.view(torch.uint8), codes.values_NK.view(torch.uint8))
    assert torch.equal(back.scale_NG, codes.scale_NG)
    assert codes.zero_NG is None or torch.equal(back.zero_NG, codes.zero_NG)  # type: ignore[arg-type]
    TileWeight(
        codes=layout["tile_codes"], scale=layout["tile_scale"], zero=layout.get("tile_zero"), table=layout.get("tile_table"),
        pick=None, group_size=grid.group_size or 0, N=150, K=200,
    ).check()  # fmt: skip


def test_a_weight_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(BadInput, match="has group_size of the wrong"):
        TileWeight(
            codes=torch.zeros(1, 1, 1024, dtype=torch.uint8), scale=torch.ones(1, 3, 16), zero=None, table=None, pick=None,
            group_size=40, N=16, K=100,
        ).check()  # fmt: skip


def test_the_fake_implementation_gives_the_shape() -> None:
    held = weight(40, 256)
    for M in (0, 5):
        x = torch.empty(M, 256, dtype=torch.float16, device="meta")
        y = cuda._fake(x, held.codes, held.scale, None, None, None, None, 128, 40)
        assert y.shape == (M, 40) and y.dtype == torch.float16
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(3, 256, dtype=torch.bfloat16, device="cuda")
        codes = torch.empty(3, 2, 1024, dtype=torch.uint8, device="cuda")
        scale = torch.empty(3, 2, 16, dtype=torch.bfloat16, device="cuda")
        y = torch.ops.aerogel.tiles_linear(x, codes, scale, None, None, None, None, 128, 40)
        assert y.shape == (3, 40) and y.device.type == "cuda"


class Recorded:
    """Stands in for `launch.Launch`: keeps what it is given, and the arguments at each call."""

    made: list[Recorded] = []

    def __init__(self, function: object, arguments: object, **options: object) -> None:
        self.function, self.arguments, self.options = function, arguments, options
        self.calls: list[dict[str, object]] = []
        Recorded.made.append(self)

    def __call__(self, stream: int) -> None:
        self.calls.append({name: getattr(self.arguments, name) for name, _ in self.arguments._fields_} | {"stream": stream})  # type: ignore[attr-defined]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """A machine with an H100 that launches nothing."""
    facts = SimpleNamespace(multi_processor_count=132, major=9, minor=0, name="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    for module in (sources, cuda_few_plan):
        monkeypatch.setattr(module, "function", lambda *what: what)
    for module in (launch, cuda_few_plan):
        monkeypatch.setattr(module, "Launch", Recorded)
    Recorded.made = []
    return Recorded.made


def real_weight(N: int, K: int) -> TileWeight:
    return cuda_tune.random_weight(N, K, 4, 32, "cpu", zero="integer")


@pytest.mark.parametrize("M", [1, 16, 40])
def test_plans_compile_what_was_said_before_the_weight_was_there(M: int, recorded: list[Recorded]) -> None:
    held = real_weight(40, 100)
    held_by = {field.name: getattr(held, field.name) for field in fields_of(held)}
    tensors = {name: value.to("meta") for name, value in held_by.items() if isinstance(value, torch.Tensor)}
    device = torch.device("cuda", 0)
    for kind in (cuda_few.Few, cuda_dense.Dense):
        recorded.clear()
        said = kind.kernels(replace(held, **tensors), M, torch.bfloat16, device)
        run = kind.plan(held, M, torch.bfloat16)
        if kind is cuda_dense.Dense:
            run(torch.ones(M, 100, dtype=torch.bfloat16), None, torch.empty(M, 40, dtype=torch.bfloat16))
        made = {str(launch.function[:3]) for launch in recorded}
        assert {str(tuple(wanted)) for wanted in said} == made and len(said) == len(made) >= 1


def test_plans_hand_over_addresses_and_begin_early_only_after_the_first_call(recorded: list[Recorded]) -> None:
    held = real_weight(40, 100)
    run = cuda_few.Few.plan(held, 3, torch.bfloat16)
    x, y, bias = torch.randn(3, 100).bfloat16(), torch.empty(3, 40, dtype=torch.bfloat16), torch.randn(40)
    run(x, bias, y)
    run(x, None, y)
    first, later = recorded
    assert "early" not in first.options and later.options["early"] is True
    assert len(first.calls) == len(later.calls) == 1
    call = later.calls[0]
    wanted = {"codes": held.codes.data_ptr(), "scale": held.scale.data_ptr(), "y": y.data_ptr(), "bias": None, "stream": 7}
    assert {name: call[name] for name in wanted} == wanted
    assert held.zero is not None and call["zero"] == held.zero.data_ptr() and call["table"] is None
    assert (call["M"], call["N"], call["groups"], call["row_tiles"], call["k_tiles"]) == (3, 40, 4, 3, 1)
    # 100 columns of 16 bits are no multiple of 16 bytes: x is copied into rows of 104.
    assert call["x_stride"] == call["x_columns"] == 104 and call["x"] != x.data_ptr()
    assert first.calls[0]["bias"] not in (None, bias.data_ptr())


def test_aligned_tokens_are_not_copied_and_many_run_in_slices(recorded: list[Recorded]) -> None:
    held = real_weight(40, 128)
    x, y = torch.randn(40, 128).bfloat16(), torch.empty(40, 40, dtype=torch.bfloat16)
    cuda_few.Few.plan(held, 40, torch.bfloat16)(x, None, y)
    calls = [call for one in recorded for call in one.calls]
    assert sorted((call["M"], call["x"]) for call in calls) == [  # type: ignore[type-var]
        (8, x[32:].data_ptr()), (16, x.data_ptr()), (16, x[16:].data_ptr()),
    ]  # fmt: skip
    assert {call["y"] for call in calls} == {y.data_ptr(), y[16:].data_ptr(), y[32:].data_ptr()}


def test_the_dense_path_decodes_row_by_row_and_keeps_no_weight_alive(
    recorded: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_dense, "BUFFER_BYTES", 2 * 256 * 32)
    held = real_weight(70, 256)
    codes = weakref.ref(held.codes)
    run = cuda_dense.Dense.plan(held, 5, torch.bfloat16)
    y = torch.empty(5, 70, dtype=torch.bfloat16)
    run(torch.zeros(5, 256, dtype=torch.bfloat16), None, y)
    assert [(one.calls[0]["first_tile"], one.calls[0]["rows"]) for one in recorded] == [(0, 32), (2, 32), (4, 6)]
    assert [one.options["grid"] for one in recorded] == [(2,), (2,), (1,)]
    del held
    assert codes() is None and run is not None


# ---- configurations --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("M", [1, 8, 16])
def test_every_weight_has_a_default_that_fits(capability: tuple[int, int], M: int) -> None:
    for N, K in [(1, 16), (17, 100), (4096, 4096), (128256, 4096), (4096, 28672), (200, 65536)]:
        for bits, size, zero in [(1, 128, False), (4, 16, True), (8, 0, True), (5, 48, True)]:
            held = weight(N, K, bits, size, zero)
            config = default_config(held, M, capability, 132)
            assert fits(held, config, M, capability, 132), (N, K, bits, size, config)
            assert not config.ring or capability >= (9, 0)


def test_the_shipped_table_holds_configurations_that_fit() -> None:
    for path in (ROOT / "kernels" / "gemm").glob("cuda_nvidia-*.json"):
        entries = json.loads(path.read_text("utf-8"))["entries"]
        assert len(entries) >= 60
        for key, entry in entries.items():
            found = re.fullmatch(r"(?:o/)?(\d)([trpzfb]?)/g(\d+)/(\d+)x(\d+)/m(\d+)", key)
            assert found is not None, key
            bits, size, N, K, M = (int(part) for part in found.group(1, 3, 4, 5, 6))
            held = weight(N, K, bits, size, zero=found[2] == "z")
            if found[2] in ("t", "r", "p"):
                tables = {"t": 1, "r": held.codes.shape[0] * 16, "p": 2}[found[2]]
                pick = held.scale.to(torch.uint8) if found[2] == "p" else None
                held = replace(held, table=torch.empty(tables, 1 << bits, device="meta"), pick=pick)
            if found[2] == "b":
                scale = torch.empty(held.scale.shape, dtype=OF_ROWS, device="meta")
                held = replace(held, scale=scale, zero=held.scale if bits == MOST_PLANES else None)
                held.check()
            if found[2] == "f":
                scale = held.scale.to(torch.uint8) if bits == 4 else held.scale  # of NVFP4 and MXFP4
                held = replace(held, floats={4: 1, 8: 3}[bits], scale=scale)
            if key.startswith("o/"):
                held = beside_outliers(held)
            assert cuda_table.key_of(held, M) == key
            assert fits(held, Config(**entry["config"]), M, (9, 0), 132), key


def test_fewer_tokens_take_no_longer_by_the_shipped_table() -> None:
    """Else what was measured with more tokens would serve fewer better."""
    entries = cuda_table.table("NVIDIA H100 80GB HBM3")
    by_place: dict[str, list[tuple[int, float]]] = {}
    for key, entry in entries.items():
        place, _, M = key.rpartition("/m")
        if "us" in entry:
            by_place.setdefault(place, []).append((int(M), entry["us"]))
    assert len(by_place) >= 40
    for place, times in by_place.items():
        for (fewer, least), (more, most) in itertools.pairwise(sorted(times)):
            assert least <= 1.03 * most, f"{place}: {least} us with {fewer} tokens, {most} with {more}"


def test_a_ring_that_would_be_shallow_gives_way_to_other_cuts(
    recorded: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = weight(8192, 28672, size=64, zero=True)
    few = {"ring": True, "row_tiles": 2, "k_warps": 8, "stages": 6, "x_resident": True}
    registers = {"ring": False, "row_tiles": 4, "k_warps": 16}
    known = {"4z/g64/8192x28672/m1": {"config": few}, "4/g128/8192x28672/m2": {"config": registers}}
    monkeypatch.setattr(cuda_table, "table", lambda name: known)
    assert cuda_table.config_for(held, 1) == Config(**few)
    assert cuda_table.config_for(held, 3) == Config(**registers)  # three tokens leave room for three stages of six
    monkeypatch.setattr(cuda_table, "table", lambda name: {"4z/g64/8192x28672/m1": {"config": few}})
    assert cuda_table.config_for(held, 3) == default_config(held, 3, (9, 0), 132)


def test_half_the_sums_take_half_the_room() -> None:
    held = weight(57344, 8192, size=64)
    plain = Config(ring=True, row_tiles=4, k_warps=7, stages=3, share=2)
    half = replace(plain, half_sums=True)
    whole, less = (shared_bytes(held, config, 16, 132) for config in (plain, half))
    assert whole - less == 3 * 16 * (64 + 4) * 4
    assert fits(held, half, 16, (9, 0), 132) and not fits(held, replace(half, beside=True), 16, (9, 0), 132)
    assert not fits(held, Config(ring=False, row_tiles=2, k_warps=8, half_sums=True), 16, (9, 0), 132)


def test_tables_are_found_by_family_and_own_measurements_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEROGEL_CACHE", str(tmp_path))
    cuda_table.table.cache_clear()
    name, key = "NVIDIA H100 80GB HBM3", "4/g128/4096x4096/m1"
    assert cuda_table.family_slug(name) == cuda_table.family_slug("NVIDIA H200") == "nvidia-h100"
    shipped = cuda_table.table(name)[key]
    own = {"config": {"ring": False, "row_tiles": 1, "k_warps": 3}, "us": 1.0}
    path = cuda_table.save(name, {key: own})
    cuda_table.save(name, {"another": own})
    assert cuda_table.table(name)[key] == own != shipped and "another" in cuda_table.table(name)
    held = json.loads(path.read_text("utf-8"))
    assert held["device"] == name and held["torch"] == torch.__version__
    assert cuda_table.table("NVIDIA A100-SXM4-80GB") == {}
    cuda_table.table.cache_clear()


def test_a_decoder_that_was_not_measured_takes_what_integers_have(recorded: list[Recorded]) -> None:
    cuda_table.table.cache_clear()
    entries = cuda_table.table("NVIDIA H100 80GB HBM3")
    for M in (1, 16):
        for shape in ("4096x4096", "28672x4096", "8192x28672"):
            measured = Config(**entries[f"4/g128/{shape}/m{M}"]["config"])
            N, K = map(int, shape.split("x"))
            plain = weight(N, K, size=48)
            held = replace(plain, floats=1, scale=plain.scale.to(torch.uint8))
            found = cuda_table.config_for(held, M)
            assert replace(found, stages=measured.stages) == measured and found.stages <= measured.stages
            assert fits(held, found, M, (9, 0), 132)
            assert cuda_table.as_roomy(held, found, measured, M, 132)
    cuda_table.table.cache_clear()


def test_candidates_fit_and_fill_the_device() -> None:
    held = weight(4096, 4096)
    for M in (1, 16):
        found = cuda_tune.candidates(held, M, (9, 0), 132)
        assert len(found) == len(set(found)) > 20
        assert any(config.ring for config in found) and any(not config.ring for config in found)
        assert all(fits(held, config, M, (9, 0), 132) for config in found)
    assert not any(config.ring for config in cuda_tune.candidates(held, 1, (8, 0), 108))
    ring = Config(ring=True, row_tiles=2, k_warps=8, stages=4)
    assert shared_bytes(held, ring, 1, 128) == 256 + 4 * 16896 + 8 * 2 * 272


def test_the_shortlist_holds_what_has_won() -> None:
    cuda_table.table.cache_clear()
    for M, (N, K) in itertools.product((1, 16), ((4096, 4096), (28672, 4096))):
        held = weight(N, K)
        every = cuda_tune.candidates(held, M, (9, 0), 132)
        found = cuda_tune.shortlist(held, M, (9, 0), 132, "NVIDIA H100 80GB HBM3")
        assert 0 < len(found) <= 40 and set(found) < set(every)
        assert cuda_tune.shortlist(held, M, (9, 0), 132, "NVIDIA Test 1GB") == every
    cuda_table.table.cache_clear()


@pytest.mark.parametrize(
    "key",
    ["4/g128/4096x4096/m1", "1/g128/57344x8192/m8", "1/g128/57344x8192/m16", "2/g128/28672x4096/m1"]
    + [f"4/g128/28672x4096/m{M}" for M in (1, 2, 4, 8, 16)]
    + [f"o/4/g128/4096x4096/m{M}" for M in (1, 2, 4, 8)]
    + [f"o/4/g128/57344x8192/m{M}" for M in (1, 2, 4, 8)]
    + [f"o/4/g128/8192x28672/m{M}" for M in (1, 2)],
)
def test_tuning_would_find_what_is_shipped(key: str) -> None:
    """Or a user's own measurements, which win over the shipped ones, would be of slower cuts."""
    cuda_table.table.cache_clear()
    bits, size, N, K, M = (int(part) for part in re.findall(r"\d+", key))
    shipped = Config(**cuda_table.table("NVIDIA H100 80GB HBM3")[key]["config"])
    held = weight(N, K, bits, size)
    held = beside_outliers(held) if key.startswith("o/") else held
    found = cuda_tune.candidates(held, M, (9, 0), 132)
    assert replace(shipped, stages=0) in {replace(config, stages=0) for config in found}
    cuda_table.table.cache_clear()


def test_weights_to_tune_are_like_the_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cuda_tune, "random_weight", lambda *what, **how: drawn.append((*what[2:], *how.values())))
    monkeypatch.setattr(cuda_tune, "random_numbers", lambda *what: drawn.append(what[2:]))
    for grid in (Nvfp4(), Mx(), Nf4(), Mx(kind="e4m3"), Bitmod(), IntGrid(bits=3, group_size=64)):
        cuda_tune.like(Problem(format="any", grid=grid, N=32, K=256, device="cuda", dtype=torch.bfloat16))
    assert drawn == [("nvfp4", 16, "cuda"), ("mxfp4", 32, "cuda"), ("table", 64, "cuda"), (3, 64, "cuda", "none")]


def test_tune_measures_token_classes_once_and_keeps_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = []

    def tune(weight, tokens):
        measured.append((weight.bits, weight.group_size, weight.N, weight.K, weight.zero is not None, list(tokens)))
        return {cuda_table.key_of(weight, M): {"config": {"ring": True}, "us": 4.5} for M in tokens}

    draw = cuda_tune.random_weight
    monkeypatch.setattr(cuda_tune, "tune", tune)
    monkeypatch.setattr(
        cuda_tune, "random_weight", lambda N, K, bits, group, device, zero: draw(N, K, bits, group, "cpu", zero=zero)
    )
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA Test 1GB")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    monkeypatch.setenv("AEROGEL_CACHE", str(tmp_path))
    grid = IntGrid(bits=4, group_size=64, symmetric=False)
    problem = Problem(format="pack-quantized", grid=grid, N=48, K=256, device="cuda", dtype=torch.bfloat16)
    tuned = cuda.Cuda.tune(problem, [1, 3, 4, 16, 512])
    assert measured == [(4, 64, 48, 256, True, [1, 4, 16])]
    assert tuned is not None
    assert sorted(tuned.found) == [1, 4, 16] and "4.5 us" in tuned.found[1]
    assert "4z/g64/48x256/m4" in tuned.kept.read_text()
    assert cuda.Cuda.tune(problem, [512]) is None
    tuned = cuda.Cuda.tune(replace(problem, outliers=True), [2])
    assert tuned is not None and list(tuned.found) == [2] and '"o/4z/g64/48x256/m2"' in tuned.kept.read_text()
    cuda_table.table.cache_clear()


def test_tune_measures_no_seats_beside_outliers() -> None:
    """Cuts that would not be taken from the table."""
    plain = cuda_tune.random_weight(1024, 2048, 4, 128, "cpu")
    held = {
        weight.outliers is not None: cuda_tune.candidates(weight, 4, (9, 0), 132)
        for weight in (plain, cuda_tune.with_outliers(plain))
    }
    assert any(config.seats > 1 for config in held[False]) and held[True]
    assert all(config.seats == 1 for config in held[True])


def test_tune_keeps_cuts_of_many_tokens_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is kept is what a plan finds, with outliers and without, and wins over what is shipped."""
    name, given = "NVIDIA H100 80GB HBM3", []

    def tune(weight: TileWeight, tokens: list[int]) -> dict[str, Any]:
        found = [cuda_wgmma_tune.candidates(weight, M, 132, name) for M in tokens]
        given.append([configs[-1] for configs in found])
        return {
            str(M): {"config": cuda_wgmma_tune.as_data(configs[-1]), "us": 9.5}
            for M, configs in zip(tokens, found, strict=True)
        }

    draw = cuda_tune.random_weight
    monkeypatch.setattr(cuda_wgmma_tune, "tune", tune)
    monkeypatch.setattr(cuda_tune, "random_weight", lambda *what, zero: draw(*what[:4], "cpu", zero=zero))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("AEROGEL_CACHE", str(tmp_path))
    cuda_wgmma_table.table.cache_clear()
    shipped = cuda_wgmma_table.table(name)["4/g128/4096x4096"]
    problem = Problem(format="pack-quantized", grid=IntGrid(bits=4), N=4096, K=4096, device="cuda", dtype=torch.bfloat16)
    for outliers in (False, True):
        tuned = cuda.Cuda.tune(replace(problem, outliers=outliers), [20, 64, 60])
        assert tuned is not None and sorted(tuned.found) == [32, 64] and "9.5 us" in tuned.found[32]
    for outliers, best in zip((False, True), given, strict=True):
        weight = cuda_tune.like(replace(problem, outliers=outliers))
        assert weight is not None and (weight.outliers is not None) is outliers
        for M, config in zip((30, 64), best, strict=True):
            assert cuda_wgmma_table.cuts_for(weight, M, name) == [(4096, config)]
        assert cuda_wgmma_table.table(name)["4/g128/4096x4096"]["128"] == shipped["128"]
    cuda_wgmma_table.table.cache_clear()
