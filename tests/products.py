"""What tests of kernels measure products by, and layers of codes for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from losparse_cli.kernels import native
from losparse_cli.shim import streams
from losparse_cli.shim.layouts import LayerSpec, column_factors
from losparse_cli.shim.linear import LowRankSparseLinear

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}
needs_compiler = pytest.mark.skipif(native.library() is None, reason="needs a C compiler")


def coded(
    shape: tuple[int, int], bits: int, *, rank: int = 0, bias: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[LowRankSparseLinear, Tensor]:
    """A settled layer of codes that take so many bits, a few more; and its dense weight, float64."""
    m, n = shape
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, shape)
    if codes.numel() > 300:
        codes.view(-1)[::199] = 5 * half
    rank = min(rank, m, n)
    contexts = streams.Contexts(torch.zeros(m).byte(), torch.zeros(n).byte(), 1, 8 * bits - 20, 1, 4)
    stream = streams.encode(codes, contexts)
    spec = LayerSpec(shape, rank, int(codes.count_nonzero()), "unstructured", "codes", index_bytes=stream.numel())
    layer = LowRankSparseLinear(spec, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 2)
        layer.weight.copy_(torch.rand(m) + 0.5)
        layer.S_codes.copy_(stream)
        layer.S_scale.copy_(torch.randint(100, 140, (n,)))
    W = codes.double() * column_factors(layer.S_scale).double() * layer.weight.double()[:, None]
    layer.settle()
    if layer.U is not None and layer.V is not None:
        W = W + layer.U.double() @ layer.V.double()
    return layer, W.detach()
