from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from aerogel.cli.progress import _Lines, describe
from aerogel.kernels.native import library
from aerogel.quantize import GRIDS


def test_the_plan_is_what_happens(aerogel, tiny: Path) -> None:
    """Every tensor that is written, byte for byte as predicted."""
    recipe = ("-r", "w4-fast", "--set", "quantize.group_size=16")
    plan = json.loads(aerogel("plan", tiny, *recipe, "--json", "-").stdout)
    done = aerogel("compress", tiny, *recipe, "-o", "out", "--json", "report.json", "--quiet", "--threads", 1)
    assert done.code == 0, done.stderr
    report = json.loads(Path("report.json").read_text())
    assert plan["size"]["bytes"] == report["size"]["bytes"]
    planned = {row["name"]: (row["fate"], row["bytes"]) for row in plan["tensors"]}
    found = {row["name"]: (row["fate"], row["bytes"]) for row in report["tensors"]}
    assert planned == found


@pytest.mark.parametrize("name", ["w8", "w4", "w4-fast", "w4-awq", "w4-hqq", "w3", "w2", "w4-sparse24", "prune-50", "demo"])
def test_every_shipped_recipe_plans(aerogel, tiny: Path, name: str) -> None:
    found = aerogel("plan", tiny, "-r", name, "--json", "-")
    assert found.code == 0, found.stderr
    plan = json.loads(found.stdout)
    fates = {row["fate"] for row in plan["tensors"]}
    assert fates == ({"kept", "pruned"} if name == "prune-50" else {"kept", "compressed"})
    assert all(row["why"] for row in plan["tensors"])
    assert plan["memory"]["peak_bytes"] > 0
    assert math.isfinite(plan["time"]["seconds"])


def test_a_plan_per_tensor(aerogel, tiny: Path) -> None:
    short, long = aerogel("plan", tiny, "-r", "w8"), aerogel("plan", tiny, "-r", "w8", "--all")
    assert "model.layers.*.mlp.down_proj.weight" in short.stdout
    assert "model.layers.1.mlp.down_proj.weight" in long.stdout


def test_what_is_kept_says_why(aerogel, tiny: Path) -> None:
    changes = ("--set", "quantize.ignore=[lm_head,'re:.*down_proj']")
    rows = json.loads(aerogel("plan", tiny, "-r", "w8", *changes, "--json", "-").stdout)["tensors"]
    why = {row["name"]: row["why"] for row in rows}
    assert why["model.layers.0.mlp.down_proj.weight"] == "stages.0.quantize.ignore: 're:.*down_proj'"
    assert why["model.norm.weight"].startswith("norm")


def test_inspect_dense_and_compressed(aerogel, tiny: Path) -> None:
    dense = json.loads(aerogel("inspect", tiny, "--json", "-").stdout)
    assert dense["quantization"] is None
    assert dense["bits_per_weight"] is None
    groups = ("--set", "quantize.group_size=16")  # which divide 32 and 48 inputs
    assert aerogel("compress", tiny, "-r", "w4-fast", *groups, "-o", "out", "--quiet", "--threads", 1).code == 0
    found = json.loads(aerogel("inspect", "out", "--json", "-").stdout)
    assert found["parameters"] == dense["parameters"]
    assert found["quantization"]["method"] == "compressed-tensors"
    assert found["quantization"]["layers"] == 14
    assert found["quantization"]["schemes"][0]["bits"] == 4
    assert 4 < found["bits_per_weight"] < 8
    assert found["report"]["recipe"]["about"]
    shown = aerogel("inspect", "out")
    assert "groups of 16" in shown.stdout
    assert "symmetric" in shown.stdout


def test_generate(aerogel, tiny: Path) -> None:
    plain = aerogel("generate", tiny, "w1 w2", "-n", 4, "--raw")
    assert plain.code == 0, plain.stderr
    assert len(plain.stdout.split()) <= 4
    again = aerogel("generate", tiny, "w1 w2", "-n", 4, "--raw")
    assert again.stdout == plain.stdout
    sampled = json.loads(aerogel("generate", tiny, "w1", "-n", 4, "--temperature", 2, "--seed", 7, "--json", "-").stdout)
    repeated = json.loads(aerogel("generate", tiny, "w1", "-n", 4, "--temperature", 2, "--seed", 7, "--json", "-").stdout)
    assert sampled["text"] == repeated["text"]


