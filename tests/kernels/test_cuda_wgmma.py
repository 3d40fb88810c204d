"""The many-token kernel without a GPU: refusals, choices, plans, and that it compiles as meant.

Plans are made and called with a stand-in for the driver, which notes the tensor maps and launches it is asked for. Where
NVRTC can be loaded every cut is compiled for sm_90a: without spilled registers, and without a warning that the compiler
serialised the matrix instructions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.kernels.cuda import nvrtc, sources
from aerogel.kernels.gemm import cuda_wgmma, cuda_wgmma_table
from aerogel.kernels.gemm.cuda_outliers import SHEET_ROWS, TileOutliers
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.cuda_wgmma import CUTS, SOURCE, Config, ManyTokens, choose_config, deepest, defines, fits
from aerogel.kernels.gemm.cuda_wgmma_plan import Parts, Plan
from aerogel.kernels.gemm.cuda_wgmma_rounds import in_rounds
from aerogel.kernels.gemm.plane_tables import OF_ROWS
from aerogel.pack import tiles

HOPPER = (9, 0)
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


def meta_outliers(N: int, K: int, E: int) -> TileOutliers:
    """So many outliers without data."""
    T = -(-N // SHEET_ROWS) * tiles.tile_counts(N, K)[1]
    made = TileOutliers.given([torch.empty(size, dtype=torch.int32, device="meta") for size in (2 * N + 1, E, T + 1, E)])
    assert made is not None
    return made


def test_refuses_other_devices_and_few_tokens() -> None:
    weight = meta_weight(4096, 4096)
    assert "compute capability 9.0" in (ManyTokens.refuses(weight, 64, torch.bfloat16, (8, 0)) or "")
    assert "compute capability 9.0" in (ManyTokens.refuses(weight, 64, torch.bfloat16, (10, 0)) or "")
    assert "17 tokens" in (ManyTokens.refuses(weight, 16, torch.bfloat16, HOPPER) or "")
    assert ManyTokens.refuses(weight, 17, torch.bfloat16, HOPPER) is None


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
    assert len(entries) >= 82
    for key, by_tokens in entries.items():
        named, group, shape = key.split("/")
        kind, beside = named.rstrip("aoei"), named[-1] if named[-1] in "aoei" else ""
        N, K = (int(size) for size in shape.split("x"))
        kinds: dict[str, dict[str, Any]] = {
            "4t": {"table": 1},
            "8t": {"table": 1},
            "4r": {"table": N},
            "4p": {"table": 2, "pick": torch.uint8},
            "4f": {"scale": torch.uint8},
            "4z": {"zero": torch.uint8},
            "4b": {"scale": OF_ROWS, "zero": torch.bfloat16},
        }
        bits, held = int(kind[0]), kinds.get(kind, {})
        weight = replace(meta_weight(N, K, bits, int(group[1:]), **held), floats={"4f": 1, "8f": 3}.get(kind, 0))
        if beside == "a":
            weight = replace(weight, in_bytes=True)
        elif beside:
            outliers = meta_outliers(N, K, N * K // 100)
            weight = replace(weight, outliers=outliers, exact=beside in "ei", in_bytes=beside == "i")
        assert key == cuda_wgmma_table.place_of(weight)
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


@pytest.mark.parametrize("M", [40, 128])
def test_kernels_are_known_before_the_weight_is_there(M: int, fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    kernel = SimpleNamespace(handle=None, name="packed_matmul", allow_shared=lambda size: None)
    monkeypatch.setattr("aerogel.kernels.gemm.cuda_wgmma_plan.function", lambda *found: asked.append(found) or kernel)
    for N, K, launches in ((321, 256, 1), (57344, 8192, 2)):
        said = ManyTokens.kernels(meta_weight(N, K), M, torch.bfloat16, torch.device("cuda", 0))
        asked.clear()
        ManyTokens.plan(cpu_weight(N, K), M, torch.bfloat16)
        assert [tuple(wanted) for wanted in said] == [found[:3] for found in asked]
        assert len(said) == launches


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
    plain = meta_weight(4096, 4096)
    beside = replace(plain, outliers=meta_outliers(4096, 4096, 4096 * 41))
    found = [cuda_wgmma_table.cuts_for(weight, 64, "NVIDIA H100 80GB HBM3")[0][1] for weight in (plain, beside)]
    assert [config.x_stages for config in found] == [8, 3]


@pytest.mark.parametrize("M", [64, 128])
@pytest.mark.parametrize("multiprocessors", [114, 132])
@pytest.mark.parametrize("N", [1 << 17, 59136, 51200, 33792, 28672, 1000])
def test_a_badly_filled_round_gets_smaller_tiles(N: int, multiprocessors: int, M: int) -> None:
    """All rows once, whole rounds first, then tiles that fill no more than one round."""
    weight, config = meta_weight(N, 8192), Config(tokens=M, blocks=2, x_stages=8, w_stages=4)
    cuts = in_rounds(weight, config, M, multiprocessors)
    assert sum(rows for rows, _ in cuts) == N and cuts[0][1] == config
    if len(cuts) == 1:
        assert N not in (59136, 51200) or multiprocessors == 114
        return
    (first, _), (rest, smaller) = cuts
    assert first % (256 * multiprocessors) == 0 and smaller.row_tiles < config.row_tiles and smaller.tokens == M
    assert -(-rest // (16 * smaller.row_tiles)) <= multiprocessors and fits(weight, smaller)


def test_rounds_that_are_full_or_shared_stay_one_launch() -> None:
    config = Config(tokens=128, blocks=2, x_stages=8, w_stages=4)
    assert [rows for rows, _ in in_rounds(meta_weight(57344, 8192), config, 128, 132)] == [33792, 23552]
    assert len(in_rounds(meta_weight(2 * 33792, 8192), config, 128, 132)) == 1
    for other in (replace(config, split=2), replace(config, share=2), replace(config, tokens=64)):
        assert in_rounds(meta_weight(57344, 8192), other, 128, 132) == [(57344, other)]
    assert in_rounds(meta_weight(57344, 8192, bits=3), config, 128, 132) == [(57344, config)]
    assert len(in_rounds(meta_weight(57344, 8192, table=1), replace(config, w_stages=2), 128, 132)) == 2
    for M, parts in ((64, 2), (32, 1)):
        [(_, cut)] = cuda_wgmma_table.cuts_for(meta_weight(57344, 8192), M, "NVIDIA H100 80GB HBM3")
        assert len(in_rounds(meta_weight(57344, 8192), cut, M, 132)) == parts


@pytest.mark.parametrize("M", [32, 64, 128])
def test_rows_beside_outliers_are_cut_as_measured_or_as_estimated(M: int) -> None:
    beside = replace(meta_weight(57344, 8192), outliers=meta_outliers(57344, 8192, 1 << 22))
    cuts = cuda_wgmma_table.cuts_for(beside, M, "NVIDIA H100 80GB HBM3")
    assert len(cuts) == (2 if M == 32 else 1)
    cuts = in_rounds(beside, cuts[0][1], M, 132) if len(cuts) == 1 else cuts
    assert [rows for rows, _ in cuts] == [33792, 23552] and [cut.row_tiles for _, cut in cuts] == [16, 12]


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


@pytest.mark.parametrize("cut", [(2, 1, 1), (2, 2, 1), (3, 1, 1), (4, 1, 1), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_cuts_with_outliers_compile_without_spills(cut: tuple[int, int, int], exact: bool) -> None:
    """More than two pairs of sheets have a warpgroup that fills them; with inputs of their own they are multiplied apart."""
    needs_compiler()
    weight = replace(meta_weight(1024, 1024), outliers=meta_outliers(1024, 1024, 1 << 14), exact=exact)
    warpgroups, blocks, resident = cut
    tokens = 32 if exact and resident > 1 else 64
    config = deepest(weight, Config(tokens=tokens, warpgroups=warpgroups, blocks=blocks, resident=resident, batch=2))
    assert config is not None and fits(weight, config)
    assert cuda_wgmma.threads_of(weight, config) == 128 * (warpgroups + (2 if warpgroups * blocks > 2 else 1))
    log = ptxas_log(defines(weight, config, torch.bfloat16))
    assert " 0 bytes spill stores" in log and "C75" not in log, (config, log)


@pytest.mark.parametrize("tables", [1, 1024])
def test_cuts_of_tables_compile_without_spills(tables: int) -> None:
    needs_compiler()
    weight = meta_weight(1024, 1024, table=tables)
    for config in (config for M in (20, 60) for config in cuda_wgmma.candidates(weight, M) if config.warpgroups == 4):
        log = ptxas_log(defines(weight, config, torch.bfloat16))
        assert " 0 bytes spill stores" in log and "C75" not in log, (config, log)


def test_no_more_registers_are_taken_than_a_block_begins_with() -> None:
    """A warpgroup that asks for what is not there waits for ever."""
    beside = ((1, 0, cuda_wgmma.REGISTERS), (1, 0, cuda_wgmma.REGISTERS_BESIDE))
    for others, filler, cuts in (*beside, (2, cuda_wgmma.FILLER_REGISTERS, cuda_wgmma.REGISTERS_APART)):
        for (warpgroups, resident), (producer, consumer) in cuts.items():
            threads = 128 * (warpgroups + others)
            begun = 65536 // (resident * threads) // 8 * 8 * threads
            assert 128 * (producer + warpgroups * consumer + filler) <= begun, (warpgroups, resident, others)
