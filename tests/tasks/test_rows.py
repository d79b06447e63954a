"""Rows of files and of the Hub's datasets: what is read, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from losparse_cli.errors import LosparseError, MissingExtraError, SourceError, UsageError
from losparse_cli.tasks.request import TaskRequest
from losparse_cli.tasks.rows import read_rows
from tests.tasks.made import write_lines

ROWS = [{"text": "a, b", "label": "x"}, {"text": 'c\n"d"', "label": "y"}]


def read(path: Path | str, task: str = "text-classification", **options: Any) -> Any:
    return read_rows(TaskRequest(task, train_file=str(path), **options), "train")


def refusal(path: Path, content: bytes | str | None = None, **options: Any) -> tuple[type[LosparseError], str]:
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(LosparseError) as raised:
        read(path, **options)
    return type(raised.value), str(raised.value).replace(str(path), path.name)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_of_a_surrogate_pair_is_replaced(name: str, tmp_path: Path) -> None:
    """As in text that was cut inside an emoji: JSON allows it, tokenizers do not."""
    row = '{"text": "cut \\uD83D and \\ud83d\\ude00 whole", "label": ["\\udE00"], "n": 1}'
    (tmp_path / name).write_text(f"[{row}]" if name.endswith(".json") else f"{row}\n")
    (found,) = read(tmp_path / name, "causal-lm").rows
    assert found == {"text": "cut \ufffd and \U0001f600 whole", "label": ["\ufffd"], "n": 1}


def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    write_lines(tmp_path / "a.jsonl", *ROWS)
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "c.csv").write_text('text,label\n"a, b",x\n"c\n""d""",y\n')
    (tmp_path / "d.tsv").write_text('\ufefftext\tlabel\na, b\tx\n\n"c\n""d"""\ty\n', encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "e.parquet")
    for path in sorted(tmp_path.iterdir()):
        found = read(path)
        assert (found.columns, found.rows, found.name) == (("text", "label"), ROWS, str(path))
        assert [found.place(k) for k in range(2)] == [f"{path}, row 1", f"{path}, row 2"]


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    assert read(path, "causal-lm").rows == [{"text": "one\n\ntwo\n"}]


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "a\u2028b", "label": 0}\n\n{"text": "b", "label": 1}\n', encoding="utf-8")
    assert read(path).numbers == (2, 4)


def test_an_unnamed_column_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"  # as pandas writes its index
    path.write_text(",text,label\n0,a,x\n")
    assert read(path).rows == [{"text": "a", "label": "x"}]


