"""What is refused before anything is read, each with its sentence."""

from __future__ import annotations

from typing import Any

import pytest

from losparse_cli.errors import UsageError
from losparse_cli.tasks.request import TASKS, TaskRequest

CLASSES: dict[str, Any] = {"task": "text-classification", "train_file": "a.csv"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("file", ["a.jsonl", "a.JSON", "a.csv", "a.tsv", "a.parquet", "a.ndjson"])
def test_every_task_reads_tables(task: str, file: str) -> None:
    assert TaskRequest(task, validation_file=file).validation_file == file


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {**CLASSES, "task": "ner"},
            ("--task is one of text-classification, question-answering, summarization, seq2seq, causal-lm, not 'ner'."),
        ),
        (
            {"task": "causal-lm"},
            (
                "There are no rows to read. Give --train-file or --validation-file, or --dataset-name "
                "for a dataset of the Hub."
            ),
        ),
        (
            {**CLASSES, "dataset_name": "glue"},
            ("--train-file and --dataset-name both say where the rows come from. Give one of them."),
        ),
        (
            {"task": "causal-lm", "validation_file": "a.txt", "dataset_name": "glue"},
            ("--validation-file and --dataset-name both say where the rows come from. Give one of them."),
        ),
        (
            {**CLASSES, "dataset_config_name": "sst2"},
            ("--dataset-config-name is of a dataset of the Hub. Add --dataset-name, or leave it out."),
        ),
        (
            {**CLASSES, "train_file": "a.txt"},
            (
                "--train-file a.txt is of no kind that text-classification reads. Give "
                "one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet."
            ),
        ),
        (
            {"task": "causal-lm", "train_file": "a.pdf"},
            (
                "--train-file a.pdf is of no kind that causal-lm reads. Give "
                "one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt."
            ),
        ),
        (
            {**CLASSES, "answers_column": "a"},
            ("--answers-column is of question-answering, not of text-classification. Leave it out."),
        ),
        (
            {**CLASSES, "source_prefix": "a"},
            ("--source-prefix is of summarization and seq2seq, not of text-classification. Leave it out."),
        ),
        (
            {**CLASSES, "text_pair_column": "b"},
            ("--text-pair-column names a second text without a first. Name that with --text-column."),
        ),
        ({**CLASSES, "max_length": 7}, "--max-length is a whole number >= 8, not 7."),
        ({**CLASSES, "max_target_length": 0}, "--max-target-length is a whole number >= 1, not 0."),
        ({**CLASSES, "doc_stride": -1}, "--doc-stride is a whole number >= 0, not -1."),
        ({**CLASSES, "n_best": 0}, "--n-best is a whole number >= 1, not 0."),
        ({**CLASSES, "max_answer_length": 0}, "--max-answer-length is a whole number >= 1, not 0."),
        ({**CLASSES, "num_beams": 0}, "--num-beams is a whole number >= 1, not 0."),
        ({**CLASSES, "max_train_samples": 0}, "--max-train-samples is a whole number >= 1, not 0."),
        ({**CLASSES, "max_validation_samples": -3}, "--max-validation-samples is a whole number >= 1, not -3."),
    ],
)
def test_a_contradiction_is_said_in_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as raised:
        TaskRequest(**options)
    assert str(raised.value) == sentence
