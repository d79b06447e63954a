"""What a model has no head for, or refuses itself: one sentence, before anything is written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY, character_tokenizer, toy_model

from losparse_cli.errors import CheckpointError, UsageError
from losparse_cli.load import load
from losparse_cli.tasks.heads import refusals
from losparse_cli.tasks.kinds import open_task
from losparse_cli.tasks.task import Task
from tests.tasks.made import CPU, Says, encoder_tokenizer, request_of, rows_of

BART: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 24, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 1,
    "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 24, "d_kv": 12, "d_ff": 24, "num_layers": 1, "num_heads": 2,
    "decoder_start_token_id": None,
}  # fmt: skip
TEXTS = rows_of({"text": "abc", "label": 0}, {"text": "de", "label": 1})


def tried_out(task: Task, model: Any, tokenizer: Any, rows: Any) -> None:
    task.check_model(model)
    task.try_out(model, tokenizer, task.prepare(rows, tokenizer, model, training=True))


# Like huggingface/transformers#34055: what is missing is said, not how the weights cannot be loaded.
@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("mamba", "text-classification"), ("mamba", "question-answering"), ("mamba", "seq2seq"),
        ("llama", "summarization"), ("deberta-v2", "causal-lm"),
    ],
)  # fmt: skip
def test_an_architecture_without_the_head(name: str, task: str, tmp_path: Path) -> None:
    toy_model(name).save_pretrained(tmp_path)
    with pytest.raises(UsageError) as raised:
        load(tmp_path, model_class=open_task(request_of(task)).head("user/model", trained=False))
    assert str(raised.value) == (
        f"user/model is a {name}, for which transformers has no head for {task}. Give another model, or another --task."
    )


def test_a_damaged_checkpoint_is_none_without_a_head(tmp_path: Path) -> None:
    toy_model("bert").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(CheckpointError, match="unheard-of"):
        load(tmp_path, model_class=open_task(request_of("text-classification")).head("user/model", trained=False))


@pytest.mark.parametrize("kind", ["Bart", "MBart", "PLBart", "Mvp"])
def test_an_encoder_decoder_that_classifies_by_an_end_token_which_is_not_there(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**BART)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    task = open_task(request_of("text-classification"))
    with pytest.raises(UsageError) as raised:
        tried_out(task, model, character_tokenizer(), TEXTS)
    assert str(raised.value) == (
        f"A {config.model_type} model classifies by the end token of a text (</s>), and rows.jsonl, row 1 has 0 of it, "
        "not 1. Give a tokenizer that closes every text with it, and texts without it."
    )
    tried_out(task, model, encoder_tokenizer(), TEXTS)
    with pytest.raises(UsageError, match="row 2 has 2 of it, not 1"):
        tried_out(task, model, encoder_tokenizer(), rows_of(TEXTS.rows[0], {"text": "d</s>e", "label": 1}))


def test_pairs_may_have_several_end_tokens() -> None:
    model = transformers.BartForSequenceClassification(transformers.BartConfig(**BART))
    rows = rows_of(*({"sentence1": "ab", "sentence2": "c" * k, "label": k % 2} for k in (1, 2)))
    tried_out(open_task(request_of("text-classification")), model, encoder_tokenizer(), rows)


def test_other_encoder_decoders_need_no_end_token() -> None:
    model = Says(lambda ids, mask: SimpleNamespace(logits=mask.sum(1, keepdim=True) * 1.0), is_encoder_decoder=True)
    task = open_task(request_of("text-classification"))
    model.device = CPU
    assert len(task.prepare(TEXTS, character_tokenizer(), model, training=True)) == 2


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("task", "head"), [
    ("seq2seq", "ForConditionalGeneration"), ("question-answering", "ForQuestionAnswering"),
])  # fmt: skip
def test_a_decoder_that_knows_no_first_token(task: str, head: str, named: bool) -> None:
    model = getattr(transformers, f"T5{head}")(transformers.T5Config(**T5))
    if not named and hasattr(model.config, "decoder_start_token_id"):
        del model.config.decoder_start_token_id
    rows = rows_of({"text": "ab", "summary": "c", "question": "a", "context": "bc",
                    "answers": {"text": ["b"], "answer_start": [0]}})  # fmt: skip
    opened = open_task(request_of(task, **({"max_target_length": 2} if task == "seq2seq" else {})))
    with pytest.raises(UsageError, match=r"The t5 model refuses what it is given: .*decoder_start_token_id"):
        tried_out(opened, model, encoder_tokenizer(), rows)


def test_what_a_model_refuses_while_it_is_scored() -> None:
    def say(ids: Any, mask: Any) -> Any:
        raise ValueError("Sequence length must be\na multiple of 64.")

    model, task, tokenizer = Says(say), open_task(request_of("text-classification")), encoder_tokenizer()
    features = task.prepare(TEXTS, tokenizer, model, training=False)
    with pytest.raises(UsageError) as raised:
        task.predict(model, tokenizer, features, batch_size=2, device=CPU)
    assert str(raised.value) == (
        "The bert model refuses what it is given: Sequence length must be a multiple of 64. Correct its config.json or "
        "its tokenizer, or give another model."
    )


def test_many_words_are_cut() -> None:
    model = SimpleNamespace(config=SimpleNamespace(model_type="toy"))
    with pytest.raises(UsageError) as raised, refusals(model):
        raise ValueError("word " * 500)
    assert len(str(raised.value)) < 400
    with pytest.raises(RuntimeError), refusals(model):  # no word of the model's about its input
        torch.zeros(2) @ torch.zeros(3)
