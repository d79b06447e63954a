"""Blocks that run again on the way back: a pass leaves what flows between them in memory, and of one what is inside.

transformers' own way does so in training mode alone, which lets dropout in; here a model stays as it predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..models.blocks import Call, renew


def recompute(model: Any, blocks: Iterable[str]) -> None:
    """Have the blocks of these names run again where gradients are asked for; the whole model, "", stays as it is."""
    for name in blocks:
        if name:
            block = model.get_submodule(name)
            block.forward = partial(_twice, block.forward)


def _twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    call = Call(args, kwargs)

    def run() -> Any:
        renew(call)
        return forward(*args, **kwargs)

    return checkpoint(run, use_reentrant=False, preserve_rng_state=False)
