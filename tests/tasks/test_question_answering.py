"""Answers from one-hot logits, with and without an answer, in whichever window; and what is refused."""

from __future__ import annotations

import string
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import character_tokenizer, toy_model

from losparse_cli.errors import UsageError
from losparse_cli.tasks.kinds import open_task
from losparse_cli.tasks.question_answering import null_position
from tests.tasks.made import CPU, Says, bare, encoder_tokenizer, request_of, rows_of

LETTERS = string.ascii_letters  # every character once, so that an answer stands in one place
CONFIG = transformers.BertConfig(vocab_size=101, max_position_embeddings=24)


def task_of(**options: Any) -> Any:
    return open_task(request_of("question-answering", **{"doc_stride": 6, **options}))


def asked(*answers: str, context: str = LETTERS, question: str = "??") -> dict[str, Any]:
    starts = [context.index(answer) for answer in answers]
    return {"question": question, "context": context, "answers": {"text": list(answers), "answer_start": starts}}


def pointing(answers: dict[int, str], strength: float = 9.0) -> Any:
    """A model that points at the answer to a question of so many characters, wherever it sees it, else at [CLS]."""
    tokenizer = encoder_tokenizer()

    def say(ids: Any, mask: Any) -> Any:
        logits = torch.zeros(2, *ids.shape)
        for k, row in enumerate(ids.tolist()):
            wanted = tokenizer(answers[row.index(2) - 1], add_special_tokens=False).input_ids
            places = [j for j in range(len(row)) if wanted and row[j : j + len(wanted)] == wanted]
            logits[0, k, places[0] if places else 0] = strength if places else 1
            logits[1, k, places[0] + len(wanted) - 1 if places else 0] = strength if places else 1
        logits = logits.masked_fill(mask == 0, 100.0)  # whoever reads the padding is lost
        return SimpleNamespace(start_logits=logits[0], end_logits=logits[1])

    return Says(say, max_position_embeddings=24)


def predict(task: Any, model: Any, *rows: dict[str, Any], side: str = "right") -> list[str]:
    tokenizer = encoder_tokenizer(side)
    features = task.prepare(rows_of(*rows), tokenizer, bare(CONFIG), training=False)
    found: list[str] = task.predict(model, tokenizer, features, batch_size=3, device=CPU)
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("place", [0, 10, 14, 17, 25, 46])
def test_an_answer_is_found_in_whichever_window_it_lies(place: int, side: str) -> None:
    answers = [LETTERS[place : place + size] for size in (1, 3, 6)]
    rows = [asked(answer, question="?" * k) for k, answer in enumerate(answers, 1)]
    model = pointing(dict(enumerate(answers, 1)))
    assert predict(task_of(), model, *rows, side=side) == answers


def test_scores_count_the_best_of_several_answers() -> None:
    rows = [
        asked("one two", "two three", context="one two three four", question="?"),
        asked("four", context="one two three four", question="??"),
    ]
    model, tokenizer, task = pointing({1: "two three", 2: "three four"}), encoder_tokenizer(), task_of()
    features = task.prepare(rows_of(*rows), tokenizer, bare(CONFIG), training=False)
    found = task.score(model, tokenizer, features, batch_size=2, device=CPU)
    assert found == pytest.approx({"exact_match": 1 / 2, "f1": (1 + 2 / 3) / 2})


@pytest.mark.parametrize(("strength", "found"), [(1.1, ["b", "c"]), (0.9, ["", ""])])
def test_nothing_is_an_answer_where_some_row_has_none(strength: float, found: list[str]) -> None:
    rows = [asked("b", question="?", context="abcdef"), asked(question="??", context="abcdef")]

    def say(ids: Any, mask: Any) -> Any:
        logits = torch.zeros(ids.shape)
        logits[:, 0] = 1  # nothing scores 2
        for k, row in enumerate(ids.tolist()):
            logits[k, 2 * row.index(2)] = strength  # of the context the character after as many as the question has
        return SimpleNamespace(start_logits=logits, end_logits=logits)

    model = Says(say, max_position_embeddings=24)
    assert predict(task_of(), model, *rows) == found
    answered = [rows[0], asked("c", question="??", context="abcdef")]
    assert predict(task_of(), model, *answered) == ["b", "c"]  # where all have one, nothing is none


def test_the_least_null_score_of_all_windows_counts() -> None:
    context = LETTERS[:30]  # in most windows the model says that there is nothing, and that is right
    rows = [asked("yz", question="?", context=context), asked(question="??", context=context)]
    assert predict(task_of(), pointing({1: "yz", 2: ""}), *rows) == ["yz", ""]


