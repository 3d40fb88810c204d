"""BitNet's bytes: read as transformers writes them, and written as transformers reads them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.integrations.bitnet import pack_weights

from aerogel.errors import BadInput
from aerogel.pack.bitnet import encode, unpack_rows
from aerogel.pack.scheme import NotServed
from aerogel.pack.source import Columns, open_source
from aerogel.quantize.codes import quantized
from aerogel.quantize.formats.ternary import Ternary


def read(config: dict[str, object], tensors: dict[str, Tensor]) -> Columns:
    source = open_source({"quant_method": "bitnet", **config})
    held = source.groups(["a.q.weight", "a.q.weight_scale", "a.norm.weight", "a.q.bias"])
    assert held == {"a.q": {"weight": "a.q.weight", "weight_scale": "a.q.weight_scale"}}
    scheme = source.scheme(("a.q",), {name: tensor.dtype for name, tensor in tensors.items()}, ("Linear",))
    return source.read(tensors, scheme)


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_what_transformers_packed_is_read(linear_class: str) -> None:
    codes_NK = torch.randint(-1, 2, (12, 10))
    tensors = {"weight": pack_weights(codes_NK.clone()), "weight_scale": torch.tensor([4.0], dtype=torch.bfloat16)}
    found = read({"linear_class": linear_class}, tensors)
    assert torch.equal(found.dense(), codes_NK.float() * (0.25 if linear_class == "bitlinear" else 4.0))


def test_what_is_written_is_what_transformers_packs_and_reads() -> None:
    grid, w_NK = Ternary(scales="tensor"), torch.randn(16, 9)
    codes = quantized(grid, w_NK, grid.fit(w_NK))
    tensors = encode(codes, "a.q")
    assert torch.equal(tensors["weight"], pack_weights(codes.values_NK.clone()))
    assert torch.equal(unpack_rows(tensors["weight"]), codes.values_NK)
    torch.testing.assert_close(read({}, tensors).dense(), codes.decode())


def test_what_bitnet_cannot_hold_is_refused() -> None:
    w_NK = torch.randn(16, 8)
    for grid, part, word in [
        (Ternary(), slice(None), "several scales"),
        (Ternary(scales="tensor"), slice(15), "multiple of 4"),
    ]:
        with pytest.raises(BadInput, match=word):
            encode(quantized(grid, w_NK[part], grid.fit(w_NK[part])), "a.q")
    packed = {"weight": torch.full((2, 3), 255, dtype=torch.uint8), "weight_scale": torch.ones(1)}
    with pytest.raises(BadInput, match="code 3"):
        read({}, packed)
    with pytest.raises(BadInput, match="weight_scale is 0"):
        read({}, {"weight": torch.zeros(2, 3, dtype=torch.uint8), "weight_scale": torch.zeros(1)})
    with pytest.raises(BadInput, match="not packed"):
        read({}, {"weight": torch.zeros(2, 3), "weight_scale": torch.ones(1)})
    for config in ({"use_rms_norm": True}, {"quantization_mode": "online"}):
        with pytest.raises(NotServed):
            open_source({"quant_method": "bitnet", **config})
