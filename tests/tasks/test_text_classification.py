"""Classes and numbers of texts: how labels become the model's, and that batches do not change what it says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import TOYS, character_tokenizer, toy_model

from losparse_cli.errors import UsageError
from losparse_cli.tasks.kinds import open_task
from tests.tasks.made import CPU, Says, bare, encoder_tokenizer, request_of, rows_of


def task_of(**options: Any) -> Any:
    return open_task(request_of("text-classification", **options))


def labelled(*labels: Any, **options: Any) -> Any:
    return rows_of(*({"text": f"t{k}", "label": label} for k, label in enumerate(labels)), **options)


def config_of(*names: str, **changes: Any) -> Any:
    return transformers.BertConfig(vocab_size=101, id2label=dict(enumerate(names)), **changes)


def ids_of(rows: Any, config: Any) -> list[Any]:
    features = task_of().prepare(rows, encoder_tokenizer(), bare(config), training=False)
    return [item["labels"] for item in features.items]


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (labelled("b", "a", "b"), ["a", "b"]),
        (labelled(10, 2, 10), ["2", "10"]),
        (labelled("10", "2"), ["2", "10"]),  # as CSV has it
        (labelled("1.0", "0.0"), ["0", "1"]),  # as pandas writes what it once read with gaps
        (labelled(2.0, 0.0), ["0", "2"]),
        (labelled(True, False), ["0", "1"]),
        (labelled(1, 0, class_names={"label": ("yes", "maybe", "no")}), ["yes", "maybe", "no"]),
    ],
)
def test_classes_are_what_the_rows_hold(rows: Any, names: list[str]) -> None:
    task = task_of()
    changes = task.config_changes(rows)
    assert changes == {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: k for k, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }
    config = transformers.BertConfig(**{k: v for k, v in changes.items() if k != "num_labels"})
    task.check(rows, config)
    assert (task.main_score, task.larger_is_better) == ("accuracy", True)


@pytest.mark.parametrize("labels", [(0.5, 1.0), (3, 2.5), ("3", "2.5")])
def test_fractions_make_a_regression(labels: Any) -> None:
    task, rows = task_of(), labelled(*labels)
    changes = task.config_changes(rows)
    assert (changes["num_labels"], changes["problem_type"], task.main_score) == (1, "regression", "pearson")
    found = ids_of(rows, config_of("LABEL_0", problem_type="regression"))
    assert found == [float(label) for label in labels]
    assert all(isinstance(label, float) for label in found)
    seen = task_of()
    seen.check(labelled(1, 2), config_of("LABEL_0"))
    assert seen.main_score == "pearson"


@pytest.mark.parametrize(
    ("labels", "options", "names", "ids"),
    [
        (("b", "a"), {}, ("a", "b"), [1, 0]),
        (("positive", "Negative"), {}, ("NEGATIVE", "POSITIVE"), [1, 0]),
        ((1, 0), {}, ("NEGATIVE", "POSITIVE"), [1, 0]),
        ((10, 2), {}, ("2", "10"), [1, 0]),
        ((1, 0), {"class_names": {"label": ("no", "yes")}}, ("YES", "NO"), [0, 1]),  # by name, not by number
        ((1, 0), {"class_names": {"label": ("neg", "pos")}}, ("LABEL_0", "LABEL_1"), [1, 0]),
    ],
)
def test_labels_become_the_models(labels: Any, options: Any, names: Any, ids: list[int]) -> None:
    assert ids_of(labelled(*labels, **options), config_of(*names)) == ids


@pytest.mark.parametrize(
    ("labels", "options", "names", "sentence"),
    [
        (
            (0, 2),
            {},
            ("a", "b"),
            (
                "rows.jsonl, row 2 has the label 2, and the model knows 2 classes: a, b. Correct the "
                "row, or give a model for these labels."
            ),
        ),
        (
            (-1, 1),
            {},
            ("a", "b"),
            (
                "rows.jsonl, row 1 has the label -1, and the model knows 2 classes: a, b. Correct "
                "the row, or give a model for these labels."
            ),
        ),
        (
            (-1, 1),
            {"class_names": {"label": ("a", "b")}},
            ("a", "b"),
            (
                "rows.jsonl, row 1 has the label -1, and the "
                "model knows 2 classes: a, b. Correct the row, or give a model for these labels."
            ),
        ),
        (
            (1, 2),
            {},
            ("0", "2", "5"),
            (
                "rows.jsonl, row 1 has the label 1, and the model knows 3 classes: 0, 2, 5. "
                "Correct the row, or give a model for these labels."
            ),
        ),
        (
            ("a", "c"),
            {},
            ("a", "b"),
            (
                "rows.jsonl, row 2 has the label 'c', and the model knows 2 classes: a, b. "
                "Correct the row, or give a model for these labels."
            ),
        ),
        (
            (0.5, 1),
            {},
            ("a", "b"),
            (
                "rows.jsonl, row 1 has the label 0.5, and the model knows 2 classes: a, b. Correct "
                "the row, or give a model for these labels."
            ),
        ),
        (
            (1, "a"),
            {},
            ("a",),
            (
                "rows.jsonl, row 2 has the label 'a', and the model's only output is a number. Give "
                "labels that are numbers, or another model."
            ),
        ),
        (
            ("a", None),
            {},
            ("a", "b"),
            (
                "rows.jsonl, row 2 has no label in 'label', but None. Leave the row out, or name "
                "another column with --label-column."
            ),
        ),
        (
            (1, [2]),
            {},
            ("a", "b"),
            (
                "rows.jsonl, row 2 has no label in 'label', but [2]. Leave the row out, or name "
                "another column with --label-column."
            ),
        ),
        (
            (float("nan"),),
            {},
            ("a",),
            (
                "rows.jsonl, row 1 has no label in 'label', but nan. Leave the row out, or name "
                "another column with --label-column."
            ),
        ),
    ],
)
def test_a_label_that_the_model_lacks_is_named_with_its_row(
    labels: Any, options: Any, names: Any, sentence: str
) -> None:
    with pytest.raises(UsageError) as raised:
        task_of().check(labelled(*labels, **options), config_of(*names))
    assert str(raised.value) == sentence


@pytest.mark.parametrize("label", ["nan", "-inf"])
def test_a_label_that_is_no_number_among_numbers(label: str) -> None:
    with pytest.raises(UsageError) as raised:
        task_of().config_changes(labelled("0.5", label, "1.5"))
    assert str(raised.value) == (
        f"rows.jsonl, row 2 has the label {label!r} among numbers in 'label'. Leave the row out, or give its number."
    )
    assert task_of().config_changes(labelled("nan", "sun"))["num_labels"] == 2


def test_one_class_and_many_at_once_are_refused() -> None:
    with pytest.raises(UsageError) as raised:
        task_of().config_changes(labelled("a", "a"))
    assert str(raised.value) == (
        "All 2 rows of rows.jsonl have the label 'a'. Give rows of two classes or more, or name another column with "
        "--label-column."
    )
    with pytest.raises(UsageError, match=r"^The model gives a text several classes at once"):
        task_of().check(labelled(0, 1), config_of("a", "b", problem_type="multi_label_classification"))


# --- texts ----------------------------------------------------------------------------------------


def test_texts_are_cut_and_pairs_keep_both() -> None:
    rows = rows_of({"sentence1": "abcdefgh", "sentence2": "xyz", "label": 0})
    features = task_of(max_length=10).prepare(rows, encoder_tokenizer(), bare(config_of("a", "b")), training=True)
    text = encoder_tokenizer().decode(features[0]["input_ids"])
    assert text == "<s>abcd</s>xyz</s>"
    assert features[0]["token_type_ids"] == [0] * 6 + [1] * 4


def test_a_text_without_a_token_is_refused() -> None:
    tokenizer = character_tokenizer()
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(UsageError) as raised:
        task_of().prepare(
            rows_of({"text": "a", "label": 0}, {"text": "", "label": 1}),
            tokenizer,
            bare(config_of("a", "b")),
            training=True,
        )
    assert str(raised.value) == "rows.jsonl, row 2 has no text. Leave the row out."


# --- what the model says --------------------------------------------------------------------------


def model_of(name: str) -> Any:
    if name in ("llama", "gpt2"):
        _, config, settings = TOYS[name]
        made = getattr(transformers, config)(**{**settings, "num_labels": 3, "pad_token_id": None})
        torch.manual_seed(0)
        return transformers.AutoModelForSequenceClassification.from_config(made).eval()
    return toy_model(name)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "deberta-v2", "llama", "gpt2"])
def test_logits_are_those_of_each_text_alone_in_the_order_of_rows(name: str, side: str) -> None:
    model, task = model_of(name), task_of()
    tokenizer = encoder_tokenizer(side) if name in ("bert", "deberta-v2") else character_tokenizer()
    tokenizer.padding_side = side
    if name in ("llama", "gpt2"):
        tokenizer.pad_token = None
    rows = rows_of(
        *({"sentence1": "xyz"[: 1 + k % 3] * k, "sentence2": "q" * (9 - k), "label": k % 3} for k in range(1, 9))
    )
    features = task.prepare(rows, tokenizer, model, training=False)
    found = task.predict(model, tokenizer, features, batch_size=3, device=CPU)
    with torch.no_grad():
        alone = [
            model(**{k: torch.tensor([v]) for k, v in item.items() if k in ("input_ids", "attention_mask")
                     or (k == "token_type_ids" and name == "bert")}).logits[0]
            for item in features.items
        ]  # fmt: skip
    torch.testing.assert_close(found, torch.stack(alone), atol=1e-5, rtol=1e-4)
    assert [item["labels"] for item in features.items] == [k % 3 for k in range(1, 9)]


def test_scores_are_those_of_the_likeliest_class() -> None:
    def say(ids: Any, mask: Any) -> Any:  # the class by the number of characters: 1 to 3
        return SimpleNamespace(logits=torch.nn.functional.one_hot(mask.sum(1) - 3, 3).float())

    model, task, tokenizer = Says(say, num_labels=3), task_of(), encoder_tokenizer()
    rows = rows_of({"text": "a", "label": 0}, {"text": "abc", "label": 2}, {"text": "ab", "label": 2})
    features = task.prepare(rows, tokenizer, model, training=False)
    found = task.score(model, tokenizer, features, batch_size=2, device=CPU)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx((1 + 0 + 2 / 3) / 3)


def test_a_regression_is_scored_by_correlation() -> None:
    def say(ids: Any, mask: Any) -> Any:
        return SimpleNamespace(logits=mask.sum(1, keepdim=True) ** 2.0)

    model, task, tokenizer = Says(say, num_labels=1), task_of(), encoder_tokenizer()
    rows = rows_of(*({"text": "a" * k, "label": float(k)} for k in (4, 1, 3, 2)))
    features = task.prepare(rows, tokenizer, model, training=False)
    found = task.score(model, tokenizer, features, batch_size=3, device=CPU)
    assert found["spearman"] == pytest.approx(1)
    assert 0.9 < found["pearson"] < 0.9999
    batch = task.collator(tokenizer, model)(features.items)
    assert (batch["labels"].dtype, batch["labels"].tolist()) == (torch.float32, [4, 1, 3, 2])


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "llama"])
def test_a_batch_trains(name: str) -> None:
    model, task = model_of(name), task_of()
    tokenizer = encoder_tokenizer()
    rows = labelled(0, 1, 2)
    features = task.prepare(rows, tokenizer, model, training=True)
    loss = model(**task.collator(tokenizer, model)(features.items)).loss
    loss.backward()
    assert torch.isfinite(loss)
