"""Every format: what is encoded comes back value for value; shapes without data; the exact bytes of the standard."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.pack.test_bits import by_hand
from tests.quantize import test_planes, test_tables

from aerogel.errors import BadInput
from aerogel.pack import FORMATS
from aerogel.pack.config import choose_format, find_group, format_of, matches, quantization_config
from aerogel.pack.scheme import NotServed, parse_group
from aerogel.quantize.formats.complex import Complex
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.grids import Codes, Fp8Grid, IntGrid, quantized

INT = [
    IntGrid(bits=bits, group_size=group, symmetric=symmetric, scale_dtype=dtype)
    for bits in range(2, 9)
    for group, symmetric, dtype in [(None, True, torch.float16), (32, False, torch.bfloat16), (7, True, torch.float32)]
]
GRIDS: list[tuple[Any, str]] = [(grid, "pack-quantized") for grid in INT]
GRIDS += [(IntGrid(bits=8, symmetric=s, scale_dtype=torch.bfloat16), "int-quantized") for s in (True, False)]
GRIDS += [(Fp8Grid(strategy=s), "float-quantized") for s in ("channel", "block", "tensor")]  # type: ignore[arg-type]
TABLES = [grid for grid in test_tables.GRIDS if not isinstance(grid, Nvfp4 | Mx) or grid == Nvfp4(scale_dtype=torch.uint8)]
GRIDS += [(grid, "table-packed") for grid in TABLES]
GRIDS += [(Nvfp4(), "nvfp4-pack-quantized"), (Mx(), "mxfp4-pack-quantized"), (Mx(kind="e4m3"), "mxfp8-quantized")]
GRIDS += [(grid, "planes") for grid in test_planes.GRIDS]
GRIDS += [(Complex(), "complex-packed")]
SHAPES = [(1, 1), (1, 33), (5, 70), (32, 64), (129, 130), (258, 130)]
EVEN = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
PAIRS = ("complex-packed",)


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """The same type and bytes, or both absent."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def codes_of(grid: Any, N: int, K: int, seed: int = 0) -> Codes:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    return quantized(grid, weight, grid.fit(weight))


