"""The many-token kernel: what it refuses, that it compiles as meant, and on a Hopper GPU that it is right.

Without a GPU: refusals, the cost model's choices, and (where NVRTC can be loaded) every cut compiled for sm_90a, without
spilled registers and without a warning that the compiler serialised the matrix instructions.
On a GPU: every width, group, zero point, table, type and cut against float64 on ragged shapes; outputs poisoned; the same
bits twice and after overlapped launches; inf and NaN; more than 2^31 outputs.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.kernels.cuda import nvrtc, sources
from aerogel.kernels.gemm import cuda_wgmma, cuda_wgmma_table
from aerogel.kernels.gemm.cuda import IMPLEMENTATIONS
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.cuda_wgmma import CUTS, SOURCE, Config, ManyTokens, choose_config, deepest, defines, fits
from aerogel.kernels.gemm.cuda_wgmma_plan import Parts, Plan
from aerogel.pack import tiles

HOPPER = (9, 0)
BOUND = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""Relative Frobenius error: the weight, its scale and the output are each rounded once to the activations' type."""
SMALL = Config(tokens=32, x_stages=4, w_stages=2)


def meta_weight(N: int, K: int, bits: int = 4, group_size: int = 128, **more: Any) -> TileWeight:
    """A weight without data."""
    R, C = tiles.tile_counts(N, K)
    G = -(-K // group_size) if group_size else 1
    kinds: dict[str, Any] = {"zero": None, "table": None, "pick": None, "scale": torch.bfloat16, **more}
    shapes = {"zero": (R, G, 16), "pick": (R, G, 16), "scale": (R, G, 16)}
    held = {n: torch.empty(shapes[n], dtype=kinds[n], device="meta") if kinds[n] is not None else None for n in shapes}
    if isinstance(kinds["table"], int):
        held["table"] = torch.empty(kinds["table"], 1 << bits, dtype=torch.float16, device="meta")
    codes = torch.empty(R, C, 256 * bits, dtype=torch.uint8, device="meta")
    return TileWeight(codes=codes, group_size=group_size, N=N, K=K, **{"table": None, **held})  # type: ignore[arg-type]


def test_refuses_other_devices_and_few_tokens() -> None:
    weight = meta_weight(4096, 4096)
    assert "compute capability 9.0" in (ManyTokens.refuses(weight, 64, torch.bfloat16, (8, 0)) or "")
    assert "compute capability 9.0" in (ManyTokens.refuses(weight, 64, torch.bfloat16, (10, 0)) or "")
    assert "17 tokens" in (ManyTokens.refuses(weight, 16, torch.bfloat16, HOPPER) or "")
    assert ManyTokens.refuses(weight, 17, torch.bfloat16, HOPPER) is None


def test_stands_before_the_dense_path() -> None:
    names = [place.split(":")[1] for place in IMPLEMENTATIONS]
    assert names.index("ManyTokens") < names.index("Dense")


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 1 << 17),
    st.integers(1, 1 << 15),
    st.integers(1, 8),
    st.sampled_from([0, 16, 32, 48, 64, 128, 256]),
    st.integers(17, 1 << 14),
)
def test_chooses_a_cut_that_fits_for_any_weight(N: int, K: int, bits: int, group_size: int, M: int) -> None:
    weight = meta_weight(N, K, bits, group_size)
    config = choose_config(weight, M, 132)
    assert config is not None and fits(weight, config)
    assert config.split <= weight.codes.shape[1] and cuda_wgmma.microseconds(weight, config, M, 132) > 0


def test_every_measured_configuration_fits() -> None:
    entries = cuda_wgmma_table.table("NVIDIA H100 80GB HBM3")
    assert len(entries) == 6
    for key, by_tokens in entries.items():
        bits, group, shape = key.split("/")
        N, K = (int(size) for size in shape.split("x"))
        weight = meta_weight(N, K, int(bits), int(group[1:]))
        for tokens, entry in by_tokens.items():
            assert fits(weight, Config(**entry["config"])), (key, tokens)
            cuts = cuda_wgmma_table.cuts_for(weight, int(tokens), "NVIDIA H100 80GB HBM3")
            assert sum(rows for rows, _ in cuts) == N and all(rows % 16 == 0 for rows, _ in cuts)


