"""`losparse finetune`, end to end: tasks that are learned, what is written, and runs that are killed."""

from __future__ import annotations

import errno
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors.torch import load_file
from torch import Tensor

import losparse_cli
from losparse_cli.budget.recipe import Recipe
from losparse_cli.checkpoint.workfolder import WorkFolder
from losparse_cli.errors import OutputError, ResumeError, TrainingError, UsageError
from losparse_cli.finetune import Finetuned, finetune
from losparse_cli.finetuning import result as written
from losparse_cli.finetuning.conversion import compressed_layers
from losparse_cli.finetuning.prepare import prepare_finetuning
from losparse_cli.finetuning.pruner import Pruning
from losparse_cli.finetuning.request import Finetuning
from losparse_cli.finetuning.states import last_state
from losparse_cli.finetuning.trainer import FinetuneTrainer, Step
from losparse_cli.progress import Progress
from losparse_cli.tasks.kinds import open_task
from losparse_cli.verify import verify
from tests.finetuning.learners import LEARNERS, request_for, write_learner

verb = importlib.import_module("losparse_cli.finetune")  # the function of that name hides it
CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"precision": "float32", "batch_size": 8, "learning_rate": 3e-3}


def how_of(**options: Any) -> Finetuning:
    pruning = {k: options.pop(k) for k in list(options) if k in Pruning.__dataclass_fields__}
    return Finetuning(**{**QUICK, **options, "pruning": Pruning(**pruning)})


def small(**options: Any) -> Recipe:
    return Recipe(**({"keep_parameters": 0.5, "rank_ratio": 0.3, "pattern": "rows"} | options))


