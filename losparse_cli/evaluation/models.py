"""One model, and the dense one beside it: found, checked, and loaded one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.source import Checkpoint, open_checkpoint
from ..errors import UsageError
from ..text.tokenizer import check_tokenizer

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
