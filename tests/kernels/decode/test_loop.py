"""Tokens equal transformers' own greedy tokens, whatever the architecture, the batch and the way they are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.zoo import ZOO, build
from torch import Tensor, nn

from aerogel.errors import BadInput
from aerogel.kernels.decode import session as sessions
from aerogel.kernels.decode.fuse import fuse
from aerogel.kernels.decode.loop import Decoder
from aerogel.kernels.decode.lower import lower
from aerogel.kernels.decode.merge import merge
from aerogel.kernels.decode.prompt_graphs import causal_without_masks, rounded
from aerogel.kernels.decode.sample import Sampling
from aerogel.kernels.decode.trace import Program, clean, trace

WAYS = {"opt": "masked", "falcon": "masked", "deepseek_v3": "masked", "mamba2": "plain"}
"""The way a model is expected to take, "fused" where it is not named."""


def padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def theirs(model: Any, prompts: list[Tensor], new: int) -> list[list[int]]:
    """transformers' greedy tokens, by step."""
    model.generation_config.eos_token_id = None
    ids, mask = (tensor.to(model.device) for tensor in padded(prompts))
    found = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return found[:, ids.shape[1] :].T.tolist()


def some_prompts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, 100, (length,), generator=generator) for length in lengths]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ZOO)
def test_tokens_are_those_of_transformers(name: str) -> None:
    model, decoder = build(name), None
    for prompts in (some_prompts(7, 7), some_prompts(4, 20, 6)):
        expected = theirs(model, prompts, 8)
        decoder = Decoder(model)
        assert list(decoder.stream(prompts, 8)) == expected
        assert list(decoder.stream(prompts, 8)) == expected, "a session is used again"
        assert decoder.way == WAYS.get(name, "fused"), decoder.facts()
    assert decoder is not None
    assert {*decoder.facts().get("not", {})} - {"native"} == {
        "fused": set(),
        "masked": {"fused"},
        "plain": {"fused", "masked"},
    }[decoder.way or ""]


