"""The distance from a teacher against plain float64 computations, and what of a batch it counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import token_batch, toy_model
from torch import Tensor

from losparse_cli.finetuning import distillation
from losparse_cli.finetuning.distillation import distance, soft_divergence
from losparse_cli.finetuning.request import Finetuning


def distilling(**options: Any) -> Finetuning:
    return Finetuning(objective="distill", **options)


def plain(logits: Tensor, goal: Tensor, T: float) -> Tensor:
    """T² Σ p log(p / q), the mean over rows, in float64."""
    p, log_q = (goal.double() / T).softmax(-1), (logits.double() / T).log_softmax(-1)
    return T**2 * (p * (p.log() - log_q)).sum(-1).mean()


@pytest.mark.parametrize("chunk", [1, 50, 1 << 24])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_value_and_gradient(temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "CHUNK_ON_CPU", chunk)
    logits, goal = (3 * torch.randn(11, 17, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss, expected = soft_divergence(ours, goal, temperature), plain(theirs, goal, temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)
    # And against differences, so that both are not wrong alike.
    nudge = torch.randn_like(theirs)
    with torch.no_grad():
        slope = (
            plain(theirs + 1e-6 * nudge, goal, temperature) - plain(theirs - 1e-6 * nudge, goal, temperature)
        ) / 2e-6
    assert float((ours.grad * nudge).sum()) == pytest.approx(3 * float(slope), rel=1e-3)


def test_the_teacher_itself_is_at_no_distance() -> None:
    logits = torch.randn(5, 9, requires_grad=True)
    loss = soft_divergence(logits, logits.detach(), 2.0)
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert float(logits.grad.abs().max()) < 1e-6


def test_classes_that_both_rule_out() -> None:
    """Logits of -inf, as some models give to tokens that are never to come."""
    logits, goal = torch.randn(4, 6), torch.randn(4, 6)
    expected = soft_divergence(logits[:, :4], goal[:, :4], 2.0)
    logits[:, 4:] = goal[:, 4:] = -torch.inf
    logits.requires_grad_()
    found = soft_divergence(logits, goal, 2.0)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert bool(logits.grad.isfinite().all())
    assert not logits.grad[:, 4:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision(dtype: torch.dtype) -> None:
    logits, goal = torch.randn(6, 8).to(dtype).requires_grad_(), torch.randn(6, 8).to(dtype)
    loss = soft_divergence(logits, goal, 2.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(float(loss), float(plain(logits.detach(), goal, 2.0)), rtol=1e-4, atol=0)
    loss.backward()
    assert logits.grad.dtype == dtype
    assert bool(logits.grad.any())


def outputs_of(**tensors: Any) -> dict[str, Any]:
    return tensors


def test_classes() -> None:
    logits, goal = torch.randn(4, 3), torch.randn(4, 3)
    inputs = {"attention_mask": torch.tensor([[1, 1, 0]] * 4)}  # which concerns tokens, and not rows
    found = distance({"logits": logits}, {"logits": goal}, inputs, distilling(temperature=3.0, distill_weight=0.25))
    assert float(found) == pytest.approx(0.25 * float(plain(logits, goal, 3.0)), rel=1e-5)


def test_a_regression() -> None:
    logits, goal = torch.randn(4, 1), torch.randn(4, 1)
    found = distance({"logits": logits}, {"logits": goal}, {}, distilling(distill_weight=2.0))
    assert float(found) == pytest.approx(2 * float((logits - goal).square().mean()), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_answers_lie_in_what_is_no_padding(dtype: torch.dtype, temperature: float) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    ours, theirs = ({n: torch.randn(2, 5).to(dtype) for n in ("start_logits", "end_logits")} for _ in range(2))
    expected = 0.0
    for name in ours:
        rows = [plain(ours[name][k, :n][None], theirs[name][k, :n][None], temperature) for k, n in ((0, 5), (1, 3))]
        expected += float(sum(rows)) / 2
        ours[name].requires_grad_()
    found = distance(ours, theirs, {"attention_mask": mask}, distilling(temperature=temperature))
    assert float(found) == pytest.approx(expected, rel=1e-3)
    found.backward()
    for tensor in ours.values():
        assert not tensor.grad[1, 3:].any()
        assert bool(tensor.grad[0].isfinite().all())
        assert bool(tensor.grad[0].any())


def test_tokens_that_are_padding_do_not_count() -> None:
    ours, theirs = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    where = mask > 0
    found = distance({"logits": ours}, {"logits": theirs}, {"attention_mask": mask}, distilling())
    assert float(found) == pytest.approx(float(plain(ours[where], theirs[where], 2.0)), rel=1e-5)
    whole = distance({"logits": ours}, {"logits": theirs}, {}, distilling())
    assert float(whole) == pytest.approx(float(plain(ours.flatten(0, 1), theirs.flatten(0, 1), 2.0)), rel=1e-5)


def test_of_what_is_written_labels_decide() -> None:
    """The mask of an encoder-decoder is that of what is read, of another length."""
    ours, theirs = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    labels = torch.tensor([[4, 5, 2], [4, -100, -100]])
    inputs = {"attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), "labels": labels}
    found = distance(
        {"logits": ours, "encoder_last_hidden_state": torch.zeros(2, 4, 2)}, {"logits": theirs}, inputs, distilling()
    )
    where = labels >= 0
    assert float(found) == pytest.approx(float(plain(ours[where], theirs[where], 2.0)), rel=1e-5)


def test_hidden_states() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    ours, theirs = ([torch.randn(2, 3, 5) for _ in range(2)] for _ in range(2))
    logits = torch.randn(2, 4)
    how = distilling(distill_weight=0.0, hidden_weight=0.5)
    found = distance(
        {"logits": logits, "hidden_states": tuple(ours)}, {"logits": logits, "hidden_states": tuple(theirs)},
        {"attention_mask": mask}, how,
    )  # fmt: skip
    where = mask > 0
    parts = [
        float((a[where] - b[where]).double().square().mean() / b[where].double().square().mean())
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert float(found) == pytest.approx(0.5 * sum(parts) / 2, rel=1e-5)


def test_hidden_states_of_what_is_written_count_where_labels_do() -> None:
    ours, theirs = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    labels = torch.tensor([[4, 5, 2], [4, -100, -100]])
    logits = torch.randn(2, 3, 7)
    found = distance(
        {"logits": logits, "decoder_hidden_states": (ours,)}, {"logits": logits, "decoder_hidden_states": (theirs,)},
        {"attention_mask": torch.ones(2, 9), "labels": labels}, distilling(distill_weight=0.0, hidden_weight=1.0),
    )  # fmt: skip
    where = labels >= 0
    expected = (ours[where] - theirs[where]).square().mean() / theirs[where].square().mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_a_loss_that_is_no_number_is_not_hidden() -> None:
    logits, goal = torch.randn(4, 6), torch.randn(4, 6)
    for broken in ((logits.clone().fill_(torch.nan), goal), (logits, goal.clone().fill_(torch.nan))):
        assert not bool(torch.isfinite(soft_divergence(*broken, 2.0)))


@pytest.mark.parametrize("name", ["llama", "bert", "bert-qa", "bart", "t5"])
def test_with_models(name: str) -> None:
    """Nothing between equals, something between others, and what stands on padding changes neither."""
    how = distilling(hidden_weight=1.0)
    teacher, student = toy_model(name), toy_model(name, seed=1)
    inputs = token_batch(teacher, 3, 9)
    if "decoder_input_ids" in inputs:
        inputs["labels"] = torch.where(inputs["decoder_input_ids"] > 60, -100, inputs["decoder_input_ids"])
    given = {n: x for n, x in inputs.items() if n != "labels"}

    def between(model: Any, batch: dict[str, Tensor]) -> float:
        with torch.no_grad():
            goal = teacher(**given, output_hidden_states=True)
            batch = {n: x for n, x in batch.items() if n != "labels"}
            return float(distance(model(**batch, output_hidden_states=True), goal, inputs, how))

    assert between(teacher, inputs) == pytest.approx(0, abs=1e-5)
    far = between(student, inputs)
    assert far > 0.1
    changed = inputs | {"input_ids": torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], 50)}
    assert not torch.equal(changed["input_ids"], inputs["input_ids"])
    assert between(student, changed) == pytest.approx(far, rel=1e-4)