def logits(model: Any, kind: str) -> Tensor:
    """What a model says to a fixed batch of words."""
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(4, 28, (3, 9), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    model.eval()
    with torch.no_grad():
        found = model(**inputs)
    return torch.stack((found.start_logits, found.end_logits)) if "qa" in kind else found.logits


class Run(Progress):
    """A fine-tuning whose model was asked right before it was written."""

    def __init__(self, place: Path, kind: str, how: Finetuning, recipe: Recipe | None = None, **options: Any) -> None:
        self.kind = kind
        self.source = options.pop("source", None) or write_learner(
            place / "model", kind, dtype=options.pop("dtype", torch.float32)
        )
        self.task = options.pop("request", None) or request_for(
            place, kind, **{k: options.pop(k) for k in ("train", "validation", "task") if k in options}
        )
        self.steps: list[Step] = []
        self.prepared = prepare_finetuning(
            self.source, place / "out", task=self.task, how=how, recipe=recipe, device="cpu", **options
        )
        self.in_training = torch.empty(0)
        write = verb.write_result

        def ask(training: Any, *args: Any) -> Any:
            self.in_training = logits(training.model, kind)
            return write(training, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verb, "write_result", ask)
            self.result: Finetuned = verb.run(self.prepared, progress=self)

    def step(self, step: Step) -> None:
        self.steps.append(step)

    def check(self) -> None:
        """Everything that holds for every result."""
        output, result = self.result.output, self.result
        found = verify(output)
        assert found.problems == ()
        assert found.hashed > 3
        assert not (output / "training").exists()
        assert not output.with_name("out.partial").exists()
        assert {p.name for p in output.iterdir()} >= {"config.json", "tokenizer.json", "losparse_report.json"}
        model, tokenizer = losparse_cli.load(output)
        assert tokenizer is not None
        assert type(model).__name__ == LEARNERS[self.kind][0] or self.kind == "bert-base"
        torch.testing.assert_close(logits(model, self.kind), self.in_training, rtol=1e-3, atol=1e-4)
        # What the report says is what lies there.
        report, raw = result.report, toys.tensor_bytes(output)
        assert report.model_bytes_after == sum(len(data) for _, _, data in raw.values())
        layers = compressed_layers(model)
        assert {layer.name for layer in report.layers} == layers.keys()
        for layer in report.layers:
            mine = [data for name, (_, _, data) in raw.items() if name.rpartition(".")[0] == layer.name]
            bias = raw.get(f"{layer.name}.bias", ("", [], b""))[2]
            assert layer.bytes_after == sum(map(len, mine)) - len(bias)
            assert layer.spec.nnz == raw[f"{layer.name}.weight"][1][0]
            spec = layers[layer.name].spec
            assert (spec.nnz, spec.rank) == (layer.spec.nnz, layer.spec.rank)
            if layer.spec.nnz and layer.spec.pattern in ("rows", "columns"):
                assert spec.layout == layer.spec.pattern
        # S is as large as was planned, and not larger.
        planned = sum(p.nnz for p in self.prepared.plan.layers)
        biggest = max(max(p.layer.shape) for p in self.prepared.plan.layers)
        left = sum(layer.spec.nnz for layer in report.layers)
        assert planned - (biggest if layer.spec.pattern != "unstructured" else 0) <= left <= planned
        assert [p.rank for p in self.prepared.plan.layers] == [layer.spec.rank for layer in report.layers]
        dense = sum(p.layer.shape[0] * p.layer.shape[1] for p in self.prepared.plan.layers)
        assert self.steps[-1].remaining == pytest.approx(left / dense)
        assert [step.step for step in self.steps] == list(range(1, result.steps + 1))
        if self.prepared.unseen is not None:
            task = open_task(self.task)
            rows = task.prepare(self.prepared.unseen.rows, tokenizer, model, training=False)
            again = task.score(model, tokenizer, rows, batch_size=16, device=CPU)
            assert again == pytest.approx(result.scores, rel=1e-3, abs=1e-3)
            assert report.training["scores"] == result.scores


# --- tasks ------------------------------------------------------------------------------------------

# Kind -> steps, batch, learning rate, the score and what it must reach, and what blind guessing reaches.
TASKS: dict[str, tuple[int, int, float, str, float]] = {
    "bert": (150, 16, 3e-3, "accuracy", 0.9),  # 0.33
    "bert-stsb": (150, 16, 3e-3, "pearson", 0.9),  # 0
    "bert-qa": (220, 32, 3e-3, "exact_match", 0.9),  # 0.17
    "llama": (100, 16, 3e-3, "perplexity", 1.3),  # 24
    "t5": (260, 24, 6e-3, "rouge1", 0.4),  # 0.1
    "bart": (250, 32, 3e-3, "rouge1", 0.9),
}


@pytest.mark.parametrize("kind", TASKS)
def test_a_task_is_learned(kind: str, tmp_path: Path) -> None:
    steps, batch, rate, score, reached = TASKS[kind]
    task = "regression" if kind == "bert-stsb" else None
    run = Run(
        tmp_path, kind, how_of(max_steps=steps, batch_size=batch, learning_rate=rate), small(), train=1000,
        validation=64, task=task,
    )  # fmt: skip
    run.check()
    found = run.result.scores[score]
    assert found <= reached if score == "perplexity" else found >= reached, run.result.scores
    assert run.steps[-1].loss < run.steps[0].loss


@pytest.mark.parametrize(
    ("kind", "recipe", "pruning"),
    [
        ("bert", None, {}),
        ("gpt2", small(pattern="columns"), {"threshold": "layer"}),
        ("bert", small(pattern="unstructured"), {}),
        ("bert", small(rank=0, rank_ratio=None), {"importance": "movement"}),
        ("llama", small(rank=0, rank_ratio=None, keep_parameters=0.1), {}),  # some layers lose all they have
        ("bart", small(rank=4, rank_ratio=None, sparsity=1.0, keep_parameters=None), {}),
        ("t5", small(rank_ratio=1.0), {}),
        ("llama", small(pattern="columns", targets=("*.mlp.*",)), {"importance": "magnitude", "beta": 0.0}),
        ("bert-qa", small(keep_parameters=None, sparsity=0.7), {"every": 1, "initial_warmup": 0, "final_warmup": 1}),
    ],
)  # fmt: skip
def test_what_is_written(kind: str, recipe: Recipe | None, pruning: dict[str, Any], tmp_path: Path) -> None:
    run = Run(tmp_path, kind, how_of(max_steps=12, **({"every": 3} | pruning)), recipe, validation=8)
    run.check()
    pattern = "rows" if recipe is None else recipe.pattern
    assert {layer.spec.pattern for layer in run.result.report.layers} == {pattern}
    if recipe is not None and recipe.rank == 0:
        assert {layer.spec.rank for layer in run.result.report.layers} == {0}
    if recipe is not None and (recipe.sparsity == 1 or recipe.rank_ratio == 1):
        assert {layer.spec.nnz for layer in run.result.report.layers} == {0}
    if pruning.get("threshold") == "layer":
        assert [layer.spec.nnz for layer in run.result.report.layers] == [p.nnz for p in run.prepared.plan.layers]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_model_of_bfloat16_stays_one(kind: str, tmp_path: Path) -> None:
    """Trained in float32, written as it was, and scored as it is written."""
    run = Run(tmp_path, kind, how_of(max_steps=20), small(), dtype=torch.bfloat16, train=200)
    assert verify(run.result.output).problems == ()
    assert {kind for kind, _, _ in toys.tensor_bytes(run.result.output).values()} <= {"BF16", "I32"}
    model, tokenizer = losparse_cli.load(run.result.output)
    task = open_task(run.task)
    rows = task.prepare(run.prepared.unseen.rows, tokenizer, model, training=False)
    again = task.score(model, tokenizer, rows, batch_size=32, device=CPU)
    assert again == run.result.scores


@pytest.mark.parametrize(
    ("kind", "pattern", "ask"),
    [
        ("bert", "rows", None), ("gpt2", "unstructured", None), ("bert", "rows", {"keep_parameters": 0.3}),
        ("llama", "columns", {"sparsity": 0.8}), ("gpt2", "unstructured", {"sparsity": 0.8}),
    ],
)  # fmt: skip
def test_from_a_compressed_model(kind: str, pattern: str, ask: dict[str, Any] | None, tmp_path: Path) -> None:
    dense = write_learner(tmp_path / "dense", kind)
    source = losparse_cli.compress(dense, tmp_path / "compressed", Recipe(rank=4, sparsity=0.5, pattern=pattern)).output
    before, _ = losparse_cli.load(source)
    run = Run(
        tmp_path, kind, how_of(max_steps=12, every=2), Recipe(**ask) if ask else None, source=source, validation=8
    )
    run.check()
    after, _ = losparse_cli.load(run.result.output)
    for name, layer in compressed_layers(after).items():
        was = compressed_layers(before)[name].support()
        assert bool((was | ~layer.support()).all()), name  # S only shrinks
        assert ask is not None or torch.equal(was, layer.support())
    assert (run.steps[-1].remaining < run.steps[0].remaining) == (ask is not None)


def test_pruned_again(tmp_path: Path) -> None:
    """One threshold for all leaves layers of very different size; with the next it is the sum that counts."""
    asked: dict[str, Any] = {"task": request_for(tmp_path, "bert", train=32, validation=0), "device": "cpu"}
    model = write_learner(tmp_path / "model", "bert")
    first = finetune(model, tmp_path / "first", how=how_of(max_steps=12, every=1), recipe=small(), **asked)
    sizes = [layer.spec.nnz for layer in first.report.layers]
    dense = sum(p.shape[0] * p.shape[1] for p in first.report.layers)
    assert min(sizes) < 0.1 * dense / len(sizes)  # a layer that has less than what every layer is to keep at last
    for threshold in ("global", "layer"):
        how = how_of(max_steps=12, every=1, threshold=threshold)
        second = finetune(first.output, tmp_path / threshold, how=how, recipe=Recipe(sparsity=0.9), **asked)
        left = [layer.spec.nnz for layer in second.report.layers]
        assert sum(left) <= 0.1 * dense < sum(sizes)
        assert all(after <= before for before, after in zip(sizes, left, strict=True))
    with pytest.raises(UsageError, match="are asked for: training a compressed model can only prune"):
        finetune(first.output, tmp_path / "more", how=how_of(), recipe=Recipe(sparsity=0.2), **asked)


@pytest.mark.parametrize("kind", ["llama", "bert-qa"])
def test_what_training_changes_for_itself_is_not_written(kind: str, tmp_path: Path) -> None:
    """Whether keys and values are kept, and how long the tokenizer cut texts."""
    model = write_learner(tmp_path / "model", kind)
    result = finetune(model, tmp_path / "out", task=request_for(tmp_path, kind), how=how_of(max_steps=1),
                      recipe=small(), device="cpu")  # fmt: skip
    for file, names in (("config.json", ("use_cache", "pad_token_id")), ("tokenizer.json", ("truncation", "padding"))):
        before, after = (json.loads((folder / file).read_text()) for folder in (model, result.output))
        assert [before.get(name) for name in names] == [after.get(name) for name in names], file


def test_an_encoder_decoder_that_classifies_learns_from_a_teacher(tmp_path: Path) -> None:
    """Such a model makes its decoder's input itself."""
    model = write_learner(tmp_path / "model", "bart-classifier")
    task = request_for(tmp_path, "bart-classifier", train=16, validation=8)
    result = finetune(model, tmp_path / "out", task=task, how=how_of(objective="distill", max_steps=2),
                      recipe=small(), device="cpu")  # fmt: skip
    assert verify(result.output).problems == ()


SHIM = """
import sys
sys.modules["losparse_cli"] = None
import torch, transformers
for folder, auto, kind in zip(*[iter(sys.argv[1:])] * 3):
    model, info = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = torch.arange(4, 13)[None]
    more = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
    found = model.eval()(input_ids=ids, **more)
    print(float(found.logits.detach().double().sum()))
"""


def test_without_losparse_the_shipped_loader_is_enough(tmp_path: Path) -> None:
    """Also of a model that was compressed before, whose folder brought a loader along."""
    arguments, expected = [], []
    dense = write_learner(tmp_path / "dense", "llama")
    again = losparse_cli.compress(dense, tmp_path / "compressed", Recipe(rank=4, sparsity=0.5, pattern="rows")).output
    for kind, auto, source in [
        ("bert", "AutoModelForSequenceClassification", None), ("bart", "AutoModelForSeq2SeqLM", None),
        ("llama", "AutoModelForCausalLM", again),
    ]:  # fmt: skip
        (tmp_path / kind).mkdir()
        run = Run(tmp_path / kind, kind, how_of(max_steps=4), None if source else small(), source=source, validation=0)
        arguments += [str(run.result.output), auto, kind]
        model, _ = losparse_cli.load(run.result.output)
        ids = torch.arange(4, 13)[None]
        more = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            expected.append(float(model(input_ids=ids, **more).logits.double().sum()))
    ended = subprocess.run([sys.executable, "-c", SHIM, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert [float(line) for line in ended.stdout.split()] == pytest.approx(expected, rel=1e-3, abs=1e-3)


# --- runs that are killed ---------------------------------------------------------------------------


class Killed(BaseException):
    """Stops a run as abruptly as a process can be stopped from within: nothing but `finally` sees it."""


def digests(folder: Path) -> dict[str, str]:
    """Of every file that holds no times."""
    found = toys.digests(folder)
    return {name: digest for name, digest in found.items() if name not in ("losparse_report.json", "README.md")}


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, str]]:
    """What is asked for, and what comes of it undisturbed: with dropout, in two and a half epochs of eight steps."""
    place = tmp_path_factory.mktemp("undisturbed")
    model = write_learner(place / "model", "bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    task = request_for(place, "bert", train=64, validation=16)
    asked = {
        "source": model, "task": task, "how": how_of(max_steps=20, save_steps=3, every=2), "recipe": small(),
        "device": "cpu",
    }  # fmt: skip
    finetune(output=place / "out", **asked)
    return asked, digests(place / "out")


def at_step(number: int) -> Callable[[pytest.MonkeyPatch], Any]:
    def kill(patch: pytest.MonkeyPatch) -> Any:
        class Watching(Progress):
            def step(self, step: Step) -> None:
                if step.step == number:
                    raise Killed

        return Watching()

    return kill


def in_place_of(owner: Any, name: str, call: int, *, before: bool) -> Callable[[pytest.MonkeyPatch], Any]:
    """At the `call`-th call of something: before it does anything, or when it has done all."""

    def kill(patch: pytest.MonkeyPatch) -> Any:
        calls, real = [], getattr(owner, name)

        def stopped(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) < call:
                return real(*args, **kwargs)
            if not before:
                real(*args, **kwargs)
            raise Killed

        patch.setattr(owner, name, stopped)
        return None

    return kill


PLACES = {
    "before the first state": (at_step(2), None),
    "in the middle of an epoch": (at_step(7), 6),
    "at the end of an epoch": (at_step(8), 6),
    "before a state is written": (in_place_of(FinetuneTrainer, "_save", 3, before=True), 6),
    "in the middle of a state": (in_place_of(FinetuneTrainer, "_save", 3, before=False), 6),
    "before its last file": (in_place_of(FinetuneTrainer, "_save_rng_state", 2, before=False), 3),
    "before the result is written": (in_place_of(verb, "write_result", 1, before=True), 20),
    "after the weights": (in_place_of(written, "write_config", 1, before=True), 20),
    "before it is moved": (in_place_of(WorkFolder, "publish", 1, before=True), 20),
}


@pytest.mark.parametrize("where", PLACES)
def test_a_killed_run_goes_on(
    where: str, long_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    asked, undisturbed = long_run
    kill, saved = PLACES[where]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        finetune(output=tmp_path / "out", **asked, progress=kill(patch))
    assert not (tmp_path / "out").exists()
    last = last_state(tmp_path / "out.partial" / "training")
    assert (last and last[0]) == saved
    told: list[int] = []

    class Watching(Progress):
        def step(self, step: Step) -> None:
            told.append(step.step)

    result = finetune(
        output=tmp_path / "out", **asked, progress=Watching(), resume="required" if saved else "auto"
    )  # fmt: skip
    assert told == list(range((saved or 0) + 1, 21))
    assert digests(result.output) == undisturbed
    assert verify(result.output).problems == ()
    assert not (tmp_path / "out.partial").exists()


def test_a_state_that_is_torn_is_not_gone_on_from(long_run: Any, tmp_path: Path) -> None:
    asked, undisturbed = long_run
    with pytest.raises(Killed):
        finetune(output=tmp_path / "out", **asked, progress=at_step(7)(pytest.MonkeyPatch()))
    states = tmp_path / "out.partial" / "training"
    torn = shutil.copytree(states / "checkpoint-6", states / "checkpoint-12") / "trainer_state.json"
    torn.write_text(torn.read_text()[:50])
    found = last_state(states)
    assert found is not None
    assert found[0] == 6
    result = finetune(output=tmp_path / "out", **asked)
    assert digests(result.output) == undisturbed


def changed(model: Path, place: Path, file: str, old: str, new: str) -> Path:
    """A copy of the same age with something else in one file."""
    shutil.copytree(model, place)
    text = (place / file).read_text()
    assert old in text
    (place / file).write_text(text.replace(old, new))
    return place


@pytest.mark.parametrize("step", [3, 7, 11])
def test_a_killed_run_with_lengths_grouped_goes_on(step: int, long_run: Any, tmp_path: Path) -> None:
    """Within an epoch, too, whose order has to be drawn again."""
    asked, other = long_run
    how = how_of(max_steps=12, save_steps=2, every=2, group_by_length=True)
    whole = finetune(output=tmp_path / "whole", **{**asked, "how": how})
    with pytest.raises(Killed):
        finetune(output=tmp_path / "out", **{**asked, "how": how}, progress=at_step(step)(pytest.MonkeyPatch()))
    result = finetune(output=tmp_path / "out", **{**asked, "how": how}, resume="required")
    assert digests(result.output) == digests(whole.output) != other


def test_resume(long_run: Any, tmp_path: Path) -> None:
    asked, undisturbed = long_run
    with pytest.raises(ResumeError, match="nothing to resume"):
        finetune(output=tmp_path / "out", **asked, resume="required")
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(UsageError, match="--resume is auto, required or never"):
        finetune(output=tmp_path / "out", **asked, resume="always")
    with pytest.raises(Killed):
        finetune(output=tmp_path / "out", **asked, progress=at_step(7)(pytest.MonkeyPatch()))
    before = toys.digests(tmp_path / "out.partial")
    for changes, differs in [
        ({"how": how_of(max_steps=20, save_steps=3, every=3)}, "--prune-every 2, now 3"),
        ({"recipe": small(keep_parameters=0.4)}, "plan"),
        ({"task": request_for(tmp_path, "bert", train=63, validation=16)}, r"data\.train"),
        (
            {
                "source": changed(
                    asked["source"],
                    tmp_path / "other",
                    "config.json",
                    '"hidden_dropout_prob": 0.2',
                    '"hidden_dropout_prob": 0.0',
                )
            },
            "source",
        ),
        ({"source": changed(asked["source"], tmp_path / "words", "tokenizer.json", '"w1"', '"w01"')}, "source"),
    ]:
        for resume in ("auto", "required"):
            with pytest.raises(ResumeError, match=rf"a different run \(different: [^)]*{differs}"):
                finetune(output=tmp_path / "out", **{**asked, **changes}, resume=resume)
    assert toys.digests(tmp_path / "out.partial") == before
    told: list[int] = []

    class Watching(Progress):
        def step(self, step: Step) -> None:
            told.append(step.step)

    result = finetune(output=tmp_path / "out", **asked, progress=Watching(), resume="never")
    assert told[0] == 1
    assert digests(result.output) == undisturbed


def test_overwrite(long_run: Any, tmp_path: Path) -> None:
    asked, undisturbed = long_run
    output = tmp_path / "out"
    short = {**asked, "how": how_of(max_steps=2, save_steps=3, every=2)}
    finetune(output=output, **short)
    first = toys.digests(output)
    with pytest.raises(UsageError, match=r"exists already\. Add --overwrite"):
        finetune(output=output, **asked)
    with pytest.raises(Killed):
        finetune(output=output, **asked, overwrite=True, progress=at_step(2)(pytest.MonkeyPatch()))
    assert toys.digests(output) == first  # until the new one is whole
    finetune(output=output, **asked, overwrite=True)
    assert digests(output) == undisturbed


def test_a_run_that_had_ended_is_not_done_again(
    long_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    asked, undisturbed = long_run
    kill = in_place_of(importlib.import_module("losparse_cli.checkpoint.workfolder"), "clear_away", 1, before=True)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        finetune(output=tmp_path / "out", **asked, progress=kill(patch))
    assert (tmp_path / "out" / "losparse_journal.jsonl").is_file()

    class Untouched(Progress):
        def step(self, step: Step) -> None:
            raise AssertionError("nothing is left to be trained")

    again = finetune(output=tmp_path / "out", **asked, progress=Untouched())
    assert digests(again.output) == undisturbed
    assert not (again.output / "losparse_journal.jsonl").exists()
    assert again.scores == again.report.training["scores"] != {}
    with pytest.raises(UsageError, match="exists already"):
        finetune(output=tmp_path / "out", **{**asked, "how": how_of(max_steps=19, save_steps=3, every=2)})


# --- what goes wrong on the way ---------------------------------------------------------------------


def test_a_loss_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = write_learner(tmp_path / "model", "bert"), request_for(tmp_path, "bert")
    compute = FinetuneTrainer.compute_loss

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        return compute(self, *args, **kwargs) * (float("nan") if self.state.global_step == 6 else 1.0)

    monkeypatch.setattr(FinetuneTrainer, "compute_loss", broken)
    kept = r"loss became nan at step 7\. The state of step 4 is kept in .*-4\. Start anew with --resume never and"
    with pytest.raises(TrainingError, match=kept):
        finetune(model, tmp_path / "out", task=task, how=how_of(max_steps=12, save_steps=4), device="cpu")
    last = last_state(tmp_path / "out.partial" / "training")
    assert last is not None
    assert last[0] == 4
    assert all(bool(x.isfinite().all()) for x in load_file(last[1] / "model.safetensors").values())
    with pytest.raises(TrainingError, match=r"No state had been saved before\. Start anew with a lower"):
        finetune(model, tmp_path / "other", task=task, how=how_of(max_steps=12, save_steps=9), device="cpu")
    assert not (tmp_path / "other.partial").exists()
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    lower = how_of(max_steps=2, learning_rate=1e-5)
    assert finetune(model, tmp_path / "out", task=task, how=lower, device="cpu", resume="never").steps == 2


def test_a_learning_rate_that_destroys_the_weights(tmp_path: Path) -> None:
    model, task = write_learner(tmp_path / "model", "bert"), request_for(tmp_path, "bert")
    how = how_of(max_steps=6, learning_rate=1e38, warmup_steps=0)
    with pytest.raises(TrainingError, match="lower --learning-rate"):
        finetune(model, tmp_path / "out", task=task, how=how, device="cpu")
    assert not list(tmp_path.glob("out*"))


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_in_safetensors() -> None:
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_disk_in_torch() -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/3")


def full_disk_where_torch_closes_its_file() -> None:
    """Really: no file of this process may grow beyond 20 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with tempfile.TemporaryDirectory() as place:
            torch.save(torch.zeros(100_000), Path(place) / "optimizer.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("fail", "place"),
    [
        (full_disk, "a state"), (full_disk, "the report"), (full_disk_in_safetensors, "a state"),
        (full_disk_in_safetensors, "the result"), (full_disk_in_torch, "the optimizer"),
        (full_disk_where_torch_closes_its_file, "the optimizer"),
    ],
)  # fmt: skip
def test_a_full_disk(
    fail: Callable[[], None], place: str, long_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, undisturbed = long_run
    owner, name = {
        "a state": (FinetuneTrainer, "_save"), "the optimizer": (FinetuneTrainer, "_save_optimizer_and_scheduler"),
        "the result": (type(losparse_cli.load(asked["source"])[0]), "save_pretrained"),
        "the report": (written, "close"),
    }[place]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *args, **kwargs: fail())
        with pytest.raises(OutputError, match="The disk is full") as caught:
            finetune(output=tmp_path / "out", **asked)
    assert "Free some space and repeat the command" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    if fail is full_disk:
        assert digests(finetune(output=tmp_path / "out", **asked).output) == undisturbed


def test_other_errors_are_not_taken_for_a_full_disk(long_run: Any, tmp_path: Path) -> None:
    class Broken(Progress):
        def step(self, step: Step) -> None:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        finetune(output=tmp_path / "out", **long_run[0], progress=Broken())


def test_a_second_run_into_the_same_folder(long_run: Any, tmp_path: Path) -> None:
    asked, _ = long_run

    class Second(Progress):
        def step(self, step: Step) -> None:
            with pytest.raises(ResumeError, match="Another losparse is writing"):
                finetune(output=tmp_path / "out", **asked)
            raise Killed

    with pytest.raises(Killed):
        finetune(output=tmp_path / "out", **asked, progress=Second())


# --- several processes ------------------------------------------------------------------------------

TOGETHER = """
import importlib, json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from losparse_cli.budget.recipe import Recipe
from losparse_cli.finetune import finetune
from losparse_cli.parallel.launch import is_first
from losparse_cli.tasks.request import TaskRequest
from losparse_cli.finetuning.pruner import Pruner, Pruning
from losparse_cli.finetuning.request import Finetuning
place = Path(sys.argv[1])
{setup}
for name, options in json.loads(sys.argv[2]).items():
    (place / name).mkdir(exist_ok=True)
    result = finetune(
        place / "model", place / name / "out", task=TaskRequest(**json.loads((place / "task.json").read_text())),
        device="cpu", recipe=Recipe(keep_parameters=0.5, rank_ratio=0.3, pattern="rows"),
        how=Finetuning(max_steps=8, batch_size=4, precision="float32", learning_rate=3e-3, save_steps=3,
                       max_grad_norm=0,  # a norm over parts is summed in another order
                       pruning=Pruning(every=2), **options),
    )
    print("main" if is_first() else "other", len(result.report.layers), flush=True)
"""
TELLING = """
from losparse_cli.finetuning.conversion import trained_layers
verb = importlib.import_module("losparse_cli.finetune")
train = verb._train
def ask(training, work, told):
    model = train(training, work, told)
    state = {name: layer.kept.tolist() for name, layer in trained_layers(model).items()}
    weights = float(sum(p.double().square().sum() for p in model.parameters()))
    (work.parent / f"rank{os.environ['RANK']}.json").write_text(json.dumps([state, weights]))
    return model
verb._train = ask
"""
SHARDED = """
import accelerate.state
from accelerate.utils import DistributedType
if os.environ.get("ACCELERATE_USE_FSDP"):  # accelerate asks for GPUs, and for no more than that
    begin = accelerate.state.PartialState.__init__
    def pretend(self, *arguments, **options):
        begin(self, *arguments, **options)
        self.distributed_type = DistributedType.MULTI_GPU
    accelerate.state.PartialState.__init__ = pretend
prune = Pruner.prune
def die(self, step):
    prune(self, step)
    if step == int(os.environ.get("DIE_AT", 0)):
        os._exit(9)
Pruner.prune = die
"""


def write_together(place: Path, setup: str) -> None:
    """What two processes run: a model, its task, and the script with `setup` before the first run."""
    write_learner(place / "model", "bert")
    task = request_for(place, "bert", train=40, validation=8)
    toys.write_json(place / "task.json", {"task": task.task, "train_file": task.train_file,
                                          "validation_file": task.validation_file})  # fmt: skip
    (place / "script.py").write_text(TOGETHER.replace("{setup}", setup))


def train_together(place: Path, runs: dict[str, Any], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py",
         str(place), json.dumps(runs)],
        capture_output=True, text=True, cwd=place, timeout=120,
        env={**os.environ, "PYTHONPATH": os.getcwd()} | environment,
    )  # fmt: skip


def test_two_processes(tmp_path: Path) -> None:
    """Also where hidden states alone are matched, and the head has no gradient."""
    runs = {"task": {}, "hidden": {"objective": "distill", "distill_weight": 0.0, "hidden_weight": 1.0}}
    write_together(tmp_path, TELLING)
    ended = train_together(tmp_path, runs)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert sorted(line.split()[0] for line in ended.stdout.splitlines() if line[:4] in ("main", "othe")) == [
        "main", "main", "other", "other",
    ]  # fmt: skip
    for name in runs:
        first, second = (json.loads((tmp_path / name / f"rank{k}.json").read_text()) for k in (0, 1))
        assert first == second
        assert 0 < sum(sum(kept) for kept in first[0].values()) < sum(len(kept) for kept in first[0].values())
        assert verify(tmp_path / name / "out").problems == ()
        assert not (tmp_path / name / "out.partial").exists()


def test_a_model_that_two_processes_share(tmp_path: Path) -> None:
    """FSDP gives what two copies of the model give, also where it was killed on the way."""
    write_together(tmp_path, SHARDED)
    parts = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
             "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer"}  # fmt: skip
    assert train_together(tmp_path, {"copies": {}}).returncode == 0
    assert train_together(tmp_path, {"parts": {}}, **parts, DIE_AT="5").returncode != 0
    assert (tmp_path / "parts" / "out.partial" / "training" / "checkpoint-3").is_dir()
    assert train_together(tmp_path, {"parts": {}}, **parts).returncode == 0
    one, two = ((tmp_path / name / "out" / "model.safetensors").read_bytes() for name in ("copies", "parts"))
    assert one == two
    assert verify(tmp_path / "parts" / "out").problems == ()
