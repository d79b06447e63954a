"""The product on a GPU, for S as bits: the kernels of `gpu_triton` expand the stored form in registers.

`few` reads each stored byte once and does all of the product in one pass, but for V x. `many` makes some rows of S
dense in scratch memory and leaves their product to torch. Tensors are contiguous, on one device, of one of DTYPES.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import low_rank

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE_BYTES = 1 << 26
"""Scratch memory of `many`."""
SLOTS = 16
"""Most rows of x that `few` takes: the narrowest product that tensor cores do."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

logger = logging.getLogger("losparse")
_failed = False


def available(device: torch.device) -> bool:
    """Whether Triton can be used for tensors there, CUDA's or with its interpreter any, and has not failed yet."""
    return not _failed and (INTERPRETED or device.type == "cuda") and kernels() is not None


def attempt(work: Callable[..., Tensor], *operands: Any) -> Tensor | None:
    """What `work` returns; None if Triton fails, which is logged in one line and ends its use."""
    global _failed
    try:
        return work(*operands)
    except torch.OutOfMemoryError:
        raise  # plain torch takes more
    except Exception as error:  # a GPU or driver that Triton does not know fails in many ways
        _failed = True
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        logger.warning("Compressed layers run on slower kernels, because Triton failed: %s", reason.strip())
        return None


@cache
def kernels(module: str = "gpu_triton") -> Any:
    """The module of Triton kernels, imported when it is first needed; None without Triton."""
    try:
        return importlib.import_module(f".{module}", __package__)
    except ImportError:
        return None


def few(
    x: Tensor, values: Tensor, index: Tensor, starts: Tensor, U: Tensor | None, V: Tensor | None, bias: Tensor | None,
    m: int, n: int,
) -> Tensor:  # fmt: skip
    """x: (rows, n), 1 to SLOTS rows -> (rows, m)."""
    rows, octets, rank = x.shape[0], index.shape[1], 0 if U is None else U.shape[1]
    y = x.new_empty(rows, m)
    t = x if V is None else F.linear(x, V)
    # What is absent is never read, but a kernel wants an address.
    operands = (x, values, index, starts, x if U is None else U, t, x if bias is None else bias, y, m, n, octets, rank)
    with on(x.device):
        if rows == 1:
            kernels().one[(-(-m // 4),)](
                *operands, BIAS=bias is not None, RANK=64, RANKS=-(-rank // 64), R=4, **_steps(n, octets, 128)
            )
        else:
            exact = INTERPRETED or x.dtype == torch.float32  # the interpreter multiplies bfloat16 as whole numbers
            kernels().some[(-(-m // 16),)](
                *operands, rows, BIAS=bias is not None, RANK=32, RANKS=-(-rank // 32), R=16, SLOTS=SLOTS, EXACT=exact,
                **_steps(n, octets, 8 if x.dtype == torch.float32 else 64),
            )  # fmt: skip
    return y


def dense(
    values: Tensor, index: Tensor, starts: Tensor, m: int, n: int, begin: int = 0, scratch: Tensor | None = None
) -> Tensor:
    """Rows of S from `begin` on, (rows, n): as many as `scratch` has, in its memory, or all of them."""
    S = values.new_empty(m - begin, n) if scratch is None else scratch[: m - begin]
    octets = index.shape[1]
    with on(values.device):
        kernels().expand[(-(-S.shape[0] // 4),)](
            values, index, starts, S, begin, begin + S.shape[0], n, octets, R=4, **_steps(n, octets, 128)
        )
    return S


def many(
    x: Tensor, values: Tensor, index: Tensor, starts: Tensor, U: Tensor | None, V: Tensor | None, bias: Tensor | None,
    m: int, n: int,
) -> Tensor:  # fmt: skip
    """x: (rows, n) -> (rows, m), with at most TILE_BYTES of S dense at a time."""
    y = low_rank(x, U, V, bias, m)
    scratch = x.new_empty(min(m, max(1, TILE_BYTES // (n * x.element_size()))), n)
    for begin in range(0, m, scratch.shape[0]):
        tile = dense(values, index, starts, m, n, begin, scratch)
        y[:, begin : begin + tile.shape[0]].addmm_(x, tile.T)
    return y


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Where Triton starts its kernels: on the current device, whatever tensors it is given."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _steps(n: int, octets: int, most: int) -> dict[str, Any]:
    """How a row of bits is gone through, `most` bytes at a time or fewer."""
    if n % 16:
        most //= 2  # masks for single entries of x take registers
    step = min(most, max(16, 1 << (octets - 1).bit_length()))
    return {"RAGGED": n % 8 != 0, "OCTETS": step, "BLOCKS": -(-octets // step)}
