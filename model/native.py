"""Reads native checkpoints: weights stored as the tensors that a kernel runs (`kernels/layouts.py`).

    config.json   quantization_config: {quant_method: aerogel, layout: {name, version, quant_method, shapes}, ...}
                  and all else as in the portable checkpoint; `shapes` lists the native weights as {name: [N, K]}, since
                  their tensors are filled up to whole tiles. What is not listed lies as in the portable checkpoint.
    tensors       <name>.codes, <name>.scale, ... Codes begin at a multiple of 64 bytes and all others at one of their
                  elements' size, so that a kernel can run them where the file is mapped. Weights that the model multiplies
                  with the same input lie behind each other, tensor by tensor, and so are one weight without a copy.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels import layouts
from aerogel.kernels.linear import problem_of, stored_shapes
from aerogel.model.reader import Entry
from aerogel.pack.compressed_tensors import CompressedTensors
from aerogel.pack.format import take
from aerogel.pack.scheme import Scheme
from aerogel.pack.source import Columns, Source

VERSION = 3
"""Of the layouts and of the words in config.json."""
ALIGNMENT = 64
"""Bytes: a vector of the widest CPU, and a cache line."""
CODES: dict[str, str] = {"native-cpu": "codes", "native-cuda": "tile_codes"}
SCALES: dict[str, str] = {"native-cpu": "scale", "native-cuda": "tile_scale"}
OTHERS = ("zero", "tile_zero", "tile_table", "tile_pick", "tile_factor", "stored_scale", "stored_factor")
LOCAL_NAMES = frozenset({*CODES.values(), *SCALES.values(), *OTHERS})
"""Local names of the tensors of native weights."""


def open_own(config: Mapping[str, Any]) -> Source:
    """The source for `quant_method: aerogel`: native where the config has a `layout`, else as compressed-tensors."""
    return Native(config) if config.get("layout") else CompressedTensors(config)


class Native(CompressedTensors):
    """A `quantization_config` with a `layout`."""

    markers: ClassVar[frozenset[str]] = CompressedTensors.markers | frozenset(CODES.values())

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.suffixes |= LOCAL_NAMES
        layout = config["layout"]
        try:
            version, self.layout = int(layout["version"]), str(layout["name"])
            self.shapes = {str(name): (int(N), int(K)) for name, (N, K) in layout["shapes"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"the layout in config.json is damaged ({error}); get the checkpoint again") from error
        if version != VERSION:
            raise BadInput(
                f"the checkpoint is in version {version} of the native layouts, this aerogel reads version {VERSION}; write it"
                " portable with the aerogel that made it (`aerogel export --layout portable`), then native with this one"
            )
        layouts.owner(self.layout)

    def scheme(self, names: Sequence[str], header: Mapping[str, torch.dtype], class_names: Sequence[str]) -> Scheme:
        """As in the portable checkpoint, with the layout's name."""
        if names[0] not in self.shapes:
            return super().scheme(names, header, class_names)
        local = SCALES[self.layout]
        if local not in header or CODES[self.layout] not in header:
            raise BadInput(f"{names[0]} has no tensor {local!r} or no codes; the checkpoint is not whole, get it again")
        found = super().scheme(names, {"weight_scale": header[local]}, class_names)
        return replace(found, layout=self.layout)

    def columns(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Columns:
        """The codes of one weight, native or not."""
        if scheme.layout is None:
            return self.read(tensors, scheme)
        N, K = self.shapes[name]
        wanted = stored_shapes(scheme, N, K)
        held = {local: take(tensors, local, shape, (dtype,)) for local, (shape, dtype) in wanted.items()}
        return Columns(layouts.owner(scheme.layout).unpack(held, problem_of(scheme, N, K, torch.float32)))

    def check_places(self, header: Mapping[str, Entry]) -> None:
        """Raises `BadInput` for a native tensor that no kernel could run where it lies in its file."""
        for name in self.shapes:
            for local in LOCAL_NAMES:
                entry = header.get(f"{name}.{local}")
                if entry is None:
                    continue
                step = ALIGNMENT if local in CODES.values() else entry.dtype.itemsize
                if entry.begin % step:
                    raise BadInput(
                        f"{entry.name!r} begins at byte {entry.begin} of {entry.file.name}, which is no multiple of {step}:"
                        f" something rewrote the file; write it again with `aerogel export --layout {self.layout}`"
                    )


def alignment(nbytes: int) -> int:
    """Where a tensor of that size may begin: the largest power of two that divides it, 64 at most."""
    return min(nbytes & -nbytes, ALIGNMENT) if nbytes else 1
