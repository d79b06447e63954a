"""Models of unusual make, end to end: what comes out is what they compute, or the reason is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peculiar
import pytest

import losparse_cli
from losparse_cli.budget.recipe import Recipe
from losparse_cli.errors import UsageError
from losparse_cli.models.reading import input_embeddings, output_embeddings, vocabulary
from losparse_cli.text.windows import Calibration

SMALL = Recipe(rank=4, sparsity=0.5)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat. " * 60, encoding="utf-8")
    return Calibration(str(path), tokens=128, length=16)


# --- embeddings -------------------------------------------------------------------------------------


def test_a_model_that_names_no_input_embeddings_is_compressed(tmp_path: Path) -> None:
    """ModelCloud/GPTQModel#2888, vllm-project/llm-compressor#2370."""
    model = peculiar.segformer()
    assert input_embeddings(model) is output_embeddings(model) is vocabulary(model) is None
    result = losparse_cli.compress(peculiar.write(peculiar.segformer, tmp_path / "dense"), tmp_path / "out", SMALL)
    assert result.report.layers
    assert losparse_cli.verify(result.output).sound
    with pytest.raises(UsageError, match=r"reads pixel_values, not text"):
        losparse_cli.bench(result.output)
    with pytest.raises(UsageError, match=r"reads pixel_values, not text"):
        losparse_cli.evaluate(result.output, "a text", against=tmp_path / "dense")


def test_a_model_that_needs_a_picture_beside_text_says_so(tmp_path: Path, asked: Calibration) -> None:
    dense = peculiar.write(peculiar.clip, tmp_path / "dense")
    assert vocabulary(peculiar.clip()) == 101
    small = losparse_cli.compress(dense, tmp_path / "out", SMALL).output
    attempts: tuple[Any, ...] = (
        lambda: losparse_cli.compress(dense, tmp_path / "told", SMALL, calibration=asked),
        lambda: losparse_cli.evaluate(small, "the cat sat on the mat. " * 9, against=dense, length=16),
        lambda: losparse_cli.bench(small, prompt=4, new_tokens=1, rounds=1, rows=(1,)),
    )
    for attempt in attempts:
        with pytest.raises(UsageError, match=r"cannot be run on text alone"):
            attempt()


def test_encoder_and_decoder_with_embeddings_of_their_own_are_calibrated(tmp_path: Path, asked: Calibration) -> None:
    """huggingface/transformers#48154: the head is tied to the decoder's, which is not what the model reads first."""
    dense = peculiar.write(peculiar.t5gemma, tmp_path / "dense")
    result = losparse_cli.compress(dense, tmp_path / "out", SMALL, calibration=asked)
    assert all(layer.output_errors for layer in result.report.layers)
    assert losparse_cli.verify(result.output).sound
