"""auto-round's own config, translated: which layout, which version of zero points, which layers differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aerogel.pack.awq import Awq
from aerogel.pack.gptq import Gptq
from aerogel.pack.scheme import NotServed
from aerogel.pack.source import open_source
from aerogel.quantize.grids import IntGrid

BASE: dict[str, Any] = {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": False, "data_type": "int"}
HEADER = {"scales": torch.float16}
N, K, G = 8, 32, 2


def packed() -> dict[str, torch.Tensor]:
    """4-bit GPTQ tensors whose codes are all 5 and whose stored zero points are all 6."""
    words = {code: int(f"0x{str(code) * 8}", 16) for code in (5, 6)}
    return {
        "qweight": torch.full((K // 8, N), words[5], dtype=torch.int32),
        "qzeros": torch.full((G, N // 8), words[6], dtype=torch.int32),
        "scales": torch.full((G, N), 0.5, dtype=torch.float16),
    }


@pytest.mark.parametrize(
    ("layout", "zero"), [(None, 7), ("auto_round:auto_gptq", 7), ("auto_round", 6), ("auto_round:gptqmodel", 6)]
)
def test_the_packing_format_says_what_a_stored_zero_point_means(layout: str | None, zero: int) -> None:
    source = open_source({**BASE, "packing_format": layout})
    scheme = source.scheme(("a",), HEADER, ())
    assert torch.equal(source.read(packed(), scheme).dense(), torch.full((N, K), (5 - zero) * 0.5))


def test_layers_that_differ() -> None:
    extra = {
        "model.layers.0.q_proj": {"bits": 8, "group_size": -1, "sym": True},
        ".*down_proj": {"bits": 2},
        "lm_head": {"bits": 16},
    }
    source = open_source({**BASE, "packing_format": "auto_round:auto_gptq", "extra_config": extra})
    assert isinstance(source, Gptq)

    def grid(name: str) -> Any:
        return source.scheme((name,), HEADER, ()).grid

    half = torch.float16
    assert grid("model.layers.0.q_proj") == IntGrid(bits=8, scale_dtype=half)
    assert grid("model.layers.0.mlp.down_proj") == IntGrid(bits=2, group_size=16, symmetric=False, scale_dtype=half)
    for other in ("model.layers.0.q_proj_norm", "model_layers.0.q_proj", "model.layers.0.down_proj_2"):
        assert grid(other) == IntGrid(bits=4, group_size=16, symmetric=False, scale_dtype=half)


def test_the_awq_layout() -> None:
    config = {**BASE, "packing_format": "auto_round:auto_awq"}
    source = open_source({**config, "extra_config": {"lm_head": {"bits": 16}}})
    assert isinstance(source, Awq)
    assert source.scheme(("a",), HEADER, ()).grid == IntGrid(bits=4, group_size=16, symmetric=False, scale_dtype=torch.float16)
    symmetric = open_source({**config, "sym": True})
    assert symmetric.scheme(("a",), HEADER, ()).grid == IntGrid(bits=4, group_size=16, scale_dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"packing_format": "auto_round:mlx"}, "mlx"),
        ({"data_type": "mx_fp"}, "mx_fp"),
        ({"act_bits": 8}, "act_bits 8"),
        ({"bits": 5}, "5 bits"),
        ({"packing_format": "auto_round:auto_awq", "extra_config": {"a": {"group_size": 64}}}, "layers differ"),
    ],
)
def test_what_is_not_read(change: dict[str, Any], word: str) -> None:
    with pytest.raises(NotServed, match=word):
        open_source({**BASE, **change})
