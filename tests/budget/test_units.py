"""Sizes: what people write is bytes, or is refused."""

from __future__ import annotations

import pytest

from losparse_cli.budget.units import parse_size
from losparse_cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5_000_000_000), ("500MB", 500_000_000), ("2GiB", 2 << 30), ("1.5 kB", 1500), (" 10 MiB ", 10 << 20),
     ("7", 7), ("1T", 10**12), ("3b", 3), (4_000_000_000, 4_000_000_000)],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "0", "0.1", "1e9", "5 parsecs", "nan", "inf", "5GB5", "9" * 400, "1.", "٣ x"]
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"--max-shard-size .* is no size; write 5GB"):
        parse_size(text)
