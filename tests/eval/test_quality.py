from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.zoo import ZOO, build
from torch import Tensor, nn

from aerogel.errors import BadInput, RunFailed
from aerogel.eval import quality
from aerogel.eval.body import HiddenStore, Split
from aerogel.eval.quality import divergence, evaluate_one, evaluate_pair

Make = Callable[..., Any]


@torch.inference_mode()
def naive(dense: nn.Module, compressed: nn.Module, ids_WT: Tensor) -> dict[str, Any]:
    """The definitions, one prediction after the other, in double precision."""
    losses: list[list[float]] = [[], []]
    kls: list[float] = []
    sames: list[float] = []
    for ids_T in ids_WT:
        p_TV, q_TV = (model(input_ids=ids_T[None]).logits[0].double().log_softmax(-1) for model in (dense, compressed))
        loss, kl, same = [0.0, 0.0], 0.0, 0
        for place in range(len(ids_T) - 1):
            token = int(ids_T[place + 1])
            loss[0] -= float(p_TV[place, token])
            loss[1] -= float(q_TV[place, token])
            kl += sum(math.exp(p) * (p - q) for p, q in zip(p_TV[place].tolist(), q_TV[place].tolist(), strict=True))
            same += int(p_TV[place].argmax() == q_TV[place].argmax())
        count = len(ids_T) - 1
        losses[0].append(loss[0] / count)
        losses[1].append(loss[1] / count)
        kls.append(kl / count)
        sames.append(same / count)
    return {"loss": losses, "kl": kls, "same": sames}


def error(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).std()) / len(values) ** 0.5


@pytest.mark.parametrize("tied", [False, True])
def test_all_figures_equal_a_naive_loop(tiny_llama: Make, windows: Make, tied: bool) -> None:
    dense, compressed, ids = tiny_llama(tied=tied), tiny_llama(tied=tied, noise=0.1), windows()
    expected = naive(dense, compressed, ids)
    found: Any = evaluate_pair(lambda: dense, lambda: compressed, ids, source={"source": "random", "bos": False})
    text, kl = found["perplexity"], found["divergence"]
    for index, name in enumerate(("dense", "compressed")):
        mean = sum(expected["loss"][index]) / len(ids)
        assert text[name]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
        assert text[name]["loss_se"] == pytest.approx(error(expected["loss"][index]), rel=1e-4)
        assert text[name]["perplexity_se"] == pytest.approx(math.exp(mean) * error(expected["loss"][index]), rel=1e-4)
    differences = [after - before for before, after in zip(*expected["loss"], strict=True)]
    ratio = math.exp(sum(differences) / len(ids))
    assert text["increase"] == pytest.approx(ratio - 1, rel=1e-3, abs=1e-6)
    assert text["increase_se"] == pytest.approx(ratio * error(differences), rel=1e-3)
    assert kl["kl"] == pytest.approx(sum(expected["kl"]) / len(ids), rel=1e-4)
    assert kl["kl_se"] == pytest.approx(error(expected["kl"]), rel=1e-3)
    assert kl["kl"] > 0
    assert kl["top1"] == pytest.approx(sum(expected["same"]) / len(ids))
    assert kl["top1_se"] == pytest.approx(error(expected["same"]), rel=1e-6)


def test_a_model_against_itself_has_no_divergence(tiny_llama: Make, windows: Make) -> None:
    found: Any = evaluate_pair(tiny_llama, tiny_llama, windows())
    assert found["divergence"]["kl"] == 0
    assert found["divergence"]["kl_max"] == 0
    assert found["divergence"]["top1"] == 1
    assert found["perplexity"]["increase"] == 0
    assert found["perplexity"]["increase_se"] == 0
    assert found["perplexity"]["dense"] == found["perplexity"]["compressed"]


@pytest.mark.parametrize("per_chunk", [1, 5, 7, 23, 1000])
def test_chunks_of_any_length_give_the_same_figures(
    tiny_llama: Make, windows: Make, monkeypatch: pytest.MonkeyPatch, per_chunk: int
) -> None:
    noisy = lambda: tiny_llama(noise=0.1)  # noqa: E731
    whole: Any = evaluate_pair(tiny_llama, noisy, windows())
    monkeypatch.setattr(quality, "LOGITS_PER_CHUNK", 260 * per_chunk)
    parts: Any = evaluate_pair(tiny_llama, noisy, windows())
    assert parts["divergence"]["kl"] == pytest.approx(whole["divergence"]["kl"], rel=1e-4)
    assert parts["divergence"]["top1"] == whole["divergence"]["top1"]
    for name in ("dense", "compressed"):
        assert parts["perplexity"][name]["loss"] == pytest.approx(whole["perplexity"][name]["loss"], rel=1e-6)


