"""The evaluation harness on tasks of our own, offline; its results made into figures and paired differences."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Loads, toy_model
from terminal import done, losparse

from losparse_cli.errors import MissingExtraError, SourceError, UsageError
from losparse_cli.evaluation import harness
from losparse_cli.evaluation.harness_scores import differences, estimates
from losparse_cli.load import load
from losparse_cli.tasks.paired import Estimate
from tests.hearing import Hearing
from tests.tasks.made import write_lines

installed = pytest.mark.skipif(harness.find_spec("lm_eval") is None, reason="lm_eval is not installed")
DOCUMENTS = 8


def definition(name: str, **changes: Any) -> str:
    """A task of multiple choice; YAML reads JSON."""
    return json.dumps(
        {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{c}}",
            "doc_to_target": "{{a}}",
            "metric_list": [{"metric": "acc"}],
            **changes,
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Definitions of three tasks and a group of two, their rows beside them."""
    path = tmp_path_factory.mktemp("definitions")
    rows = ({"q": "ab"[k % 2] * (k + 1), "c": [" a", " b", " c"], "a": k % 3} for k in range(DOCUMENTS))
    write_lines(path / "rows.jsonl", *rows)
    for name in ("letters", "letters_again"):
        (path / f"{name}.yaml").write_text(definition(name))
    (path / "coefficient.yaml").write_text(definition("coefficient", metric_list=[{"metric": "mcc"}]))
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = {"group": "both", "task": ["letters", "letters_again"], "aggregate_metric_list": [mean]}
    (path / "both.yaml").write_text(json.dumps(group))
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two language models that choose different letters."""
    from conftest import character_tokenizer

    path = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("small", "dense")):
        model = toy_model("llama", seed=seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4.0 if parameter.dim() == 2 else 1.0)
        model.save_pretrained(path / name)
        character_tokenizer().save_pretrained(path / name)
    return path / "small", path / "dense"


def choices(folder: Path) -> torch.Tensor:
    """Whether the letter that follows every question most likely is the right one, from transformers' own output."""
    model, tokenizer = load(folder)
    found = []
    for k in range(DOCUMENTS):
        question = "ab"[k % 2] * (k + 1)
        scores = []
        for choice in " a", " b", " c":
            ids = tokenizer(question + choice, return_tensors="pt").input_ids
            with torch.no_grad():
                rows = model(ids).logits[0].double().log_softmax(-1)
            scores.append(float(rows[-3, ids[0, -2]] + rows[-2, ids[0, -1]]))
        found.append(max(range(3), key=scores.__getitem__) == k % 3)
    return torch.tensor(found, dtype=torch.float64)


# --- the harness itself ---------------------------------------------------------------------------


@installed
def test_a_task_of_our_own_beside_the_dense_model(folder: Path, pair: tuple[Path, Path]) -> None:
    heard = Hearing()
    found = harness.evaluate_harness(
        pair[0], ["coefficient", " both "], path=folder, against=pair[1], device="cpu", progress=heard
    )
    ours, dense = choices(pair[0]), choices(pair[1])
    assert not torch.equal(ours, dense), "models that agree show no paired error"
    assert heard.phases == ["small", "dense"]
    assert found.dense_scores is not None
    assert found.differences is not None
    for scores, right in ((found.scores, ours), (found.dense_scores, dense), (found.differences, ours - dense)):
        figure = scores["letters"]["acc"]
        assert figure.value == pytest.approx(float(right.mean()))
        assert figure.error == pytest.approx(float(right.std()) / math.sqrt(DOCUMENTS))
    whole, gaps = found.differences["both"]["acc"], torch.cat((ours - dense, ours - dense))
    assert whole.value == pytest.approx(float(gaps.mean()))
    assert whole.error == pytest.approx(float(gaps.std()) / math.sqrt(2 * DOCUMENTS))
    assert found.differences["coefficient"]["mcc"].error is not None  # of no single document: by resamples
    assert found.protocol.documents["letters"] == DOCUMENTS
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["scores"]["letters"]["acc"]["error"] > 0


