"""The sections of a recipe beside its stages: closed, strict, frozen, every default stated once."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from aerogel.errors import BadInput
from aerogel.eval.gate import size_in_bytes
from aerogel.recipes.options import STRICT


def parse_bytes(found: Any) -> Any:
    """`"3GB"` as 3000000000; a number stays what it is. Raises ValueError for text that is no size."""
    if not isinstance(found, str):
        return found
    try:
        return size_in_bytes(found)
    except BadInput:
        raise ValueError('must be bytes or a size such as "3GB" or "512MiB"') from None


def stays_inside(found: Any) -> Any:
    """A path written in a recipe; raises ValueError when it climbs out of the working directory with `..`."""
    if isinstance(found, str) and ".." in re.split(r"[/\\]", found):
        raise ValueError("must not climb out of the working directory with '..'; write an absolute path")
    return found


Place = Annotated[str, BeforeValidator(stays_inside), Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Words = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
Counts = Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
Numerics = Literal["stored", "float32"]
Activations = Literal["stored", "int8"]


class Section(BaseModel):
    """Base of every section: unknown keys, wrong types and infinities are errors."""

    model_config = STRICT


class Calibration(Section):
    """Data that the methods see. Ignored, and not even loaded, when no stage needs data."""

    source: Place = Field(
        default="default", description="`default`, a local .txt/.json/.jsonl/.parquet file, or a dataset id on the hub"
    )
    column: str | None = Field(
        default=None, description="the column with text or chat messages; null finds `text` or `messages`"
    )
    samples: Count = Field(default=128, description="sequences")
    sequence_length: Annotated[int, Field(ge=2)] = Field(default=512, description="tokens per sequence, packed without padding")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="of the order in which documents are taken")
    chat_template: bool = Field(default=False, description="wrap each document in the tokenizer's chat template")
    bos: Literal["auto", "always", "never"] = Field(
        default="auto", description="start each sequence with BOS; `auto` does as the tokenizer"
    )
    batch: Count = Field(default=8, description="sequences per forward pass")
    compute: Literal["auto", "source", "float32", "bfloat16"] = Field(
        default="auto",
        description="type that blocks run in; `auto` is the checkpoint's, on a CPU bfloat16 where it is native",
    )
    activations: Literal["memory", "disk"] = Field(default="memory", description="where activations wait between two blocks")
    experts: Literal["top_up", "routed"] = Field(
        default="top_up",
        description="`top_up` shows all tokens to experts that were routed too few; `routed` shows only theirs",
    )
    gradient_samples: Count = Field(
        default=32, description="sequences that are run backwards where a stage needs gradients (rows: loss, clip: fisher)"
    )
    min_expert_tokens: Count = Field(default=64, description="the run fails when an expert was calibrated on fewer tokens")


class Pack(Section):
    """How the compressed weights are stored."""

    format: Literal["auto", "pack-quantized", "int-quantized", "float-quantized"] = Field(
        default="auto", description="`auto` takes the standard format that fits the quantize stage"
    )
    layout: Literal["portable", "native", "native-cpu", "native-cuda"] = Field(
        default="portable",
        description="`portable` loads in every runtime that knows the format; `native-cpu` and `native-cuda` are what"
        " aerogel's kernels run, mapped from disk or loaded without repacking; `native` is the one for this machine",
    )
    dtype: Literal["source", "float16", "bfloat16", "float32"] = Field(
        default="source", description="type of the weights that are kept, and of the scales"
    )
    entropy: bool = Field(
        default=False,
        description="code what is stored without loss (docs/methods/entropy.md); `stages` may then be empty. Loads in"
        " aerogel only; `aerogel export --to plain` undoes it",
    )


class Perplexity(Section):
    """The text that perplexity and divergence are measured on."""

    source: Place = Field(default="default", description="`default`, a local text file, or a dataset id on the hub")
    column: str | None = Field(default=None, description="the column with text; null finds `text` or `messages`")
    bos: Literal["auto", "always", "never"] = Field(
        default="auto", description="start each window with BOS; `auto` does as the tokenizer"
    )
    windows: Count = Field(default=40, description="windows of text")
    sequence_length: Annotated[int, Field(ge=2)] = Field(default=1024, description="tokens per window")


class Evaluate(Section):
    """What is measured about quality, dense beside compressed."""

    perplexity: Perplexity | None = Field(default=Perplexity(), description="null leaves perplexity out")
    divergence: bool = Field(
        default=True, description="KL divergence and top-1 agreement with the dense model, on the same windows"
    )
    tasks: Words = Field(default=(), description="lm-eval task names (`aerogel list tasks`)")
    limit: Count | None = Field(default=None, description="documents per task; null takes all")
    shots: Annotated[int, Field(ge=0)] = Field(default=0, description="examples in front of each task document")
    batch: Count = Field(default=1, description="windows and task requests per forward pass")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="of the documents drawn under `limit`")
    numerics: Numerics = Field(
        default="stored", description="`stored`: compute in the checkpoint's type; `float32`: compute in fp32"
    )
    activations: Activations = Field(
        default="stored",
        description="`int8`: packed linears round their inputs (CPU); the report then states what that costs in perplexity",
    )


class Bench(Section):
    """What is measured about speed and memory, dense beside compressed, interleaved."""

    batch: Counts = Field(default=(1,), description="batch sizes")
    prompt: Count = Field(default=512, description="prompt tokens")
    new_tokens: Annotated[int, Field(ge=2)] = Field(default=128, description="tokens generated behind the prompt")
    repeats: Count = Field(default=5, description="timed repetitions")
    warmup: Annotated[int, Field(ge=0)] = Field(default=1, description="untimed repetitions before them")
    loads: Count = Field(default=3, description="how often each model is loaded for the load time")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="of the random prompt")
    loop: Literal["auto", "fused", "masked", "plain"] = Field(
        default="auto", description="the decode loop; `auto` takes the fastest one that gives the model's own logits"
    )
    merge: bool = Field(
        default=True, description="one linear for those that read the same input (q, k, v; gate, up), in both models"
    )
    numerics: Numerics = Field(
        default="stored", description="`stored`: compute in the checkpoint's type; `float32`: compute in fp32"
    )
    activations: Activations = Field(
        default="stored",
        description="`int8`: packed linears round their inputs, which is faster on a CPU and changes numbers: set it under"
        " `evaluate` as well",
    )


Positive = Annotated[float, Field(gt=0)]
Drop = Annotated[float, Field(gt=0, lt=1)]


class Gate(Section):
    """Limits that decide whether `aerogel run` passes (exit code 0) or fails (1); null sets no limit."""

    max_kl: Positive | None = Field(default=None, description="mean KL divergence from the dense model, nats per token")
    max_perplexity_increase: Positive | None = Field(default=None, description="relative: 0.05 allows 5 % above dense")
    min_top1: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="share of tokens with the dense model's top-1"
    )
    min_compression: Positive | None = Field(default=None, description="source bytes / compressed bytes")
    min_decode_speedup: Positive | None = Field(default=None, description="decode tokens/s over dense, at every batch size")
    max_memory: Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)] | None = Field(
        default=None, description='peak memory of the compressed model; bytes or "3GB"'
    )
    max_task_drop: Drop | dict[str, Drop] | None = Field(
        default=None, description="largest loss of accuracy (0.02 is two points) on any task, or a mapping per task"
    )
