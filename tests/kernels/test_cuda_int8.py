"""The matmul with int8 activations without a GPU: its integers are those of the reference, codes are found where the kernel
looks for them, its second rounding stays within its bound, and it compiles as meant."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from tests.kernels.test_cuda_sources import needs_nvrtc
from tests.kernels.tile_weights import dense64

from aerogel.errors import RunFailed
from aerogel.kernels.cuda import nvrtc, sources
from aerogel.kernels.dispatch import explain
from aerogel.kernels.gemm import cuda_bytes, cuda_int8, cuda_quantize, cuda_wgmma_plan, cuda_wgmma_table
from aerogel.kernels.gemm.cuda_made import ACTS, Gated, Normed
from aerogel.kernels.gemm.cuda_quantize import E4M3, INT8, ROUNDED, Quantizer
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.cuda_wgmma import defines, fits
from aerogel.kernels.problem import Problem
from aerogel.pack import tiles
from aerogel.quantize.grids import IntGrid

HOPPER = (9, 0)
KINDS = [(bits, size, zero) for bits in range(1, 9) for size, zero in ((128, False), (32, True), (96, False), (0, False))]


def weight_of(bits: int, size: int, zero: bool, N: int = 33, K: int = 200, seed: int = 0) -> TileWeight:
    """Random codes, scales of either sign that differ tenfold, zero points among the codes."""
    generator = torch.Generator().manual_seed(bits + size + seed)
    G = -(-K // size) if size else 1
    codes = torch.randint(0, 1 << bits, (N, K), generator=generator, dtype=torch.uint8)
    scale = (0.1 + torch.rand(N, G, generator=generator)) * torch.where(torch.rand(N, G, generator=generator) < 0.5, -1, 1)
    held = torch.randint(0, 1 << bits, (N, G), generator=generator, dtype=torch.uint8)
    return TileWeight(
        codes=tiles.pack_tiles(codes, bits),
        scale=tiles.pack_rows_of_tiles(scale.bfloat16()),
        zero=tiles.pack_rows_of_tiles(held) if zero else None,
        table=None,
        pick=None,
        group_size=size,
        N=N,
        K=K,
    )


@pytest.mark.parametrize(("bits", "size", "zero"), KINDS)
def test_the_second_rounding_stays_within_its_bound(bits: int, size: int, zero: bool) -> None:
    weight = weight_of(bits, size, zero, N=64, K=512)
    r = cuda_int8.row_scale(weight)
    w8 = cuda_int8.two_step(weight, r)
    wanted = dense64(weight)
    off = w8.double() * r[: weight.N, None].double() - wanted
    if size == 0:
        assert not off.any()
        return
    unit = r[: weight.N, None].double()
    assert bool((off.abs() <= (0.51 + 2.0**bits / 256) * unit).all())
    assert int(w8.int().abs().max()) <= 127
    if bits <= 4:
        assert float(off.norm() / wanted.norm()) < cuda_int8.TWO_STEP


def fragments(weight: TileWeight, r: torch.Tensor) -> torch.Tensor:
    """w8 [N, K] put together from the words that the kernel reads, with the arithmetic of fragment8.cuh in 32 bits."""
    N, K, bits = weight.N, weight.K, weight.bits
    R, C = weight.codes.shape[:2]
    out = torch.zeros(R * 16, C * 128, dtype=torch.int64)
    widths = tiles.pieces(bits)
    lane = torch.arange(32)
    for tile in range(R):
        for k in range(C):
            raw = weight.codes[tile, k].long()
            for step in range(8):  # of 16 columns; two make a step of the integer tensor cores
                for h in range(2):
                    u = bytes_of(raw, widths, step, h, lane)
                    rows = tile * 16 + lane // 4 + 8 * h
                    value = signed_bytes(weight, r, u, rows, k * 128 + 16 * step)
                    for byte in range(4):
                        # What quantize.cu puts at 4t + byte is column 2t + byte / 2 + 8 * (byte % 2).
                        columns = k * 128 + 16 * step + 2 * (lane % 4) + byte // 2 + 8 * (byte % 2)
                        out[rows, columns] = value[:, byte]
    return out[:N, :K].to(torch.int8)


def bytes_of(raw: torch.Tensor, widths: tuple[int, ...], step: int, h: int, lane: torch.Tensor) -> torch.Tensor:
    """uint32 words with one code in each byte, as `bytes_of` of the source."""
    found = torch.zeros(32, dtype=torch.int64)
    begin, place = 0, 0

    def word(at: torch.Tensor) -> torch.Tensor:
        return raw[at] | raw[at + 1] << 8 | raw[at + 2] << 16 | raw[at + 3] << 24

    for width in widths:
        if width == 4:
            v = word(begin + 512 * (step // 4) + 16 * lane + 4 * (step % 4)) >> 4 * h & 0x0F0F0F0F
        elif width == 3:
            three = [word(16 * lane + 4 * at if at < 4 else 512 + 8 * lane + 4 * (at - 4)) for at in range(6)][step // 4 * 3 :]

            def pair(f: int, three: list[torch.Tensor] = three) -> torch.Tensor:
                if f < 15:
                    return three[f // 5] >> 3 * (f % 5) & 0x00070007
                return sum((three[b] >> (15 - b) & 0x00010001 << b for b in range(3)), torch.zeros(32, dtype=torch.int64))

            v = pair(4 * (step % 4) + h) | pair(4 * (step % 4) + h + 2) << 8
        elif width == 2:
            w = word(begin + 16 * lane + 4 * (step // 2)) >> (8 * (step % 2) + 2 * h)
            v = (w & 0x00030003) | (w & 0x00300030) << 4
        else:
            w = word(begin + 8 * lane + 4 * (step // 4)) >> (4 * (step % 4) + h)
            v = (w & 0x00010001) | (w & 0x00040004) << 6
        found |= v << place
        begin, place = begin + 256 * width, place + width
    return found


def signed_bytes(weight: TileWeight, r: torch.Tensor, u: torch.Tensor, rows: torch.Tensor, column: int) -> torch.Tensor:
    """int [32, 4]: the four bytes of each lane's register."""
    group = column // weight.group_size if weight.group_size else 0
    group = min(group, weight.groups - 1)  # columns beyond K meet activations that are zero
    flat = lambda values: values[:, group].reshape(-1)[rows]  # noqa: E731
    z = flat(weight.zero).long() if weight.zero is not None else torch.full((32,), 1 << (weight.bits - 1))
    mask = (1 << 32) - 1
    if weight.group_size == 0:
        centre = 0x80808080 if weight.bits == 8 else z * 0x01010101
        packed = (((u | 0x80808080) - centre) & mask) ^ 0x80808080 if weight.bits < 8 else u ^ centre
    else:
        m = 2 * (flat(weight.scale).float() * (128.0 / r[rows])).round().long()
        c = ((129 - z * m) * 0x10001) & mask
        even = ((u & 0x00FF00FF) * m + c) & mask
        odd = ((u >> 8 & 0x00FF00FF) * m + c) & mask
        packed = (even >> 8 & 255) | (odd >> 8 & 255) << 8 | (even >> 24 & 255) << 16 | (odd >> 24 & 255) << 24
    found = torch.stack([packed >> 8 * byte & 255 for byte in range(4)], 1)
    return torch.where(found > 127, found - 256, found)


