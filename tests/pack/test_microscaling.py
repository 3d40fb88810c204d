"""NVFP4, MXFP4 and MXFP8 as others read and write them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aerogel.errors import BadInput
from aerogel.pack.config import format_of, quantization_config
from aerogel.pack.gpt_oss import blocks_of_codes, codes_of_blocks
from aerogel.pack.scheme import NotServed
from aerogel.pack.source import open_source
from aerogel.quantize.codes import Codes, quantized
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nvfp4 import Nvfp4

CASES = [(Nvfp4(), "nvfp4-pack-quantized"), (Mx(), "mxfp4-pack-quantized"), (Mx(kind="e4m3"), "mxfp8-quantized")]


def codes_on(grid: Any, N: int = 48, K: int = 96) -> Codes:
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(3)) * 0.03
    return quantized(grid, w, grid.fit(w, search="mse"))


@pytest.mark.peers
@pytest.mark.parametrize(("grid", "name"), CASES, ids=str)
def test_compressed_tensors_decompresses_to_the_same_bits(grid: Any, name: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    codes = codes_on(grid)
    group = format_of(name).config(grid)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**group["weights"]), format=group["format"])
    found = BaseCompressor.get_value_from_registry(name).decompress(dict(format_of(name).encode(codes)), scheme)["weight"]
    assert torch.equal(found.float(), codes.decode())


def test_bytes_of_nvfp4() -> None:
    codes = codes_on(Nvfp4())
    tensors = format_of("nvfp4-pack-quantized").encode(codes)
    byte = int(tensors["weight_packed"][5, 7])
    for nibble, column in ((byte & 15, 14), (byte >> 4, 15)):
        number = (0, 0.5, 1, 1.5, 2, 3, 4, 6)[nibble & 7] * (-1 if nibble >> 3 else 1)
        scale = float(tensors["weight_scale"][5, 0].float()) / float(tensors["weight_global_scale"])
        assert number * scale == float(codes.decode()[5, column])
    assert tensors["weight_global_scale"].dtype is torch.float32 and tensors["weight_global_scale"].shape == (1,)
    largest = float(tensors["weight_scale"].float().max())
    assert 200 < largest <= 448


@pytest.mark.parametrize(("grid", "name"), CASES, ids=str)
def test_a_checkpoint_is_read_back(grid: Any, name: str) -> None:
    codes = codes_on(grid)
    config = quantization_config([("a", grid, "none")])
    assert config["format"] == name and config["quant_method"] == "compressed-tensors"
    source = open_source(config)
    tensors = format_of(name).encode(codes)
    groups = source.groups([f"a.{local}" for local in tensors])
    assert set(groups["a"]) == set(tensors)
    scheme = source.scheme(("a",), {local: t.dtype for local, t in tensors.items()}, ("Linear",))
    assert torch.equal(source.read(tensors, scheme).dense(), codes.decode())


def test_input_activations_of_servers_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    config = quantization_config([("a", Nvfp4(), "none")])
    group = config["config_groups"]["group_0"]
    group["input_activations"] = {**group["weights"], "dynamic": "local"}
    scheme = open_source(config).scheme(("a",), {}, ("Linear",))
    assert scheme.activations == "none" and "not rounded" in caplog.text


def test_modelopt_is_read_exactly() -> None:
    codes = codes_on(Nvfp4())
    assert codes.factor is not None
    tensors = format_of("nvfp4-pack-quantized").encode(codes)
    odd = torch.tensor(0.0012345)
    held = {"weight": tensors["weight_packed"], "weight_scale": tensors["weight_scale"], "weight_scale_2": odd}
    source = open_source({"quant_method": "modelopt", "quant_algo": "NVFP4"})
    names = [f"m.q_proj.{local}" for local in (*held, "input_scale")] + ["m.norm.weight"]
    assert list(source.groups(names)) == ["m.q_proj"]
    scheme = source.scheme(("m.q_proj",), {local: t.dtype for local, t in held.items()}, ("Linear",))
    found = source.read(held, scheme)
    g = torch.arange(96) // 16
    wanted = Nvfp4().tables[0][codes.values_NK.long()] * (codes.scale_NG.float() * odd)[:, g]
    assert torch.equal(found.dense(), wanted)
    stored = format_of(scheme.format)
    assert torch.equal(stored.decode(stored.encode(found.codes), scheme.grid), wanted)
    with pytest.raises(BadInput, match="weight_scale"):
        source.scheme(("m.q_proj",), {"weight": torch.uint8, "weight_scale_2": torch.float32}, ("Linear",))
    with pytest.raises(NotServed, match="'W6A6' is not among what aerogel runs, only FP8, "):
        open_source({"quant_method": "modelopt", "quant_algo": "w6a6"})


FP8_SCALES = {"FP8": (), "FP8_PER_CHANNEL_PER_TOKEN": (130,), "FP8_PB_WO": (2, 1, 3, 1)}


@pytest.mark.parametrize("algorithm", FP8_SCALES)
def test_fp8_of_modelopt_is_read_exactly(algorithm: str) -> None:
    weight = torch.randn(130, 300).to(torch.float8_e4m3fn)
    scale = torch.rand(FP8_SCALES[algorithm]) + 0.5
    source = open_source({"quant_method": "modelopt", "quantization": {"quant_algo": algorithm}})
    held = {"weight": weight, "weight_scale": scale, "input_scale": torch.tensor(0.1)}
    scheme = source.scheme(("a",), {local: t.dtype for local, t in held.items()}, ("Linear",))
    assert scheme.activations == {"FP8": "fp8-static", "FP8_PB_WO": "none"}.get(algorithm, "fp8")
    spread = scale.reshape(2, 3).repeat_interleave(128, 0).repeat_interleave(128, 1)[:130, :300] if "PB" in algorithm else scale
    wanted = weight.float() * (spread[:, None] if spread.dim() == 1 else spread)
    assert torch.equal(source.read(held, scheme).dense(), wanted)
    with pytest.raises(BadInput, match="weight_scale"):
        source.read({**held, "weight_scale": torch.ones(7)}, scheme)


def test_mixed_modelopt_goes_by_layer() -> None:
    layers = {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4", "group_size": 16}}
    source = open_source({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    header = {"weight": torch.uint8, "weight_scale": torch.float32, "weight_scale_2": torch.float32}
    assert [source.scheme((name,), header, ("Linear",)).format for name in "ab"] == ["float-quantized", "table-packed"]
    with pytest.raises(BadInput, match="quantized_layers"):
        source.scheme(("c",), header, ("Linear",))


def test_blocks_of_gpt_oss_are_the_same_numbers() -> None:
    codes = codes_on(Mx())
    blocks, scales = blocks_of_codes(codes)
    assert blocks.shape == (48, 3, 16) and scales.shape == (48, 3)
    assert torch.equal(codes_of_blocks(blocks, scales).decode(), codes.decode())
    byte, scale = int(blocks[2, 1, 4]), 2.0 ** (int(scales[2, 1]) - 127)
    low = (0, 0.5, 1, 1.5, 2, 3, 4, 6)[byte & 7] * (-1 if byte & 8 else 1)
    assert float(codes.decode()[2, 32 + 8]) == low * scale
    with pytest.raises(BadInput, match="blocks"):
        codes_of_blocks(blocks[0], scales)
    with pytest.raises(BadInput, match="multiple"):
        blocks_of_codes(codes_on(Mx(), 4, 40))