def test_longer_answers_than_allowed_are_never_given() -> None:
    rows = [asked("bcdef", question="?", context="abcdefgh")]
    assert predict(task_of(), pointing({1: "bcdef"}), *rows) == ["bcdef"]
    assert predict(task_of(max_answer_length=4), pointing({1: "bcdef"}), *rows) != ["bcdef"]


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [encoder_tokenizer(), encoder_tokenizer("left"), character_tokenizer()])
def test_labels_point_at_the_answer_or_at_the_first_token(tokenizer: Any) -> None:
    rows = rows_of(*(asked(LETTERS[k : k + 4]) for k in range(48)), asked())
    task = task_of()
    features = task.prepare(rows, tokenizer, bare(CONFIG), training=True)
    assert features.offsets == ()
    inputs = set(features[0]) - {"start_positions", "end_positions"}
    assert inputs <= {"input_ids", "token_type_ids", "attention_mask"}
    seen = set()
    batch = task.collator(tokenizer, toy_model("bert-qa"))(features.items)
    for k, (ids, start, end) in enumerate(
        zip(batch["input_ids"], batch["start_positions"], batch["end_positions"], strict=True)
    ):
        row = features.where[k]
        if start == end == 0:
            assert null_position(ids.tolist(), tokenizer) == 0
            assert row == 48 or LETTERS[row : row + 4] not in tokenizer.decode(ids)
        else:
            assert tokenizer.decode(ids[start : end + 1]) == LETTERS[row : row + 4]
            seen.add(row)
    assert seen == set(range(48))
    assert 48 in features.where


@pytest.mark.parametrize("toy", ["bert-qa"])
def test_a_batch_trains(toy: str) -> None:
    model, tokenizer, task = toy_model(toy), encoder_tokenizer(), task_of()
    features = task.prepare(rows_of(asked("abc"), asked()), tokenizer, model, training=True)
    loss = model(**task.collator(tokenizer, model)(features.items)).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_where_nothing_stands() -> None:
    tokenizer = encoder_tokenizer()
    assert null_position([5, 1, 7], tokenizer) == 1  # the start token, as there is no class token
    tokenizer.cls_token = "a"
    assert null_position([5, 1, tokenizer.cls_token_id], tokenizer) == 2
    assert null_position([5, 6], tokenizer) == 0


# --- bad input ------------------------------------------------------------------------------------

FORM = (
    'rows.jsonl, row 2 has no answers in \'answers\' as SQuAD has them. Give {"text": [...], "answer_start": [...]}, '
    "or name another column with --answers-column."
)


@pytest.mark.parametrize(
    "answers",
    [
        None, "abc", {"text": "abc", "answer_start": 0}, {"text": ["abc"]}, {"text": ["abc"], "answer_start": []},
        {"text": [3], "answer_start": [0]}, {"text": ["abc"], "answer_start": ["0"]}, [{"text": "abc"}], ["abc"],
    ],
)  # fmt: skip
def test_answers_of_another_form_are_refused(answers: Any) -> None:
    with pytest.raises(UsageError) as raised:
        task_of().check(rows_of(asked("abc"), {**asked("abc"), "answers": answers}), CONFIG)
    assert str(raised.value) == FORM


def test_answers_may_be_a_list_of_objects() -> None:
    row = {**asked("abc"), "answers": [{"text": "abc", "answer_start": 0}, {"text": "b", "answer_start": 1}]}
    assert task_of().answers(rows_of(row, asked())) == [[("abc", 0), ("b", 1)], []]


@pytest.mark.parametrize("start", [1, 400, -1])
def test_an_answer_that_stands_elsewhere_is_refused_in_training(start: int) -> None:
    row = {**asked("abc"), "answers": {"text": ["abc"], "answer_start": [start]}}
    with pytest.raises(UsageError) as raised:
        task_of().prepare(rows_of(asked("a"), row), encoder_tokenizer(), bare(CONFIG), training=True)
    assert str(raised.value) == (
        f"rows.jsonl, row 2 has the answer 'abc', which does not stand at character {start} of its context. Correct "
        "answer_start, or leave the row out."
    )
    task_of().prepare(rows_of(row), encoder_tokenizer(), bare(CONFIG), training=False)  # only the text is compared


def test_a_tokenizer_without_places_is_refused() -> None:
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(UsageError, match=r"does not say where in a text its tokens lie.*Give a model with a fast"):
        task_of().prepare(rows_of(asked("a")), slow, bare(CONFIG), training=False)
    with pytest.raises(UsageError) as raised:
        task_of(max_length=25).prepare(rows_of(asked("a")), encoder_tokenizer(), bare(CONFIG), training=False)
    assert str(raised.value) == (
        "A bert model of 24 tokens at most cannot read --max-length 25. Give 24 or less, or leave it out."
    )
