"""HQQ's words, built bit by bit from their description, decode to exactly the numbers that they were made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack.hqq import Hqq, tag_of
from aerogel.pack.scheme import NotServed
from aerogel.pack.source import open_source
from aerogel.quantize.formats.affine import Affine

N, K, SIZE = 16, 60, 20
PER_WORD = {1: 8, 2: 4, 3: 10, 4: 2, 5: 1, 6: 1, 8: 1}


def config(bits: float = 4, size: int | None = SIZE, **more: Any) -> dict[str, Any]:
    """A `quantization_config` as transformers writes it."""
    numbers = {
        "nbits": bits, "channel_wise": True, "group_size": size, "optimize": True, "round_zero": bits == 4, "axis": 1,
        "view_as_float": False, **more,
    }  # fmt: skip
    layer = {"weight_quant_params": numbers, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
    return {"quant_method": "hqq", "quant_config": layer, "skip_modules": ["lm_head"]}


def words_of(codes_Rg: list[list[int]], bits: int) -> Tensor:
    """Rows r, r + P, r + 2 P, ... of a word, the first in the highest bits."""
    per, width = PER_WORD[bits], {3: 3}.get(bits, 8 // PER_WORD[bits])
    P = -(-len(codes_Rg) // per)
    rows = codes_Rg + [[0] * len(codes_Rg[0])] * (P * per - len(codes_Rg))
    found = [
        [sum(rows[p + i * P][j] << (width * (per - 1 - i)) for i in range(per)) for j in range(len(rows[0]))] for p in range(P)
    ]
    return torch.tensor(found, dtype=torch.int32 if bits == 3 else torch.uint8)


def layer_of(bits: int, size: int = SIZE, dtype: torch.dtype = torch.float16) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layer as HQQ stores them, and the weight that they stand for."""
    random = torch.Generator().manual_seed(bits)
    R = N * K // size
    codes = torch.randint(0, 1 << bits, (R, size), generator=random)
    scale = (torch.rand(R, 1, generator=random) + 0.1).to(dtype)
    zero = (torch.rand(R, 1, generator=random) * (1 << bits)).to(dtype)
    dense = ((codes.float() - zero.float()) * scale.float()).reshape(N, K)
    tensors = {"W_q": words_of(codes.tolist(), bits), "scale": scale, "zero": zero, "shape": torch.tensor([N, K])}
    numbers = {"nbits": bits, "group_size": size, "axis": 1}
    return tensors | {name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()}, dense


def read(said: dict[str, Any], tensors: dict[str, Tensor], name: str = "model.layers.3.mlp.up_proj") -> Tensor:
    source = open_source(said)
    assert set(source.groups([f"{name}.{local}" for local in tensors] + [f"{name}.bias", "norm.scale"])) == {name}
    scheme = source.scheme((name,), {local: tensor.dtype for local, tensor in tensors.items()}, ("Linear",))
    assert scheme.format == "affine-packed" and isinstance(scheme.grid, Affine)
    return source.read(tensors, scheme).dense()


@pytest.mark.parametrize("bits", PER_WORD)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_words_are_read_exactly(bits: int, dtype: torch.dtype) -> None:
    tensors, dense = layer_of(bits, dtype=dtype)
    assert torch.equal(read(config(bits), tensors), dense)


def test_one_group_per_output_floats_in_the_place_of_words_and_three_values() -> None:
    tensors, dense = layer_of(4, K)
    assert torch.equal(read(config(4, None), tensors), dense)
    tensors, dense = layer_of(4)
    tensors["W_q"] = tensors["W_q"].view(torch.float16)
    assert torch.equal(read(config(4, view_as_float=True), tensors), dense)
    tensors, dense = layer_of(2)
    tensors["nbits"] = torch.tensor(1.58)
    assert torch.equal(read(config(1.58), tensors), dense)


def test_layers_have_numbers_of_their_own() -> None:
    assert tag_of("model.layers.31.self_attn.k_proj") == "self_attn.k_proj"
    said = config()
    said["quant_config"] = {"mlp.up_proj": config(3)["quant_config"], "mlp.down_proj": config(8)["quant_config"], "gate": None}
    for bits, name in ((3, "up_proj"), (8, "down_proj")):
        tensors, dense = layer_of(bits)
        assert torch.equal(read(said, tensors, f"model.layers.0.mlp.{name}"), dense)
    with pytest.raises(BadInput, match=r"self_attn\.q_proj"):
        read(said, layer_of(4)[0], "model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("said", "word"),
    [
        (config(axis=0), "axis=1"),
        (config(7), "7 bits"),
        (config(channel_wise=False), "channel_wise"),
        ({"quant_method": "hqq"}, "quant_config"),
        (
            {"quant_method": "hqq", "quant_config": {**config()["quant_config"], "zero_quant_params": {"nbits": 8}}},
            "zero points",
        ),
    ],
)
def test_other_ways_are_refused_with_what_to_do(said: dict[str, Any], word: str) -> None:
    with pytest.raises(NotServed, match=word):
        Hqq(said)


def test_a_config_that_belongs_to_another_file_is_refused() -> None:
    tensors, _ = layer_of(4)
    for wrong in (config(2), config(4, 30)):
        with pytest.raises(BadInput, match="does not belong"):
            read(wrong, tensors)
    with pytest.raises(BadInput, match="run over outputs"):
        read(config(4, 32), tensors)
    with pytest.raises(BadInput, match="W_q"):
        read(config(4), tensors | {"W_q": tensors["W_q"][:-1]})
