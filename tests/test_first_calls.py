"""First calls from Python: what is given in a plainer form is taken, or told in a sentence what to give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import losparse_cli
from losparse_cli.errors import UsageError
from losparse_cli.finetuning.prepare import prepare_finetuning
from losparse_cli.finetuning.pruner import Pruning
from losparse_cli.finetuning.request import Finetuning, make_finetuning
from losparse_cli.refine import prepare_refinement
from losparse_cli.tasks.request import TaskRequest, make_task

TEXT = " ".join(f"Sentence {k} of the text says that {k * k % 97} is not {k}." for k in range(300))
ROWS: Any = {"task": "text-classification", "train_file": "rows.csv"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_a_task_may_be_a_mapping_and_a_name_alone_lacks_rows() -> None:
    assert make_task(ROWS) == TaskRequest(**ROWS)
    assert make_task({**ROWS, "train_file": Path("rows.csv")}) == make_task(ROWS)
    for given, says in (
        ("text-classification", "There are no rows to read. Give --train-file"),
        ({"train_file": "rows.csv"}, "task lacks its setting 'task'"),
        ({**ROWS, "columns": "x"}, "task has no setting 'columns'; known are task, train_file"),
        (3, "task is a TaskRequest or a mapping of its fields, not int"),
    ):
        with pytest.raises(UsageError, match=says):
            make_task(given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="There are no rows to read"):
        losparse_cli.finetune("nowhere", task="text-classification")


def test_how_to_train_may_be_a_mapping_too(toy: Callable[..., Path], tmp_path: Path) -> None:
    assert make_finetuning(None) == Finetuning()
    assert make_finetuning({"teacher": Path("dense")}) == Finetuning(teacher="dense")
    how = {"epochs": 1.0, "pruning": {"every": 5}}
    assert make_finetuning(how) == Finetuning(epochs=1.0, pruning=Pruning(every=5))
    with pytest.raises(UsageError, match="how has no setting 'epoch'"):
        make_finetuning({"epoch": 1})
    with pytest.raises(UsageError, match="pruning is a Pruning or a mapping of its fields, not str"):
        make_finetuning({"pruning": "rows"})
    (tmp_path / "rows.csv").write_text("text,label\n" + "ab,LABEL_0\nba,LABEL_1\nbb,LABEL_2\n" * 8, encoding="utf-8")
    task = {**ROWS, "train_file": tmp_path / "rows.csv"}
    ready = prepare_finetuning(
        toy("bert", tokenizer=True), tmp_path / "out", task=task, how=how | {"max_steps": 2}, recipe={"rank": 3}
    )
    assert ready.how.pruning.every == 5
    assert {plan.rank for plan in ready.plan.layers} == {3}


def test_a_refinement_may_be_a_word(
    toy: Callable[..., Path], compressed: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, small = toy("llama", tokenizer=True), compressed("llama", tokenizer=True)
    asked: dict[str, Any] = {"calibration": {"source": text, "length": 32}, "against": dense}
    assert prepare_refinement(small, refinement="blocks", **asked).refinement is not None
    assert prepare_refinement(small, refinement="model", **asked).towards is not None
    for given, says in (
        ("off", "refinement is blocks or model, not off"),
        ("layers", "--refine is blocks, model, both or off, not 'layers'"),
        (3, "refinement is a Refinement, a mapping of its fields or a text, not int"),
    ):
        with pytest.raises(UsageError, match=says):
            losparse_cli.refine(small, tmp_path / "out", refinement=given, **asked)  # type: ignore[arg-type]


def test_a_calibration_may_name_a_path(text: Path) -> None:
    assert losparse_cli.Calibration(text) == losparse_cli.Calibration(str(text))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"--calibration is a file, a Hub dataset .*, not list"):
        losparse_cli.Calibration([TEXT])  # type: ignore[arg-type]


def test_a_loaded_model_names_no_place(toy: Callable[..., Path], tmp_path: Path) -> None:
    model, _ = losparse_cli.load(toy("llama"))
    for call in (losparse_cli.load, losparse_cli.verify, lambda given: losparse_cli.push(given, "user/name")):
        with pytest.raises(UsageError, match="this is a LlamaForCausalLM"):
            call(model)
    with pytest.raises(UsageError, match="this is a int"):
        losparse_cli.generate(3, "abc")


def test_progress_that_is_none_is_refused_before_anything_is_written(
    toy: Callable[..., Path], compressed: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, small = toy("llama", tokenizer=True), compressed("llama", tokenizer=True)
    calls: list[Callable[[Any], object]] = [
        lambda progress: losparse_cli.compress(dense, tmp_path / "out", rank=2, sparsity=0.5, progress=progress),
        lambda progress: losparse_cli.refine(
            small, tmp_path / "out", calibration={"source": text, "length": 32}, against=dense, refinement="model",
            progress=progress,
        ),
        lambda progress: losparse_cli.finetune(dense, tmp_path / "out", task=ROWS, progress=progress),
        lambda progress: losparse_cli.export(small, tmp_path / "out", progress=progress),
        lambda progress: losparse_cli.export_gguf(small, tmp_path / "out.gguf", progress=progress),
        lambda progress: losparse_cli.export_packed(small, tmp_path / "out", progress=progress),
        lambda progress: losparse_cli.verify(small, progress=progress),
        lambda progress: losparse_cli.inspect(small, progress=progress),
        lambda progress: losparse_cli.evaluate(small, text, progress=progress),
        lambda progress: losparse_cli.bench(small, progress=progress),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(UsageError, match=r"progress is a losparse_cli\.Progress .*, not bool"):
            call(True)
    assert not list(tmp_path.iterdir())


def test_rows_of_a_benchmark_may_be_one_number(compressed: Callable[..., Path]) -> None:
    small = compressed("llama", tokenizer=True)
    found = losparse_cli.bench(small, rows=2, prompt=8, new_tokens=0, rounds=1, device="cpu")
    assert {layer.rows for layer in found.layers} == {2}
    for rows, says in ((0, "--rows must be at least 1, not 0"), ("16", "--rows lists whole numbers, not '1', '6'")):
        with pytest.raises(UsageError, match=says):
            losparse_cli.bench(small, rows=rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["texto.txt", "my texts/news.txt", "corpus.en", "data.JSONL"])
def test_the_name_of_a_file_that_is_not_there_is_no_text(name: str, toy: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=f"There is no file {name}. Check --text"):
        losparse_cli.evaluate(toy("llama", tokenizer=True), name)


@pytest.mark.parametrize("written", ["It ends so. " * 20, "a" * 200, "See a.b.\nand more.txt lines of it " * 9])
def test_a_text_is_a_text(written: str, toy: Callable[..., Path]) -> None:
    assert losparse_cli.evaluate(toy("llama", tokenizer=True), written, windows=1).protocol.length == 48


def test_windows_are_as_long_as_the_model_takes(toy: Callable[..., Path], text: Path) -> None:
    """512 tokens where it takes more; what is asked for must fit."""
    small, large = toy("llama", tokenizer=True), toy("llama", tokenizer=True, max_position_embeddings=2048)
    assert losparse_cli.evaluate(small, text, windows=1).protocol.length == 48
    assert losparse_cli.evaluate(large, text, windows=1).protocol.length == 512
    with pytest.raises(UsageError, match=r"takes at most 48 tokens\. Give --length 48 or less"):
        losparse_cli.evaluate(small, text, length=512)
