"""aerogel's entry in transformers' tables of quantizers.

This module is imported while transformers is still importing itself (see `register.py`), so at the top it takes only what
is loaded by then: the base classes. What needs models is imported where it is used.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from aerogel.errors import BadInput, RunFailed
from aerogel.pack.scheme import NotServed
from aerogel.pack.source import Source, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from aerogel.model.decoder import Decoder

logger = logging.getLogger(__name__)

TABLES = "transformers.quantizers.auto"
STOCK: dict[str, tuple[str, str]] = {
    "compressed-tensors": ("CompressedTensorsConfig", "CompressedTensorsHfQuantizer"),
    "gptq": ("GPTQConfig", "GptqHfQuantizer"),
    "awq": ("AwqConfig", "AwqQuantizer"),
    "auto-round": ("AutoRoundConfig", "AutoRoundQuantizer"),
    "bitnet": ("BitNetQuantConfig", "BitNetHfQuantizer"),
    "hqq": ("HqqConfig", "HqqHfQuantizer"),
    "mxfp4": ("Mxfp4Config", "Mxfp4HfQuantizer"),
}
"""transformers' own config and quantizer classes, by `quant_method`: names in `transformers.quantizers.auto`."""
METHODS = (*STOCK, "modelopt", "aerogel")
FIRST_TOKENS = (1, 512)
"""Numbers of tokens whose kernels are compiled while a model is loaded: a step of decoding, and a prompt."""
UNREAD = (r"\.weight_packed_\d$", r"\.weight_scale_\d$", r"\.[kv]_scale$", r"[._]input_scale$")
"""Names of bit planes, and of scales of a cache and of inputs: transformers need not wonder about them when a model is loaded
without the last planes, or rounds no cache and no inputs, of which the source of the checkpoint speaks."""


def register() -> None:
    """Makes `from_pretrained` use aerogel for the methods in `METHODS`. Doing it again changes nothing."""
    tables = import_module(TABLES)
    for method in METHODS:
        tables.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = AerogelConfig
        tables.AUTO_QUANTIZER_MAPPING[method] = AerogelQuantizer


