"""What the layers of a model are fed on training data, which says what U and V had better keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from ..calibration.moments import gather_moments
from ..models.blocks import Call
from ..tasks.tokens import LABELS

TOKENS = 1 << 15  # that are looked at
AT_ONCE = 1 << 11  # tokens of one pass


def input_moments(
    model: Any, layers: Sequence[str], items: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]], *, seed: int,
) -> dict[str, Tensor]:  # fmt: skip
    """Layer -> H, (in, in), the mean of x xᵀ over the tokens of some items, drawn by `seed`; without padding.

    A layer that no item reaches is left out. CheckpointError, naming the layer, for inputs that are not finite.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        calls = _calls(model, items, collate, seed, device)
        found = gather_moments(model, layers, calls, remedy="Look at the training data, or repair the checkpoint.")
    finally:
        model.train(training)
    return {name: part.H for part in found for name in part.layers}


def _calls(
    model: Any, items: Sequence[dict[str, Any]], collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    seed: int, device: torch.device,
) -> Iterator[Call]:  # fmt: skip
    """Batches of items that are alike in all lengths, so that nothing is padded."""
    groups: dict[tuple[int, ...], list[int]] = {}
    seen = 0
    for k in torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist():
        if seen >= TOKENS:
            break
        lengths = tuple(len(value) for value in items[k].values() if isinstance(value, Sized))
        groups.setdefault(lengths, []).append(k)
        seen += len(items[k]["input_ids"])
    for lengths, members in groups.items():
        size = max(1, AT_ONCE // max(lengths))
        for begin in range(0, len(members), size):
            some = [items[k] for k in members[begin : begin + size]]
            batch = {name: x.to(device) for name, x in collate(some).items()}
            if not model.config.is_encoder_decoder or "decoder_input_ids" in batch:  # else they say what is written
                batch = {name: x for name, x in batch.items() if name not in LABELS}
            yield Call((), batch)
