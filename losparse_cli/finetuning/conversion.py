"""A model's layers as they are stored <-> as they are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..budget.plan import LayerPlan
from ..linalg.factors import LowRankSparse
from ..linalg.svd import balanced_factors, output_factors, seed_of, truncated_svd
from ..shim.embedding import CodedEmbedding
from ..shim.layouts import LayerSpec
from ..shim.linear import LowRankSparseLinear
from .layers import TrainedLinear


def compressed_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> LowRankSparseLinear, also of the class that a checkpoint brought along."""
    name_of_class = LowRankSparseLinear.__name__
    return {name: module for name, module in model.named_modules() if type(module).__name__ == name_of_class}


def coded_modules(model: nn.Module) -> dict[str, Any]:
    """Name -> layer or embedding whose S is whole numbers of its own, also of a class that a checkpoint brought."""
    kinds = (LowRankSparseLinear.__name__, CodedEmbedding.__name__)
    return {
        name: module
        for name, module in model.named_modules()
        if any(kind.__name__ in kinds for kind in type(module).__mro__)
        and module.spec.layout == "codes"
        and not is_shared(module)
    }


def is_coded(model: nn.Module) -> bool:
    """Whether S of its layers is whole numbers."""
    return any(module.spec.kind != "embedding" for module in coded_modules(model).values())


def is_shared(layer: Any) -> bool:
    """Whether a compressed layer computes with the codes of another, as a tied head does."""
    return bool(getattr(layer, "_owner", ()))


def trained_layers(model: nn.Module) -> dict[str, TrainedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainedLinear)}


@torch.no_grad()
def start_dense(
    model: nn.Module,
    plans: Sequence[LayerPlan],
    *,
    moments: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    device: torch.device,
) -> None:
    """Put U, V and S in the place of the planned layers.

    U and V are the truncated SVD of W, and S is W − U V, all of it, so that nothing is lost (LoSparse, section 3.1);
    where no plan leaves S anything there is none. Of a layer that is in `moments`, the second moment H of its inputs,
    U and V are nearest to W in its outputs instead.
    """
    low_rank_only = not any(plan.nnz for plan in plans)
    for plan in plans:
        name, rank = plan.layer.name, plan.rank
        dense = model.get_submodule(name)
        transposed = plan.layer.transposed
        weight: Tensor = dense.weight  # type: ignore[assignment]
        stored = weight.detach()
        W = (stored.T if transposed else stored).to(device).float().contiguous()
        H, own = (moments or {}).get(name), seed_of(seed, name)
        if H is not None and bool(H.any()):
            U, V = output_factors(W, H.to(device), rank, seed=own)
        else:
            U, V = balanced_factors(*truncated_svd(W, rank, seed=own))
        R = torch.addmm(W, U, V, alpha=-1)
        support = torch.full(W.shape, not low_rank_only, device=device)
        factors = LowRankSparse(U, V, R[support], support)
        bias: Tensor | None = dense.bias  # type: ignore[assignment]
        trained = TrainedLinear(factors, bias, pattern=plan.pattern, dense=not low_rank_only, transposed=transposed)
        put(model, name, trained.to(stored.device))


@torch.no_grad()
def start_compressed(model: nn.Module, plans: Sequence[LayerPlan] = (), *, seed: int = 0) -> None:
    """Make the compressed layers trainable: S keeps its support, and can only shrink.

    Codes stay where they are, in a layer that is trainable as it is; plans: with the ranks of adapters to add to them.
    """
    for plan in plans if is_coded(model) else ():
        _add_adapter(model.get_submodule(plan.layer.name), plan.rank, seed_of(seed, plan.layer.name))
    for name, layer in compressed_layers(model).items():
        if layer.spec.layout == "codes":
            continue
        m, n = layer.spec.shape
        U, V = (torch.zeros(m, 0), torch.zeros(0, n)) if layer.U is None else (layer.U.detach(), layer.V.detach())
        factors = LowRankSparse(U, V, layer.weight.detach(), layer.support())
        spec = layer.spec
        put(model, name, TrainedLinear(factors, layer.bias, pattern=spec.pattern, dense=False,
                                        transposed=spec.transposed))  # fmt: skip


def _add_adapter(layer: Any, rank: int, seed: int) -> None:
    """U of zeros and a random V beside codes that have none: nothing changes at first (LoRA, Hu et al., 2106.09685)."""
    m, n = layer.spec.shape
    if not rank or layer.spec.rank:
        return
    V = torch.randn(rank, n, generator=torch.Generator().manual_seed(seed)) / n**0.5
    layer.U = nn.Parameter(layer.weight.new_zeros(m, rank))
    layer.V = nn.Parameter(V.to(layer.weight))
    layer.spec = replace(layer.spec, rank=rank)
    layer._ready = None


@torch.no_grad()
def finish(
    model: nn.Module, dtype: torch.dtype, encode: Callable[[str, LowRankSparse], tuple[LayerSpec, dict[str, Tensor]]]
) -> None:
    """Put a LowRankSparseLinear in the place of each trained layer, and everything that is stored into `dtype`.

    encode: name and factors -> spec, and the tensors as stored.
    """
    for name, trained in trained_layers(model).items():
        spec, tensors = encode(name, trained.factors(dtype))
        layer = LowRankSparseLinear(spec, bias=trained.bias is not None, dtype=dtype)
        if trained.bias is not None:
            tensors = tensors | {"bias": trained.bias.detach().to(dtype)}
        layer.load_state_dict(tensors)
        put(model, name, layer.to(trained.kept.device))
    # Not model.to(dtype): what is made when a model is loaded, such as rotary frequencies, is float32 there.
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to(dtype))


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """A layer in the place of the one of this name, trained or not as the model is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer.train(model.training))
