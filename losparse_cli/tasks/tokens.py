"""Texts -> tokens, as many as a model takes, and padded batches of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..errors import UsageError
from ..text.tokenizer import check_tokens, length_limit

CHUNK = 1000  # texts that are tokenized at once
IGNORED = -100  # a label that no loss counts
LABELS = ("labels", "start_positions", "end_positions")
"""Of an item or a batch, what is right and not what is read."""


def chunks(items: Sequence[Any]) -> Iterable[Sequence[Any]]:
    """`items`, CHUNK at a time."""
    return (items[start : start + CHUNK] for start in range(0, len(items), CHUNK))


def length_of(asked: int | None, tokenizer: Any, model: Any, default: int) -> int:
    """Tokens of an input: `asked`, or `default` where that is None and the model takes as many.

    UsageError if model or tokenizer take fewer than were asked for.
    """
    limit = length_limit(model, tokenizer.model_max_length)
    if asked is None:
        return min(default, limit or default)
    if limit is not None and asked > limit:
        raise UsageError(
            f"A {model.config.model_type} model of {limit} tokens at most cannot read --max-length {asked}. Give "
            f"{limit} or less, or leave it out."
        )
    return asked


def settle_padding(tokenizer: Any, config: Any) -> None:
    """Give a tokenizer without a padding token the model's, or the end token, and the config the tokenizer's.

    A decoder that classifies looks for the last token that is not config's padding: without it, or with another, it
    would read its answer from a padded place. UsageError if there is no token to pad with that the model knows.
    """
    settings = config.get_text_config()
    if tokenizer.pad_token_id is None:
        known = getattr(settings, "pad_token_id", None)
        token = tokenizer.convert_ids_to_tokens(known) if isinstance(known, int) and known >= 0 else None
        token = token or tokenizer.eos_token or tokenizer.unk_token
        if token is None:
            raise UsageError(
                "The tokenizer has neither a padding token nor an end token. Add pad_token to its "
                "tokenizer_config.json."
            )
        tokenizer.pad_token = token
    known = getattr(settings, "vocab_size", None)
    if isinstance(known, int) and tokenizer.pad_token_id >= known:
        raise UsageError(
            f"The tokenizer pads with {tokenizer.pad_token}, token {tokenizer.pad_token_id}, and the model knows "
            f"{known} tokens. Name one that it knows as pad_token in tokenizer_config.json, such as the end token."
        )
    for one in {id(c): c for c in (settings, config)}.values():
        if getattr(one, "pad_token_id", None) != tokenizer.pad_token_id:
            one.pad_token_id = tokenizer.pad_token_id


def check_items(items: Iterable[dict[str, Any]], model: Any, name: str = "input_ids") -> None:
    """UsageError for a token among those of `name` that the model lacks."""
    check_tokens(max((int(max(item[name])) for item in items if len(item[name])), default=0), model)


def pad(tokenizer: Any, model: Any, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """What the model reads of the items, each (items, longest), padded on the right.

    On the right whatever the tokenizer's habit, which is for models that go on writing: so positions start at 0.
    """
    takes = inspect.signature(model.forward).parameters
    segments = "token_type_ids" in takes and getattr(model.config, "type_vocab_size", 2) != 1
    skipped = {*LABELS} if segments else {*LABELS, "token_type_ids"}
    inputs = [{name: value for name, value in item.items() if name not in skipped} for item in items]
    # A fast tokenizer advises to pad while it tokenizes, which cannot be: batches are made later.
    advice = tokenizer.deprecation_warnings.get("Asking-to-pad-a-fast-tokenizer", False)
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    try:
        return dict(tokenizer.pad(inputs, padding_side="right", return_tensors="pt"))
    finally:
        tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = advice