@installed
def test_a_compressed_model_is_asked_so_many_documents(compressed: Callable[..., Path], folder: Path) -> None:
    found = harness.evaluate_harness(
        compressed("llama", tokenizer=True), ["letters*"], path=folder, limit=3, device="cpu", batch_size=2
    )
    assert found.scores.keys() == {"letters", "letters_again"}
    assert found.protocol.documents == {"letters": 3, "letters_again": 3}
    assert found.dense is found.dense_scores is found.differences is None
    assert "letters 3 (0-shot), letters_again 3 (0-shot); 2 at once, float32 on cpu" in str(found.protocol)


@installed
def test_the_models_are_never_both_there(
    folder: Path, pair: tuple[Path, Path], watch_loads: Callable[[Any], Loads]
) -> None:
    loads = watch_loads(harness)
    harness.evaluate_harness(pair[0], ["letters"], path=folder, against=pair[1], limit=2, device="cpu")
    assert loads.alive == [0, 0]
    assert loads.models[1]() is None


@installed
def test_unknown_tasks_are_named_with_like_ones(folder: Path, pair: tuple[Path, Path]) -> None:
    with pytest.raises(
        UsageError, match=rf"no task 'leters', and {folder} defines none either\. Did you mean .*letters"
    ):
        harness.evaluate_harness(pair[0], ["letters", "leters"], path=folder, device="cpu")
    with pytest.raises(UsageError, match="--lm-eval names no task"):
        harness.find_tasks([" ", ""], folder)


@installed
def test_our_own_tasks_come_before_the_harness_s(folder: Path) -> None:
    manager, names = harness.find_tasks(["both", "letters", "letters"], folder)
    assert names == ["both", "letters"]
    assert len(manager.all_tasks) == 4, "thousands were looked through for nothing"
    assert harness.find_tasks(["arc_easy", "letters"], folder)[1] == ["arc_easy", "letters"]


@installed
def test_data_that_is_not_there(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "lost.yaml").write_text(definition("lost"))
    with pytest.raises(SourceError, match=r"cannot read the data of lost: .*rows\.jsonl"):
        harness.evaluate_harness(pair[0], ["lost"], path=tmp_path, device="cpu")


@installed
@pytest.mark.parametrize(
    ("changes", "row", "said"),
    [
        ({"test_split": "nope"}, '{"q": "a"}', "KeyError: 'nope'"),
        ({"doc_to_text": "{{nothing}}"}, '{"q": "a", "c": [" a", " b"], "a": 0}', "'nothing' is undefined"),
        ({"output_type": "telepathy"}, "{}", "invalid output_type 'telepathy'"),
        ({"unknown": 1}, "{}", "TypeError: .*'unknown'"),
    ],
)
def test_a_definition_that_is_wrong(
    changes: dict[str, Any], row: str, said: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "wrong.yaml").write_text(definition("wrong", **changes))
    (tmp_path / "rows.jsonl").write_text(row)
    with pytest.raises(UsageError, match=rf"^The harness refuses wrong: .*{said}.* or correct the definition\.$"):
        harness.evaluate_harness(pair[0], ["wrong"], path=tmp_path, device="cpu")


@installed
def test_a_task_twice_and_rows_that_are_no_json(pair: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"refuses letters, both: Duplicate task 'letters'"):
        harness.evaluate_harness(pair[0], ["letters", "both"], path=folder, device="cpu")
    (tmp_path / "broken.yaml").write_text(definition("broken"))
    (tmp_path / "rows.jsonl").write_text('{"q":')
    with pytest.raises(SourceError, match=r"cannot read the data of broken: "):
        harness.evaluate_harness(pair[0], ["broken"], path=tmp_path, device="cpu")


