"""One model, and the dense one beside it: found, checked, and loaded one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.source import Checkpoint, open_checkpoint
from ..errors import UsageError
from ..models.device import available
from ..text.tokenizer import check_tokenizer

HEADROOM = 1.25  # buffers, activations and the allocator's own, over the bytes of the weights
COPIES = 6  # of the logits of a window, in float32: two models' logits, log-probabilities and what lies between
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def check_choice(option: str, given: str, known: Iterable[str]) -> None:
    """UsageError if what was given is not among what is known."""
    if given not in known:
        raise UsageError(f"{option} is one of {', '.join(known)}, not {given!r}.")


def check_batch_size(given: int) -> None:
    if given < 1:
        raise UsageError(f"--batch-size is a whole number >= 1, not {given}.")


def open_models(
    source: str | Path, against: str | Path | None, *, revision: str | None = None, cache_dir: Path | None = None
) -> tuple[Checkpoint, Checkpoint | None]:
    """The checkpoint `source`, and the one to compare with; SourceError if one is not there, or has no tokenizer."""
    ours = open_checkpoint(source, revision=revision, cache_dir=cache_dir)
    dense = None if against is None else open_checkpoint(against, cache_dir=cache_dir)
    for checkpoint in (ours,) if dense is None else (dense, ours):
        check_tokenizer(checkpoint.folder, checkpoint.address)
    return ours, dense


def dtype_of(model: Any) -> str:
    """Such as float32."""
    return str(model.dtype).removeprefix("torch.")


def fit_together(models: tuple[Checkpoint, ...], dtype: torch.dtype | None, logits: int, device: torch.device) -> bool:
    """Whether the models, in `dtype` (None: as stored), and `logits` predicted numbers fit into free memory."""
    weights = sum(checkpoint.nbytes if dtype is None else checkpoint.elements * dtype.itemsize for checkpoint in models)
    return HEADROOM * weights + 4 * COPIES * logits <= available(device)
