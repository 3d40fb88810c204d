"""Rows of a packed weight: what the compiled code looks up is what the whole weight decodes to, bit for bit."""

from __future__ import annotations

import pytest
import torch

from aerogel.errors import BadInput
from aerogel.kernels.embedding import PackedEmbedding
from aerogel.kernels.linear import Linear
from aerogel.kernels.native import library
from aerogel.quantize.grids import IntGrid, quantized

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))


def head(N: int, K: int, bits: int, group: int | None, dtype: torch.dtype, symmetric: bool = True) -> Linear:
    grid = IntGrid(bits=bits, group_size=group, symmetric=symmetric, scale_dtype=torch.bfloat16)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(bits)) + 0.3
    return Linear.from_codes(quantized(grid, weight, grid.fit(weight)), dtype=dtype)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("N", "K", "group"), [(40, 96, 32), (33, 80, 16), (17, 100, None), (16, 36, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_those_of_the_decoded_weight(bits: int, N: int, K: int, group: int | None, dtype: torch.dtype) -> None:
    for symmetric in (True, False):
        linear = head(N, K, bits, group, dtype, symmetric)
        embedding = PackedEmbedding(linear)
        assert embedding.weight() is not None and (embedding.num_embeddings, embedding.embedding_dim) == (N, K)
        ids = torch.tensor([[0, N - 1, 5], [5, 16, 1]]).clamp_max(N - 1)
        assert torch.equal(embedding(ids), linear.dequantize(dtype)[ids])
        assert torch.equal(embedding(ids.T), linear.dequantize(dtype)[ids.T])  # not contiguous
        assert embedding(ids[:, :0]).shape == (2, 0, K)


@pytest.mark.parametrize("wrong", [-1, 40])
def test_an_id_that_is_no_row_is_refused(wrong: int) -> None:
    with pytest.raises(BadInput, match="a row is asked for"):
        PackedEmbedding(head(40, 96, 8, 32, torch.float32))(torch.tensor([3, wrong]))


def test_without_compiled_code_the_table_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "missing", lambda: "is not here")
    linear = head(40, 96, 8, 32, torch.bfloat16)
    embedding = PackedEmbedding(linear)
    ids = torch.tensor([1, 39])
    assert embedding.weight() is None
    assert torch.equal(embedding(ids), linear.dequantize()[ids]) and embedding.dense() is embedding.dense()
