"""Tasks of two checkpoints: against transformers' own output, one model at a time, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Loads, character_tokenizer, toy_model
from terminal import done, losparse

from losparse_cli.errors import MissingExtraError, SourceError, UsageError
from losparse_cli.evaluate import TaskEvaluation, evaluate_task
from losparse_cli.evaluation import task as task_evaluation
from losparse_cli.load import load
from losparse_cli.tasks import metrics
from losparse_cli.tasks.paired import Estimate
from losparse_cli.tasks.request import TaskRequest
from tests.hearing import Hearing
from tests.tasks.made import write_lines

TEXTS = ["yes it was", "no", "never again", "a bright cold day", "in April", "the clocks", "were", "thirteen hours"]
OPTIONS: dict[str, Any] = {"device": "cpu", "batch_size": 3}


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = ({"text": text, "label": k % 3} for k, text in enumerate(TEXTS))
    return write_lines(tmp_path_factory.mktemp("rows") / "dev.jsonl", *rows)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(compressed, dense), of a toy that does not say the same of every text."""
    from losparse_cli.budget.recipe import Recipe
    from losparse_cli.compress import compress

    folder = tmp_path_factory.mktemp("pair")
    model = toy_model("bert")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() == 2 else 1.0)
        model.classifier.bias.zero_()
    model.save_pretrained(folder / "dense")
    character_tokenizer().save_pretrained(folder / "dense")
    return compress(folder / "dense", folder / "small", Recipe(rank=4, sparsity=0.9)).output, folder / "dense"


def request_of(file: Path, task: str = "text-classification", **options: Any) -> TaskRequest:
    return TaskRequest(task, validation_file=str(file), **options)


def classes_of(folder: Path) -> torch.Tensor:
    """The likeliest class of every text, each alone."""
    model, tokenizer = load(folder)
    with torch.no_grad():
        return torch.tensor([int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in TEXTS])


# --- figures --------------------------------------------------------------------------------------


def test_scores_beside_the_dense_model(pair: tuple[Path, Path], dev: Path) -> None:
    source, folder = pair
    heard = Hearing()
    found = evaluate_task(source, request_of(dev), against=folder, progress=heard, **OPTIONS)
    labels = torch.tensor([k % 3 for k in range(8)])
    ours, dense = (classes_of(path) == labels for path in (source, folder))
    assert not torch.equal(ours, dense), "models that agree show no paired error"
    assert found.dense_scores is not None
    assert found.differences is not None
    assert found.main_score == "accuracy" == next(iter(found.scores))
    assert found.scores["accuracy"].value == pytest.approx(float(ours.double().mean()))
    assert found.dense_scores["accuracy"].value == pytest.approx(float(dense.double().mean()))
    gaps = ours.double() - dense.double()
    assert found.differences["accuracy"].value == pytest.approx(float(gaps.mean()))
    assert found.differences["accuracy"].error == pytest.approx(float(gaps.std()) / math.sqrt(8))
    alone = metrics.classification(classes_of(source), labels, 3)
    assert {name: found.scores[name].value for name in ("f1", "matthews")} == pytest.approx(alone, abs=1e-6)
    assert found.differences["f1"].value == pytest.approx(found.scores["f1"].value - found.dense_scores["f1"].value)
    assert found.differences["f1"].error is not None
    assert found.nbytes < (found.dense_nbytes or 0)
    assert heard.phases == [source.name, folder.name]
    assert (heard.totals, heard.done) == ({"rows": 8}, {"rows": 16})


def test_a_model_does_not_differ_from_itself(pair: tuple[Path, Path], dev: Path) -> None:
    folder = pair[1]
    found = evaluate_task(folder, request_of(dev), against=folder, **OPTIONS)
    assert found.scores == found.dense_scores
    assert set((found.differences or {}).values()) == {Estimate(0.0, 0.0)}


def test_the_seed_is_that_of_resamples(pair: tuple[Path, Path], dev: Path) -> None:
    one, again, other = (evaluate_task(pair[1], request_of(dev, seed=seed), **OPTIONS) for seed in (1, 1, 2))
    assert one == again
    assert one.scores["accuracy"] == other.scores["accuracy"]
    assert one.scores["matthews"].error != other.scores["matthews"].error
    assert one.dense is one.dense_scores is one.differences is None


