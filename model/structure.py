"""What a checkpoint is made of, discovered from the checkpoint itself and not from a list of architectures.

The model class is built on the meta device (no memory), its parameters are matched with the tensors on disk, and every
tensor gets a role. Blocks are the longest list of modules that holds most of the parameters. A `Matrix` is what stages
work on: one matrix of the checkpoint, [N, K] whichever way it lies on disk, so that each expert of a fused stack and
each transposed Conv1D weight is treated like any other linear.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from aerogel.errors import BadInput
from aerogel.model.naming import Group, group_tensors
from aerogel.model.reader import CheckpointReader
from aerogel.model.source import check_config
from aerogel.pack.modelopt import config_beside

Kind = Literal["Linear", "Conv1D", "Expert", "Embedding"]
EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Matrix:
    """One compressible matrix of the checkpoint, `y = x @ W.T` with W of shape [N, K].

    name: its layer name, the tensor name without `.weight`; experts of a fused stack are `...experts.E.<parameter>`.
    tensor: the tensor on disk; `index` picks the expert where that tensor is a whole stack [E, ., .].
    transposed: True where the disk holds [K, N].
    parameter, expert: the model parameter that runs it, and which slice of it.
    tied: True for an output head that exists only as the embedding; compressing it unties the two.
    """

    name: str
    kind: Kind
    tensor: str
    n: int
    k: int
    block: int | None
    parameter: str
    expert: int | None = None
    index: int | None = None
    transposed: bool = False
    tied: bool = False

    def take(self, tensor: Tensor) -> Tensor:
        """This matrix as [N, K], a view into `tensor` as it lies on disk."""
        part = tensor if self.index is None else tensor[self.index]
        return part.T if self.transposed else part


class Structure:
    """The architecture of a checkpoint on the meta device, its blocks, its matrices and the role of every tensor."""

    def __init__(self, folder: Path, reader: CheckpointReader, model: PreTrainedModel) -> None:
        self.folder, self.reader, self.model = folder, reader, model
        tensors = {e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in reader}
        self.groups, self.unused = group_tensors(model, tensors)
        self.block_names = find_blocks(model)
        self._check_complete()

    @property
    def config(self) -> PreTrainedConfig:
        """The model's config as transformers reads it."""
        return self.model.config

    @cached_property
    def tied(self) -> dict[str, str]:
        """Parameters that are another parameter: {tied name: name of the one that is stored}."""
        return dict(self.model.all_tied_weights_keys or {})

    def _check_complete(self) -> None:
        made = {name for group in self.groups for name in group.outputs}
        absent = sorted(name for name in dict(self.model.named_parameters(remove_duplicate=False)) if name not in made)
        absent = [name for name in absent if self.tied.get(name) not in made and name not in self.tied.values()]
        if absent:
            raise BadInput(
                f"{self.folder} lacks the weight {absent[0]!r} ({len(absent)} missing) that a"
                f" {self.config.model_type} model needs; download the checkpoint again"
            )

    def block_of(self, parameter: str) -> int | None:
        """The block that owns a parameter, or None for embeddings, final norm and head."""
        return next((i for i, name in self._prefixes if parameter.startswith(name)), None)

    @cached_property
    def _prefixes(self) -> list[tuple[int, str]]:
        return [(i, f"{name}.") for i, name in enumerate(self.block_names)]

    def block_groups(self, index: int) -> list[Group]:
        """The groups that make the parameters of block `index`."""
        return self._groups_by_block.get(index, [])

    @cached_property
    def _groups_by_block(self) -> dict[int | None, list[Group]]:
        table: dict[int | None, list[Group]] = {}
        for group in self.groups:
            table.setdefault(self.block_of(group.outputs[0]), []).append(group)
        return table

    @cached_property
    def outer_groups(self) -> list[Group]:
        """The groups outside the blocks: embeddings, final norm, head."""
        return self._groups_by_block.get(None, [])

    @property
    def head(self) -> nn.Module | None:
        """The output head, which turns hidden states into logits."""
        found: nn.Module | None = self.model.get_output_embeddings()  # type: ignore[no-untyped-call, unused-ignore]
        return found

    def is_head(self, matrix: Matrix) -> bool:
        """Whether `matrix` is the weight of the output head, tied or not."""
        module = self.model.get_submodule(matrix.parameter.rpartition(".")[0])
        return module is self.head

    @cached_property
    def matrices(self) -> list[Matrix]:
        """Every matrix that a stage may compress, in checkpoint order, then the tied head if there is one."""
        found = [matrix for group in self.groups for matrix in self._matrices_of(group)]
        for tied, stored in self.tied.items():
            path = tied.removesuffix(".weight")
            source = next((g.sources[0][0] for g in self.groups if stored in g.outputs), None)
            if source is not None and self.model.get_submodule(path) is self.head:
                n, k = self.reader.entry(source).shape
                found.append(Matrix(path, "Linear", source, n, k, None, tied, tied=True))
        return found

    @property
    def modules(self) -> list[tuple[str, str]]:
        """Name and class of every matrix, as recipes match them; the head's class is `lm_head`, whatever its name is."""
        return [(m.name, "lm_head" if self.is_head(m) else m.kind) for m in self.matrices]

    def _matrices_of(self, group: Group) -> list[Matrix]:
        parameter = group.outputs[0]
        path, _, leaf = parameter.rpartition(".")
        module = self.model.get_submodule(path)
        block = self.block_of(parameter)
        value = self.model.get_parameter_or_buffer(parameter)
        if group.converter is None and value.ndim == 2 and leaf == "weight":
            name = group.sources[0][0]
            kind = _kind(module)
            if kind is None:
                return []
            n, k = (value.shape[1], value.shape[0]) if kind == "Conv1D" else value.shape
            return [Matrix(name.removesuffix(".weight"), kind, name, n, k, block, parameter, transposed=kind == "Conv1D")]
        if value.ndim == 3 and "experts" in path.split("."):
            return self._experts_of(group, module, block)
        return []

    def _experts_of(self, group: Group, module: nn.Module, block: int | None) -> list[Matrix]:
        parameter = group.outputs[0]
        found = []
        for name, _ in group.sources:
            shape = self.reader.entry(name).shape
            number = EXPERT.search(name)
            if len(shape) == 2 and number:
                stem = name.removesuffix(".weight")
                found.append(Matrix(stem, "Expert", name, *shape, block, parameter, expert=int(number[1])))
            elif len(shape) == 3:
                transposed = bool(getattr(module, "is_transposed", False))
                n, k = (shape[2], shape[1]) if transposed else shape[1:]
                stem, _, leaf = name.removesuffix(".weight").rpartition(".")
                found += [
                    Matrix(f"{stem}.{e}.{leaf}", "Expert", name, n, k, block, parameter, e, e, transposed)
                    for e in range(shape[0])
                ]
        return found

    def role(self, tensor: str) -> str:
        """What a tensor of the checkpoint is, in a word: linear, expert, embedding, head, norm, router, bias, other."""
        return self._roles.get(tensor, "unused by this architecture")

    @property
    def routers(self) -> list[str]:
        """Names, as matrices have them, of the weights that choose experts: [experts, K], never compressed, and in other
        loaders linears like all others."""
        shapes = {entry.name: entry.shape for entry in self.reader}
        return [
            name.removesuffix(".weight")
            for name, role in self._roles.items()
            if role == "router" and name.endswith(".weight") and len(shapes[name]) == 2
        ]

    @cached_property
    def _roles(self) -> dict[str, str]:
        roles = {name: _plain_role(self.model, group.outputs[0]) for group in self.groups for name, _ in group.sources}
        for matrix in self.matrices:
            if not matrix.tied:
                roles[matrix.tensor] = "head" if self.is_head(matrix) else matrix.kind.lower()
        return roles


