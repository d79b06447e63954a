"""What tests of refinement share: a text of many short sentences, and a dense model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from losparse_cli.text.request import Calibration

TEXT = " ".join(f"Sentence {k} of the text says that {k * k % 97} is not {k}." for k in range(300))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return Calibration(str(path), tokens=1280, length=32, batch=4)


@pytest.fixture(scope="module")
def dense(toy: Callable[..., Path]) -> Path:
    return toy("llama", tokenizer=True)
