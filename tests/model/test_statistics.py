"""What calibration sums up, against sums made with plain hooks; and what must change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import zoo
from tests.model.tiny import GPTQ, digest, ids_file, recipe
from torch import Tensor, nn

from aerogel.errors import RunFailed
from aerogel.model import statistics as module
from aerogel.model.capture import Accumulator
from aerogel.model.compress import compress
from aerogel.model.layer import Stats
from aerogel.model.reader import CheckpointReader
from aerogel.model.runner import Activations, Runner
from aerogel.model.statistics import BlockStatistics
from aerogel.model.structure import discover

ROWS = torch.randint(3, 128, (6, 10), generator=torch.Generator().manual_seed(2))
CPU = torch.device("cpu")


class Walked:
    """An architecture with its calibration batches in front of block 0."""

    def __init__(self, name: str, folder: Path) -> None:
        self.structure = discover(zoo.save(name, folder / name))
        self.reader = CheckpointReader(folder / name)
        self.runner = Runner(self.structure, self.reader.read, torch.float32, CPU)
        self.hidden = Activations()
        self.batches = list(ROWS.split(4))
        self.runner.prologue(self.batches, self.hidden)

    def statistics(self, index: int = 0, names: list[str] | None = None, **more: Any) -> BlockStatistics:
        block = self.runner.load_block(index)
        chosen = names or sorted({m.parameter for m in self.structure.matrices if m.block == index})
        return BlockStatistics(self.runner, index, block, chosen, self.hidden, len(self.batches), **more)

    def width(self, name: str) -> int:
        return next(m.k for m in self.structure.matrices if m.parameter == name)


def naive(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """x x^T of the inputs of linears, from forward hooks on a whole model, in float64."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + x.T @ x

        return add

    handles = [model.get_submodule(n.removesuffix(".weight")).register_forward_pre_hook(hook(n)) for n in names]
    with torch.no_grad():
        model(ROWS)
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "gpt2", "falcon", "phi3", "mamba2"])
def test_second_moments_are_those_of_the_whole_model(tmp_path: Path, name: str) -> None:
    walked = Walked(name, tmp_path)
    found = walked.statistics()
    wanted = naive(zoo.build(name), found.names)
    assert found.names
    for parameter in found.names:
        stats = found.collect([(parameter, None)], walked.width, cross=False)[found.leader(parameter), None]
        assert stats.tokens == ROWS.numel()
        assert stats.skipped == 0
        error = (stats.second_moment_KK.double() - wanted[parameter]).norm() / wanted[parameter].norm()
        assert error < 1e-5, parameter


def test_the_second_block_sees_the_first(tmp_path: Path) -> None:
    walked = Walked("llama", tmp_path)
    first = walked.statistics()
    first.advance(walked.hidden, first.output(0))
    found = walked.statistics(1)
    name = "model.layers.1.mlp.down_proj.weight"
    stats = found.collect([(name, None)], walked.width, cross=False)[name, None]
    torch.testing.assert_close(stats.second_moment_KK.double(), naive(zoo.build("llama"), [name])[name], rtol=1e-4, atol=1e-4)