@pytest.mark.parametrize("loop", ["fused", "masked", "plain"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_every_way_makes_the_same_tokens(name: str, loop: Any) -> None:
    model, prompts = build(name), some_prompts(9, 30)
    expected = theirs(model, prompts, 24)
    merge(model)
    decoder = Decoder(model, loop)
    assert list(decoder.stream(prompts, 24)) == expected
    assert decoder.way == loop


def test_lowering_changes_calls_and_no_numbers() -> None:
    model: Any = build("llama")
    merge(model)
    x = torch.randn(2, 1, 32)
    block = model.model.layers[0].mlp
    graph = trace(block, x)
    assert fuse(graph)["gate"] == 1
    lower(graph)
    clean(graph)
    calls = [str(node.target) for node in graph.graph.nodes if node.op.startswith("call_")]
    assert sum("linear" in name for name in calls) == 2
    assert not [name for name in calls if "mm" in name or "_unsafe_view" in name or "aerogel." in name]
    program = Program(graph)
    assert program.operators == 3
    with torch.no_grad():
        for fresh in (x, torch.randn(2, 1, 32)):
            assert torch.allclose(program(fresh), block(fresh), rtol=1e-5, atol=1e-6)


def test_a_session_serves_shorter_and_longer_prompts_of_its_batch() -> None:
    model = build("llama")
    decoder = Decoder(model)
    for prompts in (some_prompts(30), some_prompts(3), some_prompts(20)):
        assert list(decoder.stream(prompts, 10)) == theirs(model, prompts, 10)
    held = decoder.session
    assert list(decoder.stream(some_prompts(5, 9), 10)) == theirs(model, some_prompts(5, 9), 10)
    assert decoder.session is not held


def test_a_way_with_other_logits_is_left_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sessions.fuse

    def wrong(graph: Any) -> dict[str, int]:
        found = real(graph)
        output = next(node for node in graph.graph.nodes if node.op == "output")
        with graph.graph.inserting_before(output):
            output.args = (graph.graph.call_function(torch.mul, (output.args[0], 1.1)),)
        graph.recompile()
        return found

    monkeypatch.setattr(sessions, "fuse", wrong)
    decoder, prompts = Decoder(build("llama")), some_prompts(5)
    assert list(decoder.stream(prompts, 4)) == theirs(build("llama"), prompts, 4)
    assert decoder.way == "plain"
    assert "differ from the model's own by 0.1" in decoder.facts()["not"]["fused"]
    with pytest.raises(BadInput, match="loop fused cannot run this model"):
        list(Decoder(build("llama"), "fused").stream(prompts, 4))


class Branching(nn.Module):
    """Does something else when a value is large: what was seen once must not be repeated."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x * 3


def test_a_step_that_depends_on_values_is_not_traced() -> None:
    model: Any = build("llama")
    model.model.layers[1].mlp.act_fn = Branching()
    decoder, prompts = Decoder(model), some_prompts(5)
    assert list(decoder.stream(prompts, 6)) == theirs(model, prompts, 6)
    assert decoder.way == "plain"
    assert "depends on values" in decoder.facts()["not"]["fused"]


def test_what_python_counts_is_not_baked_in() -> None:
    """A forward that changes with the number of calls gives other logits on the second probe."""

    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counting.calls += 1
            return x * Counting.calls

    model: Any = build("llama")
    model.model.layers[0].mlp.act_fn = Counting()
    decoder = Decoder(model)
    list(decoder.stream(some_prompts(5), 3))
    assert decoder.way == "plain"


def test_a_sequence_ends_at_its_stop_token_and_the_batch_when_all_have() -> None:
    model, prompts = build("llama"), some_prompts(5, 5)
    free = list(Decoder(model).stream(prompts, 12))
    stop = frozenset([free[3][0]])
    found = list(Decoder(model).stream(prompts, 12, stop=stop))
    ends = [next((i for i, step in enumerate(free) if step[row] in stop), 11) for row in range(2)]
    assert len(found) == max(ends) + 1
    for row, end in enumerate(ends):
        assert [step[row] for step in found] == [step[row] for step in free[: end + 1]] + [None] * (len(found) - end - 1)


def test_draws_repeat_with_the_seed_and_not_with_another() -> None:
    decoder, prompts = Decoder(build("llama")), some_prompts(5, 8)

    def draw(seed: int) -> Any:
        return list(decoder.stream(prompts, 12, sampling=Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=seed)))

    first = draw(1)
    assert draw(1) == first
    assert draw(2) != first
    likeliest = list(decoder.stream(prompts, 12, sampling=Sampling(temperature=1.5, top_k=1, seed=3)))
    assert likeliest == list(decoder.stream(prompts, 12))


@pytest.mark.parametrize(
    ("prompts", "new", "words"),
    [
        ([], 1, "no tokens"),
        ([torch.zeros(0, dtype=torch.int64)], 1, "no tokens"),
        (some_prompts(5), 0, "at least 1"),
        (some_prompts(60), 10, "64 positions: at most 4 new tokens fit"),
        (some_prompts(70), 1, "64 positions: shorten the prompt"),
    ],
)
def test_what_does_not_fit_is_refused_with_advice(prompts: list[Tensor], new: int, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        list(Decoder(build("llama")).stream(prompts, new))


def test_the_last_position_can_be_used() -> None:
    model, prompts = build("llama"), some_prompts(60)
    assert list(Decoder(model).stream(prompts, 4)) == theirs(model, prompts, 4)


@pytest.mark.real
def test_a_real_model_says_what_transformers_says(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.real import smollm2
    from transformers import AutoTokenizer

    from aerogel.model.loading import load

    folder = smollm2(tmp_path_factory)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["The capital of France is", "Once upon a time, in a land far away, there lived a small dragon who"]
    prompts = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts]
    expected = theirs(load(folder, dtype=torch.float32), prompts, 16)
    decoder = Decoder(load(folder, dtype=torch.float32, merge=True))
    assert list(decoder.stream(prompts, 16)) == expected
    assert decoder.way == "fused"


def test_a_capture_leaves_the_causal_mask_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a model does when nothing is captured; with a mask attention takes a slower kernel."""
    masks: list[Any] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **options: Any) -> Tensor:
        masks.append(options.get("attn_mask"))
        return attention(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model = build("llama")
    with torch.no_grad(), causal_without_masks():
        model(torch.arange(3, 20)[None])
    assert masks
    assert all(mask is None for mask in masks)


def test_prompts_are_read_at_few_lengths() -> None:
    lengths = [rounded(tokens) for tokens in range(1, 4097)]
    assert all(tokens <= length for tokens, length in enumerate(lengths, start=1))
    assert lengths[:16] == list(range(1, 17))
    assert max(length / tokens for tokens, length in enumerate(lengths, start=1) if tokens > 256) < 1.25
    assert len(set(lengths)) < 100