class FakeDriver:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.maps: list[tuple[int, ...]] = []
        self.launches: list[tuple[tuple[int, ...], int, int]] = []
        self.cuTensorMapEncodeTiled, self.cuLaunchKernelEx = self.describe, self.launch

    def describe(
        self, place: Any, element: int, rank: int, address: Any, sizes: Any, strides: Any, box: Any, *rest: Any
    ) -> int:
        self.maps.append((element, address.value, *sizes, *strides, *box))
        return 0

    def launch(self, config: Any, *rest: Any) -> int:
        held = config._obj
        self.launches.append((tuple(held.grid), held.block[0], held.shared_bytes))
        return 0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """The driver, the device and the compiled kernel played by stand-ins, so that plans can be made and called on a CPU."""
    stand_in = FakeDriver()
    kernel = SimpleNamespace(handle=None, name="packed_matmul", allow_shared=lambda size: None)
    monkeypatch.setattr("aerogel.kernels.cuda.tensor_map.driver", lambda: stand_in)
    monkeypatch.setattr("aerogel.kernels.cuda.launch.driver", lambda: stand_in)
    monkeypatch.setattr("aerogel.kernels.gemm.cuda_wgmma_plan.function", lambda *found: kernel)
    facts = SimpleNamespace(multi_processor_count=132, name="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    return stand_in


def cpu_weight(N: int, K: int, **more: Any) -> TileWeight:
    meta = meta_weight(N, K, **more)
    held = {name: getattr(meta, name) for name in ("codes", "scale", "zero", "table", "pick")}
    real = {name: None if tensor is None else torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in held.items()}
    return TileWeight(group_size=meta.group_size, N=N, K=K, **real)  # type: ignore[arg-type]


def test_a_plan_describes_weight_input_and_launch(fake: FakeDriver) -> None:
    weight = cpu_weight(321, 1100, zero=torch.uint8, group_size=64)
    plan = Plan(weight, SMALL, 40, torch.bfloat16)
    x, y = torch.zeros(40, 1100, dtype=torch.bfloat16), torch.zeros(40, 321, dtype=torch.bfloat16)
    plan(x, None, y)
    plan(torch.zeros(40, 1104, dtype=torch.bfloat16)[:, :1100], None, y)
    # 21 row tiles in boxes of 8, 9 k tiles of 1024 bytes; 18 groups of 16 rows, two to a box; K padded to 1104.
    assert fake.maps[0] == (4, weight.codes.data_ptr(), 9 * 128, 21, 9 * 1024, 128, 8)
    assert fake.maps[1] == (1, weight.scale.data_ptr(), 18 * 16, 21, 18 * 32, 32, 8)
    assert weight.zero is not None
    assert fake.maps[2] == (0, weight.zero.data_ptr(), 18 * 16, 21, 18 * 16, 32, 8)
    assert fake.maps[3][0] == 9 and fake.maps[3][2:] == (1104, 40, 2208, 64, 32)
    assert fake.launches == [((6, 1, 1), 384, cuda_wgmma.shared_bytes(weight, SMALL))] * 2
    held = plan._arguments
    assert (held.M, held.N, held.y_stride, held.row_tiles, held.k_tiles) == (40, 321, 321, 21, 9)
    assert held.y == y.data_ptr() and held.bias is None and ctypes.sizeof(held) % 64 == 0


def test_a_layer_cut_into_two_launches(fake: FakeDriver) -> None:
    weight = cpu_weight(1000, 512)
    parts = Parts(weight, [(640, SMALL), (360, SMALL)], 17, torch.bfloat16)
    x, y, bias = (torch.zeros(size, dtype=torch.bfloat16) for size in ((17, 512), (17, 1000), (1000,)))
    parts(x, bias, y)
    second = parts._parts[1][1]._arguments
    assert (second.N, second.y_stride, second.row_tiles) == (360, 1000, 23)
    assert second.y == y.data_ptr() + 2 * 640 and second.bias == bias.data_ptr() + 2 * 640
    assert fake.maps[2][1] == weight.codes.data_ptr() + 40 * weight.codes.stride(0)


def test_measured_layers_get_what_was_measured(fake: FakeDriver) -> None:
    wide = cuda_wgmma_table.cuts_for(meta_weight(28672, 4096), 400, "NVIDIA H100 80GB HBM3")
    assert [rows for rows, _ in wide] == [25344, 3328] and wide[0][1].tokens == 256 and wide[1][1].tokens == 128
    assert cuda_wgmma_table.cuts_for(meta_weight(28672, 4096, bits=3), 400, "NVIDIA H100 80GB HBM3") == []
    assert cuda_wgmma_table.cuts_for(meta_weight(28672, 4096), 400, "NVIDIA A100-SXM4-80GB") == []


def ptxas_log(defined: nvrtc.Defines) -> str:
    """What the assembler says of wgmma.cu for sm_90a. The product's own wrapper keeps the machine code only."""
    tool = nvrtc.compiler()
    library: Any = tool._library
    texts = sources.sources_of(SOURCE)
    others = {name: text for name, text in texts.items() if name != SOURCE}
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    headers = (ctypes.c_char_p * len(others))(*(text.encode() for text in others.values()))
    names = (ctypes.c_char_p * len(others))(*(name.encode() for name in others))
    made = library.nvrtcCreateProgram(ctypes.byref(program), texts[SOURCE].encode(), b"w.cu", len(others), headers, names)
    assert made == 0
    flags = ["--gpu-architecture=sm_90a", *nvrtc.OPTIONS, "--ptxas-options=-v", *(f"-D{k}={v}" for k, v in defined.items())]
    code = library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*(f.encode() for f in flags)))
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    text = log.value.decode()
    assert code == 0, text
    return text


