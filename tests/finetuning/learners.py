"""Small checkpoints with a tokenizer of words, and rows that they learn within seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers

from losparse_cli.tasks.request import TaskRequest

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = tuple(f"w{k}" for k in range(24))
MARKER = "key"
VOCABULARY = (*SPECIAL, MARKER, *WORDS)

_SIZE: dict[str, Any] = {"vocab_size": len(VOCABULARY)}
_ENCODER: dict[str, Any] = {
    **_SIZE, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,
}  # fmt: skip
_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Kind -> (class of the model, class of its config, config, task, how a text is framed).
LEARNERS: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", {**_ENCODER, "num_labels": 3}, "text-classification",
             "<s> $A </s>"),
    "bert-base": ("BertModel", "BertConfig", _ENCODER, "text-classification", "<s> $A </s>"),
    "bert-stsb": ("BertForSequenceClassification", "BertConfig", {**_ENCODER, "num_labels": 1}, "text-classification",
                  "<s> $A </s>"),
    "bert-qa": ("BertForQuestionAnswering", "BertConfig", _ENCODER, "question-answering", "<s> $A </s>"),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {
        **_SIZE, **_IDS, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
        "tie_word_embeddings": True}, "causal-lm", "$A </s>"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {
        **_SIZE, **_IDS, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.1,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "causal-lm", "$A </s>"),
    "t5": ("T5ForConditionalGeneration", "T5Config", {
        **_SIZE, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4,
        "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}, "seq2seq",
        "$A </s>"),
    "bart": ("BartForConditionalGeneration", "BartConfig", {
        **_SIZE, **_IDS, "d_model": 48, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_layers": 1,
        "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.1,
        "max_position_embeddings": 32, "decoder_start_token_id": 2, "forced_eos_token_id": None, "dropout": 0.0},
        "summarization", "$A </s>"),
    "bart-classifier": ("BartForSequenceClassification", "BartConfig", {
        **_SIZE, **_IDS, "d_model": 48, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_layers": 1,
        "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.1,
        "max_position_embeddings": 32, "num_labels": 3}, "text-classification", "$A </s>"),
}  # fmt: skip


def words_tokenizer(frame: str) -> Any:
    """A word a token, in the frame of a model; ids 0 to 3 are padding, start, end and unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pair = {"pair": "<s> $A </s> $B:1 </s>:1"} if frame.startswith("<s>") else {}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=frame, **pair, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    framed = {"cls_token": "<s>", "sep_token": "</s>"} if pair else {"bos_token": "<s>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", **framed
    )


def write_learner(
    folder: Path, kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, tokenizer: bool = True,
    **changes: Any,
) -> Path:  # fmt: skip
    """A random model of that kind; `changes` go to its config."""
    model_class, config_class, settings, _, frame = LEARNERS[kind]
    transformers.set_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**settings, **changes}))
    model.to(dtype).save_pretrained(folder)
    if tokenizer:
        words_tokenizer(frame).save_pretrained(folder)
    return folder


def rows_of(task: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """What there is to learn: a word's class, the word after a marker, the first two words, an endless alphabet."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        words = draw.choices(WORDS, k=draw.randint(4, 8))
        if task == "text-classification":
            rows.append({"text": " ".join(words), "label": WORDS.index(words[0]) % 3})
        elif task == "regression":
            rows.append({"text": " ".join(words), "label": WORDS.index(words[0]) / 8 + 0.5})
        elif task == "question-answering":
            place = draw.randrange(len(words))
            before = "".join(f"{word} " for word in words[:place]) + f"{MARKER} "
            context = before + " ".join(words[place:])
            answers = {"text": [words[place]], "answer_start": [len(before)]}
            rows.append({"question": "w0 w1", "context": context, "answers": answers})
        elif task == "causal-lm":
            first = draw.randrange(len(WORDS))
            rows.append({"text": " ".join(WORDS[(first + k) % len(WORDS)] for k in range(11))})
        else:
            rows.append({"text": " ".join(words), "summary": " ".join(words[:2])})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def request_for(
    place: Path, kind: str, *, train: int = 64, validation: int = 32, task: str | None = None, **options: Any
) -> TaskRequest:
    """Files of rows written into `place`, and the request for them."""
    task = task or LEARNERS[kind][3]
    given: dict[str, Any] = {"task": task if task != "regression" else "text-classification"}
    given["train_file"] = write_rows(place / "train.jsonl", rows_of(task, train, 1))
    if validation:
        given["validation_file"] = write_rows(place / "validation.jsonl", rows_of(task, validation, 2))
    if given["task"] == "causal-lm":
        given["max_length"] = 12
    if given["task"] in ("seq2seq", "summarization"):
        given |= {"max_target_length": 6, "num_beams": 1}
    return TaskRequest(**given | options)
