"""Foreign checkpoints, built here bit by bit from their description, decode to exactly the numbers they were made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.pack.test_bits import by_hand
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack.config import format_of, quantization_config
from aerogel.pack.scheme import NotServed
from aerogel.pack.source import Columns, open_source
from aerogel.quantize.grids import Fp8Grid, IntGrid, quantized

N, K = 32, 64


def numbers(width: int, groups: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """u [N, K] and z [N, G] in [0, 2^width), scales float16 [N, G]."""
    random = torch.Generator().manual_seed(seed)
    u = torch.randint(0, 1 << width, (N, K), generator=random)
    z = torch.randint(0, 1 << width, (N, groups), generator=random)
    return u, z, (torch.rand(N, groups, generator=random) + 0.1).half()


def dense(u: Tensor, z: Tensor, scale: Tensor, index: list[int]) -> Tensor:
    """(u - z) * s, one weight at a time."""
    rows = [[(u[n, k] - z[n, index[k]]).item() * scale[n, index[k]].item() for k in range(K)] for n in range(N)]
    return torch.tensor(rows, dtype=torch.float64).float()


def read(config: dict[str, Any], tensors: dict[str, Tensor], name: str = "a.q_proj") -> Columns:
    source = open_source(config)
    found = source.groups([f"{name}.{local}" for local in tensors] + ["a.norm.weight", f"{name}.bias"])
    assert set(found) == {name} and set(found[name]) == set(tensors)
    scheme = source.scheme((name,), {local: t.dtype for local, t in tensors.items()}, ("Linear",))
    return source.read(tensors, scheme)


def columns_of_words(rows: Tensor, width: int) -> Tensor:
    """Packs each column of `rows` downwards."""
    return torch.tensor([by_hand(column, width) for column in rows.T.tolist()], dtype=torch.int32).T.contiguous()


def rows_of_words(rows: Tensor, width: int) -> Tensor:
    return torch.tensor([by_hand(row, width) for row in rows.tolist()], dtype=torch.int32)


def gptq(u: Tensor, z: Tensor, scale: Tensor, width: int, index: list[int], version: int) -> dict[str, Tensor]:
    stored = (z - (1 if version == 1 else 0)) % (1 << width)
    return {
        "qweight": columns_of_words(u.T, width),
        "qzeros": rows_of_words(stored.T, width),
        "scales": scale.T.contiguous(),
        "g_idx": torch.tensor(index, dtype=torch.int32),
    }


def shuffled(groups: int, seed: int = 1) -> list[int]:
    """A column index as activation order makes it: equal groups, columns anywhere."""
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    index = torch.empty(K, dtype=torch.long)
    index[order] = torch.arange(K) // (K // groups)
    return index.tolist()


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ["natural", "shuffled", "uneven", "channel"])
def test_gptq(width: int, version: int, order: str) -> None:
    groups = 1 if order == "channel" else 4
    index = {
        "natural": [k // 16 for k in range(K)],
        "channel": [0] * K,
        "shuffled": shuffled(4),
        "uneven": [k % 3 for k in range(K)],
    }[order]
    u, z, scale = numbers(width, groups)
    config = {
        "quant_method": "gptq",
        "bits": width,
        "group_size": -1 if order == "channel" else 16,
        "sym": False,
        "desc_act": order == "shuffled",
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    found = read(config, gptq(u, z, scale, width, index, version))
    assert torch.equal(found.dense(), dense(u, z, scale, index))
    assert (found.order is not None) == (order == "shuffled")
    assert found.codes.grid.group_size == {"channel": None, "uneven": 1}.get(order, 16)


def test_gptq_symmetric_files_of_both_versions_and_a_wrong_claim() -> None:
    index = [k // 16 for k in range(K)]
    u, _, scale = numbers(4, 4)
    z = torch.full((N, 4), 8)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False}
    for version in (1, 2):
        tensors = gptq(u, z, scale, 4, index, version)
        assert tensors["qzeros"].unique().tolist() == [0x77777777 if version == 1 else 0x88888888 - (1 << 32)]
        found = read(config, tensors)
        assert torch.equal(found.dense(), dense(u, z, scale, index)) and found.codes.zero_NG is None
    with pytest.raises(BadInput, match="sym: false"):
        read(config, gptq(u, z + 3, scale, 4, index, 1))


def test_gptq_dynamic_rules_choose_the_width() -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False}
    config["dynamic"] = {r"+:a\.q.*": {"bits": 8}, "-:b": {}}
    index = [k // 16 for k in range(K)]
    u, z, scale = numbers(8, 4)
    assert torch.equal(read(config, gptq(u, z, scale, 8, index, 1)).dense(), dense(u, z, scale, index))
    u, z, scale = numbers(4, 4)
    assert torch.equal(read(config, gptq(u, z, scale, 4, index, 1), "c").dense(), dense(u, z, scale, index))


def awq_words(rows: Tensor) -> Tensor:
    """Nibble j of word c is column 8c + [0, 2, 4, 6, 1, 3, 5, 7][j]."""
    placed = [[row[8 * c + i] for c in range(len(row) // 8) for i in (0, 2, 4, 6, 1, 3, 5, 7)] for row in rows.tolist()]
    return rows_of_words(torch.tensor(placed), 4)


@pytest.mark.parametrize("old_keys", [False, True])
def test_awq(old_keys: bool) -> None:
    u, z, scale = numbers(4, 4)
    tensors = {"qweight": awq_words(u.T), "qzeros": awq_words(z.T), "scales": scale.T.contiguous()}
    names = ("w_bit", "q_group_size") if old_keys else ("bits", "group_size")
    config = {"quant_method": "awq", "version": "gemm", names[0]: 4, names[1]: 16, "zero_point": True}
    assert torch.equal(read(config, tensors).dense(), dense(u, z, scale, [k // 16 for k in range(K)]))


def ct_config(grid: Any, name: str | None = None) -> dict[str, Any]:
    config = quantization_config([("a.q_proj", grid, "none")])
    if name is not None:
        config["config_groups"]["group_0"]["format"] = None
        config["format"] = name
    return config


@pytest.mark.parametrize("packed_zeros", [True, False])
@pytest.mark.parametrize("order", ["natural", "shuffled"])
def test_compressed_tensors_with_zero_points_and_activation_order(packed_zeros: bool, order: str) -> None:
    u, z, scale = numbers(4, 4)
    index = shuffled(4) if order == "shuffled" else [k // 16 for k in range(K)]
    tensors = {
        "weight_packed": rows_of_words(u, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor([N, K]),
        "weight_zero_point": columns_of_words(z, 4) if packed_zeros else (z - 8).to(torch.int8),
    }
    if order == "shuffled":
        tensors["weight_g_idx"] = torch.tensor(index, dtype=torch.int32)
    grid = IntGrid(bits=4, group_size=16, symmetric=False, scale_dtype=torch.float16)
    assert torch.equal(read(ct_config(grid), tensors).dense(), dense(u, z, scale, index))


@pytest.mark.parametrize("width", range(2, 9))
def test_compressed_tensors_symmetric_per_channel(width: int) -> None:
    u, _, scale = numbers(width, 1)
    tensors = {"weight_packed": rows_of_words(u, width), "weight_scale": scale, "weight_shape": torch.tensor([N, K])}
    wanted = dense(u, torch.full((N, 1), 1 << (width - 1)), scale, [0] * K)
    assert torch.equal(read(ct_config(IntGrid(bits=width)), tensors).dense(), wanted)


@pytest.mark.parametrize("scale_shape", [(N, 1), (N,), (1,), ()])
@pytest.mark.parametrize("name", ["int-quantized", "naive-quantized"])
def test_compressed_tensors_plain_int8(scale_shape: tuple[int, ...], name: str) -> None:
    q = torch.randint(-128, 128, (N, K)).to(torch.int8)
    scale = torch.rand(scale_shape) + 0.1
    wanted = q.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale)
    config = ct_config(IntGrid(bits=8), name)
    if scale.numel() == 1:
        config["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    assert torch.equal(read(config, {"weight": q, "weight_scale": scale}).dense(), wanted)


@pytest.mark.parametrize("strategy", ["channel", "block", "tensor"])
@pytest.mark.parametrize("name", ["float-quantized", "naive-quantized"])
def test_compressed_tensors_fp8(strategy: Any, name: str) -> None:
    weight = torch.randn(130, 200).to(torch.float8_e4m3fn)
    shape = {"channel": (130, 1), "block": (2, 2), "tensor": (1,)}[strategy]
    scale = torch.rand(shape) + 0.1
    spread = scale
    if strategy == "block":
        spread = scale.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :200]
    config = ct_config(Fp8Grid(strategy=strategy), name)
    found = read(config, {"weight": weight, "weight_scale": scale})
    assert torch.equal(found.dense(), weight.float() * spread)


def test_layers_without_a_group_and_configs_that_are_not_served() -> None:
    grids = [("a", IntGrid(bits=4), "none"), ("b", IntGrid(bits=8), "none")]
    source = open_source(quantization_config(grids))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="no group"):
        source.scheme(("c",), {"weight_scale": torch.float16}, ("Linear",))
    with pytest.raises(BadInput, match="weight_scale"):
        source.scheme(("a",), {"weight_packed": torch.int32}, ("Linear",))
    base = ct_config(IntGrid(bits=4))
    for config, word in [
        ({"quant_method": "quip"}, "quip"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "bits": 5}, "5 bits"),
        ({"quant_method": "awq", "version": "gemv"}, "gemv"),
        ({**base, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({**base, "transform_config": {"config_groups": {}}}, "transform_config"),
        ({**base, "config_groups": {"W4A16": ["Linear"]}}, "weights"),
    ]:
        with pytest.raises(NotServed, match=word):
            open_source(config)


PEER_GRIDS = [IntGrid(bits=b, group_size=g, symmetric=s, scale_dtype=torch.bfloat16)
              for b in (2, 3, 4, 5, 8) for g, s in ((16, True), (16, False), (None, True))]  # fmt: skip


@pytest.mark.peers
@pytest.mark.parametrize("grid", [*PEER_GRIDS, Fp8Grid(), Fp8Grid(strategy="block"), Fp8Grid(strategy="tensor")], ids=str)
def test_compressed_tensors_reads_ours_and_we_read_theirs(grid: Any) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = quantization_config([("a", grid, "none")])["config_groups"]["group_0"]
    theirs = BaseCompressor.get_value_from_registry(config["format"])
    scheme = QuantizationScheme.model_validate(config)
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(3))
    codes = quantized(grid, weight, grid.fit(weight))
    fmt = format_of(config["format"])
    ours = fmt.encode(codes)
    decoded = theirs.decompress(dict(ours), scheme)["weight"]
    assert torch.equal(decoded.float(), codes.decode(decoded.dtype).float())
    state = {"weight": codes.decode(), "weight_scale": ours["weight_scale"]}
    if codes.zero_NG is not None:
        state["weight_zero_point"] = codes.zero_NG
    written = theirs.compress(state, scheme)
    for name, tensor in ours.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name].double(), tensor.double()), name
