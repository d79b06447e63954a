"""transformers' door: a quantization config and a quantizer named `losparse`; idempotent register().

transformers builds the model, this quantizer swaps each layer that `config.json` names for a
LowRankSparseLinear or a CodedEmbedding, and transformers' own loader fills in the tensors.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .embedding import CodedEmbedding, refuse_to_resize
from .experts import as_if_fused, fused_experts, split_experts, without_merging
from .layouts import FORMAT_VERSION, LayerSpec
from .linear import LowRankSparseLinear
from .loader import write_loader
from .stored import StoredIndex

METHOD = "losparse"
PAGE = mmap.PAGESIZE
PAGE_OUT = 21
"""Linux's MADV_PAGEOUT, which loses nothing."""
KEPT_BYTES = 1 << 26
"""Of indices that were replaced, before their memory is given back to the system."""


class LosparseQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a compressed checkpoint.

    modules: module name -> the fields of LayerSpec. skipped: module name -> why it stayed dense. fused: tensor that
    holds a matrix of all experts in the dense checkpoint -> what became of it, in `module`, `matrix`, `count` and
    `transposed`. Unknown keys are kept. ValueError if the format version is newer than this code.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        skipped: dict[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        fused: dict[str, dict[str, Any]] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = METHOD
        if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has losparse format version {format_version}; this code reads versions up to "
                f"{FORMAT_VERSION}. Install a losparse that reads it: pip install --upgrade losparse"
            )
        self.format_version = format_version
        self.modules = modules or {}
        self.skipped = skipped or {}
        if fused:
            self.fused = fused
        unknown.pop("quant_method", None)
        for key, value in unknown.items():
            setattr(self, key, value)

    def specs(self) -> dict[str, LayerSpec]:
        """Module name -> LayerSpec; ValueError names the first layer whose entry is wrong."""
        specs = {}
        for name, fields in self.modules.items():
            try:
                specs[name] = LayerSpec.from_dict(fields)
            except ValueError as error:
                raise ValueError(f"config.json, compressed layer {name}: {error}") from error
        return specs


class LosparseQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps the recorded layers in, before transformers loads the weights."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._loading = model
        specs = self.quantization_config.specs()
        fused = getattr(self.quantization_config, "fused", {})
        split_if_compressed(model, specs, fused)
        installed = install_layers(model, specs)
        # Under another head layers carry other names, or are not there: what is saved must say what it holds.
        recorded, prefix = self.quantization_config.modules, _prefix(model)
        self.quantization_config.modules = {
            name: _renamed(recorded[source], source, name, prefix) for name, source in installed.items()
        }
        if fused:
            self.quantization_config.fused = _fused_renamed(fused, installed, prefix)
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        # Between this and the next step transformers initializes what no file holds, by the model's own code.
        model.initialize_weights = lambda: _initialize_the_rest(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        vars(model).pop("initialize_weights", None)
        del self._loading
        for name in self.quantization_config.modules:
            _require_loaded(name, model.get_submodule(name))
        _cast_as_asked(model, self._dtypes)
        memory = _Memory()
        for name in self.quantization_config.modules:
            layer = model.get_submodule(name)
            try:
                layer.settle(memory.done_with)
            except ValueError as error:
                what = "codes" if layer.spec.layout == "codes" else "index"
                raise ValueError(f"The {what} of layer {name} cannot be read: {error}. Download it again.") from error
        memory.give_back()
        # The parameters are ordinary floating tensors: .half(), .to(dtype) and Trainer work on them, and
        # refuse models that say they are quantized. Saving goes through `model.hf_quantizer` regardless.
        model.is_quantized = False
        # transformers saves the code of custom models and configs, and this is neither. A pickle turns a bound
        # method back into the class's own.
        model.save_pretrained = partial(save_pretrained, model)
        if any(isinstance(module, CodedEmbedding) for module in model.modules()):
            model.resize_token_embeddings = partial(refuse_to_resize, model)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        # Before 5.23 transformers does not say of which model; it asks between the two steps above alone.
        return without_merging(weight_conversions, vars(self).get("_loading", model))

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _Memory:
    """What indices took that were replaced, given back to the system."""

    def __init__(self) -> None:
        self._bytes = 0
        try:
            self._libc: Any = ctypes.CDLL(None)
        except (OSError, TypeError):
            self._libc = None

    def done_with(self, index: torch.Tensor) -> None:
        """Nobody is going to read it soon: pages of a mapped file leave memory, and come back if somebody does."""
        if index.device.type != "cpu":
            return
        begin = -(-index.data_ptr() // PAGE) * PAGE
        length = (index.data_ptr() + index.numel()) // PAGE * PAGE - begin
        if length > 0:
            self._call("madvise", ctypes.c_void_p(begin), ctypes.c_size_t(length), PAGE_OUT)
        self._bytes += index.numel()
        if self._bytes > KEPT_BYTES:
            self.give_back()

    def give_back(self) -> None:
        """What is free already the C library would keep for later."""
        self._bytes = 0
        self._call("malloc_trim", 0)

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._libc, name, None)
        if function is not None:  # elsewhere it stays as it is
            function(*arguments)


def _initialize_the_rest(model: Any) -> None:
    """transformers' `initialize_weights`, while dense layers without weights stand in place of ours.

    That code may ask a layer's weight for its shape from wherever it likes (Blt's does); ours has only one dimension.
    """
    every = dict(model.named_modules(remove_duplicate=False))
    ours = {name: layer for name, layer in every.items() if isinstance(layer, StoredIndex)}
    try:
        for name, layer in ours.items():
            dense: torch.nn.Module
            if not isinstance(layer, CodedEmbedding):
                bias = getattr(layer, "bias", None) is not None
                dense = torch.nn.Linear(layer.spec.shape[1], layer.spec.shape[0], bias, device="meta")
            elif not layer.holds_more:
                dense = torch.nn.Embedding(*layer.spec.shape, device="meta")
            else:
                continue  # that code fills what it holds beside its rows
            model.set_submodule(name, dense)
        with as_if_fused(model):
            type(model).initialize_weights(model)
    finally:
        for name, layer in ours.items():
            model.set_submodule(name, layer)


def _require_loaded(name: str, layer: StoredIndex) -> None:
    """ValueError if a tensor of the layer was missing from the weights, or has another shape than recorded.

    transformers only warns of the first, and computes with whatever lay in memory; 5.15 lets the second
    pass in every quantized model.
    """
    for suffix, (shape, dtype) in layer.spec.tensor_shapes(torch.float32).items():
        tensor = getattr(layer, suffix)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}.{suffix} has shape {tuple(tensor.shape)} in the weights and {shape} in config.json: they do "
                "not belong together. Download or compress the checkpoint again."
            )
        # The mark that transformers leaves on what it read; what is offloaded is never missing, and not marked.
        read = tensor.is_meta or getattr(tensor, "_is_hf_initialized", False)
        # Other missing indices betray themselves when they are checked.
        if (dtype.is_floating_point or suffix in ("S_scale", "S_runs")) and not read:
            raise ValueError(f"The weights hold no {name}.{suffix}. Download or compress the checkpoint again.")


