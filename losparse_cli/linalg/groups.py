"""Plain rounding as most tools do it, which others are compared with: groups of entries share a scale and a zero."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32
LEAST_SCALE = 6e-8  # of fp16


def round_groups(W: Tensor, width: int, *, shift: int = 0) -> tuple[Tensor, float]:
    """W (m, n), floating, in whole numbers of `width` bits times a scale in fp16, beside a whole zero point, for each
    GROUP entries of a row; as float32, and the bits that an entry takes so, all counted.

    shift: by how many entries later groups begin, for a W that was rounded in such groups before: they would find its
    old grid again.
    """
    m, n = W.shape
    X = torch.nn.functional.pad(W.float().roll(-shift, 1), (0, -n % GROUP)).view(m, -1, GROUP)
    low, high = X.amin(2, keepdim=True).clamp_max(0), X.amax(2, keepdim=True).clamp_min(0)
    scale = ((high - low) / (2**width - 1)).clamp_min(LEAST_SCALE).half().float()
    zero = (-low / scale).round()
    q = ((X / scale).round() + zero).clamp(0, 2**width - 1) - zero
    bits = (width + (16 + width) / GROUP) * X.numel() / W.numel()
    return (q * scale).view(m, -1)[:, :n].roll(shift, 1), bits