class AerogelConfig(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
    """A `quantization_config` that aerogel's kernels run, kept word for word."""

    def __init__(self, **raw: Any) -> None:
        self.raw = raw
        self.quant_method = raw.get("quant_method", "aerogel")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """This config, or transformers' own class for what aerogel does not run.

        Raises:
            BadInput: aerogel does not run it and transformers' own loader is not installed.
        """
        try:
            open_source(config_dict)
        except NotServed as refusal:
            stock = _stock_config(config_dict, refusal)
            return (stock, kwargs) if return_unused_kwargs else stock
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The JSON values it came from."""
        return deepcopy(self.raw)


def _stock_config(raw: dict[str, Any], refusal: NotServed) -> Any:
    method = str(raw.get("quant_method"))
    if method not in STOCK:
        raise refusal
    logger.warning("%s; loading with transformers' own %s loader instead", refusal, method)
    try:
        return getattr(import_module(TABLES), STOCK[method][0]).from_dict(raw)
    except ImportError as error:
        raise BadInput(f"{refusal}, and transformers' own loader for it is missing ({first_line(error)})") from error


class AerogelQuantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """The HfQuantizer behind `from_pretrained`; gives way to the stock one for configs that are not an `AerogelConfig`."""

    requires_calibration = True

    def __new__(cls, quantization_config: Any, **kwargs: Any) -> Any:
        """Transformers' own quantizer where the config is transformers' own."""
        if isinstance(quantization_config, AerogelConfig):
            return super().__new__(cls)
        method = getattr(quantization_config.quant_method, "value", quantization_config.quant_method)
        try:
            return getattr(import_module(TABLES), STOCK[method][1])(quantization_config, **kwargs)
        except ImportError as error:
            raise BadInput(f"transformers' own {method} loader is needed here and missing ({first_line(error)})") from error

    def __init__(self, quantization_config: AerogelConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.source: Source = open_source(quantization_config.raw)
        self.decoder: Decoder | None = None
        self._groups: list[list[str]] | None = None
        self._compiling: Thread | None = None

    def preprocess_model(self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        """As the base class does it, with the names on disk known before modules are patched."""
        files = kwargs.get("checkpoint_files")
        if not files or not all(str(file).endswith(".safetensors") for file in files):
            raise BadInput("a packed checkpoint must be safetensors files; convert it, pickled weights are not read")
        from aerogel.model.decoder import read_headers
        from aerogel.model.native import Native

        self.header = read_headers([Path(file) for file in files])
        if isinstance(self.source, Native):
            self.source.check_places(self.header)
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        """Unfuses Llama 4's experts for checkpoints that hold them apart; the stacks we store keep their own class."""
        if not any(".gate_up_proj.weight_" in name or name.endswith(".gate_up_proj_weight_scale") for name in self.header):
            super()._convert_model_for_quantization(model)  # type: ignore[no-untyped-call, unused-ignore]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Replaces every linear that stays packed, and keeps the plan for the weights."""
        from aerogel.model.decoder import Decoder, pack_experts, read_entry, replace_linear
        from aerogel.model.placement import Placement, make_plan
        from aerogel.model.reader import Entry
        from aerogel.quantize.sidecars import NAMES as SIDECARS

        plan = make_plan(model, self.header, self.source, lambda name: read_entry(self.header[name]))

        def beside(item: Placement) -> dict[str, Entry]:
            return {local: self.header[name] for local, name in item.tensors.items() if local in SIDECARS}

        for item in plan.packed():
            replace_linear(model, item, f"{item.name}.bias" in self.header, beside(item))
        for parameter, stack in plan.stacks.items():
            pack_experts(model, parameter, stack, [(item, beside(item)) for item in plan.placements[parameter]])
        for name, reason in plan.unpacked.items():
            logger.warning("the experts of %s are decoded into dense weights: %s", name, reason)
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *UNREAD}
        for name in plan.homeless:
            logger.warning("%s is packed in the checkpoint, but the model has no place for it", name)
        self.decoder = Decoder(plan, self.source)
        self._compile_meanwhile(model, kwargs.get("device_map"))

    def _compile_meanwhile(self, model: PreTrainedModel, device_map: Any) -> None:
        """Begins to compile, where the whole model goes to one NVIDIA GPU."""
        from aerogel.kernels import ahead
        from aerogel.kernels.decode.merge import merging_wanted, siblings

        devices = set(device_map.values()) - {"disk"} if isinstance(device_map, dict) else set()
        device = torch.device(devices.pop()) if len(devices) == 1 else torch.device("cpu")
        if device.type != "cuda":
            return
        try:
            self._groups = siblings(model) if merging_wanted() else []
        except Exception as error:  # whatever its code does with values that are not there
            logger.info("kernels are compiled behind the reading: the model does not run on meta tensors (%s)", error)
            return
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        # While it loads a model transformers makes all tensors on the meta device, tables of numbers would be too.
        with torch.device("cpu"):
            self._compiling = ahead.begin(ahead.problems_of(model, self._groups, device), device, FIRST_TOKENS)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel | None = None) -> list[Any]:
        """Transformers' rules for plain tensors, ours for those of packed weights."""
        from transformers.core_model_loading import WeightRenaming

        from aerogel.model.decoder import PlainNames

        if self.decoder is None:
            return weight_conversions
        renamings = [rule for rule in weight_conversions if isinstance(rule, WeightRenaming)]
        others = [rule for rule in weight_conversions if not isinstance(rule, WeightRenaming)]
        return [PlainNames(renamings, self.decoder.targets), self.decoder, *others]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Packed tensors come as they are on disk."""
        from aerogel.model.decoder import Decoder

        if isinstance(converter, Decoder):
            return None
        inherited: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return inherited

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Checks that every packed weight arrived, then lets each layer choose its kernel."""
        from aerogel.kernels.ahead import compile_ahead
        from aerogel.kernels.decode.merge import merge, merging_wanted
        from aerogel.kernels.experts import ExpertLinear
        from aerogel.kernels.linear import Linear

        absent = self.decoder.absent() if self.decoder else []
        if absent:
            raise RunFailed(f"{absent[0]} was not loaded ({len(absent)} packed weights); load without key_mapping, state_dict")
        if merging_wanted():
            merge(model, self._groups)
        for module in model.modules():
            if not isinstance(module, Linear | ExpertLinear) or module.device.type == "meta" or module.kernel_name is not None:
                continue
            if isinstance(module, Linear):
                module.prepare(overwrite=True)  # nobody else has seen these tensors yet
            else:
                module.prepare()
        _say_conversions(model)
        _say_missing_kernels(model)
        if self._compiling is not None:
            self._compiling.join()
            self._compiling = None  # the model keeps its quantizer, and a thread can neither be copied nor stored
        compile_ahead(model, FIRST_TOKENS)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Dense linears and experts in the place of packed ones."""
        from aerogel.kernels.experts import PackedExperts, unpack_experts
        from aerogel.kernels.linear import Linear

        experts: list[str] = []
        for name, module in list(model.named_modules()):
            if name.startswith(tuple(experts)):
                continue
            if isinstance(module, Linear):
                dense = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
                dense.weight = torch.nn.Parameter(module.dequantize(dtype), requires_grad=False)
                if module.bias is not None:
                    dense.bias = torch.nn.Parameter(module.bias.data.to(dtype))
                model.set_submodule(name, dense)
            elif isinstance(module, PackedExperts):
                unpack_experts(module, dtype)
                experts.append(f"{name}.")
        return model

    def is_serializable(self) -> bool:
        """No: the files are the model already; copy them, or export."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Kernels have no backward pass."""
        return False


def _say_conversions(model: PreTrainedModel) -> None:
    """A warning where a native checkpoint was made for other kernels than those that run it here."""
    from aerogel.kernels.linear import Linear

    linears = [module for module in model.modules() if isinstance(module, Linear) and module.layout and module.held()]
    foreign = [module for module in linears if not module.runs_as_stored]
    if foreign:
        logger.warning(
            "the checkpoint is %s, and %d of its weights were converted for the kernel '%s'; `aerogel export` with"
            " `--layout portable` and then `--layout native`, on this machine, writes one that needs no conversion",
            foreign[0].layout,
            len(foreign),
            foreign[0].kernel_name,
        )


def _say_missing_kernels(model: PreTrainedModel) -> None:
    """A warning where packed weights run on a CPU without the compiled kernels."""
    from aerogel.kernels.native import library
    from aerogel.kernels.packed import Packed

    if any(isinstance(module, Packed) and module.device.type == "cpu" for module in model.modules()):
        library.say_missing()


def first_line(error: Exception) -> str:
    """The first line of an error's message, for errors that carry whole paragraphs."""
    return str(error).strip().split("\n")[0][:200]