def kinds() -> Iterable[tuple[TileWeight, torch.dtype]]:
    """Each width, group class, zero point, scale type and table at least once."""
    zeros = (None, torch.uint8, torch.float16)
    for bits in range(1, 9):
        size = (128, 16, 32, 48, 64, 0, 256, 0)[bits - 1]
        zero = zeros[bits % 3]
        scale = torch.float16 if zero == torch.float16 else (torch.bfloat16, torch.float32)[bits % 2]
        yield meta_weight(256, 512, bits, size, zero=zero, scale=scale), (torch.bfloat16, torch.float16)[bits % 2]
    for bits, table, pick in ((4, 1, None), (8, 1, None), (4, 256, None), (4, 4, torch.uint8)):
        yield meta_weight(256, 512, bits, 32, table=table, pick=pick), torch.bfloat16


def needs_compiler() -> None:
    try:
        nvrtc.compiler()
    except ImportError as error:
        pytest.skip(f"needs NVRTC: {error}")


def test_every_kind_of_weight_compiles_without_spills() -> None:
    needs_compiler()
    for weight, dtype in kinds():
        config = deepest(weight, SMALL)
        assert config is not None
        log = ptxas_log(defines(weight, config, dtype))
        assert " 0 bytes spill stores" in log and "C75" not in log, (weight.bits, weight.group_size, log)


def test_every_cut_compiles_without_spills() -> None:
    needs_compiler()
    weight = meta_weight(1024, 1024)
    found = [config for M in (16, 20, 60, 100, 600) for config in cuda_wgmma.candidates(weight, M)]
    every = {(config.tokens, config.warpgroups, config.blocks, config.resident): config for config in found}
    assert {cut[1:] for cut in every} == {cut[1:] for cut in CUTS}
    for config in every.values():
        log = ptxas_log(defines(weight, config, torch.bfloat16))
        assert " 0 bytes spill stores" in log and "C75" not in log, (config, log)


# ---- on a GPU ------------------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu
CONFIGS = [
    SMALL,
    Config(tokens=64, warpgroups=3, batch=2, w_tiles=2, x_stages=4, w_stages=2),
    Config(tokens=32, blocks=2, split=3, x_stages=4, w_stages=2),
    Config(tokens=64, share=2, split=2, x_stages=4, w_stages=2, batch=8),
    Config(tokens=48, resident=2, batch=2, x_stages=3, w_stages=2),
    Config(tokens=256, lead=2, x_stages=4, w_stages=2),
]


VARIANTS = [
    (128, "none", torch.bfloat16),
    (32, "integer", torch.float16),
    (48, "float", torch.float32),
    (0, "integer", torch.bfloat16),
    (16, "none", torch.float32),
    (256, "float", torch.bfloat16),
]
"""Group size, zero point and scale type."""


