"""Causal attention of a prompt on the CPU against doubles, what it hands on, and whole models that read with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import zoo
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aerogel.kernels.decode.prompt_attention import NAME, attend, fits, reading
from aerogel.kernels.native import library

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def tensors(B: int, H: int, J: int, T: int, D: int, E: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(T)
    # As models make them: heads and tokens change places behind a projection.
    q = torch.randn(B, T, H, D, generator=random).to(dtype).transpose(1, 2)
    k = torch.randn(B, T, J, D, generator=random).to(dtype).transpose(1, 2)
    return q, k, torch.randn(B, J, T, E, generator=random).to(dtype)


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize(
    ("B", "H", "J", "T", "D", "E"),
    [(1, 4, 2, 2, 8, 8), (2, 6, 3, 13, 16, 24), (1, 3, 1, 31, 40, 33), (2, 2, 2, 32, 64, 64), (1, 9, 3, 130, 64, 64)],
)
def test_it_is_attention(B: int, H: int, J: int, T: int, D: int, E: int, dtype: torch.dtype) -> None:
    q, k, v = tensors(B, H, J, T, D, E, dtype)
    assert fits(q, k, v)
    found = attend(q, k, v, 0.2)
    wide = [x.double().repeat_interleave(H // x.shape[1], 1) for x in (q, k, v)]
    wanted = scaled_dot_product_attention(wide[0], wide[1], wide[2], is_causal=True, scale=0.2).transpose(1, 2)
    assert found.shape == (B, T, H, E) and found.dtype == dtype
    assert (found.double() - wanted).norm() < ERROR[dtype] * wanted.norm()


def test_threads_change_no_bit() -> None:
    given, count = tensors(2, 4, 2, 77, 32, 32, torch.bfloat16), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(attend(*given, 0.1))
    finally:
        torch.set_num_threads(count)
    assert all(torch.equal(result, results[0]) for result in results)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = tensors(1, 2, 1, 20, 16, 16, torch.float32)
    found = attend(100 * q, 100 * k, v, 1.0)
    wanted = scaled_dot_product_attention(
        100.0 * q, 100 * k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), is_causal=True, scale=1.0
    )
    assert torch.allclose(found, wanted.transpose(1, 2), atol=1e-3)


@pytest.mark.parametrize("change", ["mask", "not causal", "sinks", "one token", "types"])
def test_what_is_not_plain_goes_on_to_torch(change: str) -> None:
    q, k, v = tensors(1, 2, 1, 6, 8, 8, torch.float32)
    module, options, mask = torch.nn.Module(), dict[str, Any](), None
    module.is_causal = change != "not causal"  # type: ignore[assignment]
    if change == "mask":
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
    elif change == "sinks":
        options["s_aux"] = torch.zeros(2)
    elif change == "one token":
        q = q[:, :, :1]
    elif change == "types":
        v = v.double()
    asked: list[Any] = []

    def plain(*given: Any, **more: Any) -> tuple[Tensor, None]:
        asked.append((given, more))
        return q, None

    kept = ALL_ATTENTION_FUNCTIONS[NAME]
    ALL_ATTENTION_FUNCTIONS[NAME] = plain
    try:
        with reading():
            assert ALL_ATTENTION_FUNCTIONS[NAME] is not plain
            ALL_ATTENTION_FUNCTIONS[NAME](module, q, k, v, mask, **options)
        assert len(asked) == 1 and ALL_ATTENTION_FUNCTIONS[NAME] is plain
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.pop(NAME, None)
    assert ALL_ATTENTION_FUNCTIONS[NAME] is kept


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "opt", "phi3", "gemma3_text"])
def test_models_read_as_before(name: str, tmp_path: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(zoo.save(name, tmp_path / name, dtype=torch.float32)).eval()
    model.set_attn_implementation("sdpa")
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids).logits
        with reading():
            found = model(ids).logits
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
