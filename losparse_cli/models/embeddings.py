"""Which embeddings and output heads of a model can be stored as rows of codes, and why the others cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .ownership import readers, reads_own
from .reading import input_embeddings, output_embeddings

LEAST_ENTRIES = 1 << 16
"""Below which nothing that matters is won."""
TOO_SMALL = f"too small to matter: fewer than {LEAST_ENTRIES:,} entries"


@dataclass(frozen=True)
class Rows:
    """An embedding, or an output head that is tied to none. shape: (vocabulary, width). twins: modules tied to it."""

    name: str
    shape: tuple[int, int]
    head: bool
    twins: tuple[str, ...] = ()


def find_rows(model: nn.Module) -> tuple[dict[str, Rows], dict[str, str]]:
    """What reads or scores tokens in `model` and the models inside it, by name; and the rest with the reason."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith(".weight"):
            groups.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    targets = {name.removesuffix(".weight") for name in getattr(model, "all_tied_weights_keys", None) or {}}
    used = readers(model)
    found: dict[str, Rows] = {}
    skipped: dict[str, str] = {}
    for module in _candidates(model):
        weight = module.weight
        assert isinstance(weight, Tensor)
        names = groups.get(id(weight), [])
        if not names:
            continue
        embeddings = [name for name in names if isinstance(model.get_submodule(name), nn.Embedding)]
        free = [name for name in embeddings if name not in targets]
        name = (free or embeddings or names)[0]
        if name in found or name in skipped:
            continue
        reason = _reason(model, names, used) if weight.numel() >= LEAST_ENTRIES else TOO_SMALL
        if embeddings and not free:
            reason = reason or f"tied to {name}, which is not where its weights come from"
        if reason:
            skipped[name] = reason
            continue
        twins = tuple(other for other in names if other != name)
        found[name] = Rows(name, (weight.shape[0], weight.shape[1]), not embeddings, twins)
    return found, skipped


def _candidates(model: nn.Module) -> list[nn.Module]:
    """Embeddings before heads, as a head that is tied is its embedding's."""
    from transformers import PreTrainedModel

    models: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    found = [*map(input_embeddings, models), *map(output_embeddings, models)]
    modules = [module for module in found if isinstance(module, nn.Embedding | nn.Linear)]
    known = {id(module) for module in model.modules()}
    return [module for module in modules if id(module) in known and module.weight.dim() == 2]


def _reason(model: nn.Module, names: list[str], used: dict[str, str]) -> str:
    """Why the modules `names`, which share a weight, cannot compute with codes; empty if they can."""
    for name in names:
        module = model.get_submodule(name)
        kind = type(module)
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding):
            if module.max_norm is not None or module.sparse:
                return "an embedding that changes its own rows"
            more = len(list(module.parameters())) > 1 or any(True for _ in module.children())
            if more or (kind is not nn.Embedding and reads_own(kind)):
                return f"{kind.__name__}, which may compute more than a row"
        elif kind is not nn.Linear:
            return f"tied to {name}, a {kind.__name__}, which may compute more than a product"
        reader = used.get(last) or used.get("")
        if reader:
            return f"its weight is read by {reader} itself"
    return ""
