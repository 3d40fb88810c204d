"""Outliers beside a few tokens: a cut for whatever is taken, and on a GPU right sums wherever the outliers are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.gemm import cuda_apart, cuda_table
from aerogel.kernels.gemm.cuda import choose
from aerogel.kernels.gemm.cuda_dense import dequantize
from aerogel.kernels.gemm.cuda_few import (
    LANE_TOKENS,
    SHARED_LIMIT,
    Config,
    Few,
    default_config,
    fits,
    grid_of,
    most_outlier_tokens,
    outlier_tokens,
    takes_patches,
)
from aerogel.kernels.gemm.cuda_few_plan import Plan
from aerogel.kernels.gemm.cuda_outliers import Apart, TileOutliers
from aerogel.kernels.gemm.cuda_table import config_for, has_apart_cut, has_patch_cut, table
from aerogel.kernels.gemm.cuda_tune import candidates, measure, random_weight, with_outliers
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.cuda_wgmma import CLUSTERS, ManyTokens
from aerogel.pack import tiles
from aerogel.quantize.outliers import Outliers


def weight_of(N: int, K: int, bits: int) -> TileWeight:
    """A weight with outliers on no device, of which shapes alone count."""
    R, C = tiles.tile_counts(N, K)
    nothing = {name: torch.empty(0, dtype=torch.int32) for name in TileOutliers.__slots__}
    return TileWeight(
        codes=torch.empty(R, C, 256 * bits, dtype=torch.uint8, device="meta"),
        scale=torch.empty(R, -(-K // 128), 16, dtype=torch.bfloat16, device="meta"),
        zero=None, table=None, pick=None, group_size=128, N=N, K=K,
        outliers=TileOutliers(**nothing),
    )  # fmt: skip


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_there_is_a_cut_for_all_tokens_that_are_taken(capability: tuple[int, int]) -> None:
    """Whatever is not refused fits, and as many tokens are taken as have their inputs in shared memory."""
    for N, K, bits in itertools.product((16, 4096, 57344), (64, 384, 4096, 4224, 8192, 14336, 28672, 65408), (1, 4, 8)):
        weight = weight_of(N, K, bits)
        most = most_outlier_tokens(weight, capability)
        for M in range(1, most + 1):
            assert fits(weight, default_config(weight, M, capability, 132), M, capability, 132), (N, K, bits, M)
        assert Few.refuses(weight, most + 1, torch.bfloat16, capability) is not None
        assert most in (4, 8, 16) or outlier_tokens(most + 1) * K * 2 > SHARED_LIMIT[capability[0]] // 2
    assert [most_outlier_tokens(weight_of(28672, K, 4), (9, 0)) for K in (4096, 8192, 14336)] == [16, 8, 4]


def few_outliers(N: int, K: int, mask_NK: Tensor) -> tuple[TileWeight, Tensor]:
    """A weight on the GPU with outliers where the mask says so, and what they are, float64 [N, K]."""
    w_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(N)).bfloat16()
    outliers = Outliers.of(w_NK, mask_NK)
    beside = Beside(outliers.start_N1.cuda(), outliers.column_E.cuda(), outliers.value_E.cuda())
    laid = TileOutliers.of(beside, N, K, torch.bfloat16, apart=True, patches=True)
    return replace(random_weight(N, K, 4, 128, "cuda"), outliers=laid), torch.where(mask_NK, w_NK, 0).double()


def most_error(M: int) -> float:
    """What M tokens' outputs may be off by, over their size. With one token and outliers in one row a single output decides,
    and its rounding to bfloat16 alone is up to 1.1e-2 of that."""
    return 6e-3 if M > 1 else 1.2e-2


def masks(N: int, K: int) -> dict[str, Tensor]:
    """Where outliers are: all in one column, all in one row, one in a thousand, in the last rows and columns only, none."""
    column, row, corner = (torch.zeros(N, K, dtype=torch.bool) for _ in range(3))
    column[:, K // 2] = row[N // 2] = corner[-3:, -5:] = True
    few = torch.rand(N, K, generator=torch.Generator().manual_seed(1)) < 1e-3
    return {"column": column, "row": row, "few": few, "corner": corner, "none": torch.zeros_like(row)}


def test_columns_that_are_looked_up_together_lie_in_different_banks() -> None:
    """Each row's outliers are there, and of the four columns of a look-up hardly two are of the same kind."""
    N, K = 64, 4096
    mask_NK = torch.rand(N, K, generator=torch.Generator().manual_seed(3)) < 0.01
    outliers = Outliers.of(torch.ones(N, K).bfloat16(), mask_NK)
    laid = TileOutliers.of(Beside(outliers.start_N1, outliers.column_E, outliers.value_E), N, K, torch.bfloat16)
    assert laid is not None
    quads, waits = (laid.by_row_E.long() & 0xFFFF).reshape(-1, 4), []
    for n in range(N):
        own = quads[laid.start_N1[n] : laid.start_N1[n + 1]]
        assert torch.equal(own[own < K].sort().values, mask_NK[n].nonzero()[:, 0])
        for pair in range(len(own) // 2):
            fours = (own[2 * pair : 2 * pair + 2, e::2] // 2 % 4 for e in range(2))
            waits += [int(four.flatten().bincount().max()) for four in fours]
    assert sum(waits) / len(waits) < 1.5 and max(waits) < 4  # at random it is 2.1


def test_patches_hold_all_outliers_and_lanes_have_their_own_banks() -> None:
    """Each outlier is in its patch with its row, column and value, little is filled up, and the four columns that lanes look up
    at once hardly ever lie in the same banks."""
    N, K = 77, 4096 - 152
    mask_NK = torch.rand(N, K, generator=torch.Generator().manual_seed(3)) < 0.01
    mask_NK[7], mask_NK[9], mask_NK[24:32] = False, True, False
    outliers = Outliers.of(torch.randn(N, K, generator=torch.Generator().manual_seed(4)).bfloat16(), mask_NK)
    laid = TileOutliers.of(Beside(outliers.start_N1, outliers.column_E, outliers.value_E), N, K, torch.bfloat16, patches=True)
    assert laid is not None and laid.patches is not None
    word_ULJ = laid.patches.word_U.long()
    patch_U = torch.arange(len(laid.patches.start_P1) - 1).repeat_interleave(laid.patches.start_P1.long().diff())
    row_ULJ = patch_U[:, None, None] // 4 * 8 + (word_ULJ >> 16 & 7)
    column_ULJ = patch_U[:, None, None] % 4 * 1024 + (word_ULJ >> 22 & 1023)
    value_ULJ = laid.patches.word_U.to(torch.int16).view(torch.bfloat16).double()
    found_NK, wanted_NK = (torch.zeros(80, 4096, dtype=torch.float64) for _ in range(2))
    found_NK.index_put_((row_ULJ.flatten(), column_ULJ.flatten()), value_ULJ.flatten(), accumulate=True)
    wanted_NK[:N, :K][mask_NK] = outliers.value_E.double()
    assert torch.equal(found_NK, wanted_NK) and word_ULJ.numel() * 0.85 < mask_NK.sum()
    at_once = torch.nn.functional.one_hot(column_ULJ // 2 % 4, 4).sum(1).amax(-1).double()
    assert at_once.mean() < 1.3


CUTS = (
    Config(ring=False, row_tiles=2, k_warps=16),
    Config(ring=True, row_tiles=2, k_warps=8, stages=2, x_resident=True),
    Config(ring=True, row_tiles=1, row_warps=2, k_warps=4, stages=2, x_resident=True),
    Config(ring=True, row_tiles=2, k_warps=8, stages=4, x_resident=True, share=2),
    Config(ring=True, row_tiles=2, k_warps=4, stages=3, cluster=2),
    Config(ring=True, row_tiles=2, k_warps=8, stages=2, x_resident=True, share=2, turned=True),
    Config(ring=False, row_tiles=2, k_warps=12, turned=False),
    Config(ring=True, row_tiles=4, k_warps=8, stages=2, x_in_stage=True),
    Config(ring=True, row_tiles=1, k_warps=8, stages=2, share=2),
)
"""Inputs in registers' way, resident, shared by blocks, once more beside those that a cluster's blocks split, turned however
many tokens there are, looked up however few, and added by patches as they come, to two blocks at once too."""
APART_CUTS = (
    Config(ring=False, row_tiles=2, k_warps=8, apart=3),
    Config(ring=True, row_tiles=3, k_warps=4, stages=3, x_in_stage=True, apart=12),
    Config(ring=True, row_tiles=1, row_warps=2, k_warps=4, stages=2, x_resident=True, apart=126),
    Config(ring=True, row_tiles=2, k_warps=8, stages=2, x_in_stage=True, share=2, apart=120),
    Config(ring=True, row_tiles=2, k_warps=4, stages=3, cluster=2, apart=6),
)
"""Blocks of their own for outliers beside each kind of cut; few others, with several row blocks each, and many."""


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    CUTS,
    ids=["registers", "resident", "rows", "share", "cluster", "turned", "looked up", "patches", "shared patches"],
)
def test_cuts_beside_few_outliers(config: Config) -> None:
    """Right sums from every kind of cut, wherever the outliers are; what is not finite stays in its token."""
    for (N, K), which in itertools.product(((77, 904), (1040, 2048)), ("column", "row", "few", "corner", "none")):
        mask_NK = masks(N, K)[which]
        weight, outliers_NK = few_outliers(N, K, mask_NK)
        both_NK = dequantize(replace(weight, outliers=None), torch.bfloat16).double().cpu() + outliers_NK
        for M in (1, 3, 5, 8, 9, 16):
            if M > 8 and not (config.ring and (config.x_resident or config.stages_hold_x)):
                assert not fits(weight, config, M, torch.cuda.get_device_capability(), 132)
                continue
            run = Plan(weight, config, M, torch.bfloat16)
            x_MK = torch.randn(M, K, device="cuda").bfloat16()
            y_MN = torch.full((M, N), float("nan"), device="cuda", dtype=torch.bfloat16)
            run(x_MK, None, y_MN)
            x = x_MK.double().cpu()
            error = (y_MN.double().cpu() - x @ both_NK.T).norm() / (x.square() @ both_NK.T.square()).sqrt().norm()
            assert error <= most_error(M), (N, which, M, float(error))
            again_MN, other_MK = torch.empty_like(y_MN), x_MK.clone()
            run(x_MK, None, again_MN)
            assert torch.equal(again_MN, y_MN)
            other_MK[0, K // 2] = float("inf")
            run(other_MK, None, again_MN)
            assert torch.equal(again_MN[1:], y_MN[1:]) and not again_MN[0].isfinite().any()


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["row", "few", "many"])
def test_patches_of_many_row_blocks(which: str) -> None:
    """Each block has several row blocks and stages, the last one short: right sums, the same bits twice."""
    N, K = 4112, 3200
    mask_NK = torch.rand(N, K, generator=torch.Generator().manual_seed(2)) < 0.03 if which == "many" else masks(N, K)[which]
    weight, outliers_NK = few_outliers(N, K, mask_NK)
    both_NK = dequantize(replace(weight, outliers=None), torch.bfloat16).double() + outliers_NK.cuda()
    one = Config(ring=True, row_tiles=1, k_warps=8, stages=2, x_in_stage=True)
    for config, M in itertools.product((one, replace(one, share=2), replace(one, row_tiles=5)), (3, 8, 11, 16)):
        if not fits(weight, config, M, torch.cuda.get_device_capability(), 132):
            assert config.row_tiles == 5 and M > 8  # registers are all spoken for
            continue
        run = Plan(weight, config, M, torch.bfloat16)
        x_MK = torch.randn(M, K, device="cuda").bfloat16()
        y_MN, again_MN = (torch.full((M, N), float("nan"), device="cuda", dtype=torch.bfloat16) for _ in range(2))
        run(x_MK, None, y_MN)
        run(x_MK, None, again_MN)
        x = x_MK.double()
        error = (y_MN.double() - x @ both_NK.T).norm() / (x.square() @ both_NK.T.square()).sqrt().norm()
        assert error <= 6e-3 and torch.equal(again_MN, y_MN), (config, M, float(error))


def test_groups_of_rows_hold_all_outliers_and_little_else() -> None:
    """Each outlier is in its row and column of the units, and at 1 % they are filled to eight tenths at least;
    columns that are gathered together lie mostly in different banks."""
    N, K = 300, 14336
    mask_NK = torch.rand(N, K, generator=torch.Generator().manual_seed(3)) < 0.01
    mask_NK[7], mask_NK[8, :100] = False, True
    outliers = Outliers.of(torch.randn(N, K, generator=torch.Generator().manual_seed(4)).bfloat16(), mask_NK)
    beside = Beside(outliers.start_N1, outliers.column_E, outliers.value_E)
    laid = TileOutliers.of(beside, N, K, torch.bfloat16, apart=True)
    assert laid is not None and laid.apart is not None
    columns, S = cuda_apart.slice_tiles(K) * tiles.COLUMNS, cuda_apart.slice_count(K)
    start_SG = laid.apart.start_G1.long()[:-1].reshape(S, -1)
    group_U = torch.arange(start_SG.numel()).repeat_interleave(laid.apart.start_G1.long().diff())
    slice_U, piece_U = group_U // start_SG.shape[1], group_U % start_SG.shape[1] // 32
    rows_UG = laid.apart.row_G.reshape(-1, 8)[group_U].long() + 256 * piece_U[:, None]
    column_of = torch.empty(columns, dtype=torch.int64)
    column_of[cuda_apart.places(torch.arange(columns))] = torch.arange(columns)
    words_ULW = laid.apart.unit_U
    found_NK, waits = torch.zeros(512, S * columns, dtype=torch.float64), []
    for product, half, slot in itertools.product(range(4), range(2), range(8)):
        place_U = words_ULW[:, 16 * half + 8 * (product % 2) + slot, 0, product // 2].long()
        g, t = (slot // 2 - product) % 4 + 4 * half, slot // 2
        value_U = words_ULW[:, 4 * g + t, 1, slot % 2].contiguous().view(torch.bfloat16).double()
        found_NK.index_put_((rows_UG[:, g], slice_U * columns + column_of[place_U]), value_U, accumulate=True)
        waits.append(torch.nn.functional.one_hot(place_U % 8, 8))
    wanted_NK = torch.zeros(N, K, dtype=torch.float64)
    wanted_NK[mask_NK] = outliers.value_E.double()
    assert torch.equal(found_NK[:N, :K], wanted_NK) and found_NK.count_nonzero() == wanted_NK.count_nonzero()
    at_once = torch.stack(waits).reshape(8, 8, -1, 8).sum(1).amax(-1).double()
    assert at_once.mean() < 1.7 and 64 * len(words_ULW) * 0.8 < mask_NK.sum()


def test_blocks_apart_are_for_devices_that_have_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured cuts add outliers of many inputs apart, but not where the others would need another round for it."""
    nothing = torch.empty(0, dtype=torch.int32)
    for (N, K), multiprocessors in itertools.product(((8192, 28672), (4096, 14336)), (132, 114)):
        facts = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=multiprocessors)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, facts=facts: facts)
        weight = weight_of(N, K, 4)
        assert weight.outliers is not None
        weight = replace(weight, outliers=replace(weight.outliers, apart=Apart(nothing, nothing, nothing)))
        for M in (8, 16) if K == 14336 else (16,):
            config = config_for(weight, M)
            assert (config.apart > 0) is (multiprocessors == 132)
            assert not config.apart or fits(weight, config, M, (9, 0), multiprocessors)


def test_blocks_apart_run_at_once_with_those_that_wait_for_them() -> None:
    """The search tries the shipped cut of clusters of four, of which an H100 runs all at once."""
    nothing = torch.empty(0, dtype=torch.int32)
    weight = weight_of(4096, 14336, 4)
    assert weight.outliers is not None
    weight = replace(weight, outliers=replace(weight.outliers, apart=Apart(nothing, nothing, nothing)))
    shipped = Config(**table("NVIDIA H100")["o/4/g128/4096x14336/m16"]["config"])
    assert shipped.share == 4 and shipped in candidates(weight, 16, (9, 0), 132)
    assert grid_of(weight, shipped, 132) // 4 <= CLUSTERS[4]


@pytest.mark.parametrize("apart", [True, False])
def test_tokens_go_to_blocks_apart_where_there_is_a_cut(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two kernels that could add the outliers of many inputs one is chosen, by whether a cut for it is known."""
    monkeypatch.setattr(cuda_table, "adds_without_room", lambda weight, M: apart and M <= 16)
    weight = weight_of(8192, 28672, 4)
    for M in (2, 4, 16, 17, 64):
        few = M <= 2 or (apart and M <= 16)
        assert choose(weight, M, torch.bfloat16, (9, 0)) is (Few if few else ManyTokens)


@pytest.mark.gpu
@pytest.mark.parametrize("most_tiles", [cuda_apart.MOST_TILES, 3])
@pytest.mark.parametrize("config", APART_CUTS, ids=["registers", "stages", "resident", "share", "cluster"])
def test_blocks_that_add_outliers_apart(config: Config, most_tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right sums in one and several slices of the inputs, wherever the outliers are, the same bits twice, eagerly
    and in replays of a graph whose launches overlap; what is not finite stays in its token."""
    monkeypatch.setattr(cuda_apart, "MOST_TILES", most_tiles)
    K = 904
    for N, which in ((77, "column"), (1040, "row"), (1040, "few"), (77, "corner"), (77, "none")):
        mask_NK = masks(N, K)[which]
        weight, outliers_NK = few_outliers(N, K, mask_NK)
        both_NK = dequantize(replace(weight, outliers=None), torch.bfloat16).double().cpu() + outliers_NK
        for M in (1, 7, 8, 9, 16):
            facts = torch.cuda.get_device_properties("cuda")
            assert fits(weight, config, M, (facts.major, facts.minor), facts.multi_processor_count)
            run = Plan(weight, config, M, torch.bfloat16)
            x_MK = torch.randn(M, K, device="cuda").bfloat16()
            bias_N = torch.randn(N, device="cuda").bfloat16()
            y_MN = torch.full((M, N), float("nan"), device="cuda", dtype=torch.bfloat16)
            run(x_MK, bias_N, y_MN)
            x = x_MK.double().cpu()
            wanted = x @ both_NK.T + bias_N.double().cpu()
            size = (x.square() @ both_NK.T.square() + bias_N.double().cpu().square()).sqrt().norm()
            error = (y_MN.double().cpu() - wanted).norm() / size
            assert error <= most_error(M), (N, which, M, float(error))
            graph, again = torch.cuda.CUDAGraph(), [torch.empty_like(y_MN) for _ in range(12)]
            with torch.cuda.graph(graph):
                for other_MN in again:
                    run(x_MK, bias_N, other_MN)
            for _ in range(4):
                for other_MN in again:
                    other_MN.fill_(float("nan"))
                graph.replay()
                run(x_MK, bias_N, extra_MN := torch.empty_like(y_MN))
                assert all(torch.equal(other_MN, y_MN) for other_MN in (*again, extra_MN))
            other_MK, other_MN = x_MK.clone(), torch.empty_like(y_MN)
            other_MK[0, K // 2] = float("inf")
            run(other_MK, bias_N, other_MN)
            assert torch.equal(other_MN[1:], y_MN[1:]) and not other_MN[0].isfinite().any()


@pytest.mark.gpu
def test_streams_and_graphs_tell_their_blocks_apart() -> None:
    """One plan on two streams at once, and in two graphs that are replayed at once beside them: each has flags of its own."""
    N, K, M = 1040, 2048, 8
    weight, _ = few_outliers(N, K, masks(N, K)["few"])
    run = Plan(weight, Config(ring=True, row_tiles=2, k_warps=4, stages=2, x_in_stage=True, apart=8), M, torch.bfloat16)
    xs = torch.randn(4, M, K, device="cuda").bfloat16()
    found = torch.empty(4, 40, M, N, device="cuda", dtype=torch.bfloat16)
    for x_MK, y_MN in zip(xs, found[:, 0], strict=True):
        run(x_MK, None, y_MN)
    wanted = found[:, :1].clone()
    assert wanted.isfinite().all()
    streams, graphs = [torch.cuda.Stream() for _ in range(4)], [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph, x_MK, ys in zip(graphs, xs, found, strict=False):
        with torch.cuda.graph(graph):
            for y_MN in ys:
                run(x_MK, None, y_MN)
    for _ in range(10):
        found.fill_(float("nan"))
        torch.cuda.synchronize()
        for which, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if which < 2:
                    graphs[which].replay()
                else:
                    for y_MN in found[which]:
                        run(xs[which], None, y_MN)
        torch.cuda.synchronize()
        assert torch.equal(found, wanted.expand_as(found))


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["column", "row", "few", "corner", "none"])
def test_wherever_few_outliers_are(which: str) -> None:
    """Few tokens, of which some inputs are not finite: what these touch is not finite, all else is as it was."""
    for N, K in ((77, 904), (4096, 4096)):
        mask_NK = masks(N, K)[which]
        weight, outliers_NK = few_outliers(N, K, mask_NK)
        codes_NK = dequantize(replace(weight, outliers=None), torch.bfloat16).double().cpu()
        for M in (1, 2, 4, 7, 8, 9, 16):
            x_MK = torch.randn(M, K, device="cuda").bfloat16()
            y_MN = torch.full((M, N), float("nan"), device="cuda", dtype=torch.bfloat16)
            run = Few.plan(weight, M, torch.bfloat16)
            run(x_MK, None, y_MN)
            both_NK, x = codes_NK + outliers_NK, x_MK.double().cpu()
            error = (y_MN.double().cpu() - x @ both_NK.T).norm() / (x.square() @ both_NK.T.square()).sqrt().norm()
            assert error <= most_error(M), (M, float(error))
            without = Few.plan(replace(weight, outliers=None), M, torch.bfloat16)
            for value in (float("inf"), float("nan")):
                other_MK, other_MN, plain_MN = x_MK.clone(), torch.empty_like(y_MN), torch.empty_like(y_MN)
                other_MK[0, K // 2] = value
                run(other_MK, None, other_MN)
                without(other_MK, None, plain_MN)
                assert torch.equal(other_MN[1:], y_MN[1:]) and not other_MN[0].isfinite().any()
                if M > LANE_TOKENS:  # products of four rows' outliers with 0 beside them, as those of the codes
                    continue
                same = [found[0].cpu()[~mask_NK[:, K // 2]].nan_to_num(0.5) for found in (other_MN, plain_MN)]
                assert torch.equal(*same)


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (6144, 4096), (28672, 4096), (57344, 8192), (4096, 14336), (8192, 28672)])
def test_cuts_of_large_weights_do_not_spill(N: int, K: int) -> None:
    """What runs fast without outliers may have no registers left beside the warps that add them, and takes twice the time."""
    apart, patches = (has(torch.cuda.get_device_name(), N, K) for has in (has_apart_cut, has_patch_cut))
    weight = with_outliers(random_weight(N, K, 4, 128, "cuda"), apart=apart, patches=patches)
    if apart and torch.cuda.get_device_capability() == (9, 0):
        assert choose(weight, 8, torch.bfloat16, (9, 0)) is Few
        assert takes_patches(weight, config_for(weight, 8)) if patches else config_for(weight, 8).apart
    for M in (1, 2, 4, 8, 16):
        if Few.refuses(weight, M, torch.bfloat16, torch.cuda.get_device_capability()) is None:
            assert measure([weight], [config_for(weight, M)], M), M  # those that spill are left out, those that are wrong raise


@pytest.mark.gpu
def test_outliers_of_launches_that_overlap() -> None:
    """Many launches in one graph, each of which begins before the one before has ended and reads what that wrote: the same bits
    in every replay, and as without a graph."""
    N = K = 1024
    weight, _ = few_outliers(N, K, torch.rand(N, K, generator=torch.Generator().manual_seed(2)) < 0.01)
    apart = Config(ring=True, row_tiles=2, k_warps=4, stages=2, x_in_stage=True, apart=8)
    for M, config in itertools.product((1, 4, 8, 16), (None, apart)):
        run = Few.plan(weight, M, torch.bfloat16) if config is None else Plan(weight, config, M, torch.bfloat16)
        first = torch.randn(M, K, device="cuda").bfloat16()
        between = [torch.empty_like(first) for _ in range(20)]  # by then numbers are large, and finite

        def chain(run: Any = run, first: Tensor = first, between: list[Tensor] = between) -> None:
            for x_MK, y_MN in itertools.pairwise([first, *between]):
                run(x_MK, None, y_MN)

        chain()
        wanted = [y_MN.clone() for y_MN in between]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        for _ in range(50):
            for y_MN in between:
                y_MN.fill_(float("nan"))
            graph.replay()
            assert all(torch.equal(found, right) for found, right in zip(between, wanted, strict=True))
