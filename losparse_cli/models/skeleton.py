"""config.json -> the model on the meta device -> the linear layers that can be compressed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SourceError, reason_of
from ..shim.experts import SplitExperts, fused_experts, split_experts
from .ownership import read_by_others
from .reading import output_embeddings

PLAIN = ("Linear", "Conv1D", "FalconLinear")
"""Classes whose output is x Wᵀ + b and nothing else."""
ROUTER = "router"
FUSED = "fused expert weights"
"""Why what chooses among experts stays dense, and experts that cannot be taken apart."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of the skeleton. shape: (out_features, in_features); transposed as in GPT-2's Conv1D."""

    name: str
    shape: tuple[int, int]
    transposed: bool


@dataclass(frozen=True)
class Skeleton:
    """The model without weights. linears: candidates by module name; skipped: module name -> reason."""

    model: Any
    linears: dict[str, Linear]
    skipped: dict[str, str]

    @property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """Every layer, compressible or not -> name of its class, and of those that it is made from."""
        return {name: kinds_of(self.model.get_submodule(name)) for name in (*self.linears, *self.skipped)}


def kinds_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the module's class and of its bases, up to nn.Module."""
    mro = type(module).__mro__
    return tuple(kind.__name__ for kind in mro[: mro.index(nn.Module)])


def build_skeleton(
    folder: Path, config: dict[str, Any], together: Iterable[str] = (), *, trust_remote_code: bool = False
) -> Skeleton:
    """The skeleton of the checkpoint in `folder`, whose config.json holds `config`; together: as of `empty_model`.

    SourceError if the architecture is unknown to the installed transformers, if it needs the model's own
    code and `trust_remote_code` is off, or if it cannot be built without weights.
    """
    model = empty_model(folder, config, together, trust_remote_code=trust_remote_code)
    linears, skipped = classify(model)
    return Skeleton(model, linears, skipped)


def empty_model(
    folder: Path, config: dict[str, Any], together: Iterable[str] = (), *, trust_remote_code: bool = False
) -> Any:
    """The model that config.json names, on the meta device, in evaluation mode, weights tied, experts split.

    together: tensors of the checkpoint, those that may hold a matrix of all experts among them; experts that lie so are
    split, too. Of a compressed checkpoint config.json says which they were.
    """
    import transformers

    architecture = (config.get("architectures") or [None])[0]
    own_code = config.get("auto_map") or {}
    quantization = config.get("quantization_config") or {}
    try:
        settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model_class = _model_class(folder, architecture, own_code, settings, trust_remote_code)
        with torch.device("meta"):
            model = model_class._from_config(settings)
    except SourceError:
        raise
    except Exception as error:  # whatever a config can make transformers raise
        if own_code and not trust_remote_code:
            raise SourceError(
                f"{folder} needs the model's own code ({', '.join(own_code)}). Read that code, then add "
                "--trust-remote-code if you trust it."
            ) from error
        raise SourceError(
            f"transformers {transformers.__version__} cannot build {architecture or 'the model'} from "
            f"{folder / 'config.json'}: {reason_of(error)}. Check the file, or upgrade transformers."
        ) from error
    split_experts(model, fused_experts(model, [*(quantization.get("fused") or {}), *together]))
    model.tie_weights()
    return model.eval()


def _model_class(folder: Path, architecture: str | None, own_code: dict[str, Any], settings: Any, trust: bool) -> Any:
    import transformers

    if architecture and hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    if trust:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        for reference in own_code.values():
            if isinstance(reference, str) and reference.endswith(f".{architecture}"):
                return get_class_from_dynamic_module(reference, str(folder))
    if architecture:
        hint = (
            "add --trust-remote-code if you trust the model's own code"
            if own_code
            else "upgrade transformers, or correct 'architectures' in config.json"
        )
        raise SourceError(
            f"{folder / 'config.json'} names the architecture {architecture!r}, which transformers "
            f"{transformers.__version__} does not have: {hint}."
        )
    return transformers.AutoModel._model_mapping[type(settings)]


def classify(model: nn.Module) -> tuple[dict[str, Linear], dict[str, str]]:
    """Every linear layer of `model`: those that can be compressed, and those that cannot with the reason."""
    from transformers.pytorch_utils import Conv1D

    blocks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    head = output_embeddings(model)
    outputs = {id(module) for module in head.modules()} if head is not None else set()
    experts = _expert_count(model)
    read = read_by_others(model)

    linears: dict[str, Linear] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, nn.Linear | Conv1D):
            if isinstance(module, nn.Embedding):
                skipped[name] = "embedding"
            elif _is_router(module, parent, experts):
                skipped[name] = ROUTER
            elif not isinstance(module, SplitExperts) and _holds_experts(module):
                skipped[name] = FUSED
            continue
        if module.weight.dim() != 2:  # a compressed layer, which holds the values of S
            continue
        transposed = isinstance(module, Conv1D)
        rows, columns = module.weight.shape
        shape = (columns, rows) if transposed else (rows, columns)
        if id(module) in outputs:
            skipped[name] = "output head"
        elif owners[id(module.weight)] > 1:
            skipped[name] = "tied weight"
        elif not any(name.startswith(f"{block}.") for block in blocks):
            skipped[name] = "outside the repeated blocks"
        elif _is_router(module, parent, experts):
            skipped[name] = ROUTER
        elif type(module).__name__ not in PLAIN:
            skipped[name] = f"{type(module).__name__}, which may compute more than a product"
        elif isinstance(parent, nn.MultiheadAttention) or name in read:
            skipped[name] = f"its weight is read by {read.get(name, type(parent).__name__)} itself"
        else:
            linears[name] = Linear(name, shape, transposed)
    return linears, skipped


def _holds_experts(module: nn.Module) -> bool:
    """Whether `module` has the matrices of experts for parameters of its own, beside each other."""
    return "expert" in type(module).__name__.lower() and any(p.dim() >= 2 for p in module.parameters(recurse=False))


def _is_router(module: nn.Module, parent: nn.Module, experts: int | None) -> bool:
    """Whether `module` chooses among the experts beside it, or belongs to what does: a row of its weight for each."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.shape[0] != experts:
        return False
    return "Router" in type(parent).__name__ or any("expert" in child for child, _ in parent.named_children())


def _expert_count(model: Any) -> int | None:
    settings = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        count = getattr(settings, name, None)
        if isinstance(count, int):
            return count
    return None
