"""Every CUDA kernel at small ragged shapes, to be run under compute-sanitizer: `make gpu-sanitize` (gpu_sanitize_all.py).

Arguments: widths of integers in bits, and sections (SECTIONS); all of them without any. With `racecheck` among them kernels are
built so that this tool can follow who waits for whom (kernels/cuda/sanitize.cuh); memcheck runs them as they are. `2/5` is the
second of five processes that share the matmuls of weights alone, since the tool needs seconds for each.

Buffers come from the driver one by one (PYTORCH_NO_CUDA_MEMORY_CACHING), so that a byte beyond one of them is an error, and
results are compared with a dense product, so that nothing passes by not running.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tests.kernels.test_cuda_kept import GRIDS, layer_of, wanted_of
from tests.kernels.test_cuda_outliers import beside_of

from aerogel.kernels.beside import cuda as cuda_beside
from aerogel.kernels.beside import ref
from aerogel.kernels.beside.choose import add
from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.cuda import nvrtc
from aerogel.kernels.entropy import cuda as entropy_cuda
from aerogel.kernels.entropy import ref as entropy
from aerogel.kernels.gemm import cuda, cuda_added, cuda_apart, cuda_int8, cuda_wgmma
from aerogel.kernels.gemm.block_scales import unit_of_sums
from aerogel.kernels.gemm.cuda_dense import Dense, dequantize
from aerogel.kernels.gemm.cuda_few import Config as FewConfig
from aerogel.kernels.gemm.cuda_few import fits
from aerogel.kernels.gemm.cuda_few_plan import Plan as FewPlan
from aerogel.kernels.gemm.cuda_kept import KEPT, KeptOperand
from aerogel.kernels.gemm.cuda_made import Gated, Normed
from aerogel.kernels.gemm.cuda_outliers import TileOutliers
from aerogel.kernels.gemm.cuda_quantize import E4M3, INT8, ROUNDED, Quantizer
from aerogel.kernels.gemm.cuda_spread import Spread, spread_out
from aerogel.kernels.gemm.cuda_tune import random_numbers, random_planes, random_weight, with_outliers
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.cuda_wgmma import Config, deepest
from aerogel.kernels.gemm.cuda_wgmma_plan import Plan
from aerogel.kernels.grouped.cuda_grouped import cuts
from aerogel.kernels.grouped.cuda_routes import add_experts, most_runs, route_experts, spread_tokens

N, K = 200, 712
ODD = 203
"""Rows whose outputs do not lie in whole pieces of 16 bytes."""
KINDS = ((128, "none"), (32, "integer"), (0, "float"))
TOKENS = (5, 16, 33)
FEW = (
    FewConfig(ring=False, row_tiles=2, k_warps=4),
    FewConfig(ring=True, row_tiles=2, k_warps=4, stages=3),
    FewConfig(ring=True, row_tiles=1, k_warps=2, stages=2, x_resident=True, cluster=2),
    FewConfig(ring=True, row_tiles=2, k_warps=2, stages=2, x_resident=True),
    FewConfig(ring=True, row_tiles=2, k_warps=2, stages=2, share=2),
    FewConfig(ring=True, row_tiles=2, k_warps=2, stages=2, x_resident=True, share=2, turned=True),
    FewConfig(ring=True, row_tiles=2, k_warps=8, stages=2, x_in_stage=True),
    FewConfig(ring=True, row_tiles=1, k_warps=8, stages=2, share=2),
    FewConfig(ring=False, row_tiles=2, k_warps=4, apart=2),
    FewConfig(ring=True, row_tiles=1, k_warps=2, stages=2, x_in_stage=True, apart=128),
)
MANY = (
    Config(tokens=32, x_stages=4, w_stages=2),
    Config(tokens=32, blocks=2, split=3, x_stages=4, w_stages=2),
    Config(tokens=64, share=2, split=2, x_stages=4, w_stages=2, batch=8),
    Config(tokens=48, resident=2, batch=2, x_stages=3, w_stages=2),
    Config(tokens=256, share=2, lead=3, x_stages=5, w_stages=3),
)
MANY_INT8 = ((128, 1, 1, 2), (64, 1, 1, 4), (256, 1, 2, 4))
"""As `cuda_int8.CUTS`."""
SPLIT_INT8 = Config(tokens=32, warpgroups=1, blocks=1, split=3, batch=2, resident=2, x_stages=3, w_stages=2)
"""Blocks that share K, two on a multiprocessor (`cuda_bytes`)."""
SECTIONS = ("scales", "tables", "floats", "planes", "outliers", "kept", "rounded", "grouped", "blocks", "others")
RACECHECK = "racecheck"
Case = tuple[str, Callable[[], cuda.Runner], int]


def cases(weight: TileWeight, every_cut: bool) -> Iterator[Case]:
    """(what it is, what plans the run, tokens) of each implementation that takes the weight, or of every cut of them."""
    dtype, capability = torch.bfloat16, torch.cuda.get_device_capability()
    for M in () if every_cut else TOKENS:
        for found in cuda.implementations():
            if found is not Dense and found.refuses(weight, M, dtype, capability) is None:  # it is the reference
                yield f"{found.name} M={M}", partial(found.plan, weight, M, dtype), M
    hopper = capability[0] == 9
    for few, M in itertools.product(FEW if every_cut else (), (3, 16)):
        if fits(weight, few, M, capability, torch.cuda.get_device_properties(0).multi_processor_count):
            yield f"{few} M={M}", partial(FewPlan, weight, few, M, dtype), M
    for many in MANY if every_cut and hopper else ():
        config = shallow(weight, many)
        if config is not None:
            yield f"{config} M=70", partial(Plan, weight, config, 70, dtype), 70


def shallow(weight: TileWeight, config: Config) -> Config | None:
    """The configuration with the stages it names, if so many fit: few, so that rings are filled again. None when none fit."""
    found = deepest(weight, config)
    if found is None:
        return None
    return replace(found, x_stages=min(found.x_stages, config.x_stages), w_stages=min(found.w_stages, config.w_stages))


def moved(weight: TileWeight) -> TileWeight:
    """The weight on the device. It is made on the CPU, as inputs and wanted results are: each kernel of torch costs time."""
    found: dict[str, Any] = {name: value.cuda() for name, value in vars(weight).items() if isinstance(value, torch.Tensor)}
    if weight.outliers is not None:
        found["outliers"] = TileOutliers.given([tensor.cuda() for tensor in weight.outliers.tensors()])
    return replace(weight, **found)


def weights(asked: list[str]) -> Iterator[tuple[str, TileWeight, bool]]:
    """(what it is, a weight, whether every cut runs it): integers of the widths asked for, then the sections."""
    for bits, (group, zero) in itertools.product((int(word) for word in asked if word.isdigit()), KINDS):
        what = f"{bits} bits, groups of {group}, zero {zero}"
        yield what, random_weight(N, K, bits, group, "cpu", zero=zero), bits == 4
    if "4" in asked:
        yield f"4 bits, {ODD} rows", random_weight(ODD, K, 4, 128, "cpu"), True
    each = {"scales": scales, "tables": tables, "floats": floats, "planes": planes, "outliers": outliers}
    for section, found in each.items():
        if section in asked:
            yield from found()


def scales() -> Iterator[tuple[str, TileWeight, bool]]:
    """Numbers of four bits with scales of eight."""
    for name, group in (("nvfp4", 16), ("mxfp4", 32)):
        yield name, random_numbers(N, K, name, group, "cpu"), name == "nvfp4"


def tables() -> Iterator[tuple[str, TileWeight, bool]]:
    """One table, tables of rows, tables that groups pick from, one of 256."""
    for name, group in (("table", 64), ("rows", 0), ("groups", 32), ("rf8", 0)):
        yield name, random_numbers(N, K, name, group, "cpu"), name != "rf8"


def floats() -> Iterator[tuple[str, TileWeight, bool]]:
    """Small floats; any bits are numbers to the kernels."""
    for bits, mantissa in ((5, 2), (6, 2), (6, 3), (8, 2), (8, 3)):
        plain = random_weight(N, K, bits, 32, "cpu")
        yield f"floats, {mantissa} of {bits} bits mantissa", replace(plain, floats=mantissa), False


def planes() -> Iterator[tuple[str, TileWeight, bool]]:
    """Bit planes, of rows and of blocks, and one plane as signs."""
    for bits, group in ((1, 64), (2, 16), (3, 128), (4, 64), (4, 48)):
        yield f"{bits} planes, groups of {group}", random_planes(N, K, bits, group, "cpu", offset=True), bits == 3
    for group in (16, 64):
        yield f"signs, groups of {group}", random_numbers(N, K, "plane", group, "cpu"), False
    yield "3 planes in blocks", random_planes(N, K, 3, 16, "cpu", blocks=True), True


def outliers() -> Iterator[tuple[str, TileWeight, bool]]:
    """Two in a hundred weights, and a tile of nothing else; beside scales of a byte too."""
    for rows, bits, group in ((N, 4, 128), (ODD, 3, 32)):
        laid = TileOutliers.of(beside_of(rows, K, kinds="o"), rows, K, torch.bfloat16, apart=True, patches=True)
        yield f"{bits} bits with outliers", replace(random_weight(rows, K, bits, group, "cpu"), outliers=laid), True
    plain = random_numbers(N, K, "nvfp4", 16, "cpu")
    unit = unit_of_sums(plain.scale, True, plain.factor, torch.bfloat16)
    laid = TileOutliers.of(beside_of(N, K, kinds="o"), N, K, torch.bfloat16, unit=unit)
    yield "nvfp4 with outliers", replace(plain, outliers=laid), True


def main() -> int:
    """0 when every result is right."""
    shares = [word for word in sys.argv[1:] if "/" in word] or ["1/1"]
    part, parts = map(int, shares[-1].split("/"))
    words = [word for word in sys.argv[1:] if word != RACECHECK and word not in shares]
    asked = words or [*(str(bits) for bits in range(1, 9)), *SECTIONS]
    unknown = [word for word in asked if not word.isdigit() and word not in SECTIONS]
    if unknown:
        raise SystemExit(
            f"{unknown[0]!r} is no section; name widths in bits and any of {', '.join(SECTIONS)}, or nothing for all"
        )
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        raise SystemExit("set PYTORCH_NO_CUDA_MEMORY_CACHING=1: buffers must end where they end")
    build = ["-DSANITIZE=1"] if RACECHECK in sys.argv else []
    cuda_wgmma.RING_BARRIERS = 3 if build else 2
    cuda_apart.MOST_TILES = 3  # two slices of these few columns
    nvrtc.OPTIONS = (*nvrtc.OPTIONS, "-lineinfo", *build)  # reports name lines
    wrong = count = 0
    turn = itertools.cycle(range(1, parts + 1))
    for what, made, every_cut in weights(asked):
        weight = moved(made)
        reference = None
        for name, plan, M in cases(weight, every_cut):
            if next(turn) != part:
                continue
            print(f"{what}: {name}: ", end="", flush=True)  # before it runs: one that never ends is named too
            run, x, y = plan(), torch.randn(M, K).bfloat16(), torch.full((M, weight.N), torch.nan).bfloat16().cuda()
            run(x.cuda(), None, y)
            if reference is None:
                reference = dequantize(weight, torch.bfloat16).cpu().float()
            wanted = x.float() @ reference.T
            error = float((y.cpu().float() - wanted).norm() / wanted.norm())
            count += 1
            print(f"relative error {error:.2g}", flush=True)  # behind what the tool says of it
            wrong += not error < 1e-2
    for section, run_all in SINGLE.items():
        if section in asked:
            found = run_all()
            wrong += found
            print(f"{section}: {found} wrong", flush=True)
    print(f"{count} matmuls of weights alone; {wrong} wrong", flush=True)
    return int(wrong > 0)


def rounded() -> int:
    """Activations of 8 bits, as they are and where they are made: how many results are wrong."""
    x, both, wrong = torch.randn(70, K, device="cuda").bfloat16(), torch.randn(70, 2 * K, device="cuda").bfloat16(), 0
    factor = torch.rand(K, device="cuda")
    made = [
        x,
        Normed(x, factor, 1e-5, False),
        Normed(x, factor.bfloat16(), 1e-5, True),
        Gated(both[:, :K], both[:, K:], "silu"),
    ]
    for output, what in itertools.product((INT8, E4M3, ROUNDED), made):
        codes, scale = Quantizer(dtype=x.dtype, device=x.device, output=output, columns=-(-K // 16) * 16)(what)
        back = codes.float()[:, :K] * (1 if output == ROUNDED else scale[:, None])
        y = (what if isinstance(what, torch.Tensor) else what.settled()).float()
        wrong += not float((back - y).norm() / y.norm()) < 5e-2
    for (rows, bits, group), numbers in itertools.product(((N, 4, 128), (ODD, 8, 0)), (*MANY_INT8, None)):
        weight = random_weight(rows, K, bits, group, "cuda")
        config = shallow(replace(weight, in_bytes=True), SPLIT_INT8) if numbers is None else cuda_int8.cut(weight, *numbers)
        r, y = cuda_int8.row_scale(weight), torch.full((70, rows), torch.nan, device="cuda", dtype=torch.bfloat16)
        run = cuda_int8.many_tokens(weight, r, 70, torch.bfloat16, config)
        if run is not None:
            run(x, None, y)
            wanted = (x @ dequantize(weight, torch.bfloat16).T).float()
            wrong += not float((y.float() - wanted).norm() / wanted.norm()) < 3e-2
        laid = TileOutliers.of(beside_of(rows, K, kinds="o", device="cuda"), rows, K, torch.bfloat16)
        exact = replace(weight, outliers=laid, exact=True)
        for M in (13, 70):
            y = torch.full((M, rows), torch.nan, device="cuda", dtype=torch.bfloat16)
            cuda_int8.with_outliers(exact, r, M, torch.bfloat16)(x[:M], None, y)
            wanted = (x[:M] @ dequantize(cuda_added.whole(exact), torch.bfloat16).T).float()
            wrong += not float((y.float() - wanted).norm() / wanted.norm()) < 3e-2
    return wrong


@torch.no_grad()
def kept() -> int:
    """Columns kept beside rounded inputs, 19 loud ones: how many results are wrong."""
    columns, wrong = torch.arange(3, K, 37)[:19], 0
    for rows, grid in ((N, GRIDS[0]), (ODD, GRIDS[2])):
        layer = layer_of(grid, rows, K, torch.bfloat16, columns, False)
        laid = layer.operands()
        if KEPT[0] not in laid:
            raise SystemExit(f"kept columns were not laid out for {layer.kernel_name}; they should be on every CUDA device")
        x = torch.randn(70, K, device="cuda")
        x[:, columns.cuda()] *= 50
        found = [(M, layer(x[:M].bfloat16())) for M in (1, 5, 16, 40)]
        weight = TileWeight(
            codes=laid["tile_codes"], scale=laid["tile_scale"], zero=None, table=None, pick=None,
            group_size=grid.group_size or 0, N=rows, K=K,
        )  # fmt: skip
        operand = KeptOperand.given([laid[name] for name in KEPT])
        for numbers in MANY_INT8:
            config, y = cuda_int8.cut(weight, *numbers), torch.full((70, rows), torch.nan, device="cuda", dtype=torch.bfloat16)
            run = cuda_int8.many_tokens(weight, laid["tile_row_scale"], 70, torch.bfloat16, config, operand)
            if run is not None:
                run(x.bfloat16(), None, y)
                found.append((70, y))
        for M, y in found:
            wanted = wanted_of(layer, x[:M].bfloat16(), columns)
            wrong += not float((y.double() - wanted).norm() / wanted.norm()) < 1e-2
    return wrong


def blocks() -> int:
    """Weights of which a block of threads computes several parts in turn: tables, of which those of rows are laid out in two
    places, and on Hopper sheets of outliers. How many results are wrong."""
    plans: list[tuple[TileWeight, int, cuda.Runner]] = []
    wrong, columns, dtype = 0, 256, torch.bfloat16
    rows = 5 * 16 * torch.cuda.get_device_properties(0).multi_processor_count
    few = FewConfig(ring=True, row_tiles=1, k_warps=2, stages=2)
    for (name, group, beside), M in itertools.product((("rows", 0, False), ("rows", 0, True), ("groups", 64, False)), (3, 16)):
        weight = moved(random_numbers(rows, columns, name, group, "cpu"))
        plans.append((weight, M, FewPlan(weight, replace(few, beside=beside), M, dtype)))
    for many in (MANY[0], MANY[3]) if torch.cuda.get_device_capability()[0] == 9 else ():
        weight = moved(with_outliers(random_weight(rows, columns, 4, 128, "cpu"), 0.02))
        config = shallow(weight, many)
        assert config is not None
        plans.append((weight, 150, Plan(weight, config, 150, dtype)))
    for weight, M, run in plans:
        x, y = torch.randn(M, columns).bfloat16(), torch.full((M, rows), torch.nan).bfloat16().cuda()
        run(x.cuda(), None, y)
        wanted = x.float() @ dequantize(weight, dtype).cpu().float().T
        wrong += not float((y.cpu().float() - wanted).norm() / wanted.norm()) < 1e-2
    return wrong


def others() -> int:
    """What is no matmul: outliers of any number of tokens, columns spread out, entropy codes: how many results are wrong."""
    wrong, beside = 0, beside_of(N, K, device="cuda")
    assert cuda_beside.takes(torch.empty(1, N, device="cuda").bfloat16(), torch.empty(1, K, device="cuda").bfloat16(), beside)
    there = Beside(*(tensor if tensor is None else tensor.cpu() for tensor in beside.all()))
    for M in (1, 3, 7, 16, 40):
        x, y = torch.randn(M, K, device="cuda").bfloat16(), torch.randn(M, N, device="cuda").bfloat16()
        wanted = ref.add(y.float().cpu(), x.float().cpu(), there)
        wrong += not float((add(y, x, beside).float().cpu() - wanted).norm() / wanted.norm()) < 1e-2
        spread = Spread(K=K, group=40, copies=2, columns=2048)
        wrong += not torch.equal(spread_out(x, spread).cpu(), spread_out(x.cpu(), spread))
    for count in (1, 257, 5000):
        symbols = torch.randn(count).bfloat16().view(torch.int16).bitwise_right_shift(7).to(torch.uint8)
        coded = entropy.encode(symbols)
        coded = replace(coded, stream=coded.stream.cuda(), lengths=coded.lengths.cuda(), code=coded.code.cuda())
        rest, numbers = torch.zeros_like(symbols, device="cuda"), torch.full((count,), torch.nan, device="cuda").bfloat16()
        joined = entropy_cuda.decode_bfloat16(coded, rest, numbers).view(torch.int16).bitwise_right_shift(7).to(torch.uint8)
        wrong += not (torch.equal(entropy_cuda.decode(coded).cpu(), symbols) and torch.equal(joined.cpu(), symbols))
    return wrong


def grouped() -> int:
    """Experts of ragged loads on Hopper: how many results are wrong."""
    if torch.cuda.get_device_capability()[0] != 9:
        return 0
    experts, wrong = 5, 0
    weight = random_weight(experts * 208, K, 4, 128, "cuda")
    dense = dequantize(weight, torch.bfloat16).reshape(experts, 208, K)[:, :N].float()
    for run, pairs in ((16, 3), (32, 70), (160, 400)):
        expert = torch.randint(experts + 1, (pairs, 2), device="cuda")
        order, place, runs = route_experts(expert.reshape(-1), experts, run)
        x, share = torch.randn(pairs, K, device="cuda").bfloat16(), torch.rand(pairs, 2, device="cuda")
        rows = spread_tokens(x, order)
        for split in (1, 3):
            config = cuts(weight, run, split)[0]
            y = torch.full((2 * pairs, N), torch.nan, device="cuda", dtype=torch.bfloat16)
            plan = Plan(replace(weight, N=N), config, 2 * pairs, torch.bfloat16, runs=most_runs(2 * pairs, experts, run))
            plan.launch(rows, None, None, y, runs=runs)
            there = (expert < experts)[..., None]
            each = torch.einsum("mk,mjnk->mjn", x.float(), dense[expert.clamp(max=experts - 1)])
            wanted = (torch.where(there, each, 0) * share[..., None]).sum(1)
            wrong += not float((add_experts(y, place, share).float() - wanted).norm() / wanted.norm()) < 1e-2
    return wrong


SINGLE = {"kept": kept, "rounded": rounded, "grouped": grouped, "blocks": blocks, "others": others}
"""Sections that compare their own results."""

if __name__ == "__main__":
    sys.exit(main())
