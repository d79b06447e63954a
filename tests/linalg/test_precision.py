"""Products may be faster inside `fast_float32`, and must stay float32."""

from __future__ import annotations

import pytest
import torch

from losparse_cli.linalg import precision
from losparse_cli.linalg.precision import FLOAT32_ERROR, fast_float32


def relative_error(n: int) -> float:
    generator = torch.Generator().manual_seed(n)
    A, B = (torch.randn(n, n, generator=generator) for _ in range(2))
    exact = A.double() @ B.double()
    return float(torch.linalg.vector_norm(A @ B - exact) / torch.linalg.vector_norm(exact))


@pytest.mark.parametrize("n", [7, 64, 257, 512])
def test_products_are_float32(n: int) -> None:
    with fast_float32():
        assert relative_error(n) < FLOAT32_ERROR


def test_the_setting_is_put_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with fast_float32():
        pass
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with pytest.raises(KeyError), fast_float32():
        raise KeyError
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_nothing_is_allowed_where_it_would_cost_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    monkeypatch.setattr(precision, "_onednn_is_exact", lambda: False)
    with fast_float32():
        assert torch.backends.mkldnn.matmul.fp32_precision == before