def test_generate_answers_several_prompts_as_it_answers_each(aerogel, tiny: Path, tmp_path: Path) -> None:
    alone = [aerogel("generate", tiny, prompt, "-n", 4, "--raw").stdout.rstrip("\n") for prompt in ("w1 w2", "w3")]
    found = aerogel("generate", tiny, "w1 w2", "w3", "-n", 4, "--raw")
    assert found.stdout == f"> w1 w2\n{alone[0]}\n\n> w3\n{alone[1]}\n\n", found.stderr
    assert "for 2 prompts" in found.stderr
    lines = json.loads(aerogel("generate", tiny, "w1 w2\n\nw3\n", "--lines", "-n", 4, "--raw", "--json", "-").stdout)
    assert [(one["prompt"], one["text"]) for one in lines["answers"]] == [("w1 w2", alone[0]), ("w3", alone[1])]
    assert lines["tokens"] == sum(one["tokens"] for one in lines["answers"])
    stopped = alone[0].split()[-1]
    ended = json.loads(aerogel("generate", tiny, "w1 w2", "w3", "-n", 4, "--raw", "--stop", stopped, "--json", "-").stdout)
    assert ended["answers"][0]["text"] == alone[0].split(stopped)[0]


def test_eval_and_bench_use_the_recipe_of_the_checkpoint(aerogel, recipe: Path, tiny: Path) -> None:
    assert aerogel("compress", tiny, "-r", recipe, "-o", "out", "--quiet", "--threads", 1).code == 0
    found = aerogel("eval", "out", "--against", tiny, "--json", "eval.json", "--threads", 1)
    assert found.code == 0, found.stderr
    evaluation = json.loads(Path("eval.json").read_text())["evaluation"]
    assert evaluation["perplexity"]["windows"] == 2
    assert evaluation["divergence"]["kl"] >= 0
    timed = aerogel("bench", "out", "--against", tiny, "--json", "bench.json", "--threads", 1)
    assert timed.code == 0, timed.stderr
    report = json.loads(Path("bench.json").read_text())
    assert report["bench"]["prompt"] == 4
    assert report["evaluation"]["divergence"]["kl"] == evaluation["divergence"]["kl"]
    timed = aerogel("bench", "out", "--against", tiny, "--speed-only", "--json", "-", "--threads", 1)
    assert "evaluation" not in json.loads(timed.stdout)


def test_export(aerogel, tiny: Path) -> None:
    assert aerogel("compress", tiny, "-r", "w8", "-o", "out", "--quiet", "--threads", 1).code == 0
    found = aerogel("export", "out", "-o", "dense")
    assert found.code == 0, found.stderr
    assert json.loads(aerogel("inspect", "dense", "--json", "-").stdout)["quantization"] is None


def test_the_output_is_named_after_model_and_recipe(aerogel, tiny: Path) -> None:
    found = aerogel("compress", tiny, "-r", "w8", "--threads", 1)
    assert found.code == 0, found.stderr
    assert Path("tiny-w8/model.safetensors").is_file()
    assert "aerogel eval tiny-w8 --against" in found.stdout


@pytest.mark.parametrize("what", ["recipes", "methods", "formats", "kernels", "tasks", "architectures"])
def test_lists(aerogel, what: str) -> None:
    found = aerogel("list", what)
    assert found.code == 0, found.stderr
    expected = {"recipes": "w4", "methods": "gptq", "formats": "pack-quantized", "kernels": "reference", "tasks": "piqa"}
    assert expected.get(what, "llama") in found.stdout


def test_formats_are_those_of_stages_and_those_of_files(aerogel) -> None:
    from aerogel.pack import FORMATS
    from aerogel.quantize import GRIDS

    listed = json.loads(aerogel("list", "formats", "--json", "-").stdout)["formats"]
    assert list(listed) == [*(f"quantize: {name}" for name in GRIDS), *(f"pack: {name}" for name in FORMATS)]
    assert all(len(about) > 12 for about in listed.values())


