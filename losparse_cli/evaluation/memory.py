"""Whether two models fit in memory at once."""

from __future__ import annotations

import torch

from ..checkpoint.source import Checkpoint
from ..models.device import available

HEADROOM = 1.25  # buffers, activations and the allocator's own, over the bytes of the weights
COPIES = 6  # of the logits of a window, in float32: two models' logits, log-probabilities and what lies between


def fit_together(models: tuple[Checkpoint, ...], dtype: torch.dtype | None, logits: int, device: torch.device) -> bool:
    """Whether the models, in `dtype` (None: as stored), and `logits` predicted numbers fit into free memory."""
    weights = sum(checkpoint.nbytes if dtype is None else checkpoint.elements * dtype.itemsize for checkpoint in models)
    return HEADROOM * weights + 4 * COPIES * logits <= available(device)