@pytest.mark.parametrize(
    ("name", "task", "rows", "scores", "unit"),
    [
        ("bert-qa", "question-answering",
         [{"question": "when", "context": "in April", "answers": {"text": ["April"], "answer_start": [3]}},
          {"question": "who", "context": "it was he", "answers": {"text": ["he"], "answer_start": [7]}}],
         ["f1", "exact_match"], "2 rows"),
        ("t5", "seq2seq", [{"text": "a b c", "target": "a b"}, {"text": "d e", "target": "d"}],
         ["rougeL", "rouge1", "rouge2", "rougeLsum", "exact_match"], "2 rows"),
        ("llama", "causal-lm", [{"text": "a bright cold day in April"}, {"text": "the clocks were striking"}],
         ["perplexity", "loss"], "3 windows"),
    ],
)  # fmt: skip
def test_every_task_is_scored(
    name: str, task: str, rows: list[Any], scores: list[str], unit: str, toy: Callable[..., Path],
    compressed: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    file = write_lines(tmp_path / "dev.jsonl", *rows)
    request = request_of(file, task, **{"max_length": 16} if name != "bert-qa" else {}, max_target_length=6)
    found = evaluate_task(compressed(name, tokenizer=True), request, against=toy(name, tokenizer=True), **OPTIONS)
    assert list(found.scores) == list(found.dense_scores or {}) == list(found.differences or {}) == scores
    assert str(found.protocol).startswith(f"{unit} of {file}")
    assert "bootstrap" not in str(found.protocol)


def test_what_is_not_finite_is_valid_json(toy: Callable[..., Path], dev: Path) -> None:
    from dataclasses import replace

    found = evaluate_task(toy("bert", tokenizer=True), request_of(dev), **OPTIONS)
    wild = replace(found, scores={"perplexity": Estimate(math.inf, None)}).to_dict()
    assert json.loads(json.dumps(wild, allow_nan=False))["scores"] == {"perplexity": {"value": None, "error": None}}


def test_the_dtype_is_the_one_asked_for(toy: Callable[..., Path], dev: Path) -> None:
    folder = toy("bert", tokenizer=True, dtype=torch.bfloat16)
    for dtype, said in (("auto", "bfloat16"), ("float32", "float32")):
        assert evaluate_task(folder, request_of(dev), dtype=dtype, **OPTIONS).protocol.dtype == said


def test_the_models_are_never_both_there(
    toy: Callable[..., Path], compressed: Callable[..., Path], dev: Path, watch_loads: Callable[[Any], Loads]
) -> None:
    loads = watch_loads(task_evaluation)
    evaluate_task(compressed("bert", tokenizer=True), request_of(dev), against=toy("bert", tokenizer=True), **OPTIONS)
    assert loads.alive == [0, 0]
    assert loads.models[1]() is None


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("squeezed", [False, True])
def test_a_model_without_a_head_is_sent_to_finetune(squeezed: bool, dev: Path, tmp_path: Path) -> None:
    from losparse_cli.budget.recipe import Recipe
    from losparse_cli.compress import compress

    toy_model("bert").bert.save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    folder = tmp_path / "base"
    if squeezed:
        folder = compress(folder, tmp_path / "small", Recipe(rank=4, sparsity=0.5)).output
    with pytest.raises(UsageError) as raised:
        evaluate_task(folder, request_of(dev), **OPTIONS)
    assert str(raised.value) == (
        f"{folder} has no head for text-classification (classifier.bias is not in its files); train it with: "
        f"losparse finetune {folder} --task text-classification"
    )


def test_a_dense_model_without_a_head_is_refused_too(toy: Callable[..., Path], dev: Path) -> None:
    with pytest.raises(UsageError, match=r"bert-qa has no head for text-classification"):
        evaluate_task(toy("bert", tokenizer=True), request_of(dev), against=toy("bert-qa", tokenizer=True), **OPTIONS)


def test_a_kind_of_model_that_has_no_such_head(toy: Callable[..., Path], dev: Path) -> None:
    with pytest.raises(UsageError, match=r"is a mamba, for which transformers has no head for text-classification\."):
        evaluate_task(toy("mamba", tokenizer=True), request_of(dev), **OPTIONS)


def test_labels_that_the_model_does_not_know(toy: Callable[..., Path], tmp_path: Path) -> None:
    file = write_lines(tmp_path / "dev.jsonl", {"text": "a", "label": 0}, {"text": "b", "label": 7})
    with pytest.raises(UsageError, match=r"row 2 has the label 7, and the model knows 3 classes"):
        evaluate_task(toy("bert", tokenizer=True), request_of(file), **OPTIONS)


def test_models_that_number_labels_differently_are_not_compared(toy: Callable[..., Path], tmp_path: Path) -> None:
    file = write_lines(tmp_path / "dev.jsonl", {"text": "a", "label": "x"}, {"text": "b", "label": "y"})
    folders = []
    for names in ("xyz", "yxz"):
        folder = shutil.copytree(toy("bert", tokenizer=True), tmp_path / names)
        config = transformers.AutoConfig.from_pretrained(folder)
        config.id2label, config.label2id = dict(enumerate(names)), {name: k for k, name in enumerate(names)}
        config.save_pretrained(folder)
        folders.append(folder)
    with pytest.raises(UsageError, match=r"number the labels differently\. Give the dense model"):
        evaluate_task(folders[0], request_of(file), against=folders[1], **OPTIONS)
    assert evaluate_task(folders[0], request_of(file), against=folders[0], **OPTIONS).differences is not None


def test_what_cannot_be_asked(toy: Callable[..., Path], dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = toy("bert", tokenizer=True)
    for option, value in (("dtype", "int4"), ("batch_size", 0), ("device", "tpu")):
        with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} is"):
            evaluate_task(folder, request_of(dev), **{**OPTIONS, option: value})
    with pytest.raises(SourceError, match=r"no tokenizer\. Copy"):
        evaluate_task(toy("bert"), request_of(dev), **OPTIONS)
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"losparse\[train\]"):
        evaluate_task(folder, request_of(dev), **OPTIONS)


