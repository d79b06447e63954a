"""A compressed model trained towards its dense one: what moves, what stays, and when it ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from terminal import done
from torch import Tensor
from torch.nn import functional as F

from losparse_cli import Recipe, compress, load, refine
from losparse_cli.compress import plan
from losparse_cli.compression.estimate import estimate
from losparse_cli.compression.request import ModelRefinement
from losparse_cli.errors import CheckpointError, OutputError, UsageError
from losparse_cli.models.head import Head
from losparse_cli.refine import RefinedModel, make_refinement, prepare_refinement, run_model
from losparse_cli.refinement import training
from losparse_cli.refinement.divergence import divergence
from losparse_cli.refinement.teacher import Teacher
from losparse_cli.refinement.training import Training
from losparse_cli.text.request import Calibration
from losparse_cli.verify import verify
from tests.hearing import Hearing

HOW = ModelRefinement(steps=12, lr=3e-3, tokens=128, precision="float32")


@pytest.fixture(scope="module")
def small(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(dense, tmp_path_factory.mktemp("refinement") / "small", Recipe(bits=2.5)).output


def refined(small: Path, output: Path, dense: Path, text: Calibration, how: ModelRefinement = HOW) -> RefinedModel:
    found = refine(small, output, calibration=text, against=dense, refinement=how)
    assert isinstance(found, RefinedModel)
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def test_nearer_to_the_dense_model_with_the_same_codes(
    small: Path, dense: Path, text: Calibration, tmp_path: Path
) -> None:
    result = refined(small, tmp_path / "out", dense, text)
    assert verify(result.output).sound
    assert result.best.divergence < 0.9 * result.looks[0].divergence
    before, after = tensors(small), tensors(result.output)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {
        name for name in before if before[name].dim() == 1 and before[name].is_floating_point() and "embed" not in name
    }
    assert all(before[name].dtype == after[name].dtype for name in before)
    ids = torch.randint(3, 90, (8, 32), generator=torch.Generator().manual_seed(5))
    logits = [load(folder, dtype=torch.float32)[0](ids).logits.detach() for folder in (dense, small, result.output)]
    goal, *found = (x.log_softmax(-1) for x in logits)
    lost = [float(F.kl_div(x, goal, log_target=True, reduction="sum")) for x in found]
    assert lost[1] < lost[0]


def test_the_first_look_is_the_divergence_of_what_was_given(
    small: Path, dense: Path, text: Calibration, tmp_path: Path
) -> None:
    job = prepare_refinement(small, tmp_path / "out", calibration=text, against=dense, refinement=HOW)
    assert job.windows is not None
    result = run_model(job)
    from losparse_cli.text.sample import held_out

    ids = job.windows.take(held_out(job.windows)).ids
    with torch.no_grad():
        goal, found = (load(folder, dtype=torch.float32)[0](ids).logits.log_softmax(-1) for folder in (dense, small))
    exact = float((goal.exp() * (goal - found)).sum()) / ids.numel()
    assert result.looks[0].divergence == pytest.approx(exact, rel=1e-3)


def test_what_makes_it_worse_is_not_written(
    small: Path, dense: Path, text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LOOKS", 1)  # at the end alone
    result = refined(small, tmp_path / "out", dense, text, ModelRefinement(steps=6, lr=0.9, tokens=64))
    assert result.best.step == 0
    before, after = tensors(small), tensors(result.output)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("killed_after", [1, 4])
def test_a_killed_run_goes_on_to_the_same_bytes(
    small: Path, dense: Path, text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    whole = tensors(refined(small, tmp_path / "whole", dense, text).output)
    looks = 0
    plain = Training._look

    def look(self: Any, state: Any) -> None:
        nonlocal looks
        plain(self, state)
        looks += 1
        if looks == killed_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_look", look)
        with pytest.raises(KeyboardInterrupt):
            refined(small, tmp_path / "out", dense, text)
    monkeypatch.setattr("losparse_cli.refinement.teacher._asked", None)  # the dense model is not asked again
    again = tensors(refined(small, tmp_path / "out", dense, text).output)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_same_command_again_has_nothing_to_do(small: Path, dense: Path, text: Calibration, tmp_path: Path) -> None:
    first = refined(small, tmp_path / "out", dense, text)
    again = refined(small, tmp_path / "out", dense, text)
    assert again.seconds == 0
    assert again.best.divergence == first.best.divergence
    assert not list(tmp_path.glob("*.partial"))
    assert not (tmp_path / "out" / "training").exists()


@pytest.mark.parametrize(("train", "moved"), [("scales", "_proj.weight"), ("norms", "norm.weight")])
def test_only_what_was_asked_for_moves(
    small: Path, dense: Path, text: Calibration, tmp_path: Path, train: str, moved: str
) -> None:
    how = ModelRefinement(steps=3, train=(train,), lr=1e-3, tokens=64)
    before, after = tensors(small), tensors(refined(small, tmp_path / "out", dense, text, how).output)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.endswith(moved) and before[name].dim() == 1
    }


def test_u_and_v_move_beside_codes(dense: Path, text: Calibration, tmp_path: Path) -> None:
    small = compress(dense, tmp_path / "small", Recipe(rank=2, bits=4.0)).output
    how = ModelRefinement(steps=3, train=("lowrank",), lr=1e-2, tokens=64)
    before, after = tensors(small), tensors(refined(small, tmp_path / "out", dense, text, how).output)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith((".U", ".V"))}


def test_floats_are_trained_with_their_zeros(dense: Path, text: Calibration, tmp_path: Path) -> None:
    small = compress(dense, tmp_path / "small", Recipe(rank=2, sparsity=0.5)).output
    result = refined(small, tmp_path / "out", dense, text, ModelRefinement(steps=8, lr=1e-2, tokens=128))
    assert result.best.divergence < result.looks[0].divergence
    before, after = (load(folder)[0].model.layers[0].mlp.up_proj for folder in (small, result.output))
    assert torch.equal(before.support(), after.support())


# --- the time -------------------------------------------------------------------------------------


def ticking(seconds: float) -> Callable[[], float]:
    """A clock by which everything between two looks at it takes so long."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += seconds
        return now

    return clock


