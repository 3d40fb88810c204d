"""MODEL on the command line: a local folder, a GGUF file or a hub id, turned into a local folder of safetensors."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from aerogel.errors import BadInput

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*"]


def cache_folder() -> Path:
    """Where aerogel keeps what it can make again: `$AEROGEL_CACHE`, else `~/.cache/aerogel`."""
    return Path(os.environ.get("AEROGEL_CACHE") or Path.home() / ".cache" / "aerogel")


def resolve(model: str | Path, *, trust_remote_code: bool = False) -> Path:
    """The local folder that holds `model`, downloaded or converted first where needed.

    Args:
        model: a folder with config.json and safetensors, a `.gguf` file, or a hub id such as `org/name`.
        trust_remote_code: allow a checkpoint whose config asks for its own Python code.

    Raises:
        BadInput: nothing there, no config.json, code required but not allowed, or the hub cannot be reached.
    """
    path = Path(model)
    if path.suffix == ".gguf" or (path.is_file() and _is_gguf(path)):
        if not path.is_file():
            raise BadInput(f"the GGUF file {str(model)!r} does not exist; give the path of an existing file")
        return _from_gguf(path)
    if path.is_dir():
        folder = path
    elif path.exists():
        raise BadInput(f"{str(model)!r} is a file but not a GGUF; give a folder with config.json, a .gguf file or a hub id")
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model)) and not str(model).startswith("."):
        folder = _from_hub(str(model))
    else:
        raise BadInput(f"there is no model at {str(model)!r}; give an existing folder, a .gguf file or a hub id (org/name)")
    check_config(folder, trust_remote_code=trust_remote_code)
    return folder


def check_config(folder: Path, *, trust_remote_code: bool = False) -> dict[str, object]:
    """config.json of `folder`, after the checks that need no model code.

    Raises:
        BadInput: missing, not JSON, not a language model, or one that would execute code from the checkpoint.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise BadInput(f"{folder} holds no config.json; give the folder of a transformers checkpoint")
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise BadInput(f"{file} cannot be read as JSON ({error}); get it again") from error
    if not isinstance(config, dict) or not config.get("model_type"):
        raise BadInput(f"{file} names no model_type; {_other_layout(config)}")
    if config.get("auto_map") and not trust_remote_code:
        raise BadInput(
            f"{folder} asks to run Python code of its own (auto_map in config.json); aerogel never does unless you pass"
            " --trust-remote-code, and you should read that code first"
        )
    return config


def _other_layout(config: object) -> str:
    """What a config.json without a model_type is."""
    if isinstance(config, dict) and {"experts_per_token", "swiglu_limit"} <= config.keys():
        return (
            "this is gpt-oss in OpenAI's own layout (the folder `original` of its release); give the folder above it, or"
            " openai/gpt-oss-20b, which has the same weights in the layout of transformers"
        )
    return "it is not the config of a transformers model"


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        if not isinstance(try_to_load_from_cache(repository, "config.json"), str):
            logger.warning("downloading %s from the hub", repository)
        return Path(snapshot_download(repository, allow_patterns=HUB_PATTERNS))
    except GatedRepoError as error:
        raise BadInput(f"{repository} is gated: accept its licence on the hub and log in with `hf auth login`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BadInput(f"{repository!r} is neither a local folder nor a model on the hub; check the spelling") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise BadInput(
            f"{repository!r} is no local folder, and the hub cannot be reached to download it; give the path of a local"
            " checkpoint or go online"
        ) from error


def _from_gguf(path: Path) -> Path:
    """An ordinary checkpoint with the dequantized weights of a GGUF file, made once per file and kept in the cache."""
    digest = hashlib.sha256(f"{path.resolve()}:{path.stat().st_size}:{path.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"{path.stem}-{digest}"
    if (folder / "config.json").is_file():
        return folder
    logger.warning("making an ordinary checkpoint of %s, once; a small one takes a minute (kept in %s)", path.name, folder)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

    draft = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        dtype = _original_dtype(model.parameters(), quantized=_holds_codes(path))
        torch.nn.Module.to(model, dtype)
        model.save_pretrained(draft)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(draft)
    except (ValueError, KeyError, IndexError, OSError, RuntimeError, struct.error) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise BadInput(
            f"{path.name} cannot be converted ({error}); give a GGUF of an architecture transformers knows"
        ) from error
    try:
        os.replace(draft, folder)
    except OSError:
        # Another process has just finished the same conversion: its result is as good.
        shutil.rmtree(draft, ignore_errors=True)
        if not (folder / "config.json").is_file():
            raise
    return folder


def _holds_codes(path: Path) -> bool:
    """Whether any tensor of the GGUF file is quantized."""
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFReader

    return any(tensor.tensor_type not in (Kind.F32, Kind.F16, Kind.BF16) for tensor in GGUFReader(path).tensors)


def _original_dtype(parameters: Iterable[torch.Tensor], *, quantized: bool) -> torch.dtype:
    """The type that the model had before it became a GGUF: the first of bfloat16, float16, float32 that is exact.

    A GGUF never quantizes its vectors (norms, biases), so they still show the original type; only they are looked at
    when matrices were quantized. Those matrices are then rounded to that type: measured on SmolLM2-135M in Q4_1, by
    0.14 % of their norm in bfloat16 and 0.02 % in float16, where the 4-bit grid itself costs several per cent. What is
    compressed and what it is compared with are both that checkpoint, so no measurement of aerogel contains the rounding.
    """
    import torch

    matrices: list[torch.Tensor] = []
    vectors: list[torch.Tensor] = []
    for parameter in parameters:
        (matrices if parameter.ndim > 1 else vectors).append(parameter.detach())
    shown = vectors if quantized else [*vectors, *matrices]
    for dtype in (torch.bfloat16, torch.float16):
        exact = all(torch.equal(tensor.to(dtype).float(), tensor) for tensor in shown)
        if shown and exact and all(tensor.to(dtype).isfinite().all() for tensor in matrices):
            return dtype
    return torch.float32
