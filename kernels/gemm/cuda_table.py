"""Which configuration serves which weight: a table per device, as data.

Entries are keyed by what decides the time: bits, kind of decoder, group size, N, K and the number of tokens, and with `o/` in
front for a weight with outliers, where that has a cut of its own. Tables are
looked for in two places: beside this module (`cuda_NAME.json`, measured by us) and in the cache folder (measured on this
machine by `tune`, with the device's name and the versions it was measured with; it wins). A weight that was not measured takes
what was measured for its shape with other groups or about as many tokens, of its decoder or else of integers; one that no
table knows gets `default_config`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aerogel.kernels.cuda.nvrtc import cache_folder, keep
from aerogel.kernels.gemm.cuda_few import (
    HALF_SHARED,
    Config,
    ceil_divide,
    default_config,
    fits,
    grid_of,
    shared_bytes,
    takes_patches,
    wants_patches,
)
from aerogel.kernels.gemm.cuda_weight import TileWeight

SHIPPED = Path(__file__).parent
SAME_FAMILY = {"nvidia-h200": "nvidia-h100", "nvidia-gh200": "nvidia-h100"}
"""Devices with another's multiprocessors, which take its table until they are measured."""
TOKEN_CLASSES = (1, 2, 4, 8, 16)
"""Numbers of tokens that are measured; others use the next larger one."""
FEWEST = 8
"""Up to so many tokens a step is one matrix product; what is fast is alike for them, and different above."""


def token_class(M: int) -> int:
    """The number of tokens that is measured for M <= 16 of them."""
    return next(size for size in TOKEN_CLASSES if size >= M)


def kind_of(weight: TileWeight) -> str:
    """Width and decoder: `4`, `4z` with zero points, `4f` floats, `4t` one table, `4r` one for each row, `4p` groups pick,
    `3b` bit planes."""
    if weight.planes:
        return f"{weight.bits}b"
    if weight.table is not None:
        return f"{weight.bits}{'p' if weight.pick is not None else 't' if len(weight.table) == 1 else 'r'}"
    return f"{weight.bits}{'f' if weight.floats else '' if weight.zero is None else 'z'}"


def key_of(weight: TileWeight, M: int) -> str:
    """`4/g128/4096x14336/m4`: width, decoder and group class, shape, token class; `o/` in front beside outliers."""
    return f"{'' if weight.outliers is None else 'o/'}{places(weight)[0]}/m{token_class(M)}"


def places(weight: TileWeight) -> tuple[str, ...]:
    """Where a weight's entries are, and those of weights like it: `4t/g64/4096x14336`. Best first; the last reads nearly as
    many bytes. Bit planes take as many instructions whatever their number, nearly as many as four bits."""
    shape, groups = f"{weight.N}x{weight.K}", dict.fromkeys((weight.group_size, 128, 64))
    like = ("3b/g128", "4/g64", "4/g128") if weight.planes else (f"{weight.bits}/g128",)
    return (*(f"{kind_of(weight)}/g{size}/{shape}" for size in groups), *(f"{place}/{shape}" for place in like))


def classes_like(M: int) -> list[int]:
    """Numbers of tokens whose entries M may take: the next larger ones, then smaller ones, of as many matrix products."""
    alike = [size for size in TOKEN_CLASSES if (size > FEWEST) == (M > FEWEST)]
    return [*(size for size in alike if size >= M), *(size for size in reversed(alike) if size < M)]


def device_slug(name: str) -> str:
    """A device's name as part of a file name: `NVIDIA H100 80GB HBM3` is `nvidia-h100-80gb-hbm3`."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def family_slug(name: str) -> str:
    """The first two words of the slug, `nvidia-h100`: tables are shipped by family, memory size aside."""
    family = "-".join(device_slug(name).split("-")[:2])
    return SAME_FAMILY.get(family, family)


def tuned_path(name: str) -> Path:
    """Where `tune` keeps what it found on the device `name`."""
    return cache_folder() / "tuned" / f"cuda_{device_slug(name)}.json"


@functools.cache
def table(name: str) -> Mapping[str, Mapping[str, Any]]:
    """All entries known for the device `name`: the shipped ones of its family, then the machine's own."""
    found: dict[str, Mapping[str, Any]] = {}
    for path in (SHIPPED / f"cuda_{family_slug(name)}.json", tuned_path(name)):
        if path.is_file():
            found.update(json.loads(path.read_text("utf-8"))["entries"])
    return found