def test_batches_of_windows_give_the_same_figures(tiny_llama: Make, windows: Make) -> None:
    noisy = lambda: tiny_llama(noise=0.1)  # noqa: E731
    single: Any = evaluate_pair(tiny_llama, noisy, windows())
    double: Any = evaluate_pair(tiny_llama, noisy, windows(), batch=2)
    assert double["divergence"]["kl"] == pytest.approx(single["divergence"]["kl"], rel=1e-4)
    assert double["perplexity"]["windows"] == 5


def test_the_dense_body_is_gone_before_the_compressed_model_is_loaded(tiny_llama: Make, windows: Make) -> None:
    dense = tiny_llama()
    layers: list[int] = []

    def load() -> Any:
        layers.append(sum(isinstance(module, nn.Linear) for module in dense.modules()))
        return tiny_llama()

    evaluate_pair(lambda: dense, load, windows())
    assert layers == [1]  # the head alone


def test_each_model_is_whole_when_it_is_visited(tiny_llama: Make, windows: Make) -> None:
    visits: list[tuple[str, bool]] = []

    def visit(which: str, model: Any) -> None:
        visits.append((which, bool(model(input_ids=windows()[:1, :4]).logits.isfinite().all())))

    evaluate_pair(tiny_llama, tiny_llama, windows(), also=visit)
    assert visits == [("dense", True), ("compressed", True)]


def test_the_text_and_its_windows_are_always_stated(tiny_llama: Make, windows: Make) -> None:
    found: Any = evaluate_pair(tiny_llama, tiny_llama, windows(3, 9), source={"source": "a file", "sha256": "ab"})
    text = found["perplexity"]
    assert (text["source"], text["sha256"], text["windows"], text["sequence_length"]) == ("a file", "ab", 3, 9)
    assert (text["predictions"], text["overlap"], text["numerics"]) == (24, 0, "stored")
    assert "bos" in text


def test_one_model_alone_has_only_a_perplexity(tiny_llama: Make, windows: Make) -> None:
    alone: Any = evaluate_one(tiny_llama(), windows())
    both: Any = evaluate_pair(tiny_llama, tiny_llama, windows())
    assert set(alone) == {"perplexity"}
    assert alone["perplexity"]["model"] == both["perplexity"]["dense"]


def test_one_window_has_no_standard_error(tiny_llama: Make, windows: Make) -> None:
    found: Any = evaluate_pair(tiny_llama, tiny_llama, windows(1))
    assert found["perplexity"]["dense"]["perplexity_se"] is None
    assert found["divergence"]["kl_se"] is None


def test_ids_that_a_mask_forbids_count_nothing() -> None:
    p = torch.log(torch.tensor([[0.5, 0.5, 0.0]]))
    q = torch.log(torch.tensor([[0.25, 0.75, 0.0]]))
    assert float(divergence(p, q)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


@pytest.mark.parametrize(
    "ids",
    [torch.zeros(2, 1, dtype=torch.long), torch.zeros(4, dtype=torch.long), torch.zeros(1, 4), torch.full((1, 4), 260)],
    ids=["one token", "one dimension", "not integers", "beyond the vocabulary"],
)
def test_unusable_ids_are_refused(tiny_llama: Make, ids: Tensor) -> None:
    with pytest.raises(BadInput):
        evaluate_one(tiny_llama(), ids)


def test_logits_that_are_not_numbers_stop_the_run(tiny_llama: Make, windows: Make) -> None:
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(RunFailed, match="compressed model gives logits that are not finite in evaluation window 0"):
        evaluate_pair(tiny_llama, lambda: broken, windows())


def test_a_model_that_ends_in_something_else_is_refused(tiny_llama: Make) -> None:
    class Odd(type(tiny_llama())):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            output = super().forward(input_ids=input_ids, **kwargs)
            output.logits = output.logits + input_ids[..., None]
            return output

    odd = tiny_llama()
    odd.__class__ = Odd
    with pytest.raises(RunFailed, match="more than its final hidden states"):
        Split(odd)


@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_can_be_split(name: str) -> None:
    split = Split(build(name))  # compares the two halves with the whole
    ids = torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = split.model(input_ids=ids).logits[0].float()
    hidden = split.hidden(ids)[0]
    split.drop_body()
    torch.testing.assert_close(split.logits(hidden), whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(RunFailed, match="already dropped"):
        split.hidden(ids)


def test_hidden_states_above_the_limit_live_in_a_file_that_goes_away() -> None:
    store = HiddenStore(3, torch.zeros(4, 5), limit=0)
    assert store._folder is not None
    store.states_WTD[1] = 2.0
    assert float(store.states_WTD.sum()) == 40
    store.close()
    assert store.states_WTD.numel() == 0
