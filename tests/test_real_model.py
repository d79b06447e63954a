"""The main job on the two packaged real models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from losparse_cli.budget.recipe import Recipe
from losparse_cli.compress import Result, compress
from losparse_cli.demo import PROMPT, minilm, news_text, smollm2
from losparse_cli.evaluate import perplexity
from losparse_cli.export import export
from losparse_cli.load import load
from losparse_cli.verify import verify

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def strong(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """SmolLM2 at rank 8, sparsity 0.9."""
    return compress(smollm2(), tmp_path_factory.mktemp("strong") / "out", Recipe(rank=8, sparsity=0.9, iterations=1))


@pytest.fixture(scope="module")
def useful(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """SmolLM2 at 85 % of the targeted bytes."""
    return compress(smollm2(), tmp_path_factory.mktemp("useful") / "out", Recipe(keep=0.85, values="float"))


def test_smollm2_is_small_on_disk(strong: Result) -> None:
    report = strong.report
    assert report.bytes_after / report.bytes_before <= 0.16
    on_disk = sum(path.stat().st_size for path in strong.output.glob("*.safetensors"))
    assert on_disk - report.model_bytes_after < 0.005 * on_disk  # headers
    assert len(report.layers) == 210
    assert verify(strong.output).sound


def test_keep_is_kept(useful: Result) -> None:
    report = useful.report
    assert 0.84 < report.bytes_after / report.bytes_before <= 0.855


def test_a_useful_setting_still_speaks(useful: Result) -> None:
    model, tokenizer = load(useful.output, dtype=torch.float32)  # bfloat16 takes minutes on some CPUs
    assert perplexity(model, tokenizer, news_text(), windows=2).value < 60
    prompt = tokenizer(PROMPT, return_tensors="pt")
    said = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True)
    assert "solid, liquid, and gas" in said


def test_logits_of_the_dense_export_agree_to_rounding(useful: Result, tmp_path: Path) -> None:
    dense = export(useful.output, tmp_path / "dense")
    ours, tokenizer = load(useful.output, dtype=torch.float32)
    plain, _ = load(dense, dtype=torch.float32)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        a, b = ours(**prompt).logits, plain(**prompt).logits
    # The export rounds U V + S to bfloat16 once more: here S alone is stored, so nothing is left to round.
    assert float((a - b).norm() / b.norm()) < 1e-4


def test_minilm_embeds(tmp_path: Path) -> None:
    result = compress(minilm(), tmp_path / "out", Recipe(rank=8, sparsity=0.9, iterations=1))
    assert result.report.bytes_after / result.report.bytes_before <= 0.16
    model, tokenizer = load(result.output)
    out = model(**tokenizer(["a film", "a longer sentence about a film"], padding=True, return_tensors="pt"))
    assert out.last_hidden_state.shape[0] == 2
    assert torch.isfinite(out.last_hidden_state).all()
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
