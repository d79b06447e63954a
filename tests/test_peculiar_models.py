"""Models of unusual make, end to end: what comes out is what they compute, or the reason is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peculiar
import pytest
import torch
import transformers

import losparse_cli
from losparse_cli.budget.recipe import Recipe
from losparse_cli.checkpoint.source import open_checkpoint
from losparse_cli.compression.assembly import Assembly
from losparse_cli.errors import UsageError
from losparse_cli.models.ownership import read_by_others
from losparse_cli.models.reading import input_embeddings, output_embeddings, vocabulary
from losparse_cli.models.skeleton import empty_model
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


# --- weights and buffers that another module reaches for --------------------------------------------


def test_weights_that_a_model_changes_itself_stay_dense(tmp_path: Path) -> None:
    """huggingface/transformers#23848: the division would reach S alone, not U V."""
    folder = peculiar.write(peculiar.rwkv, tmp_path / "dense")
    small = losparse_cli.compress(folder, tmp_path / "out", SMALL)
    reasons = {name: why for name, why in small.report.skipped.items() if "RwkvModel" in why}
    assert {name.split(".", 3)[3] for name in reasons} == {"attention.output", "feed_forward.value"}
    plain = transformers.AutoModelForCausalLM.from_pretrained(losparse_cli.export(small.output, tmp_path / "plain"))
    ids = torch.randint(3, 99, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = plain.eval()(ids).logits
        torch.testing.assert_close(losparse_cli.load(small.output)[0](ids).logits, expected, rtol=1e-4, atol=1e-5)


class Reaching(torch.nn.Module):
    """Reads weights of what lies deeper, by every way that its source may show."""

    def __init__(self) -> None:
        super().__init__()
        names = ("named", "looped", "listed", "kept", "kind", "called")
        self.deep = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in names})
        self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"looped": torch.nn.Linear(2, 2)})])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x @ block.looped.weight
        held = self.deep.kept
        x = x.to(self.deep.kind.weight.dtype) @ held.weight
        return self.deep.called(x @ self.deep.named.weight)


def test_weights_are_found_however_deep_they_are_read() -> None:
    found = read_by_others(torch.nn.Sequential(Reaching()))
    assert found == dict.fromkeys(("0.deep.named", "0.deep.kept", "0.deep.looped", "0.blocks.0.looped"), "Reaching")


@pytest.mark.parametrize(
    "make", [peculiar.falcon_h1, peculiar.gemma3n, peculiar.t5gemma], ids=lambda make: make.__name__
)
def test_buffers_that_no_file_holds_are_those_of_the_loaded_model(make: Any, tmp_path: Path) -> None:
    """huggingface/transformers#45902: an ancestor's initialization may fill a buffer, not its owner's."""
    folder = peculiar.write(make, tmp_path)
    source = open_checkpoint(folder)
    built = Assembly(empty_model(source.folder, source.config), source, torch.device("cpu")).model
    expected = dict(type(built).from_pretrained(folder).named_buffers())
    assert expected
    for name, buffer in built.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    assert all(parameter.is_meta for parameter in built.parameters())


# --- blocks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [peculiar.gemma3n, peculiar.paligemma], ids=lambda make: make.__name__)
def test_what_text_does_not_reach_is_compressed_without_it(make: Any, tmp_path: Path, asked: Calibration) -> None:
    dense = peculiar.write(make, tmp_path / "dense")
    result = losparse_cli.compress(dense, tmp_path / "out", SMALL, calibration=asked)
    without = {layer.name for layer in result.report.layers if not layer.output_errors}
    assert without == {layer.name for layer in result.report.layers if "altup" in layer.name or "tower" in layer.name}
    assert 0 < len(without) < len(result.report.layers)
    assert losparse_cli.verify(result.output).sound
