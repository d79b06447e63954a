"""Texts -> tokens, as many as a model takes, and padded batches of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..errors import UsageError
from .request import SHORTEST

CHUNK = 1000  # texts that are tokenized at once
IGNORED = -100  # a label that no loss counts

# Their first position comes after that of padding, so that of max_position_embeddings some are never used.
_POSITIONS_AFTER_PADDING = (
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip


def chunks(items: Sequence[Any]) -> Iterable[Sequence[Any]]:
    """`items`, CHUNK at a time."""
    return (items[start : start + CHUNK] for start in range(0, len(items), CHUNK))


def positions(config: Any) -> int | None:
    """Tokens that the model's tables of positions hold; None if it has none."""
    settings = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_encoder_position_embeddings")
    found = [n for n in (getattr(settings, name, None) for name in names) if isinstance(n, int) and n >= SHORTEST]
    if not found:
        return None
    padding = settings.pad_token_id if settings.model_type in _POSITIONS_AFTER_PADDING else None
    return min(found) - (0 if padding is None else padding + 1)


def length_of(asked: int | None, tokenizer: Any, config: Any, default: int) -> int:
    """Tokens of an input: `asked`, or `default` where that is None and the model takes as many.

    UsageError if model or tokenizer take fewer than were asked for.
    """
    # A tokenizer that knows no limit says 10^30.
    limits = [n for n in (positions(config), tokenizer.model_max_length) if n is not None and n < 1 << 30]
    limit = int(min(limits, default=default if asked is None else asked))
    if asked is None:
        return min(default, limit)
    if asked > limit:
        raise UsageError(
            f"A {config.model_type} model of {limit} tokens at most cannot read --max-length {asked}. Give {limit} or "
            "less, or leave it out."
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


def check_vocabulary(items: Iterable[dict[str, Any]], config: Any) -> None:
    """Before it runs: on a GPU an index out of range ends the process. UsageError for a token that the model lacks."""
    known = getattr(config.get_text_config(), "vocab_size", None)
    largest = max((int(max(item["input_ids"])) for item in items if len(item["input_ids"])), default=0)
    if isinstance(known, int) and largest >= known:
        raise UsageError(
            f"The tokenizer yields token {largest}, and the model knows {known}. Give a checkpoint with its own "
            "tokenizer."
        )


def pad(tokenizer: Any, model: Any, items: Sequence[dict[str, Any]], leave: Sequence[str]) -> dict[str, Tensor]:
    """What the model reads of the items, all but `leave`, each (items, longest), padded on the right.

    On the right whatever the tokenizer's habit, which is for models that go on writing: so positions start at 0.
    """
    takes = inspect.signature(model.forward).parameters
    segments = "token_type_ids" in takes and getattr(model.config, "type_vocab_size", 2) != 1
    skipped = {*leave} if segments else {*leave, "token_type_ids"}
    inputs = [{name: value for name, value in item.items() if name not in skipped} for item in items]
    # A fast tokenizer advises to pad while it tokenizes, which cannot be: batches are made later.
    advice = tokenizer.deprecation_warnings.get("Asking-to-pad-a-fast-tokenizer", False)
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    try:
        return dict(tokenizer.pad(inputs, padding_side="right", return_tensors="pt"))
    finally:
        tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = advice
