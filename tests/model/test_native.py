"""Native checkpoints: the same model without repacking, mapped from the disk, and the portable files again on the way back."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import zoo
from tests.model.test_loading import Made, logits, make, run
from tests.model.tiny import GPTQ, RTN, digest, ids_file, recipe
from transformers import AutoModelForCausalLM

from aerogel.errors import BadInput
from aerogel.kernels.decode.loop import Decoder
from aerogel.kernels.embedding import PackedEmbedding
from aerogel.kernels.linear import Linear
from aerogel.kernels.native import library
from aerogel.model.assembly import REPORT_NAME
from aerogel.model.compress import compress
from aerogel.model.inspect import inspect
from aerogel.model.loading import load
from aerogel.model.native import CODES
from aerogel.model.plan import plan
from aerogel.model.reader import CheckpointReader, read_header
from aerogel.pack.export import export_dense, export_layout
from aerogel.quantize.grids import IntGrid
from aerogel.recipes.schema import Recipe

compiled = pytest.mark.skipif(library.missing() is not None, reason="the CPU kernels were not compiled")
ASYMMETRIC = IntGrid(bits=3, group_size=16, symmetric=False, scale_dtype=torch.bfloat16)
LAYOUTS = ("native-cpu", "native-cuda")


def made(folder: Path, name: str = "llama", grid: Any = ASYMMETRIC) -> Made:
    return make(folder, name, dtype=torch.bfloat16, grid_of=lambda m: grid)


NAMES = ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "mixtral", "opt", "phi3"]


@pytest.mark.parametrize(
    ("name", "layout"), [*((name, LAYOUTS[place % 2]) for place, name in enumerate(NAMES)), ("llama", LAYOUTS[1])]
)
def test_there_and_back_and_the_same_logits(tmp_path: Path, name: str, layout: str) -> None:
    packed = made(tmp_path, name).packed
    (packed / "notes.txt").write_text("kept")
    assert export_layout(packed, tmp_path / "native", layout) == layout
    config = json.loads((tmp_path / "native" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "aerogel" and config["layout"]["name"] == layout
    wanted = logits(load(packed))
    assert torch.equal(logits(load(tmp_path / "native")), wanted)
    assert torch.equal(logits(load(tmp_path / "native", merge=True)), logits(load(packed, merge=True)))
    assert export_layout(tmp_path / "native", tmp_path / "back", "portable") == "portable"
    there, back = digest(packed), digest(tmp_path / "back")
    assert there.keys() == back.keys()
    same = {file for file in there if there[file] == back[file]}
    assert {"model.safetensors", "notes.txt"} <= same
    assert json.loads((packed / "config.json").read_text()) == json.loads((tmp_path / "back" / "config.json").read_text())
    export_dense(tmp_path / "native", tmp_path / "decoded")
    export_dense(packed, tmp_path / "decoded-too")
    assert digest(tmp_path / "decoded") == digest(tmp_path / "decoded-too")


@compiled
def test_weights_are_the_pages_of_the_file_merged_or_not(tmp_path: Path) -> None:
    packed = made(tmp_path, grid=IntGrid(bits=4, group_size=16, scale_dtype=torch.bfloat16)).packed
    export_layout(packed, tmp_path / "native", "native-cpu")
    script = f"""
import torch, aerogel
from aerogel.kernels.linear import Linear
file = {str(tmp_path / "native" / "model.safetensors")!r}
models = []
for merge in (False, True):
    models.append(aerogel.load({str(tmp_path / "native")!r}, merge=merge))
    with torch.no_grad():
        models[-1](torch.tensor([[3, 4, 5]]))
    spans = [line.split()[0].split("-") for line in open("/proc/self/maps") if line.rstrip().endswith(file)]
    spans = [(int(low, 16), int(high, 16)) for low, high in spans]
    held = [t for m in models[-1].modules() if isinstance(m, Linear) for t in m.held().values()]
    held += [p for p in models[-1].parameters()]
    assert len(held) > 10
    assert all(any(low <= t.data_ptr() < high for low, high in spans) for t in held), merge