def test_kernels_say_who_runs_a_problem_and_why_the_others_refuse(aerogel) -> None:
    found = aerogel("list", "kernels", "--problem", "N=64,K=128,bits=4,group_size=64,device=cpu,dtype=float32", "--json", "-")
    assert found.code == 0, found.stderr
    answers = json.loads(found.stdout)["kernels"]
    assert list(answers.values()).count("runs it") == 1
    assert "needs activations: int8" in answers["torch-int8-dynamic"]
    assert answers["reference"] in ("runs it", "could run it")


OPTIONS = {"float": "kind=e3m2", "bitmod": "bits=3", "kmeans": "bits=3", "bipolar": "bits=2", "planes": "bits=3,group_size=32"}
"""What a format must be told; the others have all they need."""


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_a_problem_may_have_any_format(aerogel, name: str) -> None:
    asked = ",".join(filter(None, ("N=64,K=128", f"format={name}", OPTIONS.get(name))))
    found = aerogel("list", "kernels", "--problem", asked, "--json", "-")
    assert found.code == 0, found.stderr
    by = next(kernel for kernel, answer in json.loads(found.stdout)["kernels"].items() if answer == "runs it")
    assert (by != "torch-chunked") == (library.missing() is None)


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("K=64", "lacks N"),
        ("N=64,K=x", "K must be a whole number from 1, found 'x'"),
        ("N=64,K=64,bit=4", "did you mean 'bits'"),
        ("N=64,K=64,bits=9", "--problem bits=9"),
        ("N=64,K=64,format=nf5", "did you mean 'nf4'"),
        ("N=64,K=64,format=nf4,bits=4", "knows no 'bits' of format nf4"),
        ("N=64,K=64,format=nf4,activations=int8", "is weight-only, found activations: int8; leave them out"),
        ("N=64,K=64,dtype=int4", "bfloat16, float16, float32"),
        ("N=64,K=64,bits", "has no value"),
    ],
)
def test_a_problem_that_cannot_be_read(aerogel, asked: str, answer: str) -> None:
    found = aerogel("list", "kernels", "--problem", asked)
    assert found.code == 2
    assert answer in found.stderr


def test_tune_asks_the_kernel_that_runs_each_layer(aerogel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from aerogel.kernels.gemm.torch_ops import Chunked
    from aerogel.kernels.problem import Tuned

    asked = []

    def tune(problem, tokens):
        asked.append((problem.N, problem.K, tuple(tokens)))
        return Tuned(found={count: f"{count} us" for count in tokens}, kept=tmp_path / "table.json")

    monkeypatch.setattr(Chunked, "tune", staticmethod(tune))
    monkeypatch.setattr("aerogel.kernels.dispatch.choose", lambda problem: ("torch-chunked", Chunked))
    found = aerogel("tune", "--problem", "N=64,K=128", "--tokens", "16,1", "--json", "-")
    assert found.code == 0, found.stderr
    assert asked == [(64, 128, (1, 16))]
    (row,) = json.loads(found.stdout)["tuned"]
    assert row["found"] == {"1": "1 us", "16": "16 us"}
    assert row["kept"].endswith("table.json")


def test_tune_takes_the_layers_of_a_compressed_model(
    aerogel, recipe: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from aerogel.kernels.gemm import cpu_table

    monkeypatch.setenv("AEROGEL_CACHE", str(tmp_path / "cache"))
    request.addfinalizer(cpu_table.table.cache_clear)
    assert aerogel("tune", tiny).code == 2
    assert aerogel("compress", tiny, "-r", recipe, "-o", "out").code == 0
    found = aerogel("tune", "out", "--json", "-", "--device", "cpu")
    assert found.code == 0, found.stderr
    rows = json.loads(found.stdout)["tuned"]
    assert len(rows) == len({row["layer"] for row in rows}) >= 2


def test_progress_in_a_log_is_a_line_per_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    watch = _Lines()
    for done in range(101):
        watch("blocks", done, 100, {"tokens_per_second": 1234.5, "memory_bytes": 2**30})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert "1,234 tok/s" in lines[5] or "1,235 tok/s" in lines[5]
    assert "memory 1.00 GiB" in lines[5]
    assert lines[-1].startswith("blocks: 100/100")


def test_facts_in_words() -> None:
    assert describe({"loss": 0.00123, "name": "block 3", "retries": 2, "nothing": None}) == "loss 0.00123  block 3  retries 2"


def test_generate_says_which_wishes_of_the_model_it_does_not_follow(aerogel, tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "polite"
    shutil.copytree(tiny, copy)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "repetition_penalty": 1.3, "num_beams": 1}))
    found = aerogel("generate", copy, "w1", "-n", 2, "--raw")
    assert "asks for repetition_penalty=1.3, which was not done" in found.stderr
    assert "num_beams" not in found.stderr


