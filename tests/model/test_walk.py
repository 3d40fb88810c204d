"""What recipes may ask of a walk: rules per pattern, head and embedding, pruning, ragged groups, other types, GGUF."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import zoo
from tests.model.tiny import GPTQ, RTN, digest, error, ids_file, logits, recipe
from torch import nn
from transformers import AutoModelForCausalLM

import aerogel
from aerogel.errors import BadInput, RunFailed
from aerogel.kernels.embedding import PackedEmbedding
from aerogel.model.compress import compress
from aerogel.model.plan import plan
from aerogel.model.reader import CheckpointReader
from aerogel.model.structure import build_on_meta, discover
from aerogel.pack.export import export_dense


def stage(method: str = "rtn", bits: int = 4, **more: Any) -> dict[str, Any]:
    return {"quantize": {"method": method, "bits": bits, "group_size": 16, **more}}


def layers(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for block in report["blocks"] for row in block["layers"]}


def same_as_export(out: Path, folder: Path) -> None:
    """The loaded model computes what the dense export computes."""
    dense = AutoModelForCausalLM.from_pretrained(export_dense(out, folder), dtype="auto")
    assert error(logits(aerogel.load(out)), logits(dense)) < 2e-5


# ---- rules by pattern -------------------------------------------------------------------------------------------------


def test_rules_by_pattern(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    chosen = recipe(
        ids_file(tmp_path),
        stage("gptq", 3, targets=["re:.*self_attn"], ignore=["re:.*o_proj"]),
        stage("rtn", 8, targets=["re:.*mlp"], ignore=["model.layers.0.mlp.down_proj"]),
        stage("hqq", 5, targets=["model.layers.0.mlp.down_proj"], ignore=[]),
    )
    report = compress(dense, chosen, tmp_path / "out")
    found = {name: (row["method"], row["bits"]) for name, row in layers(report).items()}
    wanted = {}
    for block in (0, 1):
        for x in "qkv":
            wanted[f"model.layers.{block}.self_attn.{x}_proj"] = ("gptq", 3)
        for x in ("gate", "up", "down"):
            wanted[f"model.layers.{block}.mlp.{x}_proj"] = ("rtn", 8)
    wanted["model.layers.0.mlp.down_proj"] = ("hqq", 5)
    assert found == wanted
    kept = {row["name"]: row["why"] for row in report["tensors"] if row["fate"] == "kept"}
    assert "re:.*o_proj" in kept["model.layers.0.self_attn.o_proj.weight"]
    assert report["size"]["bytes"] == plan(dense, chosen)["size"]["bytes"]
    source, stored = CheckpointReader(dense), CheckpointReader(tmp_path / "out")
    for name in kept.keys() & set(source.names):
        assert torch.equal(stored.read(name), source.read(name))
    same_as_export(tmp_path / "out", tmp_path / "exported")


def test_two_rules_for_one_weight_are_an_error(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    with pytest.raises(BadInput, match=r"claimed by stages.0.quantize and stages.1.quantize"):
        compress(dense, recipe(None, stage(), stage(bits=8, targets=["re:.*mlp"])), tmp_path / "out")


# ---- head and embedding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_quantized_head(tmp_path: Path, name: str, method: str) -> None:
    dense = zoo.save(name, tmp_path / "dense")
    tied = zoo.build(name).config.tie_word_embeddings
    chosen = recipe(ids_file(tmp_path), stage(method, ignore=[]))
    report = compress(dense, chosen, tmp_path / "out")
    assert layers(report)["lm_head"]["bits"] == 4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if tied:
        assert config["tie_word_embeddings"] is False
        source, stored = CheckpointReader(dense), CheckpointReader(tmp_path / "out")
        embedding = next(n for n in source.names if "embed_tokens" in n or "wte" in n)
        assert torch.equal(stored.read(embedding), source.read(embedding))
    assert report["size"]["bytes"] == plan(dense, chosen)["size"]["bytes"] == sum(row["bytes"] for row in report["tensors"])
    same_as_export(tmp_path / "out", tmp_path / "exported")


def test_the_head_is_calibrated_on_what_reaches_it(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    source = ids_file(tmp_path)
    good = compress(dense, recipe(source, stage("gptq", 3, targets=["lm_head"], ignore=[])), tmp_path / "gptq")
    poor = compress(dense, recipe(source, stage("rtn", 3, weighted=True, targets=["lm_head"], ignore=[])), tmp_path / "rtn")
    assert layers(good)["lm_head"]["loss"] < 0.7 * layers(poor)["lm_head"]["loss"]
    wanted = logits(AutoModelForCausalLM.from_pretrained(dense))
    assert error(logits(aerogel.load(tmp_path / "gptq")), wanted) < error(logits(aerogel.load(tmp_path / "rtn")), wanted)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_quantized_embedding(tmp_path: Path, name: str) -> None:
    dense = zoo.save(name, tmp_path / "dense")
    embedding = "transformer.wte" if name == "gpt2" else "model.embed_tokens"
    chosen = recipe(None, stage(bits=8, targets=[embedding], ignore=[]), stage())
    report = compress(dense, chosen, tmp_path / "out")
    assert layers(report)[embedding]["bits"] == 8
    assert report["size"]["bytes"] == plan(dense, chosen)["size"]["bytes"]
    same_as_export(tmp_path / "out", tmp_path / "exported")
    exported = CheckpointReader(tmp_path / "exported").read(f"{embedding}.weight")
    assert 0 < error(exported, CheckpointReader(dense).read(f"{embedding}.weight")) < 0.01
    model = aerogel.load(tmp_path / "out")
    embedded, head = model.get_input_embeddings(), model.get_output_embeddings()
    if zoo.build(name).config.tie_word_embeddings:
        assert isinstance(embedded, PackedEmbedding) and embedded.head is head, "one packed weight serves both"
    else:
        assert embedded.weight is not head.weight


def test_an_embedding_cannot_be_calibrated(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    with pytest.raises(BadInput, match=r"model\.embed_tokens lies outside the blocks"):
        compress(dense, recipe(ids_file(tmp_path), stage("gptq", targets=["Embedding"], ignore=[])), tmp_path / "out")


def test_a_tied_head_cannot_only_be_pruned(tmp_path: Path) -> None:
    dense = zoo.save("qwen3", tmp_path / "dense")
    chosen = recipe(None, {"prune": {"method": "magnitude", "targets": ["lm_head"], "ignore": []}})
    with pytest.raises(BadInput, match="lm_head is tied to the embedding"):
        compress(dense, chosen, tmp_path / "out")


# ---- pruning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_pruning_alone_leaves_a_dense_checkpoint_with_zeros(tmp_path: Path, method: str, name: str) -> None:
    dense = zoo.save(name, tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), {"prune": {"method": method, "pattern": "2:4"}})
    report = compress(dense, chosen, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    source, stored = CheckpointReader(dense), CheckpointReader(tmp_path / "out")
    assert set(stored.names) == set(source.names)
    for m in discover(dense).matrices:
        if m.name in layers(report):
            groups = m.take(stored.read(m.tensor)).reshape(m.n, m.k // 4, 4)
            assert bool(((groups == 0).sum(-1) >= 2).all()), m.name
            assert layers(report)[m.name]["zeros"] == pytest.approx(0.5)
    assert {row["fate"] for row in report["tensors"]} == {"pruned", "kept"}
    assert report["size"]["bytes"] == plan(dense, chosen)["size"]["bytes"] == source.nbytes
    assert math.isfinite(logits(aerogel.load(tmp_path / "out")).sum())


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_rounding_keeps_the_zeros_of_pruning(tmp_path: Path, pruner: str, method: str) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), {"prune": {"method": pruner, "pattern": "2:4"}}, stage(method, symmetric=False))
    report = compress(dense, chosen, tmp_path / "out")
    exported = CheckpointReader(export_dense(tmp_path / "out", tmp_path / "exported"))
    for name, row in layers(report).items():
        weight = exported.read(f"{name}.weight")
        assert bool(((weight.reshape(len(weight), -1, 4) == 0).sum(-1) >= 2).all()), name
        assert row["method"] == f"{pruner} -> {method}"
        assert row["zeros"] == pytest.approx(0.5)


# ---- shapes and types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "method"), [*((group, "gptq") for group in (5, 20, 32, 1000, None)), (20, "rtn")])
def test_groups_that_do_not_divide_the_inputs(tmp_path: Path, group: int | None, method: str) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    chosen = recipe(ids_file(tmp_path), stage(method, group_size=group))
    report = compress(dense, chosen, tmp_path / "out")
    assert report["size"]["bytes"] == plan(dense, chosen)["size"]["bytes"]
    same_as_export(tmp_path / "out", tmp_path / "exported")


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", ["float16", "bfloat16"])
def test_another_type_for_what_is_kept(tmp_path: Path, source: torch.dtype, wanted: str) -> None:
    dense = zoo.save("llama", tmp_path / "dense", dtype=source)
    chosen = recipe(ids_file(tmp_path), GPTQ, pack={"dtype": wanted})
    report = compress(dense, chosen, tmp_path / "out")
    dtype = getattr(torch, wanted)
    stored = CheckpointReader(tmp_path / "out")
    assert {entry.dtype for entry in stored if entry.dtype.is_floating_point} == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == wanted
    assert report["size"]["bytes"] == plan(dense, chosen)["size"]["bytes"]
    model = aerogel.load(tmp_path / "out")
    assert model.dtype == dtype
    assert error(logits(model), logits(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32))) < 0.35


def test_fp8(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense", dtype=torch.bfloat16)
    chosen = recipe(None, {"quantize": {"method": "rtn", "format": "fp8"}})
    report = compress(dense, chosen, tmp_path / "out")
    assert report["size"]["bytes"] == plan(dense, chosen)["size"]["bytes"]
    assert torch.float8_e4m3fn in {entry.dtype for entry in CheckpointReader(tmp_path / "out")}


# ---- reports and refusals ---------------------------------------------------------------------------------------------


def test_the_error_of_each_block_is_that_of_its_output(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    report = compress(dense, recipe(ids_file(tmp_path), GPTQ, batch=8), tmp_path / "out")
    found = [block["relative_error"] for block in report["blocks"][:-1]]
    ids = read_ids(tmp_path)
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(dense).model(ids, output_hidden_states=True).hidden_states
        after = aerogel.load(tmp_path / "out").model(ids, output_hidden_states=True).hidden_states
    # Block 0 sees the same input in both models, so its error is the whole difference behind it.
    assert found[0] == pytest.approx(error(after[1], before[1]), rel=1e-3)
    assert all(0 < value < 0.5 for value in found)
    assert "relative_error" not in report["blocks"][-1]


def read_ids(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / "ids.safetensors")["ids"]


def test_a_linear_that_no_token_reaches_fails_loudly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def skips_up(self: Any, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)))
        return found

    dense = zoo.save("llama", tmp_path / "dense")
    monkeypatch.setattr(LlamaMLP, "forward", skips_up)
    with pytest.raises(RunFailed, match=r"calibration never reaches model\.layers\.0\.mlp\.up_proj"):
        compress(dense, recipe(ids_file(tmp_path), GPTQ), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_in_memory_between_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    seen: list[int] = []
    kept: list[nn.Module] = []

    def watched(config: Any) -> Any:
        model = build_on_meta(config)
        kept.append(model)
        return model

    monkeypatch.setattr("aerogel.model.structure.build_on_meta", watched)

    def count(label: str, done: int, total: int, facts: Any = None) -> None:
        seen.append(sum(p.nbytes for p in kept[-1].parameters() if not p.is_meta))

    compress(dense, recipe(ids_file(tmp_path), GPTQ), tmp_path / "out", progress=count)
    assert seen == [0, 0, 0, 0]


def test_other_files_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    dense = zoo.save("llama", tmp_path / "dense")
    for name in ("LICENSE", "tokenizer.json", "chat_template.jinja", "pytorch_model.bin", "README.md", ".secret", "a.gguf"):
        (dense / name).write_text(name)
    compress(dense, recipe(None, RTN), tmp_path / "out")
    names = set(digest(tmp_path / "out"))
    assert {"LICENSE", "tokenizer.json", "chat_template.jinja", "generation_config.json", "aerogel_report.json"} <= names
    assert not {"pytorch_model.bin", "README.md", ".secret", "a.gguf"} & names


@pytest.mark.parametrize("one", ["model.layers.0.mlp.experts.2.down_proj", r"re:.*experts\.[01]\."])
def test_experts_of_one_stack_go_together(tmp_path: Path, one: str) -> None:
    dense = zoo.save("gpt_oss", tmp_path / "dense")
    with pytest.raises(BadInput, match=r"of the 4 experts in model.layers.0.mlp.experts.* are quantized"):
        compress(dense, recipe(None, stage(targets=[one])), tmp_path / "out")


# ---- GGUF -------------------------------------------------------------------------------------------------------------


def write_gguf(file: Path) -> nn.Module:
    """A llama in GGUF, in float32, as llama.cpp names its tensors."""
    import gguf

    model = zoo.build("llama")
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = ["<unk>", "<s>", "</s>", *[f"w{i}" for i in range(config.vocab_size - 3)]]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3, *[1] * (len(words) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for name, value in model.state_dict().items():
        target = outer.get(name)
        if target is None:
            _, _, block, path = name.removesuffix(".weight").split(".", 3)
            target = f"blk.{block}.{names[path]}.weight"
            if path in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp interleaves the halves of each rotary head
                heads = config.num_attention_heads if "q_proj" in path else config.num_key_value_heads
                value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(target, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.filterwarnings("ignore")
def test_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("AEROGEL_CACHE", str(tmp_path / "cache"))
    model = write_gguf(tmp_path / "tiny.gguf")
    chosen = recipe(ids_file(tmp_path), stage(bits=8))
    report = compress(tmp_path / "tiny.gguf", chosen, tmp_path / "out")
    assert len(layers(report)) == 14
    assert error(logits(aerogel.load(tmp_path / "out")), logits(model)) < 0.03
    made = list((tmp_path / "cache").iterdir())
    assert len(made) == 1
    before = digest(made[0])
    compress(tmp_path / "tiny.gguf", chosen, tmp_path / "again")
    assert list((tmp_path / "cache").iterdir()) == made
    assert digest(made[0]) == before
    (tmp_path / "broken.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:5000])
    with pytest.raises(BadInput, match=r"broken\.gguf cannot be converted"):
        compress(tmp_path / "broken.gguf", chosen, tmp_path / "no")
    assert list((tmp_path / "cache").iterdir()) == made
