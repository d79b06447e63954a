"""transformers' door: a quantization config and a quantizer named `losparse`; idempotent register().

transformers builds the model, this quantizer swaps each layer that `config.json` names for a
LowRankSparseLinear, and transformers' own loader fills in the tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .layouts import FORMAT_VERSION, LayerSpec
from .linear import LowRankSparseLinear

METHOD = "losparse"


class LosparseQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a compressed checkpoint.

    modules: module name -> the fields of LayerSpec. skipped: module name -> why it stayed dense.
    Unknown keys are kept. ValueError if the format version is newer than this code.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        skipped: dict[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        self.quant_method = METHOD
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has losparse format version {format_version}; this code reads version "
                f"{FORMAT_VERSION}. Install a losparse that reads it: pip install --upgrade losparse"
            )
        self.format_version = format_version
        self.modules = modules or {}
        self.skipped = skipped or {}
        unknown.pop("quant_method", None)
        for key, value in unknown.items():
            setattr(self, key, value)

    def specs(self) -> dict[str, LayerSpec]:
        """Module name -> LayerSpec; ValueError names the first entry that is wrong."""
        return {name: LayerSpec.from_dict(fields) for name, fields in self.modules.items()}


class LosparseQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps the recorded layers in, before transformers loads the weights."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        install_layers(model, self.quantization_config.specs())

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # The parameters are ordinary floating tensors: .half(), .to(dtype) and Trainer work on them, and
        # refuse models that say they are quantized. Saving goes through `model.hf_quantizer` regardless.
        model.is_quantized = False
        return model

    def get_weight_conversions(self) -> list[Any]:
        return []

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def install_layers(model: Any, specs: dict[str, LayerSpec]) -> list[str]:
    """Replace each named linear layer of `model` by an empty LowRankSparseLinear; returns their names.

    A checkpoint may be loaded under another head, so names are tried with and without the base model's
    prefix. Names that this head does not have are left out; ValueError if none is found, or if a layer's
    shape is not the recorded one.
    """
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    installed = []
    for recorded, spec in specs.items():
        name = _find(model, recorded, prefix)
        if name is None:
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        dense = parent.get_submodule(name.rpartition(".")[2])
        rows, columns = dense.weight.shape
        shape = (columns, rows) if type(dense).__name__ == "Conv1D" else (rows, columns)
        if shape != tuple(spec.shape):
            raise ValueError(
                f"Layer {name} is {shape} (out, in) in {type(model).__name__} and {tuple(spec.shape)} in the "
                "checkpoint: config.json and the model class do not belong together."
            )
        layer = LowRankSparseLinear(
            spec, bias=dense.bias is not None, device=dense.weight.device, dtype=dense.weight.dtype
        )
        setattr(parent, name.rpartition(".")[2], layer.train(dense.training))
        installed.append(name)
    if specs and not installed:
        raise ValueError(
            f"None of the {len(specs)} compressed layers of this checkpoint exists in {type(model).__name__} "
            f"(the first is {next(iter(specs))!r}): load it with the model class it was made for."
        )
    return installed


def _find(model: Any, recorded: str, prefix: str) -> str | None:
    for name in (recorded, prefix + recorded, recorded.removeprefix(prefix)):
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.dim() == 2:
            return name
    return None


def register() -> None:
    """Make transformers read losparse checkpoints; safe to call again, from here or from a shipped copy."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(LosparseQuantizationConfig)
        register_quantizer(METHOD)(LosparseQuantizer)


class LosparseConfig(PretrainedConfig):  # type: ignore[misc]
    """What `auto_map` names in a checkpoint: importing it registers the quantizer above.

    Its `from_pretrained` returns the model's own configuration, so nothing else about loading changes.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("trust_remote_code", None)
        kwargs.pop("_from_auto", None)
        kwargs.pop("name_or_path", None)
        return AutoConfig.from_pretrained(*args, trust_remote_code=False, **kwargs)


register()