@installed
def test_models_and_options_that_make_no_sense(toy: Callable[..., Path], folder: Path) -> None:
    with pytest.raises(UsageError, match=r"predicts no next token, so the harness cannot ask it\."):
        harness.evaluate_harness(toy("bert", tokenizer=True), ["letters"], path=folder, device="cpu")
    llama = toy("llama", tokenizer=True)
    for options, said in (
        ({"limit": 0}, "--lm-eval-limit is a whole number >= 1, not 0"),
        ({"batch_size": 0}, "--batch-size is a whole number >= 1"),
        ({"dtype": "int4"}, "--dtype is one of"),
        ({"path": folder / "rows.jsonl"}, "rows.jsonl is no folder"),
    ):
        with pytest.raises(UsageError, match=said):
            harness.evaluate_harness(llama, ["letters"], **{"path": folder, "device": "cpu", **options})


@pytest.mark.parametrize("package", ["lm_eval", "accelerate"])
def test_without_the_packages(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None if name == package else True)
    with pytest.raises(MissingExtraError, match=rf"the package '{package}'.*losparse\[lm-eval\]"):
        harness.evaluate_harness("model", ["letters"])


# --- its results, without it ----------------------------------------------------------------------


def results(values: list[float], **changes: Any) -> dict[str, Any]:
    """As simple_evaluate returns them, of a task with one score and of a group that holds it alone."""
    mean = sum(values) / len(values)
    samples = [{"doc_id": k, "doc_hash": str(k), "filter": "none", "em": value} for k, value in enumerate(values)]
    row = {"alias": "t", "sample_len": len(values), "em,none": mean, "em_stderr,none": 0.125}
    base = {
        "results": {"t": row, "g": {"alias": "g", "em,none": mean, "em_stderr,none": "N/A"}},
        "samples": {"t": samples},
        "group_subtasks": {"g": ["t"]},
    }
    return base | changes


def test_figures_and_errors_are_the_harness_s() -> None:
    assert estimates(results([1.0, 0.0])) == {"t": {"em": Estimate(0.5, 0.125)}, "g": {"em": Estimate(0.5, None)}}
    named = {"t": {"em,strict": 0.5, "em_stderr,strict": math.nan}}
    assert estimates(results([1.0], results=named)) == {"t": {"em,strict": Estimate(0.5, None)}}


def test_differences_are_paired_by_document() -> None:
    found = differences(results([1.0, 1.0, 0.0, 0.0]), results([1.0, 1.0, 1.0, 0.0]))
    assert found == {"t": {"em": Estimate(-0.25, 0.25)}, "g": {"em": Estimate(-0.25, 0.25)}}


@installed
def test_no_error_where_documents_cannot_be_paired() -> None:
    mine, theirs = results([1.0, 0.0]), results([0.0, 0.0])
    theirs["samples"]["t"][1]["doc_hash"] = "another"
    assert differences(mine, theirs)["t"]["em"] == Estimate(0.5, None)
    theirs = results([0.0, 0.0])
    theirs["results"]["t"]["em,none"] = 0.25  # made in some way that the documents do not show
    assert differences(mine, theirs)["t"]["em"] == Estimate(0.25, None)
    theirs = results([0.0, 0.0])
    theirs["samples"]["t"] = []
    assert differences(mine, theirs)["t"]["em"] == Estimate(0.5, None)


# --- the command ----------------------------------------------------------------------------------


@installed
def test_eval_by_the_harness(folder: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    asked = ("--lm-eval", "both", "--lm-eval-path", folder, "--device", "cpu")
    ended = done("eval", pair[0], "--against", pair[1], *asked, cwd=tmp_path)
    assert ended.err == ""
    shown = " ".join(ended.out.split())
    for words in ("evaluation harness", "task score this", "letters acc", "both acc", "difference", "of dense",
                  "documents: letters 8 (0-shot)", "standard errors count documents as independent."):  # fmt: skip
        assert words in shown, ended.out
    content = json.loads(done("eval", pair[0], *asked, "--lm-eval-limit", 2, "--json", cwd=tmp_path).out)
    assert content["protocol"]["documents"] == {"letters": 2, "letters_again": 2}
    assert content["scores"]["letters"].keys() == {"acc"}
    assert content["differences"] is None
    refused = losparse("eval", pair[0], *asked[:1], "leters", *asked[2:])
    assert (refused.code, "Did you mean" in refused.complaint) == (2, True)