dirty = 0
for block in open("/proc/self/smaps").read().split("VmFlags")[:-1]:
    if file in block:
        dirty += int(block.split("Private_Dirty:")[1].split()[0])
print("dirty", dirty)
"""
    assert run(script) == "dirty 0"


@compiled
def test_nothing_is_repacked_on_the_device_it_was_made_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    packed = made(tmp_path).packed
    for layout in LAYOUTS:
        export_layout(packed, tmp_path / layout, layout)
    from aerogel.kernels.gemm.cpu import Native

    def no(*args: Any) -> Any:
        raise AssertionError("packed")

    with monkeypatch.context() as patch, caplog.at_level("WARNING"):
        patch.setattr(Native, "pack", staticmethod(no))
        patch.setattr(Native, "unpack", staticmethod(no))
        model = load(tmp_path / "native-cpu", merge=True)
        logits(model)
    assert "converted" not in caplog.text
    assert all(m.runs_as_stored and m.kernel_name == "cpu" for m in model.modules() if isinstance(m, Linear))
    with caplog.at_level("WARNING"):
        load(tmp_path / "native-cuda")
    assert "native-cuda" in caplog.text and "converted for the kernel 'cpu'" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("merge", [False, True])
def test_on_a_gpu_both_layouts_give_the_same_bits(tmp_path: Path, merge: bool, caplog: pytest.LogCaptureFixture) -> None:
    packed = made(tmp_path).packed
    for layout in LAYOUTS:
        export_layout(packed, tmp_path / layout, layout, device="cuda" if layout == "native-cuda" else "cpu")
    ids = torch.tensor([[3, 4, 5]], device="cuda")
    with torch.no_grad():
        wanted = load(packed, device="cuda", merge=merge)(ids).logits
        with caplog.at_level("WARNING"):
            model = load(tmp_path / "native-cuda", device="cuda", merge=merge)
            assert "converted" not in caplog.text
        assert torch.equal(model(ids).logits, wanted)
        with caplog.at_level("WARNING"):
            assert torch.equal(load(tmp_path / "native-cpu", device="cuda", merge=merge)(ids).logits, wanted)
        assert "converted for the kernel 'cuda'" in caplog.text
    assert all(m.runs_as_stored and m.kernel_name == "cuda" for m in model.modules() if isinstance(m, Linear))


def test_plain_from_pretrained_and_state_dicts(tmp_path: Path) -> None:
    packed = made(tmp_path).packed
    export_layout(packed, tmp_path / "native", "native-cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert torch.equal(logits(model), logits(load(packed)))
    stored = load_file(tmp_path / "native" / "model.safetensors")
    for module in model.modules():
        if isinstance(module, Linear):
            module.restore()
    state = model.state_dict()
    assert stored.keys() <= state.keys() and all(torch.equal(state[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_lie_at_whole_vectors_and_siblings_side_by_side(tmp_path: Path, layout: str) -> None:
    export_layout(made(tmp_path).packed, tmp_path / "native", layout)
    header = read_header(tmp_path / "native" / "model.safetensors")
    codes = [entry for name, entry in header.items() if name.endswith(f".{CODES[layout]}")]
    assert len(codes) == 14 and all(entry.begin % 64 == 0 for entry in codes)
    for local in {name.rpartition(".")[2] for name in header if ".q_proj." in name}:
        parts = [header[f"model.layers.1.self_attn.{name}.{local}"] for name in ("q_proj", "k_proj", "v_proj")]
        assert [part.end for part in parts[:-1]] == [part.begin for part in parts[1:]]


def test_many_files_there_and_back(tmp_path: Path) -> None:
    packed = made(tmp_path, "qwen2").packed
    tensors = load_file(packed / "model.safetensors")
    (packed / "model.safetensors").unlink()
    names = sorted(tensors)
    # The cut falls inside a weight, as it may in files of other tools.
    cuts = {"model-00001-of-00002.safetensors": names[:31], "model-00002-of-00002.safetensors": names[31:]}
    from aerogel.model.writer import write_json, write_tensors

    for file, held in cuts.items():
        write_tensors(packed / file, {name: tensors[name] for name in held})
    weight_map = {name: file for file, held in cuts.items() for name in held}
    write_json(packed / "model.safetensors.index.json", {"metadata": {"by": "hand"}, "weight_map": weight_map})
    export_layout(packed, tmp_path / "native", "native-cpu", shard_bytes=9000)
    assert len(list((tmp_path / "native").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "native", merge=True)), logits(load(packed, merge=True)))
    export_layout(tmp_path / "native", tmp_path / "back", "portable")
    there, back = digest(packed), digest(tmp_path / "back")
    there.pop("config.json"), back.pop("config.json")
    assert there == back


def test_files_that_no_kernel_could_run_are_refused_before_they_are_read(tmp_path: Path) -> None:
    export_layout(made(tmp_path).packed, tmp_path / "native", "native-cpu")
    file = tmp_path / "native" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-64])
    with pytest.raises(BadInput, match="cut off"):
        load(tmp_path / "native")
    length = struct.unpack("<Q", whole[:8])[0]
    file.write_bytes(struct.pack("<Q", length + 8) + whole[8 : 8 + length] + b" " * 8 + whole[8 + length :])
    with pytest.raises(BadInput, match=r"no multiple of 64.*--layout native-cpu"):
        load(tmp_path / "native")
    file.write_bytes(whole.replace(b"layers.0.mlp.up_proj.scale", b"layers.0.mlp.up_proj.other"))
    with pytest.raises(BadInput, match="up_proj"):
        load(tmp_path / "native")


def test_what_cannot_lie_in_a_layout_is_refused_with_the_reason(tmp_path: Path) -> None:
    uneven = made(tmp_path, grid=IntGrid(bits=4, group_size=8, scale_dtype=torch.bfloat16)).packed
    with pytest.raises(BadInput, match=r"native-cuda: it needs group_size null or a multiple of 16, found 8.*portable"):
        export_layout(uneven, tmp_path / "native", "native-cuda")
    assert not (tmp_path / "native").exists()
    (tmp_path / "float").mkdir()
    wide = make(tmp_path / "float", "llama").packed
    with pytest.raises(BadInput, match="float32"):
        export_layout(wide, tmp_path / "native", "native-cuda")
    export_layout(wide, tmp_path / "native", "native-cpu")
    for layout, words in [("native-cpu", "already"), ("native-cuda", "portable first"), ("natve", "unknown layout")]:
        with pytest.raises(BadInput, match=words):
            export_layout(tmp_path / "native" if layout != "natve" else wide, tmp_path / "other", layout)
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    config["quantization_config"]["layout"]["version"] = 99
    (tmp_path / "native" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="version 99"):
        load(tmp_path / "native")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_recipe_writes_it_and_counts_its_bytes(tmp_path: Path, layout: str) -> None:
    dense = zoo.save("qwen3", tmp_path / "dense", dtype=torch.bfloat16)
    head = {"quantize": {"method": "rtn", "bits": 8, "group_size": 16, "targets": ["lm_head"], "ignore": []}}
    pack = {"layout": layout}
    planned = plan(dense, recipe(None, RTN, head, pack=pack))
    report = compress(dense, recipe(None, RTN, head, pack=pack), tmp_path / "native")
    files = CheckpointReader(tmp_path / "native")
    assert planned["size"]["bytes"] == report["size"]["bytes"] == files.nbytes == sum(row["bytes"] for row in report["tensors"])
    assert {row["name"]: row["bytes"] for row in planned["tensors"]} == {row["name"]: row["bytes"] for row in report["tensors"]}
    stored = json.loads((tmp_path / "native" / REPORT_NAME).read_text())
    assert stored["recipe"]["pack"]["layout"] == layout
    seen = inspect(tmp_path / "native")
    assert seen["quantization"]["layout"] == layout and seen["quantization"]["layers"] == 15
    assert seen["bits_per_weight"] == pytest.approx(report["size"]["bits_per_weight"])
    compress(dense, recipe(None, RTN, head), tmp_path / "portable")
    assert inspect(tmp_path / "portable")["parameters"] == seen["parameters"]
    # The recipe's way and the exporter's write the same native files, and the way back gives the portable ones.
    export_layout(tmp_path / "portable", tmp_path / "exported", layout)
    export_layout(tmp_path / "native", tmp_path / "back", "portable")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "exported" / file).read_bytes() == (tmp_path / "native" / file).read_bytes(), file
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "portable" / file).read_bytes(), file
    model = load(tmp_path / "native", merge=True)
    assert isinstance(model.lm_head, Linear) and model.config.tie_word_embeddings is False
    assert torch.equal(logits(model), logits(load(tmp_path / "portable", merge=True)))


class StopError(Exception):
    pass


def test_an_interrupted_run_writes_the_same_native_files(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense", dtype=torch.bfloat16)
    chosen = recipe(ids_file(tmp_path), GPTQ, pack={"layout": "native-cpu"})
    compress(dense, chosen, tmp_path / "whole")

    def stop(what: str, done: int, total: int, facts: Any) -> None:
        if done == 1:
            raise StopError

    with pytest.raises(StopError):
        compress(dense, chosen, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    compress(dense, chosen, tmp_path / "out")
    assert digest(tmp_path / "whole") == digest(tmp_path / "out")
    assert compress(dense, chosen, tmp_path / "out")["size"]["bytes"] == CheckpointReader(tmp_path / "out").nbytes
    assert not os.path.exists(tmp_path / "out.partial")


def test_recipes_say_what_is_wrong() -> None:
    half = {"prune": {"method": "magnitude", "sparsity": 0.5}}
    with pytest.raises(BadInput, match="quantize stage"):
        recipe(None, half, pack={"layout": "native"})
    with pytest.raises(BadInput, match="native-cuda"):
        recipe(None, RTN, pack={"layout": "nativ-cuda"})
    assert Recipe.load("w4-fast", ["pack.layout=native"]).pack.layout == "native"


@compiled
@pytest.mark.parametrize("layout", ["portable", "native-cpu"])
def test_a_packed_embedding_serves_the_tied_head(tmp_path: Path, layout: str) -> None:
    dense = zoo.save("qwen3", tmp_path / "dense", dtype=torch.float32)
    embedding = {"quantize": {"method": "rtn", "bits": 8, "group_size": 16, "targets": ["Embedding"], "ignore": []}}
    compress(dense, recipe(None, RTN, embedding, pack={"layout": layout}), tmp_path / "out")
    names = {entry.name for entry in CheckpointReader(tmp_path / "out")}
    assert not any(name.startswith("lm_head") or name == "model.embed_tokens.weight" for name in names)
    model = load(tmp_path / "out", merge=True)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding) and isinstance(model.get_output_embeddings(), Linear)
    largest = max(tensor.numel() for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point())
    assert largest < 128 * 32, "something dense of the table's size is held"
    export_dense(tmp_path / "out", tmp_path / "decoded")
    found, wanted = logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "decoded"))
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


@compiled
def test_a_packed_embedding_is_part_of_the_compiled_step(tmp_path: Path) -> None:
    dense = zoo.save("qwen3", tmp_path / "dense", dtype=torch.float32)
    embedding = {"quantize": {"method": "rtn", "bits": 8, "group_size": 16, "targets": ["Embedding"], "ignore": []}}
    compress(dense, recipe(None, RTN, embedding), tmp_path / "out")
    model = load(tmp_path / "out", merge=True)
    prompt = torch.tensor([3, 14, 15])
    plain, fused = Decoder(model, "plain"), Decoder(model)
    assert list(fused.stream([prompt], 8)) == list(plain.stream([prompt], 8))
    assert fused.session is not None and fused.session.not_native is None


def test_a_scaled_embedding_is_decoded_as_before(tmp_path: Path) -> None:
    dense = zoo.save("gemma3_text", tmp_path / "dense", dtype=torch.float32)
    embedding = {"quantize": {"method": "rtn", "bits": 8, "group_size": 16, "targets": ["Embedding"], "ignore": []}}
    compress(dense, recipe(None, embedding), tmp_path / "out")
    model = load(tmp_path / "out")
    export_dense(tmp_path / "out", tmp_path / "decoded")
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "decoded")))