def save(name: str, entries: Mapping[str, Mapping[str, Any]]) -> Path:
    """Adds entries to the machine's own table for the device `name`, with the versions they were measured with."""
    path = tuned_path(name)
    held = json.loads(path.read_text("utf-8"))["entries"] if path.is_file() else {}
    content = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "entries": {**held, **entries}}
    keep(path, json.dumps(content, indent=1, sort_keys=True).encode())
    table.cache_clear()
    return path


def as_roomy(weight: TileWeight, config: Config, measured: Config, M: int, multiprocessors: int) -> bool:
    """Whether `config` leaves the next kernel's blocks the room that `measured` left them with integers in groups of 128.
    A weight with more beside its codes may need a shallower ring for that, which costs less than the room."""
    R = weight.codes.shape[0]
    scale = torch.empty(R, ceil_divide(weight.K, 128), 16, dtype=torch.bfloat16, device="meta")
    plain = replace(
        weight, scale=scale, zero=None, table=None, pick=None, factor=None, outliers=None, kept=None, group_size=128
    )

    def room(held: TileWeight, cut: Config) -> int:
        return shared_bytes(held, cut, M, grid_of(held, cut, multiprocessors)) * cut.blocks

    return not measured.ring or room(plain, measured) > HALF_SHARED or room(weight, config) <= HALF_SHARED


def config_for(weight: TileWeight, M: int, device: torch.device | None = None) -> Config:
    """The configuration that runs M <= 16 tokens on `device`, the weight's own unless given: from a table, else by rule."""
    facts = torch.cuda.get_device_properties(weight.codes.device if device is None else device)
    capability = (facts.major, facts.minor)
    known = table(facts.name)
    held = places(weight)
    held = held if weight.outliers is None else (*(f"o/{place}" for place in held), *held)
    alike = (f"{place}/m{size}" for place in held for size in classes_like(M))
    for key in (key for key in alike if key in known):
        measured = Config(**known[key]["config"])
        # Warps that add outliers leave no seats to the next launch, and a cut that is made for these is a slow one without.
        if weight.outliers is not None and measured.seats > 1:
            continue
        if _costs_a_round(weight, measured, facts.multi_processor_count):
            continue
        if key == key_of(weight, M) and fits(weight, measured, M, capability, facts.multi_processor_count):
            return measured  # for just this: what room it leaves has been measured with it
        config = _fitting(weight, measured, M, capability, facts.multi_processor_count)
        if config is not None:
            return config
    return default_config(weight, M, capability, facts.multi_processor_count)


def has_apart_cut(name: str, N: int, K: int) -> bool:
    """Whether the device `name` adds outliers of weights of this shape by blocks of their own, for some number of tokens."""
    return any(config.apart > 0 for config in _beside_outliers(name, N, K))


def has_patch_cut(name: str, N: int, K: int) -> bool:
    """Whether it adds them patch by patch, as inputs come, for some number of tokens."""
    return any(wants_patches(config) for config in _beside_outliers(name, N, K))


def _beside_outliers(name: str, N: int, K: int) -> Iterator[Config]:
    """Cuts that were measured beside outliers of weights of this shape."""
    return (Config(**entry["config"]) for key, entry in table(name).items() if key[:2] == "o/" and f"/{N}x{K}/" in key)


def adds_without_room(weight: TileWeight, M: int) -> bool:
    """Whether a cut is known that adds the weight's outliers though a block has no room for all inputs: by blocks of their own,
    or as inputs come."""
    if TOKEN_CLASSES[-1] < M or weight.outliers is None or not weight.codes.is_cuda:
        return False
    if weight.outliers.apart is None and weight.outliers.patches is None:
        return False
    config = config_for(weight, M)
    return config.apart > 0 or takes_patches(weight, config)


def _costs_a_round(weight: TileWeight, config: Config, multiprocessors: int) -> bool:
    """Whether blocks that add outliers apart leave the others too few multiprocessors: the device is smaller than the one that
    was measured."""
    blocks = ceil_divide(weight.codes.shape[0], config.block_tiles * config.share) * config.share * config.cluster
    left = multiprocessors - config.apart
    return config.apart > 0 and (left < 1 or ceil_divide(blocks, left) > ceil_divide(blocks, multiprocessors))


def _fitting(weight: TileWeight, measured: Config, M: int, capability: tuple[int, int], multiprocessors: int) -> Config | None:
    """The configuration, with a shallower ring where the weight has more beside its codes, or more tokens, than what was
    measured; None where it would be less than two thirds as deep, which is no longer what was measured."""
    for stages in range(measured.stages, ceil_divide(2 * measured.stages, 3) - 1, -1):
        config = replace(measured, stages=stages)
        if fits(weight, config, M, capability, multiprocessors) and as_roomy(weight, config, measured, M, multiprocessors):
            return config
    return None