@pytest.mark.parametrize(("bits", "size", "zero"), [*KINDS, (4, 0, True), (3, 0, True)])
def test_the_kernels_words_are_the_references_integers(bits: int, size: int, zero: bool) -> None:
    weight = weight_of(bits, size, zero, N=20, K=150)
    r = cuda_int8.row_scale(weight)
    assert torch.equal(fragments(weight, r), cuda_int8.two_step(weight, r))


def test_rows_of_zeros_have_a_scale() -> None:
    weight = weight_of(4, 32, False)
    weight = replace(weight, scale=torch.zeros_like(weight.scale))
    r = cuda_int8.row_scale(weight)
    assert bool((r == 1).all())
    assert not cuda_int8.two_step(weight, r).any()


def test_refusals_name_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aerogel.kernels.gpu_here.nvidia_missing", lambda: None)

    def reason(grid: IntGrid, **more: object) -> str | None:
        given = {"N": 64, "K": 256, "dtype": torch.bfloat16, "device": "cuda", "activations": "int8", **more}
        return cuda_int8.CudaInt8.refuses(Problem(format="pack-quantized", grid=grid, **given))

    assert reason(IntGrid(bits=4, group_size=128)) is None
    assert reason(IntGrid(bits=8)) is None
    assert "multiple of 32" in (reason(IntGrid(bits=4, group_size=48)) or "")
    assert "signed byte" in (reason(IntGrid(bits=8, symmetric=False)) or "")
    assert "32 bits" in (reason(IntGrid(bits=4), K=cuda_int8.LONGEST_K + 1) or "")
    assert "activations: int8" in (reason(IntGrid(bits=4), activations="none") or "")
    found = dict(explain(Problem(format="pack-quantized", grid=IntGrid(bits=4), N=64, K=256, activations="int8")))
    assert "device cuda" in (found["cuda-int8"] or "") and found["reference"] is None