def _cast_as_asked(model: Any, dtypes: dict[str, torch.dtype]) -> None:
    """Give each parameter the dtype that the model was built with, as `from_pretrained(dtype=...)` asks.

    transformers 5.15 leaves tensors of quantized models that it renames in the dtype on disk.
    """
    half = (torch.float16, torch.bfloat16)
    for name, parameter in model.named_parameters():
        dtype = dtypes.get(name, parameter.dtype)
        kept = (getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype in half else ()
        kept = [*kept, *((getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ())]
        if any(re.search(pattern.replace("*", ".*"), name) for pattern in kept):
            dtype = torch.float32
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def save_pretrained(model: Any, save_directory: Any, *args: Any, push_to_hub: bool = False, **options: Any) -> None:
    """transformers' save_pretrained, then the loader beside the weights, without which nobody could read them."""
    hub = {k: options.pop(k) for k in ("repo_id", "private", "commit_message", "create_pr") if k in options}
    type(model).save_pretrained(model, save_directory, *args, **options)
    write_loader(Path(save_directory))
    if push_to_hub:  # transformers would upload before the loader is there
        repository = hub.pop("repo_id", Path(save_directory).name)
        model.push_to_hub(repository, token=options.get("token"), **hub)


def install_layers(model: Any, specs: dict[str, LayerSpec]) -> dict[str, str]:
    """Replace each named layer of `model` by an empty one of ours; its name here -> in `specs`.

    A checkpoint may be loaded under another head, so names are tried with and without the base model's
    prefix, and as transformers renames the weight on disk: a text model inside a larger one has other names alone.
    Names that this head does not have are left out. What is tied to an embedding computes with its codes. ValueError if
    no layer is found, or if one's shape or class is not what was recorded.
    """
    renaming = _Renaming(model)
    installed: dict[str, str] = {}
    for recorded, spec in specs.items():
        name = _find(model, renaming.tries(recorded, spec.tensor or recorded))
        if name is None:
            continue
        dense = model.get_submodule(name)
        rows, columns = dense.weight.shape
        shape = (columns, rows) if type(dense).__name__ == "Conv1D" else (rows, columns)
        if shape != tuple(spec.shape):
            raise ValueError(
                f"Layer {name} is {shape} (out, in) in {type(model).__name__} and {tuple(spec.shape)} in the "
                "checkpoint: config.json and the model class do not belong together."
            )
        twins = _tied_to(model, name) if spec.kind == "embedding" else ()
        layer = _install(model, name, spec)
        for twin in twins:
            _install(model, twin, spec, layer)
        installed[name] = recorded
    if specs and not installed:
        raise ValueError(
            f"None of the {len(specs)} compressed layers of this checkpoint exists in {type(model).__name__} "
            f"(the first is {next(iter(specs))!r}): load it with the model class it was made for."
        )
    return installed


def split_if_compressed(model: Any, specs: dict[str, LayerSpec], together: Iterable[str] = ()) -> None:
    """Split the experts that transformers fuses, all of them, if any of their matrices is a compressed layer.

    together: tensors that hold a matrix of all experts in the dense checkpoint.
    """
    fused = fused_experts(model, together)
    if not fused:
        return
    renaming = _Renaming(model)
    for recorded, spec in specs.items():
        if any(name.rsplit(".", 2)[0] in fused for name in renaming.tries(recorded, spec.tensor or recorded)):
            split_experts(model, fused)
            return


def _install(model: Any, name: str, spec: LayerSpec, owner: StoredIndex | None = None) -> StoredIndex:
    """Put a layer of ours in the place of the dense one called `name`; an owner is what that one is tied to."""
    dense = model.get_submodule(name)
    layer: StoredIndex
    if isinstance(dense, torch.nn.Embedding) and spec.kind == "embedding":
        layer = CodedEmbedding.replacing(dense, spec, owner)
    elif spec.kind == "embedding" and (owner is None or type(dense) is not torch.nn.Linear):
        raise ValueError(
            f"{name} is a {type(dense).__name__} in {type(model).__name__} and an embedding in the checkpoint, or tied "
            "to one: load it with the model class it was made for."
        )
    else:
        bias = dense.bias is not None
        layer = LowRankSparseLinear(spec, bias=bias, device=dense.weight.device, dtype=dense.weight.dtype, owner=owner)
        if bias and owner is not None:
            layer.bias = dense.bias  # which may be tied, too
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer.train(dense.training))
    return layer


def _tied_to(model: Any, name: str) -> list[str]:
    """Modules whose weight is that of the module `name`, or will be."""
    weight = f"{name}.weight"
    tied = [
        target for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items() if source == weight
    ]
    own = model.get_submodule(name).weight
    tied += [other for other, parameter in model.named_parameters(remove_duplicate=False) if parameter is own]
    return sorted({other.removesuffix(".weight") for other in tied} - {name})


class _Renaming:
    """What layers of a checkpoint may be called in `model`."""

    def __init__(self, model: Any) -> None:
        mapping = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else None
        self._renamings = [entry for entry in mapping or () if isinstance(entry, WeightRenaming)]
        self._prefix = _prefix(model)
        self._state = dict.fromkeys(model.state_dict(), True)

    def tries(self, recorded: str, disk: str) -> Iterator[str]:
        """Names to look for, the likeliest first."""
        yield from _plain_names(recorded, self._prefix)
        base = self._prefix.removesuffix(".")
        weight, _ = rename_source_key(f"{disk}.weight", self._renamings, [], base, self._state)
        yield weight.removesuffix(".weight")


def _renamed(fields: dict[str, Any], source: str, name: str, prefix: str) -> dict[str, Any]:
    """The entry of the layer `source` where it is called `name`: on disk it goes by the same prefix as in memory.

    Names that transformers changed at load it changes back when it saves.
    """
    if name not in _plain_names(source, prefix):
        return {"tensor": source, **fields}
    if name == source or "tensor" not in fields:
        return fields
    tensor = fields["tensor"]
    return {**fields, "tensor": prefix + tensor if len(name) > len(source) else tensor.removeprefix(prefix)}


def _fused_renamed(
    fused: dict[str, dict[str, Any]], installed: dict[str, str], prefix: str
) -> dict[str, dict[str, Any]]:
    """What is recorded of fused tensors, by the prefix that the layers `installed` have now: name here -> before."""
    name, source = next(iter(installed.items()), ("", ""))
    if name == source or name not in _plain_names(source, prefix):
        return fused

    def now(text: str) -> str:
        return prefix + text if len(name) > len(source) else text.removeprefix(prefix)

    return {now(tensor): {**fields, "module": now(fields["module"])} for tensor, fields in fused.items()}


def _prefix(model: Any) -> str:
    return f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""


def _plain_names(recorded: str, prefix: str) -> tuple[str, str, str]:
    return recorded, prefix + recorded, recorded.removeprefix(prefix)


def _find(model: Any, names: Iterator[str]) -> str | None:
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.dim() == 2:
            return name
    return None


def register(replace: bool = False) -> None:
    """Make transformers read losparse checkpoints; safe to call again, from here or from a shipped copy.

    replace: also where a copy from some checkpoint was there first.
    """
    if replace or METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
        AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
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
