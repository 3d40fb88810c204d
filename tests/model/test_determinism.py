"""The same command gives the same bytes; the number of threads hardly matters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tests import zoo
from tests.model.tiny import GPTQ, RTN, digest, ids_file, recipe

from aerogel.model.compress import compress
from aerogel.model.reader import CheckpointReader
from aerogel.pack.pack_quantized import PackQuantized
from aerogel.quantize.grids import IntGrid

REPOSITORY = Path(__file__).resolve().parents[2]
SPARSE = {"prune": {"method": "sparsegpt", "pattern": "2:4"}}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "mamba2"])
@pytest.mark.parametrize("stages", [[RTN], [GPTQ], [SPARSE, GPTQ]])
def test_the_same_command_gives_the_same_bytes(tmp_path: Path, name: str, stages: list[dict[str, object]]) -> None:
    dense = zoo.save(name, tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), *stages)
    compress(dense, chosen, tmp_path / "a")
    torch.rand(7)  # nobody may depend on the state of the global generator
    compress(dense, chosen, tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), GPTQ)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(chosen.as_dict()))
    command = [sys.executable, "-m", "aerogel", "compress", str(dense), "-r", str(tmp_path / "recipe.yaml"), "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "7"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    subprocess.run([*command, "-o", str(tmp_path / "a")], env=environment, check=True, cwd=tmp_path)
    compress(dense, chosen, tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_the_number_of_threads_hardly_matters(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), GPTQ)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            compress(dense, chosen, tmp_path / str(threads))
    finally:
        torch.set_num_threads(before)
    one, two = (CheckpointReader(tmp_path / str(threads)) for threads in (1, 2))
    grid = IntGrid(bits=4, group_size=16)
    differ = total = 0
    for name in one.names:
        if name.endswith(".weight_packed"):
            local = ("weight_packed", "weight_scale", "weight_shape")
            a, b = (
                PackQuantized.to_codes({n: r.read(name.replace("weight_packed", n)) for n in local}, grid).values_NK
                for r in (one, two)
            )
            differ += int((a != b).sum())
            total += a.numel()
    assert total > 10_000
    assert differ <= 0.001 * total