def test_a_later_wave_sees_what_earlier_ones_became(tmp_path: Path) -> None:
    walked = Walked("llama", tmp_path)
    found = walked.statistics()
    waves = found.waves()
    dense = zoo.build("llama")
    for wave in waves:
        wanted = naive(dense, wave)
        stats = found.collect([(n, None) for n in wave], walked.width, cross=False)
        for parameter in wave:
            sums = stats[found.leader(parameter), None].second_moment_KK
            torch.testing.assert_close(sums.double(), wanted[parameter], rtol=1e-4, atol=1e-4)
        for parameter in wave:  # "compress": zero every third weight, in both models
            for model in (walked.structure.model, dense):
                weight = model.get_parameter(parameter)
                with torch.no_grad():
                    weight.view(-1)[::3] = 0
        found.final.update(wave)
    out = found.output(0)
    with torch.no_grad():
        wanted_out = dense.model(ROWS[:4], output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(out, wanted_out, rtol=1e-4, atol=1e-5)


def test_the_cross_moment_pairs_each_token_with_its_dense_self(tmp_path: Path) -> None:
    walked = Walked("llama", tmp_path)
    shifted = Activations()
    for batch in range(len(walked.batches)):
        noise = torch.randn(walked.hidden[batch].shape, generator=torch.Generator().manual_seed(batch))
        shifted[batch] = walked.hidden[batch] + 0.1 * noise
    found = walked.statistics(hidden_dense=shifted)
    names = found.waves()[0]
    q = next(n for n in names if "q_proj" in n)
    stats = found.collect([(q, None)], walked.width, cross=True)[found.leader(q), None]
    norm = walked.structure.model.get_submodule("model.layers.0.input_layernorm")
    wanted = 0
    for batch in range(len(walked.batches)):
        x, dense = (norm(h[batch]).detach().reshape(-1, 32).double() for h in (walked.hidden, shifted))
        wanted = wanted + (dense - x).T @ x
    assert (stats.cross_moment_KK.double() - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon", "mixtral", "deepseek_v3", "gpt_oss", "mamba2"])
def test_memory_limits_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    dense = zoo.save(name, tmp_path / "dense")
    chosen = recipe(
        ids_file(tmp_path),
        {"quantize": {**GPTQ["quantize"], "ignore": ["re:lm_head|embed_out"] if name != "gpt2" else ["lm_head"]}},
    )
    compress(dense, chosen, tmp_path / "plain")
    for what in ("REMEMBERED_BYTES", "SUMS_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(module, what, 0)
            compress(dense, chosen, tmp_path / what)
        assert digest(tmp_path / what) == digest(tmp_path / "plain"), what


def test_any_limit_on_what_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), GPTQ)
    compress(dense, chosen, tmp_path / "plain")
    for limit in (3_000, 7_000, 20_000):
        monkeypatch.setattr(module, "REMEMBERED_BYTES", limit)
        compress(dense, chosen, tmp_path / f"{limit}")
        assert digest(tmp_path / f"{limit}") == digest(tmp_path / "plain"), limit


# ---- rows that are no numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("k", [5, 700])
def test_rows_that_are_not_finite_are_left_out_and_counted(value: float, k: int) -> None:
    x = torch.randn(4, 100, k, generator=torch.Generator().manual_seed(0))
    dense = x + 1
    bad = x.clone()
    bad[1, 3, 2] = value
    bad[2, 7, :] = value
    total = Accumulator(k, cross=True, device=CPU)
    total.add(bad[:2], dense[:2])
    total.add(bad[2:], dense[2:])
    stats = total.stats("x")
    good = torch.cat([row for i, row in enumerate(x.reshape(-1, k).split(1)) if i not in (103, 207)]).double()
    assert (stats.tokens, stats.skipped) == (398, 2)
    torch.testing.assert_close(stats.second_moment_KK.double(), good.T @ good, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(stats.cross_moment_KK.double(), torch.ones_like(good).T @ good, rtol=1e-4, atol=1e-3)


def test_a_dense_row_that_is_not_finite_does_not_poison_the_cross_moment() -> None:
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    dense = x + 1
    dense[3, 1] = float("inf")
    total = Accumulator(6, cross=True, device=CPU)
    total.add(x, dense)
    stats = total.stats("x")
    assert bool(stats.cross_moment_KK.isfinite().all())
    assert (stats.tokens, stats.skipped) == (199, 1)


def test_large_values_whose_sum_overflows_are_numbers() -> None:
    x = torch.full((10, 4), 3e38)
    total = Accumulator(4, cross=False, device=CPU)
    total.add(x * torch.tensor([1e-30, 1.0, 1e-30, 1e-30]))
    assert (total.tokens, total.skipped) == (10, 0)


def test_more_than_one_in_a_hundred_ends_the_run() -> None:
    for bad, fails in ((1, False), (2, True)):
        x = torch.ones(100, 3)
        x[:bad, 0] = float("nan")
        total = Accumulator(3, cross=False, device=CPU)
        total.add(x)
        if not fails:
            assert total.stats("layer").skipped == 1
            continue
        with pytest.raises(RunFailed, match="2 of 100 calibration tokens reach layer with NaN or infinity"):
            total.stats("layer")


def test_statistics_add_up() -> None:
    x, y = torch.randn(20, 4), torch.randn(30, 4)
    parts = []
    for rows in (x, y, torch.cat([x, y])):
        total = Accumulator(4, cross=True, device=CPU)
        total.add(rows, rows + 1)
        parts.append(total.stats("x"))
    merged: Stats = parts[0] + parts[1]
    assert merged.tokens == parts[2].tokens == 50
    torch.testing.assert_close(merged.second_moment_KK, parts[2].second_moment_KK)
    torch.testing.assert_close(merged.cross_moment_KK, parts[2].cross_moment_KK)


# ---- waves and shared inputs ------------------------------------------------------------------------------------------

WAVES: dict[str, list[set[str]]] = {
    "llama": [
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        {"self_attn.o_proj"},
        {"mlp.gate_proj", "mlp.up_proj"},
        {"mlp.down_proj"},
    ],
    "gemma2": [
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        {"self_attn.o_proj"},
        {"mlp.gate_proj", "mlp.up_proj"},
        {"mlp.down_proj"},
    ],
    "opt": [{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, {"self_attn.out_proj"}, {"fc1"}, {"fc2"}],
    "gpt2": [{"attn.c_attn"}, {"attn.c_proj"}, {"mlp.c_fc"}, {"mlp.c_proj"}],
    "phi3": [{"self_attn.qkv_proj"}, {"self_attn.o_proj"}, {"mlp.gate_up_proj"}, {"mlp.down_proj"}],
    "falcon": [
        {"self_attention.query_key_value", "mlp.dense_h_to_4h"},
        {"self_attention.dense", "mlp.dense_4h_to_h"},
    ],
    "mixtral": [
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        {"self_attn.o_proj"},
        {"mlp.experts.gate_up_proj"},
        {"mlp.experts.down_proj"},
    ],
    "deepseek_v3": [
        {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"},
        {"self_attn.q_b_proj", "self_attn.kv_b_proj"},
        {"self_attn.o_proj"},
        {"mlp.gate_proj", "mlp.up_proj"},
        {"mlp.down_proj"},
    ],
}


@pytest.mark.parametrize("name", list(WAVES))
def test_waves(tmp_path: Path, name: str) -> None:
    found = Walked(name, tmp_path).statistics()
    short = [{n.removeprefix(found.prefix).removesuffix(".weight") for n in wave} for wave in found.waves()]
    assert short == WAVES[name]


def test_waves_of_a_block_with_experts_and_a_shared_one(tmp_path: Path) -> None:
    walked = Walked("deepseek_v3", tmp_path)
    first = walked.statistics()
    first.advance(walked.hidden, first.output(0))
    found = walked.statistics(1)
    waves = [{n.removeprefix(found.prefix).removesuffix(".weight") for n in wave} for wave in found.waves()]
    assert waves[3] == {"mlp.experts.gate_up_proj", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"}
    assert waves[4] == {"mlp.experts.down_proj", "mlp.shared_experts.down_proj"}


def test_linears_that_read_one_tensor_share_one_sum(tmp_path: Path) -> None:
    found = Walked("llama", tmp_path).statistics()
    p = found.prefix
    q, k, v, o = (f"{p}self_attn.{x}_proj.weight" for x in "qkvo")
    gate, up, down = (f"{p}mlp.{x}_proj.weight" for x in ("gate", "up", "down"))
    assert len({found.leader(n) for n in (q, k, v)}) == 1
    assert found.leader(gate) == found.leader(up)
    assert len({found.leader(n) for n in (q, o, gate, down)}) == 4


def test_equal_inputs_stay_in_one_portion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walked = Walked("llama", tmp_path)
    found = walked.statistics()
    slots = [(n, None) for n in found.names]
    assert list(found.portions(slots, walked.width, False)) == [
        [s for leader in dict.fromkeys(found.leader(n) for n in found.names) for s in slots if found.leader(s[0]) == leader]
    ]
    monkeypatch.setattr(module, "SUMS_BYTES", 1)
    portions = list(found.portions(slots, walked.width, False))
    assert len(portions) == 4
    assert all(len({found.leader(n) for n, _ in portion}) == 1 for portion in portions)


# ---- experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_see_their_own_tokens_or_all(tmp_path: Path, name: str) -> None:
    walked = Walked(name, tmp_path)
    experts = [(n, e) for n in walked.statistics().names if n.endswith("gate_up_proj") for e in range(4)]
    routed = walked.statistics(min_expert_tokens=1, top_up=False)
    own = routed.collect(experts, walked.width, cross=False)
    assert sum(own[slot].tokens for slot in experts) == 2 * ROWS.numel()
    everything = walked.statistics(min_expert_tokens=ROWS.numel(), top_up=True)
    shown = everything.collect(experts, walked.width, cross=False)
    assert all(shown[slot].tokens == ROWS.numel() for slot in experts)
    for slot in experts[1:]:
        torch.testing.assert_close(shown[slot].second_moment_KK, shown[experts[0]].second_moment_KK, rtol=1e-4, atol=1e-4)
    # The sum over experts of what was routed is what each sees of everything, twice (every token has two experts).
    total = sum(own[slot].second_moment_KK for slot in experts)
    torch.testing.assert_close(total, 2 * shown[experts[0]].second_moment_KK, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_the_second_matrix_of_a_topped_up_expert_sees_its_own_hidden_units(tmp_path: Path, name: str) -> None:
    walked = Walked(name, tmp_path)
    index = 0
    if name == "deepseek_v3":
        first = walked.statistics()
        first.advance(walked.hidden, first.output(0))
        index = 1
    found = walked.statistics(index, min_expert_tokens=ROWS.numel())
    down = next(n for n in found.names if n.endswith("experts.down_proj"))
    shown = found.collect([(down, e) for e in range(4)], walked.width, cross=False)
    assert all(stats.tokens == ROWS.numel() for stats in shown.values())
    moments = [stats.second_moment_KK for stats in shown.values()]
    assert all(float(m.diagonal().min()) > 0 for m in moments)
    assert not torch.allclose(moments[0], moments[1])