@pytest.fixture(scope="module")
def hopper() -> None:
    """Skips on other devices; compiles what the tests will ask for side by side."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.0")
    wanted = [
        (SOURCE, defines(weight_of(200, 700, bits, *kind), small_for(bits, kind[0]), dtype_of(bits + place)))
        for bits in range(1, 9)
        for place, kind in enumerate(VARIANTS)
    ]
    sources.compile_ahead(wanted, HOPPER, workers=16)


def dtype_of(number: int) -> torch.dtype:
    return (torch.bfloat16, torch.float16)[number % 2]


def small_for(bits: int, size: int) -> Config:
    return deepest(meta_weight(200, 700, bits, size), SMALL) or SMALL


def weight_of(N: int, K: int, bits: int, size: int, zero: str, dtype: torch.dtype, seed: int = 0) -> TileWeight:
    """Random codes; scales of one sign; zero points among the codes, or between them."""
    generator = torch.Generator("cuda").manual_seed(N + 31 * K + bits + seed)
    codes = torch.randint(0, 1 << bits, (N, K), device="cuda", generator=generator, dtype=torch.uint8)
    G = -(-K // size) if size else 1
    scale = (0.5 + torch.rand(N, G, device="cuda", generator=generator)).to(dtype) / 8
    held = torch.randint(0, 1 << bits, (N, G), device="cuda", generator=generator)
    zeros = {"none": None, "integer": held.to(torch.uint8), "float": (held + 0.375).to(dtype)}[zero]
    return TileWeight(
        codes=tiles.pack_tiles(codes, bits),
        scale=tiles.pack_rows_of_tiles(scale),
        zero=None if zeros is None else tiles.pack_rows_of_tiles(zeros),
        table=None,
        pick=None,
        group_size=size,
        N=N,
        K=K,
    )


def dense64(weight: TileWeight) -> torch.Tensor:
    """The weight in float64, from the definition."""
    N, K, size = weight.N, weight.K, weight.group_size or weight.K
    codes = tiles.unpack_tiles(weight.codes, weight.bits, N, K)

    def spread(values: torch.Tensor) -> torch.Tensor:
        return tiles.unpack_rows_of_tiles(values, N).repeat_interleave(size, 1)[:, :K]

    scale = spread(weight.scale).double()
    if weight.table is not None:
        row = torch.arange(N, device="cuda")[:, None] if weight.table.shape[0] > 1 else torch.zeros(1, 1, device="cuda").long()
        which = spread(weight.pick).long() if weight.pick is not None else row
        return weight.table.double()[which, codes.long()] * scale
    zero = float(1 << (weight.bits - 1)) if weight.zero is None else spread(weight.zero).double()
    return (codes.double() - zero) * scale


def check(weight: TileWeight, config: Config, M: int, dtype: torch.dtype, bias: bool = False) -> None:
    """Against float64, twice, with NaN where nothing may be written."""
    x = torch.randn(M, weight.K, device="cuda", generator=torch.Generator("cuda").manual_seed(M)).to(dtype)
    b = torch.randn(weight.N, device="cuda").to(dtype) if bias else None
    plan = Plan(weight, config, M, dtype)
    assert plan.function.attribute("local_bytes") == 0, config
    found = []
    for _ in range(2):
        y = torch.full((M + 1, weight.N), torch.nan, dtype=dtype, device="cuda")
        plan(x, b, y[:M])
        assert y[M].isnan().all(), f"{config} writes past the last token"
        found.append(y[:M])
    wanted = x.double() @ dense64(weight).T + (0 if b is None else b.double())
    error = ((found[0].double() - wanted).norm() / wanted.norm()).item()
    worst = divmod(int((found[0].double() - wanted).abs().nan_to_num(torch.inf).argmax()), weight.N)
    what = f"{weight.bits} bits g{weight.group_size} [{M}, {weight.N}, {weight.K}] {dtype} {config}"
    assert error <= BOUND[dtype] * (1 if wanted.numel() >= 32 else 4), f"{what}: {error:.2e}, worst at {worst}"
    assert torch.equal(found[0], found[1]), f"{what}: two runs differ"


@gpu
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_against_float64(hopper: None, bits: int) -> None:
    for place, (size, zero, scale) in enumerate(VARIANTS):
        for N, K, M in ((200, 700, 40), (33, 128, 17)):
            weight = weight_of(N, K, bits, size, zero, scale)
            check(weight, small_for(bits, size), M, dtype_of(bits + place), bias=M == 40)


@gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_cut_on_ragged_shapes(hopper: None, config: Config) -> None:
    for (N, K), M in itertools.product([(1, 512), (520, 1032), (1000, 2049)], [17, 300]):
        check(weight_of(N, K, 4, 128, "none", torch.bfloat16), config, M, torch.bfloat16, bias=M == 17)


@gpu
def test_the_configurations_that_the_rule_chooses(hopper: None) -> None:
    for N, K, M in ((4096, 1024, 16), (4096, 2048, 100), (1536, 576, 700), (576, 1536, 2000), (49152, 576, 33)):
        weight = weight_of(N, K, 4, 64, "integer", torch.bfloat16)
        config = choose_config(weight, M, torch.cuda.get_device_properties(0).multi_processor_count)
        assert config is not None
        check(weight, config, M, torch.bfloat16)


@gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scope", ["tensor", "row", "group"])
def test_tables(hopper: None, bits: int, scope: str) -> None:
    if bits == 8 and scope == "row":
        pytest.skip("one table of 256 entries for each row does not fit; refused")
    for dtype, size in itertools.product((torch.bfloat16, torch.float16), (32, 0)):
        plain = weight_of(100, 700, bits, size, "none", torch.float32)
        R, G = plain.scale.shape[:2]
        count = {"tensor": 1, "row": R * 16, "group": 4}[scope]
        pick = torch.randint(0, 4, (R, G, 16), device="cuda", dtype=torch.uint8) if scope == "group" else None
        table = torch.randn(count, 1 << bits, device="cuda").to(torch.float16)
        held = {name: getattr(plain, name) for name in ("codes", "scale", "zero", "group_size", "N", "K")}
        check(TileWeight(table=table, pick=pick, **held), SMALL, 40, dtype)


def chain(plans: list[Plan], start: torch.Tensor, steps: list[torch.Tensor], apart: bool = False) -> None:
    """Each layer eats the one before it; now and then another kernel stands between."""
    for place, step in enumerate(steps):
        plans[place % len(plans)](steps[place - 1] if place else start, None, step)
        if place % 7 == 3:
            step.clamp_(-4, 4)
        if apart:
            torch.cuda.synchronize()


@gpu
def test_overlapped_replays_give_the_bits_of_single_launches(hopper: None) -> None:
    weights = [weight_of(1024, 1024, 4, 128, "none", torch.bfloat16, seed) for seed in range(4)]
    for config in (CONFIGS[0], CONFIGS[2], CONFIGS[3], Config(tokens=32, resident=2, batch=4, x_stages=4, w_stages=3)):
        plans = [Plan(weight, config, 48, torch.bfloat16) for weight in weights]
        start = torch.randn(48, 1024, device="cuda").bfloat16()
        steps = [torch.empty_like(start) for _ in range(20)]

        chain(plans, start, steps, apart=True)
        wanted = [step.clone() for step in steps]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain(plans, start, steps)
        for _ in range(50):
            for step in steps:
                step.fill_(torch.nan)
            graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(steps, wanted, strict=True)), config


@gpu
def test_inf_and_nan_stay_in_their_tokens(hopper: None) -> None:
    weight = weight_of(300, 700, 4, 128, "none", torch.bfloat16)
    x = torch.randn(40, 700, device="cuda").bfloat16()
    x[3, 5], x[17, 699], x[39, 0] = torch.inf, torch.nan, -torch.inf
    y = torch.empty(40, 300, device="cuda", dtype=torch.bfloat16)
    Plan(weight, SMALL, 40, torch.bfloat16)(x, None, y)
    wanted = x.double() @ dense64(weight).T
    assert torch.equal(y.isfinite(), wanted.isfinite()) and torch.equal(y.isnan(), wanted.isnan())
    clean = wanted.isfinite().all(1)
    assert (y[clean].double() - wanted[clean]).norm() <= BOUND[torch.bfloat16] * wanted[clean].norm()


@gpu
def test_misaligned_and_strided_inputs(hopper: None) -> None:
    weight = weight_of(128, 640, 4, 128, "none", torch.bfloat16)
    plan = Plan(weight, SMALL, 20, torch.bfloat16)
    room = torch.randn(20 * 640 + 3, device="cuda").bfloat16()
    for x in (room[3:].view(20, 640), torch.randn(640, 20, device="cuda").bfloat16().T):
        y = torch.full((20, 128), torch.nan, device="cuda", dtype=torch.bfloat16)
        plan(x, None, y)
        wanted = x.double() @ dense64(weight).T
        assert (y.double() - wanted).norm() <= BOUND[torch.bfloat16] * wanted.norm()


@gpu
def test_more_than_two_to_the_31_outputs(hopper: None) -> None:
    N, K, M = 139264, 128, 16384
    weight = weight_of(N, K, 4, 128, "none", torch.bfloat16)
    x = torch.randn(M, K, device="cuda").bfloat16()
    y = torch.full((M, N), torch.nan, device="cuda", dtype=torch.bfloat16)
    Plan(weight, Config(tokens=256, x_stages=4, w_stages=2, lead=2), M, torch.bfloat16)(x, None, y)
    assert not y.isnan().any()
    wanted = x[-50:].double() @ dense64(weight)[-1000:].T
    assert (y[-50:, -1000:].double() - wanted).norm() <= BOUND[torch.bfloat16] * wanted.norm()
