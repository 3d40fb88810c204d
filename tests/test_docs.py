"""The guides do what they say: their marked snippets run, in order, one folder per page.

A fence is run when its first line says so: `python run`, `console run` (lines that begin with `aerogel`), and
`LANGUAGE file=NAME`, which is written to that file. Each page starts in an empty folder with a tiny model in `my-model`
and words it knows in `text.txt`.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml

from aerogel.cli.app import main
from aerogel.kernels.gemm import cpu_table
from aerogel.quantize import METHODS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def fences(page: Path) -> list[tuple[str, str, str]]:
    """(language, mark, text) of every fenced block."""
    return FENCE.findall(page.read_text("utf-8"))


RUNNING = [page for page in PAGES if any(mark for _, mark, _ in fences(page))]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder with the model and the text that the pages use."""
    import random

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [f"w{index}" for index in range(92)]
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *words])}
    tool = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tool.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "my-model")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tool, **special).save_pretrained(tmp_path / "my-model")
    (tmp_path / "text.txt").write_text(" ".join(random.Random(0).choices(words, k=2000)), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("AEROGEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    known, modules = dict(METHODS), set(sys.modules)
    yield tmp_path
    cpu_table.table.cache_clear()
    METHODS.clear()
    METHODS.update(known)
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.name)
def test_the_snippets_run(page: Path, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "snippet"}
    for language, mark, text in fences(page):
        if mark.startswith("file="):
            (place / mark.removeprefix("file=")).write_text(text, "utf-8")
        elif (language, mark) == ("python", "run"):
            exec(compile(text, f"{page.name}", "exec"), names)
        elif (language, mark) == ("console", "run"):
            for line in text.splitlines():
                program, *arguments = shlex.split(line, comments=True)
                assert program == "aerogel", line
                code = main(arguments)
                assert code == 0, f"{line}\n{capfd.readouterr().err}"
        else:
            assert not mark, f"{page.name}: unknown mark {mark!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_is_yaml(page: Path) -> None:
    for language, _, text in fences(page):
        if language == "yaml":
            yaml.safe_load(text)


def test_commands_in_the_pages_exist() -> None:
    """Every `aerogel WORD` in a console block is a command, and its long options are options of it."""
    import typer.main

    from aerogel.cli.app import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for page in PAGES:
        for language, _, text in fences(page):
            for line in text.splitlines() if language in ("console", "bash", "yaml") else ():
                found = re.search(r"\baerogel ([a-z]+)( .*)?$", line.partition(" #")[0])
                if found is None or line.strip().startswith(("#", "-r", "about")):
                    continue
                assert found[1] in commands, f"{page.name}: {line}"
                options = {option for parameter in commands[found[1]].params for option in parameter.opts}
                for option in re.findall(r"(?<!\S)--[a-z-]+", found[2] or ""):
                    assert option in options, f"{page.name}: {line}: no option {option}"


def test_the_report_page_names_every_key(place: Path) -> None:
    import aerogel

    recipe = {
        "aerogel": 1,
        "calibration": {"source": "text.txt", "samples": 4, "sequence_length": 32},
        "stages": [{"scale": {"method": "awq"}}, {"quantize": {"method": "gptq", "bits": 4, "group_size": 16}}],
    }
    report = aerogel.compress("my-model", recipe, "out")
    page = (ROOT / "docs" / "report.md").read_text("utf-8")
    keys = {*report, *report["calibration"], *report["size"], *report["tensors"][0], *report["machine"]}
    keys |= {*report["blocks"][0], *report["blocks"][0]["layers"][0]}
    assert not [key for key in sorted(keys) if f"`{key}`" not in page and f"## {key}\n" not in page]


def test_the_comparison_of_formats_is_what_was_measured() -> None:
    spec = spec_from_file_location("formats_table", ROOT / "benchmarks" / "formats_table.py")
    assert spec is not None and spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.PAGE.read_text("utf-8")
    assert text == script.page(text), "run: python benchmarks/formats_table.py"


def test_every_recipe_is_taught() -> None:
    """By name on a page about its method; plain integers and pruning are in the guide and the overview of recipes."""
    pages = [*(ROOT / "docs" / "methods").glob("*.md")]
    taught = {word for page in pages for word in re.findall(r"`(w[0-9][\w-]*)`", page.read_text("utf-8"))}
    plain = {"w2", "w3", "w4", "w4-fast", "w4-awq", "w4-cpu", "w4-sparse24", "w8", "demo", "lossless", "prune-50"}
    shipped = {file.stem for file in (ROOT / "recipes").glob("*.yaml")}
    assert not shipped - taught - plain
    assert not taught - shipped, "a page names a recipe that is not shipped"