def test_training_ends_before_its_time_is_up(small: Path, dense: Path, text: Calibration, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    rates: list[float] = []
    plain = torch.optim.Adam.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    monkeypatch.setattr(training.time, "monotonic", ticking(1.0))
    result = refined(small, tmp_path / "out", dense, text, ModelRefinement(minutes=2, lr=1e-3, tokens=64))
    assert 10 < result.steps < 60
    assert result.looks[-1].seconds <= 125
    assert max(rates) == pytest.approx(1e-3, rel=0.05)
    assert rates[-1] < 5e-5
    assert all(a >= b for a, b in pairwise(rates[5:]))


def test_no_time_for_a_step(small: Path, dense: Path, text: Calibration, tmp_path: Path) -> None:
    heard = Hearing()
    how = ModelRefinement(minutes=1e-6)
    result = refine(small, tmp_path / "out", calibration=text, against=dense, refinement=how, progress=heard)
    assert isinstance(result, RefinedModel)
    assert result.steps == 0
    assert any("Raise --refine-minutes" in sentence for sentence in heard.warned)
    assert all(torch.equal(a, tensors(result.output)[name]) for name, a in tensors(small).items())


# --- the loss -------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_whole(dense: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("losparse_cli.refinement.divergence.LOGITS", 4 * 101 * 3)  # three tokens at a time
    model, teacher = (load(folder, dtype=torch.float32)[0] for folder in (small, dense))
    ids = {"input_ids": torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))}
    head = Head(model, ids)
    with torch.no_grad():
        goal = Head(teacher, ids).states(ids)
    states = head.states(ids).detach().requires_grad_()
    weight = teacher.get_output_embeddings().weight.detach()
    total, slope = divergence(head, states, goal, Teacher(goal, weight, None), gradients=True)
    log_q = model.get_output_embeddings()(states).log_softmax(-1)
    exact = F.kl_div(log_q, F.linear(goal, weight).log_softmax(-1), log_target=True, reduction="sum")
    exact.backward()
    assert total == pytest.approx(float(exact), rel=1e-4)
    torch.testing.assert_close(slope, states.grad, rtol=1e-4, atol=1e-6)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3])
