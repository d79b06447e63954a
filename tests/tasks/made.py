"""What the tests of tasks share: tokenizers of characters, files of rows, models that say what they are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import character_tokenizer
from torch import Tensor, nn

from losparse_cli.tasks.request import TaskRequest
from losparse_cli.tasks.rows import Rows

CPU = torch.device("cpu")
CLS, SEP = 1, 2  # as the character tokenizer numbers its start and its end


def encoder_tokenizer(side: str = "right") -> Any:
    """A character a token, framed as BERT does: [CLS] a [SEP] b [SEP], with token types."""
    from tokenizers import processors

    made = character_tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", CLS), ("</s>", SEP)]
    )
    made.padding_side = side
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return made


def rows_of(*rows: dict[str, Any], **options: Any) -> Rows:
    return Rows(tuple(dict.fromkeys(name for row in rows for name in row)), list(rows), "rows.jsonl", **options)


def request_of(task: str, **options: Any) -> TaskRequest:
    return TaskRequest(task, validation_file="rows.jsonl", **options)


def bare(config: Any) -> Any:
    """What is asked for its config alone."""
    made = nn.Module()
    made.config = config
    return made


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Says(nn.Module):
    """A model whose output is what `say` makes of the token ids, (batch, tokens), and their mask."""

    def __init__(self, say: Callable[[Tensor, Tensor], Any], **config: Any) -> None:
        super().__init__()
        self.say = say
        self.inner = nn.Dropout()
        self.config = transformers.BertConfig(**{"vocab_size": 101, "max_position_embeddings": 48, **config})

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        assert not self.inner.training
        assert torch.is_inference_mode_enabled()
        return self.say(input_ids, attention_mask)
