"""A refinement whose passes compute in bfloat16: near to that in float32, with codes that cost nothing more."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from terminal import done
from torch import Tensor

from losparse_cli import Recipe, compress
from losparse_cli.compress import plan
from losparse_cli.compression.estimate import estimate
from losparse_cli.compression.fingerprint import fingerprint
from losparse_cli.compression.request import ModelRefinement
from losparse_cli.errors import UsageError
from losparse_cli.models import device
from losparse_cli.refine import make_refinement, prepare_refinement
from losparse_cli.refinement.training import Training
from losparse_cli.text.request import Calibration
from tests.refinement.test_training import refined

HOW = ModelRefinement(steps=8, lr=3e-3, tokens=512, precision="float32")
HALF = replace(HOW, precision="bfloat16")


@pytest.fixture(scope="module")
def small(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(dense, tmp_path_factory.mktemp("precision") / "small", Recipe(rank=2, bits=3.0)).output


@pytest.mark.parametrize("recipe", [Recipe(bits=3.0), Recipe(rank=2, bits=3.0), Recipe(rank=2, sparsity=0.5)])
def test_as_near_to_the_dense_model_as_in_float32(
    recipe: Recipe, dense: Path, text: Calibration, tmp_path: Path
) -> None:
    small = compress(dense, tmp_path / "small", recipe).output
    whole, half = (refined(small, tmp_path / how.precision, dense, text, how) for how in (HOW, HALF))
    assert half.best.divergence < half.looks[0].divergence
    gained = whole.looks[0].divergence - whole.best.divergence
    assert half.best.divergence == pytest.approx(whole.best.divergence, abs=0.2 * gained)
    kinds = [{n: t.dtype for n, t in load_file(one.output / "model.safetensors").items()} for one in (whole, half)]
    assert kinds[0] == kinds[1]
    assert [one.report.refinement["precision"] for one in (whole, half)] == ["float32", "bfloat16"]


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "t5", "mixtral", "mamba", "bart"])
def test_other_architectures(name: str, toy: Callable[..., Path], text: Calibration, tmp_path: Path) -> None:
    dense = toy(name, tokenizer=True)
    small = compress(dense, tmp_path / "small", Recipe(bits=3.0)).output
    how = replace(HALF, steps=4, tokens=128, gradient_checkpointing=True)
    result = refined(small, tmp_path / "out", dense, text, how)
    assert result.best.divergence < result.looks[0].divergence


def test_what_is_trained_and_the_loss_stay_float32(
    small: Path, dense: Path, text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[torch.dtype, ...]] = set()
    plain = Training._gradient

    def watched(self: Any, *arguments: Any) -> tuple[float, Tensor]:
        found = plain(self, *arguments)
        seen.update((one.parameter.dtype, one.s.dtype, found[1].dtype) for one in self.moving.values())
        assert self._states([0]).dtype == torch.float32
        return found

    monkeypatch.setattr(Training, "_gradient", watched)
    refined(small, tmp_path / "out", dense, text, replace(HALF, steps=1, tokens=64))
    assert seen == {(torch.float32,) * 3}


def test_auto_is_what_is_fast_and_a_run_goes_on_by_that_alone(
    small: Path, dense: Path, text: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mark(how: ModelRefinement) -> Any:
        return fingerprint(prepare_refinement(small, calibration=text, against=dense, refinement=how))

    for fast, same in ((True, HALF), (False, HOW)):
        monkeypatch.setattr(device, "_has_bfloat16", lambda fast=fast: fast)
        assert mark(replace(HOW, precision="auto")) == mark(same)
    assert mark(HOW) != mark(HALF)


def test_a_forecast_counts_a_byte_for_a_code(dense: Path, text: Calibration, tmp_path: Path) -> None:
    sizes = ({"bits": 3.0}, {"keep": 0.5, "values": "float"})
    how = replace(HOW, train=("norms",))
    jobs = [plan(dense, tmp_path / "out", calibration=text, refinement=how, **asked) for asked in sizes]  # type: ignore[arg-type]
    coded, floats = (estimate(job, job.windows).training_bytes for job in jobs)
    weights = [p.layer.weights for p in jobs[0].plan.layers if p.bits]
    assert floats - coded == 3 * sum(weights) - 4 * max(weights)  # one is unfolded at a time


def test_precisions_that_are_none() -> None:
    with pytest.raises(UsageError, match="precision of a refinement is auto, float32, bfloat16, not 'float16'"):
        ModelRefinement(precision="float16")
    with pytest.raises(UsageError, match="--precision is of --objective model"):
        make_refinement("blocks", precision="bfloat16")


def test_the_commands(small: Path, dense: Path, text: Calibration, tmp_path: Path) -> None:
    reads = ("--calibration", text.source, "--calibration-tokens", "1280", "--calibration-length", "32")
    steps = ("--refine-steps", "2", "-o")
    done("refine", small, "--against", dense, *reads, "--precision", "bfloat16", *steps, tmp_path / "one")
    how = ("--refine", "model", "--refine-precision", "bfloat16")
    done("compress", dense, *reads, "--bits", "3", *how, *steps, tmp_path / "two")
    for name in ("one", "two"):
        report = json.loads((tmp_path / name / "losparse_report.json").read_text(encoding="utf-8"))
        assert report["refinement"]["precision"] == "bfloat16"
