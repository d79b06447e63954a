"""The product with a 2:4 S on tensor cores that skip its zeros, through torch's semi-structured tensors.

These are a second copy of S beside the stored one (its values once more, and 2 bits for each), so nothing chooses this
way by itself: LOSPARSE_KERNEL=semi does.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import gpu

logger = logging.getLogger("losparse")

_made: MutableMapping[Tensor, tuple[tuple[int, int, int], Tensor | None]] = WeakIdKeyDictionary()
"""values -> what they and the index were when looked at, and the semi-structured S, None where it is not 2:4."""
_failed = False


def semi_structured(
    x: Tensor, values: Tensor, index: Tensor, starts: Tensor, U: Tensor | None, V: Tensor | None, bias: Tensor | None,
    m: int, n: int,
) -> Tensor | None:  # fmt: skip
    """x: (rows, n) -> (rows, m); None where S is not 2:4, or the GPU, its torch, the dtype or the shape forbids it.

    S is made anew for values that are another tensor or have changed; between that, one pass over x.
    """
    global _failed
    if _failed or not x.is_cuda or not allowed(x.dtype, m, n) or torch.cuda.get_device_capability(x.device) < (8, 0):
        return None
    state = (index.data_ptr(), values.data_ptr(), -1 if values.is_inference() else values._version)
    try:
        known, S = _made.get(values) or (None, None)
        if known != state:
            if torch.cuda.is_current_stream_capturing():
                return None  # looking at the index waits for the GPU, which a graph cannot record
            S = _semi_structured(values, index, starts, m, n)
            _made[values] = (state, S)
        if S is None:
            return None
        y = F.linear(x, S, bias).contiguous()
        return y if U is None or V is None else y.addmm_(F.linear(x, V), U.T)
    except (RuntimeError, ValueError) as error:
        _failed = True
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        logger.warning("Layers with 2:4 patterns are not multiplied as such here: %s", reason.strip())
        return None


def allowed(dtype: torch.dtype, m: int, n: int) -> bool:
    """Whether torch's semi-structured tensors take this dtype and shape."""
    return dtype in (torch.bfloat16, torch.float16) and m % 32 == 0 and n % 64 == 0


def two_of_four(index: Tensor) -> bool:
    """Whether every four bits, from the first on, have two set."""
    nibble = torch.arange(16, device=index.device)
    two = torch.stack([(nibble >> place) & 1 for place in range(4)]).sum(0) == 2
    byte = torch.arange(256, device=index.device)
    good = (two[byte & 15] & two[byte >> 4]).index_select(0, index.reshape(-1).int())
    return bool(good.all())


def _semi_structured(values: Tensor, index: Tensor, starts: Tensor, m: int, n: int) -> Tensor | None:
    if values.numel() * 2 != m * n or not two_of_four(index):
        return None
    with torch.no_grad():
        S = gpu.dense(values, index, starts, m, n)
        made: Tensor = torch.sparse.to_sparse_semi_structured(S)
    return made