def random_shape(N: int, K: int, bits: int, size: int) -> TileWeight:
    R, C = tiles.tile_counts(N, K)
    scale = torch.empty(R, -(-K // size) if size else 1, 16, dtype=torch.bfloat16, device="meta")
    codes = torch.empty(R, C, 256 * bits, dtype=torch.uint8, device="meta")
    return TileWeight(codes=codes, scale=scale, zero=None, table=None, pick=None, group_size=size, N=N, K=K)


def test_cuts_fit_and_16_bits_are_left_to_where_they_are_faster() -> None:
    for N, K, bits, size in ((1, 1, 4, 128), (4096, 4096, 4, 128), (57344, 8192, 4, 32), (8192, 28672, 8, 0), (300, 99, 1, 64)):
        weight = random_shape(N, K, bits, size)
        for M in (97, 512, 4096, 1 << 16):
            config = cuda_int8.choose_config(weight, M, 132)
            assert config is None or fits(weight, config)
    # As measured on an H100: few rows for many multiprocessors, and all of them busy.
    assert cuda_int8.choose_config(random_shape(4096, 14336, 4, 128), 128, 132) is None
    assert cuda_int8.choose_config(random_shape(4096, 14336, 4, 128), 512, 132) is not None
    assert cuda_int8.choose_config(random_shape(28672, 4096, 4, 128), 128, 132) is not None
    for N, K in ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)):
        many, fewer = (cuda_int8.choose_config(random_shape(N, K, 8, 0), M, 132) for M in (4096, 1024))
        assert many is not None and fewer is not None and (many.tokens, many.share, many.batch) == (256, 2, 4)
        assert fewer.share == 1


def test_cuts_whose_blocks_share_columns_fit_and_keep_the_device_busy() -> None:
    for N, K in ((16, 128), (4096, 4096), (57344, 8192), (8192, 28672), (300, 99), (33, 14336)):
        held = replace(random_shape(N, K, 8, 0), in_bytes=True)
        for M in (9, 16, 17, 48, 96, 128):
            found = cuda_bytes.candidates(held, M, 132)
            assert found and all(fits(held, config) and config.tokens >= M for config in found)
    # As measured on an H200: blocks of 64 rows, two on a multiprocessor, and clusters share K where these are too few.
    few = cuda_bytes.choose_config(replace(random_shape(4096, 4096, 8, 0), in_bytes=True), 64, 132)
    assert few is not None and (few.warpgroups, few.resident) == (1, 2) and few.split > 1
    many = cuda_bytes.choose_config(replace(random_shape(28672, 4096, 8, 0), in_bytes=True), 64, 132)
    assert many is not None and many.split == 1


