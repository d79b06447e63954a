"""A tokenizer as GGUF holds it: tokens, their kinds, merges or scores, special ones, and the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UsageError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {"llama-bpe": _WORDS + r"\p{N}{1,3}" + _OTHERS, "qwen2": _WORDS + r"\p{N}" + _OTHERS}
"""What llama.cpp calls a way to split text into words -> the expression that describes it."""
PROBE = (
    "It's 2024, WE'LL pay 1,234.56 $ (or  not?)\n\n\tüber naïve  x=3;\r\n"
    "const α = [1234567];  日本語 ... 'tis 🙂🙂 \u00a0end "
)
"""A text in which they differ."""


def write_vocabulary(writer: Any, folder: Path, rows: int) -> str:
    """Tell `writer` of the tokenizer in `folder`, for embeddings of so many rows.

    Returns what llama.cpp may do otherwise, or "". UsageError if there is none, or none of a kind that llama.cpp knows.
    """
    import gguf
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = tokenizer.backend_tokenizer
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{folder} holds no tokenizer.json, without which llama.cpp reads no text. Put the tokenizer beside the "
            "weights."
        ) from error
    if type(backend.model).__name__ != "BPE":
        raise UsageError(f"{folder}: llama.cpp is given tokenizers of kind BPE alone, and this is another.")
    doubt = ""
    pieces = bool(backend.model.byte_fallback)  # as SentencePiece makes them: spaces are a letter, bytes are tokens
    if pieces:
        if not _rising(backend, tokenizer):
            doubt = "llama.cpp may join pieces in another order than this tokenizer does"
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(tokenizer.convert_ids_to_tokens(tokenizer("a").input_ids)[-1].startswith("\u2581"))
    else:
        writer.add_tokenizer_model("gpt2")
        words = _words(backend)
        if words is None or backend.normalizer is not None:
            doubt = "llama.cpp may split text into words otherwise than this tokenizer does"
        writer.add_tokenizer_pre(words or "default")
    tokens, kinds = _tokens(tokenizer, rows, pieces)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if pieces:  # the earlier a piece was made, the sooner it is made of letters again
        writer.add_token_scores([-float(k) for k in range(rows)])
    gguf.SpecialVocab(folder, load_merges=not pieces, n_vocab=rows).add_to_gguf(writer, quiet=True)
    return doubt


def _rising(backend: Any, tokenizer: Any) -> bool:
    """Whether pieces that are joined sooner have lower numbers, by which alone llama.cpp knows them."""
    merges = json.loads(backend.to_str())["model"].get("merges") or []
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in merges]
    numbers = [tokenizer.convert_tokens_to_ids("".join(pair)) for pair in pairs]
    return numbers == sorted(numbers)


def _tokens(tokenizer: Any, rows: int, pieces: bool) -> tuple[list[str], list[int]]:
    """Text and kind of each token; rows of the embeddings that have none are called by their number."""
    from gguf import TokenType

    by_number = {number: token for token, number in tokenizer.get_vocab().items() if number < rows}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(rows):
        token = by_number.get(number)
        if token is None:
            tokens.append(f"[PAD{number}]")
            kinds.append(TokenType.UNUSED)
            continue
        tokens.append(token)
        if number in added:
            kinds.append(TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED)
        elif pieces and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds.append(TokenType.BYTE)
        else:
            kinds.append(TokenType.NORMAL)
    return tokens, kinds


def _words(backend: Any) -> str | None:
    """What llama.cpp calls the way in which this tokenizer splits text into words; None if it is none of the known.

    Found by what it does, as the same way is written down in many.
    """
    from tokenizers import Regex, pre_tokenizers

    if backend.pre_tokenizer is None:
        return None
    known: dict[str, Any] = {
        name: pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        for name, split in SPLITS.items()
    }
    known["gpt-2"] = pre_tokenizers.ByteLevel(False)
    known["smollm"] = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    wanted = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(PROBE)]
    return next((n for n, way in known.items() if [word for word, _ in way.pre_tokenize_str(PROBE)] == wanted), None)