def discover(folder: str | Path, *, trust_remote_code: bool = False) -> Structure:
    """Reads headers and config of a local checkpoint and works out its structure; no weights are loaded.

    Raises:
        BadInput: transformers does not know the architecture, it is not a causal language model, it is already
            quantized, or the weights do not fit it.
    """
    folder = Path(folder)
    raw = check_config(folder, trust_remote_code=trust_remote_code)
    if stored := raw.get("quantization_config") or config_beside(folder):
        method = dict(stored).get("quant_method", "?")  # type: ignore[call-overload]
        raise BadInput(
            f"{folder} is already quantized ({method}); start from the dense checkpoint, or make one with"
            " `aerogel export --to dense`"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        raise BadInput(f"transformers knows no model of type {raw['model_type']!r} ({_first_line(error)})") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BadInput(
            f"{folder} is a {config.model_type} model, which is not a causal language model; aerogel compresses text decoders"
        )
    reader = CheckpointReader(folder)
    return Structure(folder, reader, build_on_meta(config))


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """The model class of `config` with every parameter on the meta device, buffers that no checkpoint stores filled in."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call, unused-ignore]
            config, experts_implementation="eager"
        )
    model.train(False)
    model.tie_weights()
    owners = {name.rpartition(".")[0] for name, _ in model.named_non_persistent_buffers()}
    for path in owners:
        module = model.get_submodule(path)
        for leaf in module._non_persistent_buffers_set:
            buffer = module._buffers.get(leaf)
            if buffer is not None and buffer.is_meta:
                module._buffers[leaf] = torch.empty_like(buffer, device="cpu")
        # transformers' own rule recomputes rotary frequencies and the like; parameters stay on meta, so it costs nothing.
        model._init_weights(module)  # type: ignore[no-untyped-call, unused-ignore]
    return model


def find_blocks(model: PreTrainedModel) -> list[str]:
    """Names of the decoder blocks in order: the items of the outermost module list that holds the most parameters.

    Raises:
        BadInput: the model has no such list.
    """
    best, size = "", 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            held = sum(p.numel() for p in module.parameters())
            if held > size:
                best, size = name, held
    if not best:
        raise BadInput(f"a {model.config.model_type} model has no list of blocks; aerogel compresses decoder stacks only")
    return [f"{best}.{i}" for i in range(len(model.get_submodule(best)))]  # type: ignore[arg-type]


def _kind(module: nn.Module) -> Kind | None:
    if isinstance(module, nn.Linear):
        return "Linear"
    if isinstance(module, Conv1D):
        return "Conv1D"
    return "Embedding" if isinstance(module, nn.Embedding) else None


def _plain_role(model: PreTrainedModel, parameter: str) -> str:
    path, _, leaf = parameter.rpartition(".")
    name = type(model.get_submodule(path)).__name__.lower()
    if "norm" in name:
        return "norm"
    if leaf.endswith("bias"):
        return "bias"
    return "router" if "router" in name or path.endswith((".gate", ".router")) else "other"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160]
