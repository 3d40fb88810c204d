"""Loads packed Llamas for decoding on a CPU without transformers' modules: config and tensors straight into `Direct`.

A checkpoint is served where everything that its config and its files say is known here: one of the architectures of
`FAMILIES`, plain rotations, and every linear in a format that the compiled CPU kernels run. Anything else is refused with the
reason, and read through transformers instead (`model/loading.py`): a setting that is not understood is not ignored.

Shape legend: N out features, K in features, D size of a head, H query heads, J key/value heads.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from aerogel.errors import BadInput
from aerogel.kernels.decode.direct import Block, DenseHead, Direct, Sizes
from aerogel.kernels.decode.merge import Merged, whole_of
from aerogel.kernels.decode.merge_beside import MergedBeside, tensors_beside
from aerogel.kernels.decode.operations import KERNELS
from aerogel.kernels.embedding import PackedEmbedding
from aerogel.kernels.linear import Linear, stored_shapes
from aerogel.kernels.native import library
from aerogel.kernels.sidecars import SidecarLinear
from aerogel.model.native import Native as NativeSource
from aerogel.model.reader import CheckpointReader
from aerogel.model.source import check_config
from aerogel.model.stored_bits import bits_wanted
from aerogel.pack.scheme import NotServed
from aerogel.pack.source import Source, open_source
from aerogel.quantize import sidecars

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""`model_type` to the one class of each that has a language model's head."""
KNOWN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, 1.0, None),
}
"""Settings that change what is computed, and the values of them that are served."""
HARMLESS = frozenset(
    {
        *("architectures", "auto_map", "dtype", "model_type", "quantization_config", "torch_dtype", "transformers_version"),
        *(
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "sep_token_id",
            "unk_token_id",
            "transformers.js_config",
            "use_cache",
        ),
        *("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings", "initializer_range"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "attention_dropout", "mlp_bias"),
        *("max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta", "rope_interleaved", "is_llama_config"),
        *("layer_types", "max_window_layers", "rms_norm_eps"),
    }
)
"""Settings that are read here, or change nothing of what is computed. Biases are those that the file has."""
MOST_HEAD, MOST_SHARE = 512, 64
"""The largest size of a head, and the most query heads for one key: of the compiled attention."""


class NotDirect(Exception):  # noqa: N818  (not an error of the run: the model is then loaded another way)
    """Why a checkpoint is not served here."""


def load_to_decode(
    path: str | Path,
    *,
    loop: str = "auto",
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    merge: bool = True,
    bits: int | None = None,
) -> Direct | PreTrainedModel:
    """A checkpoint for `kernels.decode.Decoder`: as a `Direct` model where that serves it, else as `model.loading.load` does.

    Args:
        loop: of the decoder; other loops than "auto" and "direct" are those of transformers' models.
        path, device, dtype, merge, bits: as of `load`.

    Returns:
        The model, whose attribute `not_direct` says why where it is one of transformers'.

    Raises:
        BadInput: as `load`; or loop "direct" where the model is not served that way.
    """
    bits = bits_wanted() if bits is None else bits
    try:
        if loop not in ("auto", "direct"):
            raise NotDirect(f"the loop is {loop}")
        if torch.device(device).type != "cpu" or not merge or bits is not None:
            raise NotDirect("it runs on the CPU, with merged linears and all bits")
        return load(Path(path), dtype)
    except NotDirect as refusal:
        if loop == "direct":
            raise BadInput(f"loop direct cannot run this model ({refusal}); write loop auto") from refusal
        from aerogel.model.loading import load as load_model

        logger.info("not loaded directly: %s", refusal)
        model = load_model(path, device=device, dtype=dtype, merge=merge, bits=bits)
        model.not_direct = str(refusal)  # type: ignore[assignment]
        return model


def load(folder: Path, dtype: torch.dtype | None = None) -> Direct:
    """The model of a packed checkpoint.

    Args:
        folder: of config.json and safetensors files; native layouts are mapped, others are converted.
        dtype: of activations; the checkpoint's own unless given.

    Raises:
        NotDirect: something about it is not served here.
        BadInput: a damaged checkpoint.
    """
    lacking = library.missing()
    if lacking is not None:
        raise NotDirect(f"the compiled CPU library {lacking}")
    if not (folder / "config.json").is_file():
        raise NotDirect("it is no folder of a checkpoint")
    config = check_config(folder)
    _check(config)
    return _Checkpoint(folder, config, dtype or _dtype(config)).model()