def test_bytes_serve_where_they_are_faster_and_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    eight, four, grouped = (random_shape(4096, 4096, *kind) for kind in ((8, 0), (4, 0), (8, 128)))

    def served(weight: TileWeight, M: int) -> bool:
        return len(cuda_int8.cuts_in_bytes(weight, M, "nowhere", 132)) > 0

    assert [served(eight, M) for M in (1, 8, 9, 64, 96, 128, 512)] == [False, False, True, True, True, True, True]
    assert not any(served(weight, M) for weight in (four, grouped) for M in (9, 96))
    entry = {"config": {"tokens": 64, "split": 2, "batch": 2}, "us": 9.0, cuda_bytes.SIXTEEN: 10.0}
    monkeypatch.setattr(cuda_wgmma_table, "table", lambda _: {"8a/g0/4096x4096": {"64": entry}})
    assert [config.split for _, config in cuda_int8.cuts_in_bytes(eight, 50, "here", 132)] == [2]
    monkeypatch.setitem(entry, "us", 11.0)
    assert not served(eight, 50) and served(eight, 33)


@needs_nvrtc
@pytest.mark.parametrize("place", range(4))
def test_every_cut_and_every_kind_compile(place: int) -> None:
    """How codes become bytes and how the tile is cut are different parts of the source: each cut with one kind of weight."""
    weight = weight_of(*[(4, 128, False), (8, 0, False), (3, 32, True), (4, 0, True)][place])
    for numbers in cuda_int8.CUTS[place::4]:
        config = cuda_int8.cut(weight, *numbers)
        assert config is not None
        macros = defines(weight, config, torch.bfloat16) | {"INT8": 1}
        nvrtc.compiler().compile("wgmma.cu", sources.sources_of("wgmma.cu"), macros, HOPPER)


@needs_nvrtc
def test_warpgroups_of_bytes_are_not_staggered() -> None:
    weight = weight_of(4, 128, False)
    config = cuda_int8.cut(weight, 256, 1, 1, 2)
    assert config is not None
    macros = defines(weight, replace(config, lead=3), torch.bfloat16) | {"INT8": 1}
    with pytest.raises(RunFailed, match="LEAD must be 0"):
        nvrtc.compiler().compile("wgmma.cu", sources.sources_of("wgmma.cu"), macros, HOPPER)


def test_argument_blocks_are_those_of_the_sources() -> None:
    for module, name in ((cuda_quantize, "quantize.cu"), (cuda_wgmma_plan, "wgmma_work.cuh")):
        body = re.search(r"struct (?:alignas\(64\) )?Arguments \{(.*?)\};", sources.texts()[name], re.DOTALL)
        assert body is not None
        fields = re.findall(r"\*?\s*(\w+)\s*[,;]", re.sub(r"//.*", "", body[1]))
        ours = [entry[0].removesuffix("_map") for entry in module.Arguments._fields_ if entry[0] != "padding"]
        assert fields == ours


@needs_nvrtc
@pytest.mark.parametrize("columns", [128, 14336])
def test_the_quantizer_compiles(columns: int) -> None:
    x, u, bf16 = torch.zeros(2, 64).bfloat16(), torch.zeros(64), torch.bfloat16
    made = [Normed(x, u, 1e-5, True), Normed(x, x[0], 1e-5, False), *(Gated(x, x, act) for act in ACTS)]
    wanted = [(INT8, bf16, tuple(one.macros().items())) for one in made]
    wanted += [(output, dtype, ()) for output in (INT8, E4M3, ROUNDED) for dtype in (bf16, torch.float16)]
    for output, dtype, kind in wanted:
        quantizer = Quantizer(dtype=dtype, device=torch.device("cuda"), output=output, columns=columns, permuted=output == INT8)
        macros = cuda_quantize.macros(quantizer, columns - columns % 3, kind)
        assert macros["THREADS"] % 32 == 0 and not macros["LONGER"]
        for capability in ((9, 0),) if columns > 128 else ((8, 0), (10, 0)) if output != E4M3 else ((8, 9),):
            nvrtc.compiler().compile("quantize.cu", sources.sources_of("quantize.cu"), macros, capability)