@pytest.mark.parametrize(("grid", "name"), GRIDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_shapes_and_size(grid: Any, name: str, shape: tuple[int, int]) -> None:
    N, K = shape
    if name in EVEN and K % 2:
        with pytest.raises(BadInput, match="table-packed"):
            format_of(name).encode(codes_of(grid, N, K))
        return
    if name in PAIRS and (N % 2 or K % 2):
        with pytest.raises(BadInput, match="pairs"):
            format_of(name).shapes(N, K, grid)
        return
    fmt, codes = format_of(name), codes_of(grid, N, K)
    tensors = fmt.encode(codes)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == fmt.shapes(N, K, grid)
    back = fmt.to_codes(tensors, grid)
    for field in ("values_NK", "scale_NG", "zero_NG", "table_TE", "pick_NG", "factor"):
        assert same(getattr(back, field), getattr(codes, field)), field
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(fmt.decode(tensors, grid, dtype), codes.decode(dtype))
    assert fmt.bits_per_weight(N, K, grid) == 8 * sum(t.nbytes for t in tensors.values()) / (N * K)
    ghost = codes.to("meta")
    assert {n: (tuple(t.shape), t.dtype) for n, t in fmt.encode(ghost).items()} == fmt.shapes(N, K, grid)
    assert fmt.shapes(N, K, grid, True, torch.float16)["bias"] == ((N,), torch.float16)


@pytest.mark.parametrize(("grid", "name"), GRIDS, ids=str)
def test_rows_can_be_cut_out(grid: Any, name: str) -> None:
    fmt, codes = format_of(name), codes_of(grid, 300, 70)
    tensors = fmt.encode(codes)
    parts = [fmt.decode(fmt.rows(tensors, grid, start, start + 128), grid) for start in (0, 128, 256)]
    assert torch.equal(torch.cat(parts), codes.decode())


def test_pack_quantized_bytes_are_those_of_the_standard() -> None:
    grid = IntGrid(bits=3, group_size=16, symmetric=False, scale_dtype=torch.bfloat16)
    codes = codes_of(grid, 11, 45)
    tensors = format_of("pack-quantized").encode(codes)
    for n in range(11):
        assert tensors["weight_packed"][n].tolist() == by_hand([q + 4 for q in codes.values_NK[n].tolist()], 3)
    assert codes.zero_NG is not None
    for g in range(3):
        assert tensors["weight_zero_point"][:, g].tolist() == by_hand([z + 4 for z in codes.zero_NG[:, g].tolist()], 3)
    assert tensors["weight_shape"].tolist() == [11, 45]


@pytest.mark.parametrize(("grid", "name"), GRIDS, ids=str)
def test_tensors_that_do_not_fit_the_config_are_refused(grid: Any, name: str) -> None:
    fmt = format_of(name)
    tensors = fmt.encode(codes_of(grid, 6, 70))
    for missing in tensors:
        with pytest.raises(BadInput):
            fmt.to_codes({n: t for n, t in tensors.items() if n != missing}, grid)
    spoiled = "weight_scale" if "weight_scale" in tensors else "weight_table"
    with pytest.raises(BadInput, match=rf"{spoiled}|weight_packed"):
        fmt.to_codes({**tensors, spoiled: torch.zeros(7, 9)}, grid)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_refuses_what_another_one_stores(name: str) -> None:
    fmt = format_of(name)
    other = Fp8Grid() if name != "float-quantized" else IntGrid(bits=4)
    assert "use" in (fmt.refuses(other) or "")
    with pytest.raises(BadInput):
        fmt.config(other)
    with pytest.raises(BadInput):
        fmt.encode(codes_of(other, 4, 8))
    assert set(fmt.tolerance) == {torch.float32, torch.float16, torch.bfloat16}


def test_uniform_config_is_one_group_that_targets_linear() -> None:
    grid = IntGrid(bits=4, group_size=128)
    config = quantization_config([("a", grid, "none"), ("b", grid, "none")], ["lm_head"])
    group = config["config_groups"]["group_0"]
    assert config["format"] == group["format"] == "pack-quantized" and group["targets"] == ["Linear"]
    assert config["ignore"] == ["lm_head"] and config["quant_method"] == "compressed-tensors"
    wanted = {"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": True, "type": "int", "zp_dtype": None}
    assert group["weights"] | wanted == group["weights"]
    named = quantization_config([("a", grid, "none"), ("lm_head", grid, "none")], heads=["lm_head"])
    assert named["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]


def test_mixed_bits_are_several_groups_and_mixed_formats_say_so() -> None:
    narrow, wide = IntGrid(bits=3, group_size=32), IntGrid(bits=8, group_size=32, symmetric=False)
    config = quantization_config([("a", narrow, "none"), ("b", wide, "none"), ("c", narrow, "none")])
    assert config["format"] == "pack-quantized"
    assert [group["targets"] for group in config["config_groups"].values()] == [["a", "c"], ["b"]]
    assert config["config_groups"]["group_1"]["weights"]["zp_dtype"] == "torch.int8"
    assert quantization_config([("a", narrow, "none"), ("b", Fp8Grid(), "fp8")])["format"] == "mixed-precision"
    with pytest.raises(BadInput, match="nothing was quantized"):
        quantization_config([])
    with pytest.raises(BadInput, match="to int-quantized"):
        quantization_config([("a", IntGrid(bits=8), "int8")], wanted="pack-quantized")


DYNAMIC = [(IntGrid(bits=8), "int8"), (Fp8Grid(strategy="block"), "fp8")]


@pytest.mark.parametrize(("grid", "activations"), [(g, "none") for g, _ in GRIDS] + DYNAMIC)
def test_what_is_written_is_read_back(grid: Any, activations: Any) -> None:
    config = quantization_config([("a", grid, activations)])
    group = find_group(config["config_groups"], ["a"])
    assert group is not None
    scheme = parse_group(group, config["format"]).with_scale_dtype(grid.scale_dtype)
    assert (scheme.grid, scheme.activations) == (grid, activations)
    assert scheme.format == choose_format(grid, activations).name


def test_targets_match_by_name_then_pattern_then_class() -> None:
    name = "model.layers.0.mlp.down_proj"
    assert [matches([p], name) for p in (name, r"re:.*down_proj$", "Linear", "re:mlp", "Conv1D")] == [3, 2, 1, 0, 0]
    groups = {"x": {"targets": ["Linear"]}, "y": {"targets": [r"re:.*mlp\."]}, "z": {"targets": ["model.layers.1.mlp.up"]}}
    assert find_group(groups, [name]) is groups["y"]
    assert find_group(groups, ["lm_head"]) is groups["x"]
    assert find_group({"y": groups["y"]}, ["lm_head"]) is None
    with pytest.raises(BadInput, match="regular expression"):
        matches(["re:("], name)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "nvfp4-pack-quantized"}, "nvfp4"),
        ({"output_activations": {"num_bits": 8}}, "output"),
        ({"input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": False}}, "static"),
        ({"weights": {"num_bits": 1, "type": "int", "strategy": "group", "group_size": 32}}, "1-bit"),
        ({"weights": None}, "weights"),
    ],
)
def test_what_is_not_served_is_named(change: dict[str, Any], reason: str) -> None:
    group = format_of("pack-quantized").config(IntGrid(bits=4, group_size=32))
    with pytest.raises(NotServed, match=reason):
        parse_group({**group, **change}, "pack-quantized")
