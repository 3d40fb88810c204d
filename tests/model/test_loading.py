"""Compressed checkpoints, as files, through `from_pretrained`: the model must be the one the decoded weights make."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import zoo
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from aerogel.errors import BadInput
from aerogel.kernels.linear import Linear
from aerogel.kernels.native import library
from aerogel.model.loading import load, register
from aerogel.model.reader import CheckpointReader
from aerogel.model.structure import Matrix, discover
from aerogel.pack.config import choose_format, quantization_config
from aerogel.pack.export import export_dense
from aerogel.quantize.grids import Fp8Grid, IntGrid, quantized

REPOSITORY = Path(__file__).resolve().parents[2]
INT4 = IntGrid(bits=4, group_size=16)
IDS = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(0))


@dataclass
class Made:
    dense: Path
    packed: Path
    expected: dict[str, Tensor]
    names: list[str] = field(default_factory=list)


def make(
    folder: Path,
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    grid_of: Callable[[Matrix], Any] = lambda m: INT4,
    activations: str = "none",
    method: str = "compressed-tensors",
) -> Made:
    """A zoo model as a dense checkpoint, and a packed one with every matrix but embeddings, head and routers quantized."""
    register()
    dense = zoo.save(name, folder / "dense", dtype=dtype)
    structure = discover(dense)
    reader = CheckpointReader(dense)
    out = {n: reader.read(n) for n in reader.names}
    expected = {n: t.clone() for n, t in out.items()}
    assignments = []
    for m in structure.matrices:
        role = structure.role(m.tensor)
        grid = grid_of(m) if m.kind != "Embedding" and role in ("linear", "expert", "conv1d") else None
        if grid is None:
            continue
        weight = m.take(expected[m.tensor]).float()
        codes = quantized(grid, weight, grid.fit(weight))
        m.take(expected[m.tensor]).copy_(codes.decode(dtype))
        out.pop(m.tensor, None)
        for local, tensor in choose_format(grid, activations).encode(codes).items():
            out[f"{m.name}.{local}"] = tensor.clone()
        assignments.append((m.name, grid, activations))
    packed = folder / "packed"
    packed.mkdir()
    save_file(out, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = quantization_config(assignments, ["lm_head"], method=method)
    (packed / "config.json").write_text(json.dumps(config))
    return Made(dense, packed, expected, [n for n, _, _ in assignments])


def reference(made: Made) -> torch.nn.Module:
    """The dense architecture with the decoded weights."""
    target = made.dense.parent / "expected"
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text((made.dense / "config.json").read_text())
    save_file(made.expected, target / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(target, experts_implementation="eager")


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = ((found - wanted).norm() / wanted.norm()).item()
    worst = int((found - wanted).abs().argmax())
    assert error <= tolerance, f"relative error {error:.2e} above {tolerance:.0e}, worst at flat index {worst}"


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_every_architecture_runs_with_its_decoded_weights(tmp_path: Path, name: str) -> None:
    made = make(tmp_path, name)
    model = load(made.packed)
    close(logits(model), logits(reference(made)), 2e-5)
    assert made.names


def test_missing_kernels_are_said_once_and_only_where_packed_weights_would_run_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = make(tmp_path, "llama")
    monkeypatch.setattr(library, "_load", lambda: "was not compiled, says the test")
    library.say_missing.cache_clear()
    with caplog.at_level("WARNING"):
        load(made.dense)
        assert "was not compiled" not in caplog.text
        for _ in range(2):
            model = load(made.packed)
            assert caplog.text.count("was not compiled, says the test; slower code runs") == 1
    assert not any(module.kernel_name in ("cpu", "cpu-int8") for module in model.modules() if isinstance(module, Linear))
    library.say_missing.cache_clear()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "qwen3"])
def test_export_gives_the_decoded_weights_bit_for_bit_under_their_own_names(tmp_path: Path, name: str) -> None:
    made = make(tmp_path, name, dtype=torch.bfloat16)
    (made.packed / "tokenizer.json").write_text("{}")
    out = export_dense(made.packed, tmp_path / "exported", shard_bytes=20_000)
    reader = CheckpointReader(out)
    assert set(reader.names) == set(made.expected)
    for tensor, wanted in made.expected.items():
        assert torch.equal(reader.read(tensor), wanted), tensor
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert (out / "tokenizer.json").exists() and len(list(out.glob("*.safetensors"))) > 1
    with pytest.raises(BadInput, match="exists"):
        export_dense(made.packed, out)
    export_dense(made.packed, out, overwrite=True)
    assert len(list(out.glob("*.safetensors"))) == 1


SCHEMES = [
    (IntGrid(bits=bits, group_size=group, symmetric=symmetric, scale_dtype=torch.bfloat16), "none")
    for bits, group, symmetric in [(2, 32, False), (3, 16, True), (4, 32, True), (4, 32, False), (5, None, True), (8, 32, True)]
] + [
    (IntGrid(bits=8, scale_dtype=torch.bfloat16), "none"),
    (IntGrid(bits=8, scale_dtype=torch.bfloat16), "int8"),
    (Fp8Grid(), "fp8"),
    (Fp8Grid(strategy="block", scale_dtype=torch.bfloat16), "none"),
    (Fp8Grid(strategy="tensor"), "none"),
]


@pytest.mark.parametrize(("grid", "activations"), SCHEMES, ids=str)
def test_every_scheme_loads_packed_and_decodes_exactly(tmp_path: Path, grid: Any, activations: str) -> None:
    made = make(tmp_path, "llama", dtype=torch.bfloat16, grid_of=lambda m: grid, activations=activations)
    model = load(made.packed)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear)}
    assert set(layers) == set(made.names)
    sizes = dict.fromkeys(layers, 0)
    for tensor, value in load_file(made.packed / "model.safetensors").items():
        owner = tensor.rpartition(".")[0]
        if owner in sizes:
            sizes[owner] += value.nbytes
    for n, layer in layers.items():
        assert torch.equal(layer.dequantize(torch.bfloat16), made.expected[f"{n}.weight"]), n
        kept = layer.restore() or layer.packed_bytes
        assert kept == sizes[n], n
        layer.prepare()
        # A kernel's own layout may repeat scales in another type, fill up its last tile and hold the numbers of floats in a
        # table, never repeat weights.
        tiles = -(-layer.out_features // 16) * 16 * -(-layer.in_features // 32) * 32 * grid.bits // 8
        table = 8 << grid.bits if isinstance(grid, Fp8Grid) else 0
        assert layer.packed_bytes <= max(sizes[n], tiles) + 5 * layer.out_features * grid.groups(layer.in_features) + table
    tolerance = 0.08 if activations != "none" else 0.03
    close(logits(model), logits(reference(made)), tolerance)


def test_tied_embeddings_stay_tied_and_a_packed_head_unties(tmp_path: Path) -> None:
    made = make(tmp_path, "qwen3")
    model = load(made.packed)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weight = made.expected["model.embed_tokens.weight"].float()
    codes = quantized(INT4, weight, INT4.fit(weight))
    tensors = load_file(made.packed / "model.safetensors")
    for local, tensor in choose_format(INT4).encode(codes).items():
        tensors[f"lm_head.{local}"] = tensor
    save_file(tensors, made.packed / "model.safetensors", metadata={"format": "pt"})
    for tied in (False, True):
        # True is a config that somebody forgot to change; the tensors in the file decide.
        config = json.loads((made.packed / "config.json").read_text())
        config["tie_word_embeddings"] = tied
        config["quantization_config"]["ignore"] = []
        (made.packed / "config.json").write_text(json.dumps(config))
        model = load(made.packed)
        assert isinstance(model.lm_head, Linear)
        assert torch.equal(model.lm_head.dequantize(), codes.decode())
        assert torch.equal(model.model.embed_tokens.weight, made.expected["model.embed_tokens.weight"])
        assert model.config.tie_word_embeddings is False


def test_mixed_schemes_and_kept_layers(tmp_path: Path) -> None:
    wide = IntGrid(bits=8, group_size=16, symmetric=False)

    def grid_of(m: Matrix) -> Any:
        if "k_proj" in m.name:
            return None
        return wide if "down_proj" in m.name else INT4

    made = make(tmp_path, "llama", grid_of=grid_of)
    config = json.loads((made.packed / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized" and len(config["config_groups"]) == 2
    model = load(made.packed)
    assert model.model.layers[0].mlp.down_proj.scheme.grid == wide
    assert type(model.model.layers[0].self_attn.k_proj) is torch.nn.Linear
    close(logits(model), logits(reference(made)), 2e-5)


def test_experts_of_which_some_are_not_packed(tmp_path: Path) -> None:
    made = make(tmp_path, "mixtral", grid_of=lambda m: None if "experts.2." in m.name else INT4)
    close(logits(load(made.packed)), logits(reference(made)), 2e-5)


@pytest.mark.parametrize("order", ["natural", "shuffled", "uneven"])
def test_gptq_checkpoints_of_others(tmp_path: Path, order: str) -> None:
    dense = zoo.save("llama", tmp_path / "dense", dtype=torch.float16)
    tensors, expected = {}, load_file(dense / "model.safetensors")
    for name, weight in load_file(dense / "model.safetensors").items():
        if "proj" not in name:
            tensors[name] = weight
            continue
        K, stem = weight.shape[1], name.removesuffix(".weight")
        columns = {"natural": torch.arange(K), "shuffled": torch.randperm(K), "uneven": 16 * (torch.arange(K) % 2)}
        found = Numbers.draw(weight.shape, columns[order] // 16)
        tensors |= {f"{stem}.{local}": tensor for local, tensor in found.tensors.items()}
        # Many tools write a bias of zeros for layers that have none.
        tensors[f"{stem}.bias"] = torch.zeros(weight.shape[0], dtype=torch.float16)
        expected[name] = found.dense
    packed = tmp_path / "packed"
    packed.mkdir()
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": order != "natural"}
    config["quantization_config"] = quantization
    (packed / "config.json").write_text(json.dumps(config))
    model = load(packed)
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, Linear) == (order != "uneven")
    for name, weight in expected.items():
        module = model.get_submodule(name.rpartition(".")[0])
        assert torch.equal(module.dequantize() if isinstance(module, Linear) else module.weight, weight), name
    close(logits(model), logits(reference(Made(dense, packed, expected))), 5e-3)


@dataclass
class Numbers:
    """A GPTQ weight of random codes, packed along K by torch's own shifts, and what it stands for."""

    tensors: dict[str, Tensor]
    dense: Tensor

    @classmethod
    def draw(cls, shape: torch.Size, index: Tensor) -> Numbers:
        (N, K), G = shape, int(index.max()) + 1
        groups = max(G, -(-K // 16))
        u, z = torch.randint(0, 16, (K, N)), torch.randint(1, 16, (groups, N))
        scale = (torch.rand(groups, N) * 0.02 + 0.01).half()
        dense = ((u - z[index]).float() * scale[index].float()).half().T.contiguous()
        shifts = 4 * torch.arange(8)
        packed = (u.reshape(K // 8, 8, N) << shifts[:, None]).sum(1)
        zeros = ((z - 1).reshape(groups, N // 8, 8) << shifts).sum(2)
        words = {"qweight": _int32(packed), "qzeros": _int32(zeros), "scales": scale, "g_idx": index.to(torch.int32)}
        return cls(words, dense)


def _int32(words: Tensor) -> Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()


def test_what_is_missing_or_wrong_is_an_error(tmp_path: Path) -> None:
    made = make(tmp_path, "llama")
    file = made.packed / "model.safetensors"
    whole = load_file(file)
    broken = {n: t for n, t in whole.items() if n != "model.layers.1.mlp.up_proj.weight_scale"}
    save_file(broken, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="weight_scale"):
        load(made.packed)
    name = "model.layers.0.mlp.up_proj.weight_shape"
    save_file({**whole, name: torch.tensor([1, 2])}, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"\[1, 2\]"):
        load(made.packed)
    save_file({n: t for n, t in whole.items() if n != "model.norm.weight"}, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="norm"):
        load(made.packed)
    with pytest.raises(BadInput, match="checkpoint"):
        load(tmp_path / "nowhere")


def test_a_config_that_aerogel_does_not_run_goes_to_the_stock_loader_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = make(tmp_path, "llama")
    config = json.loads((made.packed / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["format"] = "mxfp6-pack-quantized"
    group["weights"] |= {"type": "float", "num_bits": 6, "strategy": "group", "group_size": 32}
    (made.packed / "config.json").write_text(json.dumps(config))
    pytest.importorskip("compressed_tensors")
    from transformers.quantizers.auto import AutoHfQuantizer

    with caplog.at_level("WARNING"):
        quantizer = AutoHfQuantizer.from_config(AutoConfig.from_pretrained(made.packed).quantization_config)
    assert type(quantizer).__name__ == "CompressedTensorsHfQuantizer"
    assert "mxfp6-pack-quantized" in caplog.text


def test_no_optional_package_is_imported(tmp_path: Path) -> None:
    made = make(tmp_path, "llama")
    script = f"""
import sys
for name in ("compressed_tensors", "gptqmodel", "optimum", "awq"):
    sys.modules[name] = None
from aerogel.model.register import install_hook
assert "transformers" not in sys.modules
install_hook(); install_hook()
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(made.packed)!r})
print(type(model.model.layers[0].mlp.up_proj).__module__)
"""
    assert run(script) == "aerogel.kernels.linear"


def run(script: str) -> str:
    """What a fresh interpreter prints for `script`."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()