def test_a_loss_that_stops_being_a_number_ends_it(
    small: Path, dense: Path, text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    plain, calls = training.divergence, 0

    def broken(*args: Any, gradients: bool) -> tuple[float, Tensor]:
        nonlocal calls
        calls += gradients
        lost, slope = plain(*args, gradients=gradients)
        return (float("nan"), slope) if gradients and calls > steps else (lost, slope)

    monkeypatch.setattr(training, "divergence", broken)
    heard = Hearing()
    how = ModelRefinement(steps=12, lr=3e-3, tokens=32)
    result = refine(small, tmp_path / "out", calibration=text, against=dense, refinement=how, progress=heard)
    assert isinstance(result, RefinedModel)
    assert result.steps == steps
    assert result.best.divergence <= result.looks[0].divergence
    assert any("lower --refine-lr than 0.003" in sentence for sentence in heard.warned)
    assert verify(result.output).sound


def test_a_model_that_gives_no_numbers(
    small: Path, dense: Path, text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "divergence", lambda *args, gradients: (float("nan"), torch.zeros_like(args[1])))
    with pytest.raises(CheckpointError, match="gives no numbers"):
        refined(small, tmp_path / "out", dense, text)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "t5"])
def test_other_architectures(name: str, toy: Callable[..., Path], text: Calibration, tmp_path: Path) -> None:
    dense = toy(name, tokenizer=True)
    small = compress(dense, tmp_path / "small", Recipe(bits=3.0)).output
    result = refined(small, tmp_path / "out", dense, text, ModelRefinement(steps=10, lr=2e-3, tokens=128))
    assert verify(result.output).sound
    assert result.best.divergence < result.looks[0].divergence


def test_another_vocabulary(small: Path, toy: Callable[..., Path], text: Calibration, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="vocabulary"):
        refined(small, tmp_path / "out", toy("llama", tokenizer=True, vocab_size=120), text)


def test_a_model_without_a_head(toy: Callable[..., Path], text: Calibration, tmp_path: Path) -> None:
    dense = toy("bert", tokenizer=True)
    small = compress(dense, tmp_path / "small", Recipe(bits=4.0)).output
    with pytest.raises(UsageError, match="losparse finetune"):
        refined(small, tmp_path / "out", dense, text)
    assert not list(tmp_path.glob("out*"))


def test_a_dense_model_that_it_was_not_made_from(
    small: Path, toy: Callable[..., Path], text: Calibration, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="num_hidden_layers is 2 in one"):
        refined(small, tmp_path / "out", toy("llama", tokenizer=True, num_hidden_layers=3), text)


