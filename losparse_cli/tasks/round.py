"""What ranks have found of items that they shared out, on all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..parallel.group import Ranks


def hand_round(group: Ranks, mine: Mapping[int, Any]) -> dict[int, Any]:
    """Item -> what was found of it, by all ranks: texts, tensors, or tuples of arrays, the same on every rank.

    Tensors, and what arrays become, are on the CPU and of one dtype.
    """
    if group.size == 1:
        return dict(mine)
    texts = {str(k): one for k, one in mine.items() if isinstance(one, str)}
    others = {k: one for k, one in mine.items() if not isinstance(one, str)}
    parts = {k: [torch.as_tensor(x) for x in (one if isinstance(one, tuple) else (one,))] for k, one in others.items()}
    shapes = [[k, isinstance(others[k], tuple), [list(x.shape) for x in found]] for k, found in parts.items()]
    flat = [x.reshape(-1) for found in parts.values() for x in found]
    found: dict[int, Any] = {}
    for rank, (its_texts, its_shapes) in enumerate(group.agree([texts, shapes])):
        found |= {int(k): text for k, text in its_texts.items()}
        values = group.broadcast(rank, {"values": torch.cat(flat)} if flat else {}).get("values", torch.empty(0))
        at = 0
        for k, several, sizes in its_shapes:
            tensors: list[Tensor] = []
            for size in sizes:
                count = torch.Size(size).numel()
                tensors.append(values[at : at + count].view(size))
                at += count
            found[k] = tuple(x.numpy() for x in tensors) if several else tensors[0]
    return found
