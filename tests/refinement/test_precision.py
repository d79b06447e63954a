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
from torch.nn import functional as F

from losparse_cli import Recipe, compress, load
from losparse_cli.compress import plan
from losparse_cli.compression.estimate import estimate
from losparse_cli.compression.fingerprint import fingerprint
from losparse_cli.compression.request import ModelRefinement
from losparse_cli.errors import UsageError
from losparse_cli.models import device
from losparse_cli.refine import make_refinement, prepare_refinement
from losparse_cli.refinement import run
from losparse_cli.refinement.layers import DenseCodes, unfold
from losparse_cli.refinement.training import Training
from losparse_cli.text.request import Calibration
from tests.refinement.test_training import refined

HOW = ModelRefinement(steps=8, lr=3e-3, tokens=512, precision="float32")
HALF = replace(HOW, precision="bfloat16")


@pytest.fixture(scope="module")
def small(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(dense, tmp_path_factory.mktemp("precision") / "small", Recipe(rank=2, bits=3.0)).output


def test_codes_in_bfloat16_are_those_that_autocast_makes(small: Path) -> None:
    """It would round them so at every step."""
    products: list[Tensor] = []
    found: list[list[Tensor]] = []
    x = torch.randn(3, 7, 68, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = load(small, dtype=torch.float32)
        model.requires_grad_(False)
        unfold(model, 1 << 30, dtype)
        layer = model.model.layers[0].self_attn.q_proj
        assert isinstance(layer, DenseCodes)
        assert layer.C.dtype == dtype
        layer.requires_grad_()
        leaf = x[..., : layer.C.shape[1]].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            products.append(F.linear(leaf, layer.C).detach())
            y = layer(leaf)
        y.float().square().sum().backward()
        found.append([y.float(), leaf.grad, layer.weight.grad, layer.U.grad, layer.V.grad])  # type: ignore[list-item]
    assert torch.equal(*products)
    scale = found[0][0].abs().max()
    assert (found[0][0] - found[1][0]).abs().max() <= 2**-7 * scale  # the output is rounded, as autocast's own is
    for one, other in zip(*(part[1:] for part in found), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=float(2**-6 * one.abs().max()))


def test_small_changes_of_the_factors_of_rows_are_felt(small: Path) -> None:
    """Below what bfloat16 resolves, about one in 256."""
    model, _ = load(small, dtype=torch.float32)
    unfold(model, 1 << 30, torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(64, layer.C.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = layer(x).float()
        layer.weight.mul_(1 + 2**-10)
        after = layer(x).float()
    assert float(after.abs().sum() / before.abs().sum()) == pytest.approx(1 + 2**-10, abs=2**-12)


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


def test_layers_that_are_unfolded_when_they_compute(
    small: Path, dense: Path, text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = replace(HALF, steps=1, tokens=64)
    held = refined(small, tmp_path / "held", dense, text, how)
    monkeypatch.setattr(run, "unfold", lambda *arguments: None)
    result = refined(small, tmp_path / "out", dense, text, how)
    assert result.best.divergence == pytest.approx(held.best.divergence, rel=0.1)


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


def test_a_forecast_counts_half_for_codes(small: Path, dense: Path, text: Calibration, tmp_path: Path) -> None:
    for asked in ({"bits": 3.0}, {"keep": 0.5, "values": "float"}):
        jobs = [plan(dense, tmp_path / "out", calibration=text, refinement=how, **asked) for how in (HOW, HALF)]  # type: ignore[arg-type]
        whole, half = (estimate(job, job.windows).training_bytes for job in jobs)
        weights = sum(p.layer.weights for p in jobs[0].plan.layers if not p.layer.rows)
        assert whole - half == (2 * weights if "bits" in asked else 0)


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
