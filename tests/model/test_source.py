"""A GGUF becomes an ordinary checkpoint in the type the model had before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.smollm2 import gguf
from tests.real import smollm2

from aerogel.cli.app import main
from aerogel.errors import BadInput
from aerogel.model import source
from aerogel.model.reader import CheckpointReader


def parameters(vector: torch.Tensor, matrix: torch.Tensor) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(vector), torch.nn.Parameter(matrix)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_vectors_show_the_original_type(dtype: torch.dtype) -> None:
    vector = (torch.rand(64) + 0.5).to(dtype).float()
    assert source._original_dtype(parameters(vector, torch.randn(8, 8)), quantized=True) == dtype


def test_a_file_without_codes_is_never_rounded() -> None:
    exact = torch.rand(8).bfloat16().float()
    assert source._original_dtype(parameters(exact, torch.rand(8, 8)), quantized=False) == torch.float32
    assert source._original_dtype(parameters(exact, exact.expand(8, 8)), quantized=False) == torch.bfloat16


def test_float16_is_not_taken_where_it_would_overflow() -> None:
    vector = torch.rand(8).half().float()
    vector[0] = 1 + 2**-10  # not a bfloat16
    assert source._original_dtype(parameters(vector, torch.full((2, 2), 1e5)), quantized=True) == torch.float32


@pytest.mark.real
def test_smollm2_is_converted_once(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, file = smollm2(tmp_path_factory), gguf()
    assert file is not None
    monkeypatch.setenv("AEROGEL_CACHE", str(folder.parent))
    reader = CheckpointReader(folder)
    assert {entry.dtype for entry in reader} == {torch.bfloat16}
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= {path.name for path in folder.iterdir()}
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert source.resolve(file) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("quiet", [False, True])
def test_what_takes_minutes_is_said_first_unless_quiet(
    quiet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AEROGEL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    assert main(["plan", str(tmp_path / "broken.gguf"), *(["--quiet"] if quiet else [])]) == 2
    assert ("making an ordinary checkpoint of broken.gguf" in caplog.text) == (not quiet)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF nothing else")
    with pytest.raises(BadInput, match=r"broken\.gguf"):
        source.resolve(broken)
    with pytest.raises(BadInput, match="does not exist"):
        source.resolve(tmp_path / "absent.gguf")
