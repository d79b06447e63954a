"""Whole numbers that move while their block is matched: nearer to the dense block, in no byte more."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import digests, tensor_bytes

from losparse_cli.checkpoint.config import layer_specs, layer_tensors
from losparse_cli.checkpoint.layers import numbers_of, read_layer
from losparse_cli.checkpoint.report import Report
from losparse_cli.checkpoint.source import REPORT, open_checkpoint
from losparse_cli.compress import compress
from losparse_cli.compression.estimate import forecast
from losparse_cli.compression.matching import match_block
from losparse_cli.compression.moving_codes import MovingCodes, Rounding
from losparse_cli.compression.request import Matching, Refinement
from losparse_cli.errors import UsageError
from losparse_cli.linalg.factors import LowRankCodes
from losparse_cli.linalg.integers import code, column_metric, limits, rounded, short, unrounded
from losparse_cli.refine import prepare_refinement, refine
from losparse_cli.shim.layouts import COLUMN_FACTORS, times_runs
from losparse_cli.text.windows import Calibration
from losparse_cli.verify import verify
from tests.compression.test_matching import Scene, state


@pytest.mark.parametrize("fed", [True, False], ids=["feedback", "alone"])
def test_what_codes_were_rounded_from_is_half_a_step_away_at_most(fed: bool) -> None:
    chance = torch.Generator().manual_seed(0)
    W = torch.randn(24, 150, generator=chance)
    X = torch.randn(900, 150, generator=chance) @ torch.randn(150, 150, generator=chance)
    metric = column_metric(X.T @ X / 900, COLUMN_FACTORS) if fed else None
    columns = torch.ones(150) if metric is None else metric.columns
    a = 0.2 + torch.rand(24, generator=chance)
    q = rounded(W, a, 0.0) if metric is None else code(W, metric, a, weight=0.0)
    u = unrounded(W, q.float(), a, metric, columns)
    assert float((u - q).abs().max()) < 0.5 + 1e-3
    assert float((u - q).abs().mean()) == pytest.approx(0.25, abs=0.02)  # anywhere between two codes
    direct = W / a[:, None] / columns
    assert torch.equal(u.round(), direct.round()) is not fed  # errors that were handed on are part of it


def coded_scene(name: str, step: float = 0.1, **changes: Any) -> tuple[Scene, dict[str, Rounding]]:
    """A block whose layers are rounded coarsely; each may take the bits that its codes take, by their size."""
    scene = Scene(name)
    made = {}
    for layer in scene.layers:
        weight = scene.block.get_parameter(f"{layer}.weight")
        W = (weight.T if scene.transposed[layer] else weight).detach().contiguous()
        a = W.abs().amax(1) * step
        q = rounded(W, a, 0.0)
        empty = LowRankCodes(W.new_zeros(len(W), 0), W.new_zeros(0, W.shape[1]), a, torch.ones(W.shape[1]), q)
        scene.layers[layer] = empty  # type: ignore[assignment]
        most = int(q.abs().sum())
        made[layer] = Rounding(
            W / a[:, None], changes.get("width", 0), changes.get("sparse", False),
            changes.get("fits", lambda one, most=most: int(one.codes.abs().sum()) <= most),
        )  # fmt: skip
    return scene, made


def match(scene: Scene, made: dict[str, Rounding], **options: Any) -> Any:
    how = Matching(steps=30, lr=2e-3)
    return match_block(
        scene.block, scene.calls, scene.targets, scene.layers, scene.norms, how, transposed=scene.transposed,
        roundings=made, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_loss_falls_and_nothing_grows(name: str) -> None:
    scene, made = coded_scene(name)
    before, start = state(scene.block), deepcopy(scene.layers)
    found = match(scene, made, held_out=1)
    assert found.loss_after < 0.9 * found.loss_before
    assert found.held_out_after < found.held_out_before
    moved = 0
    for layer, factors in found.factors.items():
        assert isinstance(factors, LowRankCodes)
        was: Any = start[layer]
        assert torch.equal(scene.layers[layer].codes, was.codes)  # type: ignore[attr-defined]  # left alone
        assert factors.codes.dtype == was.codes.dtype
        assert int(factors.codes.abs().sum()) <= int(was.codes.abs().sum())
        moved += int((factors.codes != was.codes).sum())
    assert moved > 0
    after = state(scene.block)
    assert {n for n in after if not torch.equal(after[n], before[n])} <= set(scene.norms)


def test_what_does_not_fit_keeps_the_codes_it_had() -> None:
    scene, made = coded_scene("llama", fits=lambda one: False)
    found = match(scene, made)
    for layer, factors in found.factors.items():
        assert torch.equal(factors.codes, scene.layers[layer].codes)  # type: ignore[union-attr,attr-defined]
    assert found.loss_after < found.loss_before  # factors of rows, and norms


def test_zeros_of_a_pattern_stay() -> None:
    scene, made = coded_scene("llama", step=0.4, sparse=True)
    found = match(scene, made)
    for layer, factors in found.factors.items():
        zeros = scene.layers[layer].codes == 0  # type: ignore[attr-defined]
        assert bool(zeros.any())
        assert not bool(factors.codes[zeros].any())  # type: ignore[union-attr]


def test_codes_of_a_width_stay_within_it_and_multiples_of_their_runs() -> None:
    scene, made = coded_scene("llama", width=4, fits=lambda one: True)
    for layer, factors in list(scene.layers.items()):
        codes = factors.codes.clamp(*limits(4))  # type: ignore[attr-defined]
        runs = torch.randint(1, 4, codes.shape, dtype=torch.int8) * (1 - 2 * torch.randint(0, 2, codes.shape).char())
        scene.layers[layer] = replace(factors, codes=codes * runs, runs=runs)  # type: ignore[type-var,call-arg]
        made[layer] = replace(made[layer], latent=made[layer].latent * runs)
    found = match(scene, made)
    moved = 0
    for layer, factors in found.factors.items():
        whole = factors.codes / factors.runs  # type: ignore[union-attr]
        assert torch.equal(whole, whole.round())
        assert limits(4)[0] <= float(whole.min()) <= float(whole.max()) <= limits(4)[1]
        moved += int((factors.codes != scene.layers[layer].codes).sum())  # type: ignore[union-attr,attr-defined]
    assert moved > 0


def test_gradients_of_codes_are_those_of_what_they_round() -> None:
    scene, made = coded_scene("llama")
    layer = next(iter(scene.layers))
    factors: Any = scene.layers[layer]
    form = MovingCodes(factors, made[layer], transposed=False)
    W = form()
    assert torch.allclose(W, factors.dense())
    slope = torch.randn(W.shape, generator=torch.Generator().manual_seed(1))
    W.backward(slope)
    assert torch.allclose(form.latent.grad, slope * factors.columns * factors.rows[:, None])  # type: ignore[arg-type]
    assert torch.allclose(form.change.grad, (slope * W).sum(1), rtol=1e-4)  # type: ignore[arg-type]


# --- a whole run -------------------------------------------------------------------------------------

HOW = Refinement(steps=48, lr=1e-3)


@pytest.fixture
def asked(tmp_path: Path) -> Calibration:
    text = " ".join(f"Sentence {k} of the text says that {k * k % 97} is not {k}." for k in range(900))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    return Calibration(str(tmp_path / "text.txt"), tokens=8192, length=32, batch=8)


def bits_of(report: Report) -> float:
    return 8 * sum(layer.bytes_after for layer in report.layers) / sum(layer.parameters for layer in report.layers)


def far(blocks: tuple[dict[str, Any], ...], when: str) -> float:
    return sum(block[f"held_out_{when}"] for block in blocks)


@pytest.mark.parametrize(
    "size", [{"bits": 3.0, "rank": 1}, {"grid": "int4"}, {"sparsity": 0.6, "value_bits": 4}], ids=str
)
def test_compressed_and_matched_nearer_in_the_bytes_asked_for(
    size: dict[str, Any],
    toy: Any,
    asked: Calibration,
    tmp_path: Path,
) -> None:
    dense = toy("llama", tokenizer=True, dtype=torch.bfloat16)
    made = compress(dense, tmp_path / "made", size, calibration=asked, refinement=HOW)
    assert far(made.report.blocks, "after") < far(made.report.blocks, "before")
    if "bits" in size:
        assert bits_of(made.report) <= 3
    assert verify(made.output).sound
    if "sparsity" in size:
        assert all(layer.density <= 0.4 for layer in made.report.layers if not layer.head)


def test_killed_between_blocks_it_ends_with_the_same_bytes(
    toy: Any,
    asked: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = toy("llama", tokenizer=True, num_hidden_layers=2)
    options: dict[str, Any] = {"bits": 3.0, "calibration": asked, "refinement": Refinement(steps=4)}
    whole = compress(dense, tmp_path / "whole" / "out", **options).output
    done = 0

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        if done == 1:
            raise KeyboardInterrupt
        done += 1
        return match_block(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("losparse_cli.compression.block.match_block", killed)
        with pytest.raises(KeyboardInterrupt):
            compress(dense, tmp_path / "killed" / "out", **options)
    again = compress(dense, tmp_path / "killed" / "out", **options)
    assert again.resumed
    assert digests(again.output) == digests(whole)


def test_a_checkpoint_of_whole_numbers_is_matched_later(toy: Any, asked: Calibration, tmp_path: Path) -> None:
    dense = toy("llama", tokenizer=True)
    small = compress(dense, tmp_path / "small", bits=3.0, calibration=asked)
    made = refine(small.output, tmp_path / "made", calibration=asked, against=dense, refinement=HOW)
    assert far(made.report.blocks, "after") < far(made.report.blocks, "before")  # type: ignore[union-attr]
    assert bits_of(made.report) <= bits_of(small.report)
    assert verify(made.output).sound
    changed = {
        name for name, tensor in tensor_bytes(made.output).items() if tensor != tensor_bytes(small.output).get(name)
    }
    assert any(name.endswith("S_codes") for name in changed)
    assert not any("embed_tokens" in name or "lm_head" in name for name in changed)


def test_both_one_after_the_other(
    toy: Any, asked: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, matched = toy("llama", tokenizer=True), []

    def match(*args: Any, **kwargs: Any) -> Any:
        matched.append(match_block(*args, **kwargs))
        return matched[-1]

    monkeypatch.setattr("losparse_cli.compression.block.match_block", match)
    both = {"mode": "both", "steps": 48, "lr": 1e-3, "minutes": 0.02}
    made = compress(dense, tmp_path / "out", bits=3.0, calibration=asked, refinement=both)
    assert len(matched) == 2
    assert made.report.refinement["divergence_after"] <= made.report.refinement["divergence_before"]
    assert bits_of(made.report) <= 3
    assert len(made.report.blocks) == 2
    trained, again = "Trained towards the whole dense model", "Each block was trained to match"
    card = (made.output / "README.md").read_text(encoding="utf-8")
    assert 0 < card.index(again) < card.index(trained)
    more = refine(made.output, tmp_path / "then", calibration=asked, against=dense, refinement=Refinement(steps=2))
    assert more.report.refinement == made.report.refinement | {"followed_by": "blocks"}
    card = (more.output / "README.md").read_text(encoding="utf-8")
    assert 0 < card.index(trained) < card.index(again)
    with pytest.raises(UsageError, match="one thing at a time"):
        refine(made.output, tmp_path / "more", calibration=asked, against=dense, refinement={"mode": "both"})


def test_codes_that_were_read_from_a_file_may_grow_past_a_byte() -> None:
    scene, made = coded_scene("llama", step=1 / 127, fits=lambda one: True)
    layer = next(iter(scene.layers))
    factors: Any = scene.layers[layer]
    narrow = replace(factors, codes=factors.codes.clamp(-127, 127).to(torch.int8))
    form = MovingCodes(narrow, made[layer], transposed=False)
    with torch.no_grad():
        form.latent.mul_(1.1)
    found = form.factors().codes
    assert int(found.abs().max()) > 127
    assert bool((found.sign() * narrow.codes.sign() >= 0).all())


@pytest.mark.parametrize("values", ["codes", "float"])
def test_refining_asks_nothing_of_the_loss(
    values: str, toy: Any, asked: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = toy("llama", tokenizer=True)
    small = compress(dense, tmp_path / "small", values=values).output

    def measured(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing needs it")

    monkeypatch.setattr("losparse_cli.compression.foreseen.measure_sensitivity", measured)
    how = Refinement(steps=1)
    made = refine(small, tmp_path / "made", calibration=asked, against=dense, refinement=how).report
    assert len(made.blocks) == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("report", [True, False], ids=["reported", "no report"])
def test_zeros_and_widths_of_single_layers_stay(report: bool, toy: Any, asked: Calibration, tmp_path: Path) -> None:
    dense = toy("llama", tokenizer=True, hidden_size=64)
    layers = {"k_proj": {"sparsity": 0.5, "value_bits": 4}, "q_proj": {"grid": "int4"}, "o_proj": {"grid": "int8"}}
    small = compress(dense, tmp_path / "small", {"bits": 3.0, "layers": layers}, calibration=asked).output
    if not report:
        (small / REPORT).unlink()
    made = refine(small, tmp_path / "made", calibration=asked, against=dense, refinement=HOW).output
    for layer, width in (("q_proj", 4), ("k_proj", 0), ("o_proj", 8)):
        was, now = (stored(folder, f"model.layers.0.self_attn.{layer}") for folder in (small, made))
        assert not torch.equal(was.codes, now.codes)
        if not width:
            assert not bool(now.codes[was.codes == 0].any())
            continue
        numbers = numbers_of(now)
        assert limits(width)[0] <= int(numbers.min()) <= int(numbers.max()) <= limits(width)[1]
        assert torch.equal(now.rows, short(now.rows) if width == 4 else now.rows.half().float())
        if now.runs is not None:
            assert torch.equal(times_runs(numbers, now.runs), now.codes)


def stored(folder: Path, name: str) -> LowRankCodes:
    checkpoint = open_checkpoint(folder)
    spec = layer_specs(checkpoint)[name]
    found = read_layer(checkpoint, name, spec, layer_tensors(checkpoint, name, spec))
    assert isinstance(found, LowRankCodes)
    return found


def test_a_plan_to_refine_codes_has_room_for_what_they_were_rounded_from(
    toy: Any, asked: Calibration, tmp_path: Path
) -> None:
    dense = toy("llama", tokenizer=True)
    need = []
    for values in ("codes", "float"):
        small = compress(dense, tmp_path / values, values=values).output
        job = prepare_refinement(
            small, tmp_path / "made", calibration=asked, against=dense, refinement=Refinement(steps=1)
        )
        need.append(forecast(job).need.fixed_bytes)
    assert need[0] >= need[1] + 4 * 131**2  # a second moment of the widest
