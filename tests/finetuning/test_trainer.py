"""Steps of the optimizer: the same gradients however a batch is divided, and what is told of them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor

from losparse_cli.budget.recipe import Recipe
from losparse_cli.errors import UsageError
from losparse_cli.finetuning.prepare import Training, prepare_finetuning
from losparse_cli.finetuning.pruner import Pruner
from losparse_cli.finetuning.request import Finetuning
from losparse_cli.finetuning.trainer import FinetuneTrainer, Step, check_sharding
from losparse_cli.models.device import chosen_precision
from losparse_cli.progress import Progress
from tests.finetuning.learners import request_for, write_learner

CPU = torch.device("cpu")


class Watched(Progress):
    """A training that is run, with the gradients of every step, and what was told of it."""

    def __init__(self, place: Path, kind: str, **options: Any) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.steps: list[Step] = []
        model = options.pop("source", None) or write_learner(place / "model", kind)
        task = options.pop("request", None) or request_for(place, kind, validation=0)
        settings = {"precision": "float32", "max_steps": 3, "learning_rate": 1e-3, "max_grad_norm": 1e9} | options
        self.training: Training = prepare_finetuning(
            model, place / "out", task=task, how=Finetuning(**settings), device="cpu",
            recipe=Recipe(keep_parameters=0.5, rank_ratio=0.3, pattern="rows"),
        )  # fmt: skip
        watch = Pruner.watch

        def note(pruner: Pruner) -> None:
            self.gradients.append(
                {n: p.grad.clone() for n, p in self.training.model.named_parameters() if p.grad is not None}
            )
            watch(pruner)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Pruner, "watch", note)
            importlib.import_module("losparse_cli.finetune")._train(self.training, place / "out.partial", self)

    def step(self, step: Step) -> None:
        self.steps.append(step)


def same_gradients(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    largest = max(float(x.abs().max()) for x in a.values())
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5 * largest, msg=name)


OBJECTIVES: dict[str, dict[str, Any]] = {
    "task": {}, "both": {"distill_weight": 0.5}, "distill": {"objective": "distill"},
    "hidden": {"objective": "distill", "hidden_weight": 0.5},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("bert", "task"), ("bert", "both"), ("bert-qa", "distill"), ("llama", "task"), ("llama", "distill"),
        ("llama", "hidden"), ("t5", "distill"),
    ],
)  # fmt: skip
def test_two_halves_of_a_batch_are_the_batch(kind: str, objective: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 1, **OBJECTIVES[objective]}
    if objective != "task":
        options["teacher"] = str(write_learner(tmp_path / "teacher", kind, seed=3))
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = Watched(tmp_path / "one", kind, batch_size=16, **options)
    two = Watched(tmp_path / "two", kind, batch_size=8, gradient_accumulation_steps=2, **options)
    assert any(bool(gradient.any()) for gradient in one.gradients[0].values())
    if objective != "hidden":
        same_gradients(one.gradients[0], two.gradients[0])
        return
    # Hidden states are compared relative to the teacher's, and those of two halves have different sizes.
    a, b = (torch.cat([x.flatten() for x in run.gradients[0].values()]) for run in (one, two))
    assert float((a - b).norm() / a.norm()) < 0.1


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_gradient_checkpointing_changes_nothing(kind: str, tmp_path: Path) -> None:
    runs = []
    for asked in (False, True):
        place = tmp_path / str(asked)
        place.mkdir()
        runs.append(Watched(place, kind, batch_size=8, gradient_checkpointing=asked))
    plain, saving = (run.training.model.state_dict() for run in runs)
    for name in plain:
        torch.testing.assert_close(plain[name], saving[name], rtol=1e-4, atol=1e-5, msg=name)
    assert len(runs[1].gradients) == 3


def test_the_gradients_are_those_of_the_task(tmp_path: Path) -> None:
    """Against one pass by hand over the same rows."""
    run = Watched(tmp_path, "bert", batch_size=64, max_steps=1)
    model = prepare_again(run.training)
    batch = run.training.task.collator(run.training.tokenizer, model)(list(run.training.features.items))
    model(**batch).loss.backward()
    same_gradients({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, run.gradients[0])


def prepare_again(training: Training) -> Any:
    return prepare_finetuning(
        training.source.folder, training.output, task=training.task.request, how=training.how, device="cpu",
        recipe=Recipe(keep_parameters=0.5, rank_ratio=0.3, pattern="rows"),
    ).model.train()  # fmt: skip


def test_what_is_told_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of its last pass, also where the end of an epoch leaves fewer passes to a step."""
    losses: list[float] = []
    compute = FinetuneTrainer.compute_loss

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(FinetuneTrainer, "compute_loss", note)
    run = Watched(
        tmp_path, "bert", batch_size=8, gradient_accumulation_steps=3, max_steps=4,
        request=request_for(tmp_path, "bert", train=32, validation=16),
    )  # fmt: skip
    # Of four batches, three make one step and the last one another.
    assert len(losses) == 8
    assert [step.loss for step in run.steps] == pytest.approx([losses[2], losses[3], losses[6], losses[7]])
    assert [(step.step, step.total) for step in run.steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert run.steps[0].remaining == 1.0
    assert run.steps[-1].remaining < 0.5
    assert [bool(step.scores) for step in run.steps] == [False, False, True, True]


@pytest.mark.parametrize("kind", ["bert", "t5", "llama"])
def test_bfloat16(kind: str, tmp_path: Path) -> None:
    teacher = write_learner(tmp_path / "teacher", kind, seed=3)
    run = Watched(tmp_path, kind, precision="bfloat16", batch_size=8, teacher=str(teacher), hidden_weight=1.0)
    assert len(run.steps) == 3
    assert {p.dtype for p in run.training.model.parameters()} == {torch.float32}
    assert {p.dtype for p in run.training.teacher.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_float16(limit: float, tmp_path: Path) -> None:
    """Its gradients are scaled, and steps in which they overflow are skipped: importance knows nothing of either."""
    found = []
    for precision in ("float32", "float16"):
        place = tmp_path / precision
        place.mkdir()
        run = Watched(place, "bert", precision=precision, batch_size=8, max_steps=4, max_grad_norm=limit)
        assert {p.dtype for p in run.training.model.parameters()} == {torch.float32}
        found.append(torch.cat([layer.smoothed for layer in run.training.pruner.layers]))
    assert bool(found[0].any())
    torch.testing.assert_close(found[1], found[0], rtol=0.1, atol=0.1 * float(found[0].mean()))


def test_precision() -> None:
    assert chosen_precision("auto", CPU) in ("float32", "bfloat16")
    assert chosen_precision("bfloat16", CPU) == "bfloat16"
    assert chosen_precision("float32", torch.device("cuda")) == "float32"
    assert chosen_precision("float16", torch.device("cuda")) == "float16"


@pytest.mark.parametrize("kind", ["bert", "bert-stsb", "bert-qa", "llama", "bart", "t5"])
def test_the_teacher_is_the_dense_model(kind: str, tmp_path: Path) -> None:
    """Of a dense start, which says at first what its teacher says: the distance is nothing, until S is pruned."""
    task = "regression" if kind == "bert-stsb" else None
    run = Watched(
        tmp_path, kind, objective="distill", hidden_weight=1.0, batch_size=8, max_steps=8,
        request=request_for(tmp_path, kind, validation=0, task=task),
    )  # fmt: skip
    assert run.steps[0].loss == pytest.approx(0, abs=1e-4)
    assert run.steps[-1].loss > 100 * max(run.steps[0].loss, 1e-7)
    assert not any(p.requires_grad for p in run.training.teacher.parameters())


def test_distillation_needs_no_right_labels(tmp_path: Path) -> None:
    """What is learned is the teacher's opinion: with labels that are all wrong, the gradients are the same."""
    import json

    model = write_learner(tmp_path / "model", "bert")
    teacher = str(write_learner(tmp_path / "teacher", "bert", seed=3))
    request = request_for(tmp_path, "bert", validation=0)
    options = {"source": model, "objective": "distill", "teacher": teacher, "batch_size": 8, "max_steps": 2}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    right = Watched(tmp_path / "a", "bert", request=request, **options)
    rows = [json.loads(line) for line in Path(str(request.train_file)).read_text().splitlines()]
    Path(str(request.train_file)).write_text(
        "".join(json.dumps(row | {"label": (row["label"] + 1) % 3}) + "\n" for row in rows)
    )
    wrong = Watched(tmp_path / "b", "bert", request=request, **options)
    for a, b in zip(right.gradients, wrong.gradients, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_that_flattens_tensors_is_refused(version: int) -> None:
    plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=version)
    check_sharding(None)
    if version == 2:
        check_sharding(plugin)
    else:
        with pytest.raises(UsageError, match=r"without regard to their neurons\. Give --fsdp_version 2"):
            check_sharding(plugin)
