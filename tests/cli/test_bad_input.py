"""Everything a person can get wrong, each answered with exit code 2 and one line: what is wrong and what to write."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

STAGE = "stages:\n  - quantize: {method: rtn, bits: 4, group_size: 16}\n"
GOOD = f"aerogel: 1\n{STAGE}"


@dataclass
class Place:
    """Where a case builds what is wrong, beside a model that is fine."""

    folder: Path
    tiny: Path
    text: Path

    def write(self, name: str, content: str | bytes) -> str:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(file)

    def model(self, **config: object) -> str:
        """A copy of the tiny model with other values in its config; None removes a key."""
        copy = self.folder / "model"
        shutil.copytree(self.tiny, copy)
        values = json.loads((copy / "config.json").read_text()) | config
        (copy / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
        return str(copy)


@pytest.fixture
def place(tmp_path: Path, tiny: Path, text: Path) -> Place:
    folder = tmp_path / "place"
    folder.mkdir()
    return Place(folder, tiny, text)


@pytest.fixture
def refused(aerogel, place: Place) -> Callable[..., str]:  # type: ignore[no-untyped-def]
    """Asserts that a call ends with code 2 and one line without traceback, and returns that line."""

    def call(*arguments: object) -> str:
        found = aerogel(*arguments)
        lines = found.stderr.splitlines()
        assert found.code == 2, found.stderr
        assert len(lines) == 1, found.stderr
        assert lines[0].startswith("error: ")
        assert "Traceback" not in found.stderr
        assert found.stdout == ""
        return lines[0]

    return call


def says(line: str, *words: str) -> None:
    for word in words:
        assert word in line, f"{word!r} is not in: {line}"


RECIPES = {
    "unknown top key": (f"{GOOD}calibratoin: {{}}\n", ["r.yaml:4", "calibratoin", "'calibration'"]),
    "unknown method key": (GOOD.replace("bits", "bitz"), ["r.yaml:3", "stages.0.quantize.bitz", "'bits'"]),
    "unknown calibration key": (f"{GOOD}calibration: {{sample: 3}}\n", ["calibration.sample", "'samples'"]),
    "unknown nested key": (f"{GOOD}evaluate: {{perplexity: {{window: 3}}}}\n", ["evaluate.perplexity.window", "'windows'"]),
    "unknown gate": (f"{GOOD}gate: {{max_kll: 1}}\n", ["gate.max_kll", "'max_kl'"]),
    "unknown pack key": (f"{GOOD}pack: {{formt: auto}}\n", ["pack.formt", "'format'"]),
    "unknown method": (GOOD.replace("rtn", "gtpq"), ["stages.0.quantize.method", "'gtpq'", "'gptq'"]),
    "unknown kind of stage": (GOOD.replace("quantize", "quantise"), ["stages.0.quantise", "'quantize'"]),
    "two kinds in one stage": (
        "aerogel: 1\nstages:\n  - {quantize: {method: rtn, bits: 4}, prune: {}}\n",
        ["stages.0", "quantize, prune", "own"],
    ),
    "method missing": (GOOD.replace("method: rtn, ", ""), ["stages.0.quantize.method", "missing", "gptq"]),
    "bits missing": (GOOD.replace("bits: 4, ", ""), ["stages.0.quantize.bits", "missing"]),
    "bits too many": (GOOD.replace("bits: 4", "bits: 9"), ["stages.0.quantize.bits", "at most 8", "9"]),
    "bits too few": (GOOD.replace("bits: 4", "bits: 1"), ["stages.0.quantize.bits", "between 2 and 8", "found 1"]),
    "bits as text": (GOOD.replace("bits: 4", "bits: '4'"), ["stages.0.quantize.bits", "whole number", "'4' (text)"]),
    "bits as fraction": (GOOD.replace("bits: 4", "bits: 4.5"), ["stages.0.quantize.bits", "whole number", "4.5"]),
    "group of nothing": (GOOD.replace("16", "0"), ["stages.0.quantize.group_size", "at least 1"]),
    "group negative": (GOOD.replace("16", "-1"), ["stages.0.quantize.group_size", "at least 1", "-1"]),
    "group as word": (GOOD.replace("16", "all"), ["stages.0.quantize.group_size", "'all' (text)"]),
    "symmetric as word": (GOOD.replace("16", "16, symmetric: yes"), ["symmetric", "true or false", "'yes'"]),
    "unknown format": (GOOD.replace("rtn", "rtn, format: fp9"), ["stages.0.quantize.format", "'fp9'", "'fp8'"]),
    "unknown activations": (GOOD.replace("rtn", "rtn, activations: int4"), ["activations", "'int4'", "'int8'"]),
    "activations that no format stores": (GOOD.replace("rtn", "rtn, activations: fp8"), ["stages.0.quantize", "activations"]),
    "pack format that refuses": (f"{GOOD}pack: {{format: float-quantized}}\n", ["stages.0.quantize", "float-quantized"]),
    "sparsity above one": (
        "aerogel: 1\nstages:\n  - prune: {method: magnitude, sparsity: 1.5}\n",
        ["stages.0.prune.sparsity", "less than 1", "1.5"],
    ),
    "pattern that is none": (
        "aerogel: 1\nstages:\n  - prune: {method: magnitude, sparsity: 0.5, pattern: two of four}\n",
        ["stages.0.prune.pattern", "two of four"],
    ),
    "pattern with more than all": (
        'aerogel: 1\nstages:\n  - prune: {method: magnitude, pattern: "5:4"}\n',
        ["stages.0.prune", "5:4"],
    ),
    "damping negative": (
        "aerogel: 1\nstages:\n  - quantize: {method: gptq, bits: 4, damping: -1}\n",
        ["stages.0.quantize.damping", "-1"],
    ),
    "targets not a list": (GOOD.replace("16", "16, targets: Linear"), ["targets", "list", "'Linear'"]),
    "target no expression": (GOOD.replace("16", "16, targets: ['re:(']"), ["targets.0", "regular expression"]),
    "no stages": ("aerogel: 1\nstages: []\n", ["stages", "at least one stage"]),
    "stages missing": ("aerogel: 1\n", ["stages", "at least one stage", "quantize"]),
    "stages no list": ("aerogel: 1\nstages: {quantize: {}}\n", ["stages", "a mapping"]),
    "version missing": (STAGE, ["version", "aerogel: 1"]),
    "version of the future": (GOOD.replace("aerogel: 1", "aerogel: 2"), ["version 1", "2"]),
    "anchor bomb": ("aerogel: 1\na: &a [x, x]\nb: &b [*a, *a]\n", ["r.yaml:2", "anchors", "write the value out"]),
    "tag that runs code": ("aerogel: !!python/object/apply:os.system [x]\n", ["r.yaml:1", "tag", "plain values"]),
    "same key twice": (f"{GOOD}about: a\nabout: b\n", ["r.yaml:5", "about", "twice", "r.yaml:4"]),
    "not YAML": ("aerogel: [1\n", ["r.yaml", "not valid YAML"]),
    "a list": ("- 1\n", ["mapping", "aerogel: 1"]),
    "empty": ("", ["mapping", "aerogel: 1"]),
    "not UTF-8": (b"about: \xff\n", ["r.yaml", "UTF-8"]),
    "huge": (b"#" * 1_000_001, ["r.yaml", "larger than"]),
    "samples zero": (f"{GOOD}calibration: {{samples: 0}}\n", ["calibration.samples", "at least 1"]),
    "samples many": (f"{GOOD}calibration: {{samples: many}}\n", ["calibration.samples", "whole number", "'many'"]),
    "source climbs out": (f"{GOOD}calibration: {{source: ../../data.txt}}\n", ["calibration.source", "'..'", "absolute path"]),
    "model climbs out": (f"{GOOD}model: a/../../b\n", ["model", "'..'", "absolute path"]),
    "gate without divergence": (
        f"{GOOD}evaluate: {{divergence: false}}\ngate: {{max_kl: 1}}\n",
        ["r.yaml:5", "gate.max_kl", "evaluate.divergence: true"],
    ),
    "gate without bench": (f"{GOOD}bench: null\ngate: {{min_decode_speedup: 1}}\n", ["min_decode_speedup", "bench"]),
    "gate without tasks": (f"{GOOD}gate: {{max_task_drop: 0.1}}\n", ["max_task_drop", "evaluate.tasks"]),
    "gate without perplexity": (
        f"{GOOD}evaluate: {{perplexity: null, divergence: false}}\ngate: {{max_perplexity_increase: 0.1}}\n",
        ["max_perplexity_increase", "perplexity"],
    ),
    "gate as text": (f"{GOOD}gate: {{max_kl: small}}\n", ["gate.max_kl", "number", "'small'"]),
    "memory of no size": (f"{GOOD}gate: {{max_memory: lots}}\n", ["gate.max_memory", "'lots'", "3GB"]),
    "batch of zero": (f"{GOOD}bench: {{batch: [0]}}\n", ["bench.batch", "at least 1"]),
    "batch no list": (f"{GOOD}bench: {{batch: 1}}\n", ["bench.batch", "list"]),
    "pattern matches nothing": (GOOD.replace("16", "16, targets: ['re:.*wq']"), ["re:.*wq", "matches nothing"]),
    "name matches nothing": (
        GOOD.replace("16", "16, targets: [model.layers.0.mlp.dawn_proj]"),
        ["dawn_proj", "matches nothing", "down_proj"],
    ),
    "ignore matches nothing": (
        GOOD.replace("16", "16, ignore: [lm_head, v_proj]"),
        ["v_proj", "matches nothing", "re:.*v_proj"],
    ),
    "claimed twice": (f"{GOOD}  - quantize: {{method: rtn, bits: 8}}\n", ["stages.0", "stages.1", "claimed", "ignore"]),
    "pruned too late": (f"{GOOD}  - prune: {{method: magnitude, sparsity: 0.5}}\n", ["stages.1.prune", "move it in front"]),
}


@pytest.mark.parametrize("case", sorted(RECIPES))
def test_recipes(case: str, refused: Callable[..., str], place: Place) -> None:
    content, words = RECIPES[case]
    recipe = place.write("r.yaml", content)
    says(refused("compress", place.tiny, "-r", recipe, "-o", place.folder / "out"), *words)
    assert not (place.folder / "out").exists()


COMMAND_LINES = {
    "unknown command": (["comprss"], ["comprss", "compress", "--help"]),
    "unknown option": (["compress", "{tiny}", "--recip", "w4"], ["--recip", "--recipe"]),
    "option without its value": (["compress", "{tiny}", "-r"], ["-r", "argument"]),
    "missing argument": (["inspect"], ["MODEL", "--help"]),
    "too many arguments": (["inspect", "a", "b"], ["b", "--help"]),
    "threads no number": (["compress", "{tiny}", "--threads", "all"], ["--threads", "all"]),
    "threads zero": (["compress", "{tiny}", "--threads", "0"], ["--threads", "0"]),
    "unknown recipe": (["compress", "{tiny}", "-r", "w44"], ["'w44'", "'w4'"]),
    "recipe file that is not there": (
        ["compress", "{tiny}", "-r", "./none.yaml"],
        ["none.yaml", "does not exist", "list recipes"],
    ),
    "recipe that is a folder": (["compress", "{tiny}", "-r", "{folder}/"], ["folder", "list recipes"]),
    "recipe with a path in its name": (["compress", "{tiny}", "-r", "../recipes/w4"], ["../recipes/w4", "does not exist"]),
    "no model": (["compress", "-r", "w4-fast"], ["no model", "model:"]),
    "no recipe to run": (["run"], ["no recipe", "list recipes"]),
    "set without value": (["compress", "{tiny}", "--set", "bits"], ["--set bits", "path.to.key=value"]),
    "set of unknown key": (["compress", "{tiny}", "--set", "quantize.bitz=3"], ["--set quantize.bitz=3", "'bits'"]),
    "set of unknown section": (["compress", "{tiny}", "--set", "calib.samples=3"], ["--set calib.samples=3", "'calibration'"]),
    "set of wrong type": (["compress", "{tiny}", "--set", "calibration.samples=few"], ["--set", "'few'", "whole number"]),
    "set of a stage that is not there": (["compress", "{tiny}", "--set", "prune.sparsity=0.5"], ["no prune stage"]),
    "set of an index that is not there": (["compress", "{tiny}", "--set", "stages.3.quantize.bits=4"], ["'3'", "0 to 0"]),
    "unknown device": (["compress", "{tiny}", "--device", "tpu"], ["'tpu'", "cpu"]),
    "json into a folder": (["plan", "{tiny}", "--json", "{folder}"], ["--json", "folder", "file name"]),
    "json into nowhere": (["plan", "{tiny}", "--json", "{folder}/none/x.json"], ["--json", "does not exist", "create"]),
    "model that is not there": (["compress", "/none/here", "-r", "w4-fast"], ["/none/here", "give an existing folder"]),
    "inspect nothing": (["inspect", "./none"], ["./none", "give"]),
    "hub without network": (["compress", "nobody/nothing", "-r", "w4-fast"], ["nobody/nothing", "local"]),
    "gguf that is not there": (["plan", "none.gguf"], ["none.gguf", "does not exist"]),
    "a file as model": (["plan", "{text}"], ["text.txt", "GGUF", "folder"]),
    "unknown task": (["eval", "{tiny}", "--tasks", "piqaa"], ["piqaa", "piqa"]),
    "eval of little text": (
        ["eval", "{tiny}", "--set", "evaluate.perplexity.source={text}", "--windows", "9999"],
        ["text.txt", "9999", "lower"],
    ),
    "tune nothing": (["tune"], ["MODEL", "--problem"]),
    "tune a dense model": (["tune", "{tiny}"], ["no packed layers"]),
    "tune for words": (["tune", "--problem", "N=64,K=64", "--tokens", "one"], ["--tokens", "'one'"]),
    "bench of batch nothing": (["bench", "{tiny}", "--batch", "0"], ["bench.batch", "at least 1"]),
    "bench of batch words": (["bench", "{tiny}", "--batch", "one"], ["bench.batch", "'one'"]),
    "limit zero": (["eval", "{tiny}", "--limit", "0"], ["--limit", "0"]),
    "unknown list": (["list", "recipe"], ["'recipe'", "'recipes'"]),
    "unknown export": (["export", "{tiny}", "-o", "{folder}/x", "--to", "gguf"], ["'gguf'", "dense"]),
    "export without out": (["export", "{tiny}"], ["--out", "--help"]),
    "empty prompt": (["generate", "{tiny}", "  "], ["prompt", "empty"]),
    "one empty prompt of two": (["generate", "{tiny}", "w1", " "], ["prompt", "empty"]),
    "stdin twice": (["generate", "{tiny}", "-", "-"], ["stdin", "once"]),
    "too much to generate": (["generate", "{tiny}", "w1", "--raw", "-n", "128"], ["128 positions", "at most 127 new tokens"]),
    "unknown loop": (["generate", "{tiny}", "w1", "--loop", "fast"], ["'fast'", "fused"]),
    "top-p of zero": (["generate", "{tiny}", "w1", "--temperature", "1", "--top-p", "0"], ["top_p", "above 0"]),
    "negative temperature": (["generate", "{tiny}", "hello", "--temperature", "-1"], ["--temperature", "-1"]),
    "out inside the model": (["compress", "{tiny}", "-r", "w4-fast", "-o", "{tiny}/out"], ["out", "outside"]),
    "out is a file": (["compress", "{tiny}", "-r", "w4-fast", "-o", "{text}"], ["text.txt", "is a file", "folder"]),
    "ambiguous run": (["run", "a.yaml", "b", "c"], ["c", "--help"]),
}


@pytest.mark.parametrize("case", sorted(COMMAND_LINES))
def test_command_lines(case: str, refused: Callable[..., str], place: Place) -> None:
    arguments, words = COMMAND_LINES[case]
    names = {"tiny": place.tiny, "folder": place.folder, "text": place.text}
    says(refused(*(argument.format(**names) for argument in arguments)), *words)


def test_ambiguous_set(refused: Callable[..., str], place: Place) -> None:
    recipe = place.write("r.yaml", f"{GOOD}  - quantize: {{method: rtn, bits: 8, targets: [lm_head], ignore: []}}\n")
    says(refused("plan", place.tiny, "-r", recipe, "--set", "quantize.bits=3"), "stages.0.quantize.bits or stages.1")


def test_recipes_of_a_folder_that_is_named_like_a_shipped_one(aerogel, place: Place) -> None:  # type: ignore[no-untyped-def]
    Path("w4-fast").mkdir()
    assert aerogel("plan", place.tiny, "-r", "w4-fast").code == 0


CONFIGS: dict[str, tuple[dict[str, object], list[str]]] = {
    "unknown architecture": ({"model_type": "lama3"}, ["lama3"]),
    "no architecture": ({"model_type": None}, ["model_type"]),
    "own code": ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, ["auto_map", "--trust-remote-code"]),
    "vision only": ({"model_type": "vit", "architectures": ["ViTModel"]}, ["vit", "language model"]),
    "already quantized": ({"quantization_config": {"quant_method": "gptq"}}, ["already quantized", "gptq", "export"]),
}


@pytest.mark.parametrize("case", sorted(CONFIGS))
def test_models(case: str, refused: Callable[..., str], place: Place) -> None:
    config, words = CONFIGS[case]
    says(refused("compress", place.model(**config), "-r", "w4-fast", "-o", place.folder / "out"), *words)


def test_a_folder_without_config(refused: Callable[..., str], place: Place) -> None:
    says(refused("compress", place.folder, "-r", "w4-fast"), str(place.folder), "config.json")


def test_a_config_that_is_no_json(refused: Callable[..., str], place: Place) -> None:
    model = place.model()
    (Path(model) / "config.json").write_text("{")
    says(refused("inspect", model), "config.json", "JSON")


def test_a_folder_without_weights(refused: Callable[..., str], place: Place) -> None:
    model = place.model()
    (Path(model) / "model.safetensors").unlink()
    says(refused("compress", model, "-r", "w4-fast"), "safetensors")


def test_truncated_weights(refused: Callable[..., str], place: Place) -> None:
    weights = Path(place.model()) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    says(refused("compress", weights.parent, "-r", "w4-fast"), "model.safetensors")


def test_shards_that_climb_out(refused: Callable[..., str], place: Place) -> None:
    model = Path(place.model())
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../../secret.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    says(refused("inspect", model), "../../secret.safetensors")


def test_no_tokenizer(refused: Callable[..., str], place: Place) -> None:
    model = Path(place.model())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    says(refused("compress", model, "--set", f"calibration.source={place.text}"), "tokenizer")


DATA: dict[str, tuple[str, str | bytes, list[str]]] = {
    "empty": ("data.txt", "", ["no text"]),
    "too short": ("data.txt", "w1 w2 w3", ["3 tokens", "lower samples"]),
    "other ending": ("data.csv", "text\nw1\n", [".csv", ".jsonl"]),
    "broken lines": ("data.jsonl", '{"text": "w1"\n', ["data.jsonl", "cannot be read"]),
    "broken file": ("data.json", "[1,", ["data.json", "cannot be read"]),
    "not a list": ("data.json", '{"text": "w1"}', ["data.json", "list"]),
    "no text column": ("data.jsonl", '{"body": "w1"}\n', ["body", "column"]),
    "numbers for text": ("data.jsonl", '{"text": 3}\n', ["text", "column"]),
    "not text at all": ("data.txt", b"\xff\xfe\x00", ["data.txt", "cannot be read"]),
}


@pytest.mark.parametrize("case", sorted(DATA))
def test_calibration_data(case: str, refused: Callable[..., str], place: Place) -> None:
    name, content, words = DATA[case]
    data = place.write(name, content)
    says(refused("compress", place.tiny, "--set", f"calibration.source={data}", "-o", place.folder / "out"), *words)
    assert not (place.folder / "out").exists()


def test_data_that_is_not_there(refused: Callable[..., str], place: Place) -> None:
    says(refused("compress", place.tiny, "--set", "calibration.source=none.jsonl"), "none.jsonl", "exist")


def test_a_column_that_is_not_there(refused: Callable[..., str], place: Place) -> None:
    data = place.write("data.jsonl", '{"text": "w1"}\n')
    changes = ["--set", f"calibration.source={data}", "--set", "calibration.column=body"]
    says(refused("compress", place.tiny, *changes), "'body'", "text")


def test_an_output_that_exists(refused: Callable[..., str], place: Place) -> None:
    out = place.folder / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    says(refused("compress", place.tiny, "-r", "w4-fast", "-o", out), str(out), "exists", "--overwrite")
    assert (out / "precious").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_permission(refused: Callable[..., str], place: Place) -> None:
    place.folder.chmod(0o500)
    says(refused("compress", place.tiny, "-r", "w4-fast", "-o", place.folder / "out"), "permission", "folder")


def test_a_gate_is_checked_before_the_compression(refused: Callable[..., str], place: Place) -> None:
    arguments = ["--set", "gate.max_task_drop=0.1", "-o", place.folder / "out"]
    says(refused("run", "w4-fast", place.tiny, *arguments), "max_task_drop", "evaluate.tasks")
    assert not (place.folder / "out").exists()


def test_a_task_is_checked_before_the_compression(refused: Callable[..., str], place: Place) -> None:
    arguments = ["--set", "evaluate.tasks=[hellaswagg]", "-o", place.folder / "out"]
    says(refused("run", "w4-fast", place.tiny, *arguments), "hellaswagg", "hellaswag")
    assert not (place.folder / "out").exists()


def test_the_text_is_checked_before_the_compression(refused: Callable[..., str], place: Place) -> None:
    arguments = ["--set", f"evaluate.perplexity.source={place.write('few.txt', 'w1 w2')}", "-o", place.folder / "out"]
    says(refused("run", "w4-fast", place.tiny, *arguments), "few.txt", "2 tokens")
    assert not (place.folder / "out").exists()
