"""`inspect` reads from files what the run that wrote them says: parameters, bits per weight, format, what stands beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests import zoo
from tests.model.tiny import recipe

from aerogel.model.compress import compress
from aerogel.model.inspect import inspect
from aerogel.pack import export

STAGES: dict[str, dict[str, Any]] = {
    "int": {"bits": 4, "group_size": 16},
    "fp8": {"format": "fp8", "strategy": "block"},
    "float": {"format": "float", "kind": "e2m3"},
    "nf4": {"format": "nf4", "group_size": 16, "scale_dtype": "e4m3"},
    "mx": {"format": "mx"},
    "mxfp8": {"format": "mx", "kind": "e4m3"},
    "nvfp4": {"format": "nvfp4"},
    "bitmod": {"format": "bitmod", "bits": 3, "group_size": 16},
    "kmeans": {"format": "kmeans", "bits": 3},
    "rf8": {"format": "rf8"},
    "bipolar": {"format": "bipolar", "bits": 4},
    "complex": {"format": "complex"},
    "ternary": {"format": "ternary", "group_size": 16},
    "planes": {"format": "planes", "bits": 3, "group_size": 16, "offset": "scale"},
    "affine": {"format": "affine", "bits": 3, "group_size": 16},
    "outliers": {"bits": 4, "outliers": "sigma", "outlier_sigma": 2.0},
    "rotation": {"format": "mx", "transform": "hadamard", "transform_block": 16},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save("llama", tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize("name", STAGES)
def test_bits_and_parameters_are_those_of_the_report(name: str, dense: Path, tmp_path: Path) -> None:
    report = compress(dense, recipe(None, {"quantize": {"method": "rtn", **STAGES[name]}}), tmp_path / "out")
    found = inspect(tmp_path / "out")
    assert found["bits_per_weight"] == pytest.approx(report["size"]["bits_per_weight"], rel=1e-12)
    assert found["parameters"] == inspect(dense)["parameters"]
    scheme = found["quantization"]["schemes"][0]
    own = {"mx": 32, "mxfp8": 32, "rotation": 32, "nvfp4": 16}.get(name)
    assert scheme["group_size"] == STAGES[name].get("group_size", own)
    assert scheme["symmetric"] in (True, None)
    beside = {"outliers": ["outliers"], "rotation": ["rotated inputs"]}.get(name, [])
    assert list(found["quantization"]["beside"]) == beside


@pytest.mark.parametrize("stages", [[], [{"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}]])
def test_entropy_coding_hides_nothing(stages: list[dict[str, Any]], dense: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("aerogel.model.entropy.LEAST_BYTES", 1)
    monkeypatch.setattr("aerogel.model.entropy.WORTH", 10.0)
    report = compress(dense, recipe(None, *stages, pack={"entropy": True, "dtype": "bfloat16"}), tmp_path / "out")
    assert report["entropy"]
    found = inspect(tmp_path / "out")
    assert found["parameters"] == inspect(dense)["parameters"]
    assert found["quantization"]["entropy_coded"]
    assert len(found["quantization"]["schemes"]) == len(stages)
    if stages:
        assert found["bits_per_weight"] == pytest.approx(report["size"]["bits_per_weight"], rel=1e-12)
        export.export_plain(tmp_path / "out", tmp_path / "plain")
        assert not inspect(tmp_path / "plain")["quantization"]["entropy_coded"]