def _check(config: Mapping[str, Any]) -> None:
    kind = config["model_type"]
    if kind not in FAMILIES or config.get("architectures") != [FAMILIES[kind]]:
        raise NotDirect(f"it is a {kind} as {config.get('architectures')}; served are {', '.join(FAMILIES.values())}")
    if not config.get("quantization_config"):
        raise NotDirect("it is not packed")
    windowed = config.get("use_sliding_window") is not False
    for name, value in config.items():
        if name in KNOWN and value not in KNOWN[name] and (windowed or name != "sliding_window"):
            raise NotDirect(f"{name} is {value!r}")
        if name not in KNOWN and name not in HARMLESS and not name.startswith("_"):
            raise NotDirect(f"its config has a setting {name!r} that is not known here")
    if set(config.get("layer_types") or ()) - {"full_attention"} or config.get("rope_interleaved"):
        raise NotDirect("its layers differ from a Llama's")


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    found = getattr(torch, str(name), None)
    if found not in library.TYPES:
        raise NotDirect(f"its dtype is {name}")
    return found  # type: ignore[no-any-return]


def frequencies(config: Mapping[str, Any], D: int) -> Tensor:
    """Radians per token of each pair of a head, float32 [D / 2]: RoPE (Su et al. 2021), with Llama 3's stretching of slow ones.

    Raises:
        NotDirect: another kind of rotation.
    """
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = given.get("rope_type") or given.get("type") or "default"
    if any("attention" in str(name) for name in given) or given.get("partial_rotary_factor", 1.0) != 1.0:
        raise NotDirect("its rotation is not that of a Llama")
    theta = float(given.get("rope_theta") or config.get("rope_theta") or 10000.0)
    plain = 1.0 / (theta ** (torch.arange(0, D, 2, dtype=torch.float) / D))
    if kind == "default":
        return plain
    if kind == "linear":
        return plain / float(given["factor"])
    if kind != "llama3":
        raise NotDirect(f"its rotation is of the type {kind}")
    factor, low, high = (float(given[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    length = float(given["original_max_position_embeddings"])
    turns = length * plain / (2 * math.pi)  # within the length it was trained on
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * plain / factor + share * plain


class _Checkpoint:
    """The tensors of one checkpoint and what is made of them. `left` holds the names that nobody has asked for."""

    def __init__(self, folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.folder, self.config, self.dtype = folder, config, dtype
        self.entries = CheckpointReader(folder).entries
        try:
            self.source: Source = open_source(config["quantization_config"])
        except NotServed as refusal:
            raise NotDirect(str(refusal)) from refusal
        if isinstance(self.source, NativeSource):
            self.source.check_places(self.entries)
        self.groups = self.source.groups(self.entries)
        self.left = set(self.entries)
        self.files = {file: safe_open(file, framework="pt") for file in {entry.file for entry in self.entries.values()}}

    def model(self) -> Direct:
        """All of it."""
        c = self.config
        N, inner, H = (int(c[name]) for name in ("hidden_size", "intermediate_size", "num_attention_heads"))
        J, D = int(c.get("num_key_value_heads") or H), int(c.get("head_dim") or N // H)
        if H % J or H // J > MOST_SHARE or D > MOST_HEAD or D % 2:
            raise NotDirect(f"{H} heads of {D} over {J} keys are not compiled")
        blocks = []
        for index in range(int(c["num_hidden_layers"])):
            at = f"model.layers.{index}."
            own = f"{at}self_attn."
            qkv = [self.packed(f"{own}{name}_proj", rows * D, N) for name, rows in (("q", H), ("k", J), ("v", J))]
            both = [self.packed(f"{at}mlp.{name}_proj", inner, N) for name in ("gate", "up")]
            out, down = self.packed(f"{own}o_proj", N, H * D), self.packed(f"{at}mlp.down_proj", N, inner)
            norms = self.norm(f"{at}input_layernorm", N), self.norm(f"{at}post_attention_layernorm", N)
            blocks.append(Block(_merged(qkv), _ready(out), _merged(both), _ready(down), norms))
        norm = self.norm("model.norm", N)
        embedding, head = self.ends(int(c["vocab_size"]), N)
        if self.left:
            raise NotDirect(f"it has a tensor {min(self.left)!r} that a Llama has no place for")
        epsilon = float(c.get("rms_norm_eps") or 1e-6)
        sizes = Sizes(queries=H, heads=J, head_size=D, epsilon=epsilon, frequencies=frequencies(c, D))
        return Direct(SimpleNamespace(**c), self.generation(), sizes, embedding, blocks, norm, head)

    def generation(self) -> SimpleNamespace:
        """What generation_config.json says."""
        file = self.folder / "generation_config.json"
        return SimpleNamespace(**(json.loads(file.read_text("utf-8")) if file.is_file() else {}))

    def ends(self, V: int, N: int) -> tuple[PackedEmbedding | nn.Embedding, Linear | DenseHead]:
        """Embedding and head, which may be one weight."""
        table, last = "model.embed_tokens", "lm_head"
        if self.config.get("tie_word_embeddings"):
            if table in self.groups:
                head = _ready(self.packed(table, V, N))
                return PackedEmbedding(head), head
            weight = self.dense(f"{table}.weight", V, N)
            return _table(weight), DenseHead(weight)
        if table in self.groups:
            raise NotDirect("its embedding is packed alone")
        embedding = _table(self.dense(f"{table}.weight", V, N))
        if last in self.groups:
            return embedding, _ready(self.packed(last, V, N))
        return embedding, DenseHead(self.dense(f"{last}.weight", V, N))

    def norm(self, name: str, N: int) -> Tensor:
        """The weight of a norm."""
        return self.dense(f"{name}.weight", N)

    def dense(self, name: str, *shape: int) -> Tensor:
        """A tensor in the dtype of activations. Raises NotDirect where it is not there, BadInput for another shape."""
        if name not in self.entries:
            raise NotDirect(f"it has no dense {name}")
        entry = self.entries[name]
        if entry.shape != shape:
            raise BadInput(f"{name} is {list(entry.shape)}, config.json wants {list(shape)}; get the checkpoint again")
        return self.take(name).to(self.dtype)

    def take(self, name: str) -> Tensor:
        """A tensor as it lies in the file, mapped."""
        self.left.discard(name)
        file: Any = self.files[self.entries[name].file]
        tensor: Tensor = file.get_tensor(name)
        return tensor

    def packed(self, name: str, N: int, K: int) -> Linear:
        """The linear [N, K] of a packed weight, as it is stored, with what stands beside it."""
        if name not in self.groups:
            raise NotDirect(f"{name} is not packed")
        entries = {local: self.entries[tensor] for local, tensor in self.groups[name].items()}
        scheme = self.source.scheme_of((name,), entries, ("Linear",))
        wanted = stored_shapes(scheme, N, K)
        tensors = {local: self.take(tensor) for local, tensor in self.groups[name].items()}
        beside = {local: tensors.pop(local) for local in sidecars.NAMES if local in tensors}
        sidecars.read(beside, N, K, name)  # refuses damage
        if {local: (tuple(tensor.shape), tensor.dtype) for local, tensor in tensors.items()} != wanted:
            raise NotDirect(f"{name} is stored with more or other tensors than its format's")
        bias = self.dense(f"{name}.bias", N) if f"{name}.bias" in self.entries else None
        options: dict[str, Any] = {"bias": bias is not None, "dtype": self.dtype, "device": "meta"}
        layer = SidecarLinear(K, N, scheme, beside=beside, **options) if beside else Linear(K, N, scheme, **options)
        layer.fill(tensors)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer


def _merged(parts: Sequence[Linear]) -> Linear:
    first = parts[0]
    if any(part.scheme != first.scheme or (part.bias is None) != (first.bias is None) for part in parts):
        raise NotDirect("linears that read the same input differ in format")
    beside = tensors_beside(parts)
    whole = None if beside is None else whole_of(parts, MergedBeside if beside else Merged)
    if whole is None:
        raise NotDirect("linears that read the same input cannot be merged")
    if isinstance(whole, MergedBeside):
        whole.keep(beside or {})
    return _served(whole)


def _ready(layer: Linear) -> Linear:
    return _served(layer.prepare())


def _served(layer: Linear) -> Linear:
    if not issubclass(layer._kernel, KERNELS):
        raise NotDirect(f"a weight [{layer.out_features}, {layer.in_features}] is run by the kernel '{layer.kernel_name}'")
    if isinstance(layer, SidecarLinear) and layer.added_by_kernel() is None:
        raise NotDirect(f"what stands beside a weight [{layer.out_features}, {layer.in_features}] is not compiled")
    return layer


def _table(weight_VN: Tensor) -> nn.Embedding:
    V, N = weight_VN.shape
    return nn.Embedding(V, N, _weight=weight_VN, _freeze=True)