def test_inspect_shapes(aerogel, tiny: Path) -> None:
    found = json.loads(aerogel("inspect", tiny, "--shape", "--deepshape", "0.5", "--json", "-").stdout)["shape"]
    row = next(row for row in found["kinds"] if row["name"].endswith("down_proj.weight"))
    assert row["count"] == 2 and 1.7 < row["shape"] < 2.3  # random weights are normal
    assert row["deepshape"]["shape"] == pytest.approx(0.5, abs=0.1)
    assert row["deepshape"]["entropy_bits"] < row["entropy_bits"] < row["golomb_bits"] and row["deepshape"]["moved"] > 0.1
    shown = aerogel("inspect", tiny, "--shape")
    assert shown.code == 0 and "Golomb" in shown.stdout
    assert aerogel("inspect", tiny, "--step", "0.5").code == 2


def test_who_loads_the_result_is_said_before_the_work(aerogel, tiny: Path, caplog) -> None:
    """Groups of 32 leave a short last one in the 48 inputs of down_proj."""
    short = ("-r", "w4-fast", "--set", "quantize.group_size=32")
    done = aerogel("plan", tiny, *short)
    assert done.code == 0
    assert "loads in aerogel only" in done.stdout and "write quantize.group_size: 16, which" in done.stdout
    assert not caplog.text
    assert aerogel("compress", tiny, *short, "-o", "out").code == 0
    assert "write quantize.group_size: 16, which" in caplog.text
    done = aerogel("plan", tiny, *short, "--set", "pack.format=pack-quantized")
    assert done.code == 2 and "write quantize.group_size: 16, which" in done.stderr
    assert "loads in aerogel, transformers, vLLM and SGLang" in aerogel("plan", tiny, "-r", "w8").stdout


def test_bits_are_shared_out_as_the_page_says(aerogel, tiny: Path) -> None:
    """Compress at each width, allocate, compress by the recipe that came out."""
    Path("text.txt").write_text("\n\n".join(" ".join(f"w{(7 * i + j) % 90}" for j in range(40)) for i in range(40)))
    sets = ("quantize.group_size=16", "calibration.source=text.txt", "calibration.samples=4", "calibration.sequence_length=32")
    for bits in (2, 3, 4):
        changes = [word for each in (*sets, f"quantize.bits={bits}") for word in ("--set", each)]
        done = aerogel("compress", tiny, "-r", "w3", "-o", f"w{bits}", *changes, "--quiet")
        assert done.code == 0, done.stderr
    shared = aerogel("allocate", "w2", "w3", "w4", "--average", 3, "-o", "mixed.yaml", "--json", "-")
    bits_of = json.loads(shared.stdout)["bits"]
    done = aerogel("compress", tiny, "-r", "mixed.yaml", "-o", "mixed", "--quiet")
    assert done.code == 0, done.stderr
    report = json.loads(Path("mixed/aerogel_report.json").read_text())
    rows = [layer for block in report["blocks"] for layer in block["layers"]]
    assert {row["name"]: row["bits"] for row in rows} == bits_of
    assert len(set(bits_of.values())) > 1