def test_nothing_to_move(small: Path, dense: Path, text: Calibration, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no U and V"):
        refined(small, tmp_path / "out", dense, text, ModelRefinement(steps=1, train=("lowrank",)))
    assert not list(tmp_path.iterdir())


def test_only_embeddings_are_compressed(toy: Callable[..., Path], text: Calibration, tmp_path: Path) -> None:
    dense = toy("qwen2", tokenizer=True, vocab_size=2000)  # smaller ones are left dense
    small = compress(dense, tmp_path / "small", Recipe(targets=("lm_head",), embedding_bits=6)).output
    with pytest.raises(UsageError, match="but embeddings"):
        refined(small, tmp_path / "out", dense, text)


def test_a_full_disk(
    small: Path, dense: Path, text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(training, "save_file", full)
        with pytest.raises(OutputError, match="goes on where it stopped"):
            refined(small, tmp_path / "out", dense, text)
    refined(small, tmp_path / "out", dense, text)


def test_a_torn_state_is_begun_anew(
    small: Path, dense: Path, text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("losparse_cli.refinement.run.write_refined", killed)
        with pytest.raises(KeyboardInterrupt):
            refined(small, tmp_path / "out", dense, text)
    state = tmp_path / "out.partial" / "training" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    assert refined(small, tmp_path / "out", dense, text).steps == 12


def test_a_checkpoint_without_a_report(small: Path, dense: Path, text: Calibration, tmp_path: Path) -> None:
    bare = shutil.copytree(small, tmp_path / "bare")
    (bare / "losparse_report.json").unlink()
    result = refined(bare, tmp_path / "out", dense, text)
    assert verify(result.output).sound
    whole = refined(small, tmp_path / "whole", dense, text).report
    assert result.report.bits == whole.bits
    assert result.report.model_bytes_after == whole.model_bytes_after


def test_text_of_which_nothing_can_be_held_out_is_not_called_so(small: Path, dense: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcd " * 400)
    result = refined(small, tmp_path / "out", dense, Calibration(str(tmp_path / "text.txt"), tokens=256, length=32))
    assert result.report.refinement["held_out"] == 0
    card = (result.output / "README.md").read_text(encoding="utf-8")
    assert "on the text that it was trained on 0." in card


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"minutes": 0}, "--refine-minutes"),
        ({"minutes": float("nan")}, "--refine-minutes"),
        ({"steps": 0}, "--refine-steps"),
        ({"lr": 2}, "--refine-lr"),
        ({"train": ("codes",)}, "--train"),
        ({"train": ()}, "--train"),
    ],
)
def test_numbers_that_are_none(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ModelRefinement(**settings)


def test_options_that_do_not_go_together(small: Path, dense: Path, text: Calibration) -> None:
    with pytest.raises(UsageError, match="--objective is one of"):
        make_refinement("both")
    with pytest.raises(UsageError, match="--refine-minutes is of --objective model"):
        make_refinement("blocks", minutes=3)
    with pytest.raises(UsageError, match="one thing at a time"):
        refine(small, calibration=text, against=dense, refinement="both")
    job = prepare_refinement(small, calibration=text, against=dense, refinement=make_refinement(steps=7))
    assert job.towards == ModelRefinement(steps=7)


def test_a_forecast_counts_the_minutes(dense: Path, text: Calibration, tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": 2.5, "calibration": text}
    without, within = (
        estimate(job, job.windows)
        for job in (
            plan(dense, tmp_path / "out", **options),
            plan(dense, tmp_path / "out", **options, refinement=ModelRefinement(minutes=60)),
        )
    )
    assert without.seconds < 1800 < 3600 <= within.least_seconds <= within.seconds <= within.most_seconds


# --- the command ----------------------------------------------------------------------------------


def test_the_command(small: Path, dense: Path, text: Calibration, tmp_path: Path) -> None:
    options = ("--calibration", text.source, "--calibration-tokens", "1280", "--calibration-length", "32")
    out = tmp_path / "out"
    command = ("refine", small, "--against", dense, *options, "--refine-steps", "8", "--refine-lr", "3e-3", "-o", out)
    spoken = done(*command)
    assert "At first: 0." in spoken.err
    assert "After 8 steps: 0." in spoken.err
    assert "From the dense model, on held-out text: 0." in spoken.out
    assert "8 steps of 1,024 tokens" in spoken.out
    data = json.loads(done(*command, "--json").out)
    assert data["divergence_after"] < data["divergence_before"]
    assert data["seconds"] == 0  # this very run had finished
    assert " 0 s" not in done(*command).out
    assert "nats a token from its predictions before" in (out / "README.md").read_text(encoding="utf-8")
