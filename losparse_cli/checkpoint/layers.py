"""A compressed layer in memory <-> on disk."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import kernels
from ..budget.plan import LayerPlan
from ..errors import CheckpointError
from ..linalg.factors import LowRankCodes, LowRankSparse
from ..shim.codec import decode, smallest
from ..shim.kept import decode as decode_codes
from ..shim.kept import encode as encode_codes
from ..shim.layouts import COLUMN_FACTORS, LayerSpec, column_factors, over_runs, times_runs
from .kept import smallest_stream
from .reader import TensorEntry
from .source import Checkpoint


def encode_layer(plan: LayerPlan, factors: LowRankSparse | LowRankCodes) -> tuple[LayerSpec, dict[str, Tensor]]:
    """The entry in config.json of a layer's factors, and its tensors as stored, by suffix."""
    kernels.install()
    layer, rank = plan.layer, factors.rank
    if isinstance(factors, LowRankCodes):
        runs, codes = factors.runs, numbers_of(factors)
        stream = encode_codes(codes, smallest_stream(codes, plan.pattern))
        spec = LayerSpec(
            layer.shape,
            rank,
            factors.nnz,
            plan.pattern,
            "codes",
            index_bytes=stream.numel(),
            kind="embedding" if layer.rows == "embedding" else "",
            run=0 if runs is None else layer.shape[1] // runs.shape[1],
        )
        scale = torch.searchsorted(COLUMN_FACTORS, factors.columns.cpu()).to(torch.uint8)
        tensors = {"S_codes": stream, "S_scale": scale} | ({} if runs is None else {"S_runs": runs})
    else:
        spec, tensors = smallest(factors.support, rank, plan.pattern)
    disk = layer.disk_module if layer.disk_module != layer.name else ""
    spec = replace(spec, transposed=layer.transposed, tensor=disk)
    tensors = ({"U": factors.U, "V": factors.V} if rank else {}) | {"weight": factors.stored, **tensors}
    return spec, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def numbers_of(factors: LowRankCodes) -> Tensor:
    """The codes (out, in) as they are stored: without what runs multiply them by."""
    return factors.codes if factors.runs is None else over_runs(factors.codes, factors.runs)


def read_layer(
    checkpoint: Checkpoint, name: str, spec: LayerSpec, entries: dict[str, TensorEntry]
) -> LowRankSparse | LowRankCodes:
    """The factors of one layer, every index checked; U and V have rank 0 columns if absent.

    CheckpointError names the layer if an index leaves its range, or a stream of codes is damaged.
    """
    kernels.install()
    files = {file.path: file for file in checkpoint.files}
    tensors = {suffix: files[entry.path].read(entry) for suffix, entry in entries.items()}
    try:
        return unpack_layer(spec, tensors)
    except ValueError as error:
        path, what = entries["weight"].path, "damaged codes" if spec.layout == "codes" else "a damaged index"
        raise CheckpointError(f"{path}: layer {name} has {what} ({error}). Download or compress it again.") from error


def not_finite(factors: LowRankSparse | LowRankCodes, entries: dict[str, TensorEntry]) -> list[str]:
    """A sentence for each of a layer's tensors that holds what is no number; entries: by suffix, as read."""
    return [
        f"{entries[suffix].path}: {entries[suffix].name} holds NaN or infinity. Compress the model again."
        for suffix, tensor in (("U", factors.U), ("V", factors.V), ("weight", factors.stored))
        if not torch.isfinite(tensor).all()
    ]


def read_finite_layer(
    checkpoint: Checkpoint, name: str, spec: LayerSpec, entries: dict[str, TensorEntry]
) -> LowRankSparse | LowRankCodes:
    """`read_layer`, and CheckpointError if a tensor holds what is no number."""
    factors = read_layer(checkpoint, name, spec, entries)
    for problem in not_finite(factors, entries):
        raise CheckpointError(problem)
    return factors


def unpack_layer(spec: LayerSpec, tensors: dict[str, Tensor]) -> LowRankSparse | LowRankCodes:
    """The factors from the stored tensors by suffix; ValueError if an index leaves its range."""
    m, n = spec.shape
    values = tensors["weight"]
    U = tensors.get("U", values.new_zeros(m, 0))
    V = tensors.get("V", values.new_zeros(0, n))
    if spec.layout == "codes":
        codes, _ = decode_codes(tensors["S_codes"], spec.shape)
        runs = tensors.get("S_runs")
        codes = codes if runs is None else times_runs(codes, runs)
        if int(torch.count_nonzero(codes)) != spec.nnz:
            raise ValueError(f"S_codes does not hold {spec.nnz} entries other than zero")
        return LowRankCodes(U, V, values, column_factors(tensors["S_scale"]), codes.to(values.device), runs)
    support = decode(spec, {k: t for k, t in tensors.items() if k.startswith("S_")})
    return LowRankSparse(U, V, values, support)