def test_samples_are_drawn_by_the_seed_and_keep_their_order(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", *({"text": str(k), "label": k} for k in range(50)))
    some = read(path, max_train_samples=10)
    assert some.rows == read(path, max_train_samples=10).rows
    assert list(some.numbers) == sorted(some.numbers)
    assert [row["label"] + 1 for row in some.rows] == list(some.numbers)
    assert some.rows != read(path, max_train_samples=10, seed=1).rows
    assert max(some.numbers) > 20  # not the first ones alone
    assert len(read(path, max_train_samples=99).rows) == 50
    other = TaskRequest("text-classification", validation_file=str(path), max_train_samples=1)
    assert len(read_rows(other, "validation")) == 50


@pytest.mark.parametrize(
    ("file", "content", "kind", "sentence"),
    [
        (
            "a.jsonl",
            None,
            UsageError,
            ("There is no file a.jsonl. Check --train-file, or give --dataset-name for a dataset of the Hub."),
        ),
        ("a.jsonl", "", UsageError, "a.jsonl is empty: it has no rows. Give some for train."),
        ("a.csv", " \n", UsageError, "a.csv is empty: it has no rows. Give some for train."),
        ("a.json", "[]", UsageError, "a.json is empty: it has no rows. Give some for train."),
        ("a.csv", "text,label\n", UsageError, "a.csv is empty: it has no rows. Give some for train."),
        (
            "a.csv",
            b"PK\x03\x04\xff\xfe",
            SourceError,
            ("a.csv is not UTF-8 text (at byte 4). Convert it, or give another."),
        ),
        (
            "a.jsonl",
            b"ab\0c",
            SourceError,
            ("a.jsonl, line 1 holds NUL bytes, so it is not text. Give a UTF-8 text file."),
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n\n{"text": "b"',
            SourceError,
            ("a.jsonl, line 3 is not valid JSON (Expecting ',' delimiter). Give one object a line."),
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n3\n',
            SourceError,
            ("a.jsonl, line 2 is no JSON object. Give one object a line."),
        ),
        ("a.jsonl", '{"text": "a"}\n[1]\n', SourceError, "a.jsonl, line 2 is no JSON object. Give one object a line."),
        ("a.json", '[{"text": "a"}, 4]', SourceError, "a.json, row 2 is no JSON object. Give an array of objects."),
        (
            "a.json",
            '[{"text": "a"}\n',
            SourceError,
            (
                "a.json is not valid JSON (Expecting ',' delimiter: line 2 column "
                "1 (char 15)). Give an array of objects."
            ),
        ),
        (
            "a.csv",
            "a film,1\nb film,0\n",
            UsageError,
            ("a.csv has no header row: in its first line stands the number 1. Begin it with the names of the columns."),
        ),
        (
            "a.csv",
            "x,text,x\n1,2,3\n",
            UsageError,
            ("a.csv has no header row: in its first line stands 'x' twice. Begin it with the names of the columns."),
        ),
        (
            "a.csv",
            ",,\na,b,c\n",
            UsageError,
            ("a.csv has no header row: in its first line stands no name. Begin it with the names of the columns."),
        ),
        (
            "a.csv",
            "a film,good\nb film,bad\n",
            UsageError,
            ("a.csv has no column sentence or text, but a film, good. Name one with --text-column."),
        ),
        (
            "a.csv",
            "text,label\na,1\nb, c,0\n",
            SourceError,
            ("a.csv, row 2 (until line 3) has 3 fields, and the header 2. Put fields that hold commas in quotes."),
        ),
        (
            "a.tsv",
            'text\tlabel\n"a"b\t1\n',
            SourceError,
            ("a.tsv, line 2 cannot be read as CSV ('\t' expected after '\"'). Correct it."),
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n\n{"text": "b"}\n',
            UsageError,
            ("a.jsonl, row 3 has no 'label', but text. Complete it, or name another column with --label-column."),
        ),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence(
    tmp_path: Path, file: str, content: Any, kind: type[LosparseError], sentence: str
) -> None:
    assert refusal(tmp_path / file, content) == (kind, sentence)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_file_that_may_not_be_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text("text,label\na,1\n")

    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    assert refusal(tmp_path / name) == (
        SourceError, f"{name} cannot be read: Permission denied. Check its permissions."
    )  # fmt: skip


def test_a_folder_and_a_missing_part_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a.csv"
    folder.mkdir()
    assert refusal(folder) == (UsageError, "--train-file a.csv is a folder. Give a file in it.")
    request = TaskRequest("text-classification", train_file="a.csv")
    with pytest.raises(UsageError) as raised:
        read_rows(request, "validation")
    assert str(raised.value) == "There are no rows for validation. Give --validation-file, or --dataset-name."


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    kind, sentence = refusal(tmp_path / "a.parquet", "text,label\na,1\n")
    assert kind is SourceError
    assert sentence.startswith("a.parquet cannot be read as Parquet (")
    assert sentence.endswith("). Write or download it again.")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    kind, sentence = refusal(tmp_path / "a.parquet", "x")
    assert kind is MissingExtraError
    assert sentence == (
        "Reading a.parquet needs the package 'pyarrow'. Install it with: pip install 'losparse[datasets]'"
    )


# --- the Hub --------------------------------------------------------------------------------------

HUB: dict[str, Any] = {"task": "text-classification", "dataset_name": "who/what"}


def test_a_dataset_comes_with_the_names_of_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
    asked = []

    def load(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        return made

    monkeypatch.setattr(datasets, "load_dataset", load)
    request = TaskRequest(**HUB, dataset_config_name="sst2", validation_split="test", max_validation_samples=2)
    found = read_rows(request, "validation")
    assert asked == [("who/what", "sst2", "test")]
    assert found.class_names == {"label": ("no", "yes")}
    assert (found.columns, found.name, len(found)) == (("text", "label"), "who/what (test)", 2)
    assert found.rows == [{"text": "abc"[n - 1], "label": [1, 0, 1][n - 1]} for n in found.numbers]


def test_code_of_a_dataset_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before version 4 a dataset could bring some, after a question at the terminal."""
    datasets = pytest.importorskip("datasets")
    asked: list[dict[str, Any]] = []

    def load(name: str, config: str | None, **options: Any) -> Any:
        asked.append(options)
        return datasets.Dataset.from_dict({"text": ["a"], "label": [1]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    read_rows(TaskRequest(**HUB), "train")
    assert asked == [{"split": "train", "trust_remote_code": False}]


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (
            ValueError("Unknown split"),
            UsageError,
            (
                "The dataset who/what cannot be read with the split 'train': Unknown "
                "split. Choose with --train-split, or a configuration with --dataset-config-name."
            ),
        ),
        (
            ConnectionError("x"),
            SourceError,
            ("The Hub cannot be reached to read the dataset who/what. Check the network, or unset HF_HUB_OFFLINE."),
        ),
        (
            RuntimeError("odd\nfile."),
            SourceError,
            ("The dataset who/what cannot be read: odd file. Give another, or a file."),
        ),
    ],
)
def test_a_dataset_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[LosparseError], sentence: str
) -> None:
    datasets = pytest.importorskip("datasets")

    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(kind) as raised:
        read_rows(TaskRequest(**HUB), "train")
    assert str(raised.value) == sentence


def test_a_dataset_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(*_: Any, **__: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("x")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(SourceError, match=r"^There is no dataset who/what on the Hub that you can see\."):
        read_rows(TaskRequest(**HUB), "train")


def test_a_dataset_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError) as raised:
        read_rows(TaskRequest(**HUB), "train")
    assert str(raised.value) == (
        "Reading the dataset who/what needs the package 'datasets'. Install it with: pip install 'losparse[datasets]'"
    )