# --- the command ----------------------------------------------------------------------------------


def test_eval_of_a_task_shows_a_table(toy: Callable[..., Path], compressed: Callable[..., Path], dev: Path) -> None:
    source, dense = compressed("bert", tokenizer=True), toy("bert", tokenizer=True)
    asked = ("--task", "text-classification", "--validation-file", dev, "--device", "cpu")
    ended = done("eval", source, "--against", dense, *asked)
    assert ended.err == ""
    for words in ("this", "difference", "std.", "error", "accuracy", "matthews", "of dense", f"8 rows of {dev}, 32 at",
                  "standard errors count rows as independent, those of f1 and matthews by a bootstrap of 1,000 resamp",
                  "(seed 42)"):  # fmt: skip
        assert words in " ".join(ended.out.split()), ended.out
    alone = done("eval", dense, *asked).out
    assert "accuracy" in alone
    assert "dense" not in alone.replace(str(dense), "")


def test_eval_of_a_task_as_json(toy: Callable[..., Path], compressed: Callable[..., Path], dev: Path) -> None:
    source, dense = compressed("bert", tokenizer=True), toy("bert", tokenizer=True)
    shown = done(
        "eval", source, "--against", dense, "--task", "text-classification", "--validation-file", dev, "--json",
        "--device", "cpu", "--max-validation-samples", 6, "--seed", 3, "--batch-size", 2,
    )  # fmt: skip
    assert shown.err == ""
    content = json.loads(shown.out)
    assert content.keys() == TaskEvaluation.__dataclass_fields__.keys()
    request = request_of(dev, seed=3, max_validation_samples=6)
    found = evaluate_task(source, request, against=dense, device="cpu", batch_size=2)
    assert content == json.loads(json.dumps(found.to_dict()))
    assert content["protocol"]["units"] == 6


def test_eval_measures_on_one_thing(toy: Callable[..., Path], dev: Path) -> None:
    folder = toy("bert", tokenizer=True)
    task = ("--task", "text-classification")
    refused: list[tuple[tuple[object, ...], str]] = [
        ((), "give exactly one of --text FILE, --task TASK, --lm-eval TASKS, not nothing."),
        (("--text", dev, *task), "not --text and --task."),
        ((*task, "--lm-eval", "x"), "not --task and --lm-eval."),
        (task, "--task needs rows to score on. Give --validation-file, or --dataset-name."),
        ((*task, "--validation-file", dev, "--windows", 3), "--windows is of --text, not of --task. Give --max-valid"),
        ((*task, "--validation-file", dev, "--length", 3), "--length is of --text, not of --task. Give --max-length"),
        ((*task, "--validation-file", dev, "--stride", 3), "--stride is of --text, not of --task. Leave it out."),
        ((*task, "--validation-file", dev, "--memory", "apart"), "one after the other: leave it out."),
        ((*task, "--validation-file", dev, "--lm-eval-limit", 3), "--lm-eval-limit is of --lm-eval, not of --task."),
        (("--text", dev, "--validation-file", dev), "--validation-file is of --task, not of --text."),
        (("--text", dev, "--batch-size", 2), "--batch-size is of --task and --lm-eval, not of --text."),
        (("--lm-eval", "x", "--windows", 2), "--windows is of --text, not of --lm-eval. Give --lm-eval-limit."),
        ((*task, "--validation-file", dev, "--question-column", "q"), "--question-column is of question-answering"),
        (("--task", "chess", "--validation-file", dev), "--task is one of text-classification"),
    ]
    for arguments, said in refused:
        ended = losparse("eval", folder, *arguments)
        assert ended.code == 2, arguments
        assert said in ended.complaint, ended.complaint
