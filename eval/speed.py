"""Dense and compressed timed side by side in one run, with medians and spread.

Machines drift: clocks throttle, other processes come and go. Timing one model and then the other turns that drift into
a speed-up that is not there. So each repetition times both, in alternating order (dense first, then compressed first),
and the speed-up is the median of the ratios within repetitions, where drift cancels, with the range of those ratios
beside it. Warm-up runs are thrown away. Prompts are random ids from a seed: what is said makes no difference to how
long it takes, except in mixtures of experts, where random text spreads over more experts than real text does.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from aerogel.errors import BadInput, RunFailed
from aerogel.eval.body import vocabulary_of
from aerogel.eval.decode import decode, facts, warm
from aerogel.eval.memory import peak_bytes, peak_device_bytes, tensor_bytes
from aerogel.eval.settings import BenchSettings
from aerogel.eval.significance import Spread
from aerogel.kernels.decode.loop import Decoder
from aerogel.model.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from aerogel.kernels.decode.direct import Direct

Model: TypeAlias = "PreTrainedModel | Direct"
Loader = Callable[[], Model]
Samples = dict[str, list[float]]

QUANTITIES = ("first_token_seconds", "prefill_tokens_per_second", "decode_tokens_per_second")
"""What one repetition measures. The first is better when small, the others when large."""


def order(names: list[str], repetition: int) -> list[str]:
    """Who goes first alternates: what the first one leaves in caches and clocks then helps and hurts both."""
    return names if repetition % 2 == 0 else names[::-1]


def load_all(loaders: Mapping[str, Loader], loads: int, progress: Progress) -> tuple[dict[str, Model], Samples]:
    """Load every model `loads` times, interleaved; only those of the last round stay in memory."""
    seconds: Samples = {name: [] for name in loaders}
    models: dict[str, Model] = {}
    done, total = 0, loads * len(loaders)
    for repetition in range(loads):
        for name in order(list(loaders), repetition):
            progress("load", done, total, {"name": name})
            done += 1
            start = time.perf_counter()
            model = loaders[name]()
            seconds[name].append(time.perf_counter() - start)
            if repetition == loads - 1:
                models[name] = model
            del model
            gc.collect()
    progress("load", total, total)
    return {name: models[name] for name in loaders}, seconds


def prompt(vocabulary: int, batch: int, length: int, seed: int) -> Tensor:
    """Random token ids, int64 [batch, length], the same for the same seed on every machine."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def check_length(models: Mapping[str, Model], settings: BenchSettings) -> None:
    """Raise BadInput when prompt and new tokens do not fit in the positions a model has."""
    needed = settings.prompt + settings.new_tokens
    for name, model in models.items():
        limit = getattr(model.config, "max_position_embeddings", None)
        if isinstance(limit, int) and needed > limit:
            raise BadInput(
                f"bench.prompt + bench.new_tokens is {needed}, the {name} model has {limit} positions: "
                f"write at most {limit} together"
            )


def measure(decoder: Decoder, ids_BT: Tensor, settings: BenchSettings) -> dict[str, float]:
    """One repetition: the three QUANTITIES for one model."""
    batch, length = ids_BT.shape
    result = decode(decoder, ids_BT, settings.new_tokens)
    return {
        "first_token_seconds": result.first_seconds,
        "prefill_tokens_per_second": batch * length / result.first_seconds,
        "decode_tokens_per_second": batch * (settings.new_tokens - 1) / result.rest_seconds,
    }


@contextmanager
def within_memory(name: str, batch: int) -> Iterator[None]:
    """Raises RunFailed where the device's memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunFailed(
            f"out of device memory timing the {name} model at batch {batch}: "
            "write smaller numbers for bench.batch, bench.prompt or bench.new_tokens"
        ) from error


def time_batch(decoders: Mapping[str, Decoder], batch: int, settings: BenchSettings, progress: Progress) -> dict[str, object]:
    """All repetitions for one batch size: a row of the report. What a loop prepares once is done before the clock runs."""
    vocabulary = min(vocabulary_of(decoder.model) for decoder in decoders.values())
    ids_BT = prompt(vocabulary, batch, settings.prompt, settings.seed)
    samples: dict[str, Samples] = {name: {quantity: [] for quantity in QUANTITIES} for name in decoders}
    total = settings.warmup + settings.repeats
    for name, decoder in decoders.items():
        progress(f"bench: batch {batch}, prepare", 0, 1, {"name": name})
        with within_memory(name, batch):
            warm(decoder, ids_BT, settings.new_tokens)
    progress(f"bench: batch {batch}, prepare", 1, 1)
    for repetition in range(total):
        for name in order(list(decoders), repetition):
            progress(f"bench: batch {batch}", repetition, total, {"name": name})
            with within_memory(name, batch):
                measured = measure(decoders[name], ids_BT, settings)
            if repetition >= settings.warmup:
                for quantity, value in measured.items():
                    samples[name][quantity].append(value)
    progress(f"bench: batch {batch}", total, total)
    row: dict[str, object] = {"batch": batch}
    for name, values in samples.items():
        row[name] = {quantity: Spread.of(values[quantity]).as_dict() for quantity in QUANTITIES} | {
            "ran": facts(decoders[name])
        }
    if "dense" in samples and "compressed" in samples:
        row["speedup"] = speedups(samples["dense"], samples["compressed"])
    return row


def speedups(dense: Samples, compressed: Samples) -> dict[str, object]:
    """Ratios within repetitions, above 1 where compressed is faster: `first_token`, `prefill`, `decode`."""
    pairs = {
        "first_token": (dense["first_token_seconds"], compressed["first_token_seconds"]),
        "prefill": (compressed["prefill_tokens_per_second"], dense["prefill_tokens_per_second"]),
        "decode": (compressed["decode_tokens_per_second"], dense["decode_tokens_per_second"]),
    }
    return {
        name: Spread.of([over / under for over, under in zip(above, below, strict=True)]).as_dict()
        for name, (above, below) in pairs.items()
    }


def time_models(loaders: Mapping[str, Loader], settings: BenchSettings, progress: Progress = silent) -> dict[str, object]:
    """Load, warm up and time the models of `loaders` ("dense", "compressed") interleaved: the report's `bench`.

    Raises BadInput when the tokens do not fit in a model's positions, RunFailed when device memory runs out.
    """
    models, load_seconds = load_all(loaders, settings.loads, progress)
    check_length(models, settings)
    first = next(iter(models.values()))
    decoders = {name: Decoder(model, settings.loop) for name, model in models.items()}
    return {
        "device": first.device.type,
        "threads": torch.get_num_threads(),
        "dtype": {name: str(model.dtype).removeprefix("torch.") for name, model in models.items()},
        "numerics": settings.numerics,
        "activations": settings.activations,
        "prompt": settings.prompt,
        "new_tokens": settings.new_tokens,
        "repeats": settings.repeats,
        "warmup": settings.warmup,
        "interleaved": len(models) > 1,
        "loop": settings.loop,
        "merge": settings.merge,
        "seed": settings.seed,
        "load_seconds": {name: Spread.of(values).as_dict() for name, values in load_seconds.items()},
        "memory": {name: {"bytes": tensor_bytes(model)} for name, model in models.items()},
        "rows": [time_batch(decoders, batch, settings, progress) for batch in settings.batch],
        "peak_bytes": peak_bytes(),
        "peak_device_bytes": peak_device_bytes(),
    }
