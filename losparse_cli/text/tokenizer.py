"""A model's tokenizer: its files, what it puts around a text, how many tokens fit, and whether the model knows them."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import SourceError, UsageError, reason_of

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "spm.model", "sentencepiece.bpe.model", "sentencepiece.model", "prophetnet.tokenizer", "tekken.json",
    "vocab-src.json", "source.spm", "byte_maps.json", "spm_char.model",
)  # fmt: skip
"""One of these stands beside every model that has a tokenizer."""
PIECE = 1 << 20  # characters that are tokenized at once: tokenizers take some ninety times a text's own bytes
SHORTEST = 8  # tokens of a text in which there is anything to read beside special ones


def has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def check_tokenizer(folder: Path, address: str | None = None) -> None:
    """SourceError if no tokenizer lies beside the model; `address` is what a person calls it, None for the folder."""
    if not has_tokenizer(folder):
        raise _none(address or folder)


def load_tokenizer(source: str | Path, **where: Any) -> Any:
    """The tokenizer of a folder or a Hub id; SourceError if there is none, or none that can be loaded.

    where: keywords of from_pretrained that say where files come from.
    """
    import transformers

    if not where.get("gguf_file") and Path(source).is_dir():
        check_tokenizer(Path(source) / where.get("subfolder", ""), str(source))
    try:
        found = transformers.AutoTokenizer.from_pretrained(source, **where)
    except Exception as error:  # whatever a file can make a tokenizer raise
        if not tokenizer_is_there(source, where):
            raise _none(source) from error
        reason = reason_of(error)
        if isinstance(error, TypeError) or reason.endswith(
            ":"
        ):  # of a vocabulary whose name is None, or a list cut off
            reason = "files that belong to it are not there"
        raise SourceError(f"The tokenizer of {source} cannot be loaded: {reason}. Download it again.") from error
    if not tokenizer_is_there(source, where):  # transformers invents an empty one
        raise _none(source)
    return found


def tokenizer_is_there(source: str | Path, where: dict[str, Any]) -> bool:
    """Whether any file of a tokenizer lies in the folder, or was fetched from the Hub when the tokenizer was loaded."""
    inside = where.get("subfolder") or ""
    if where.get("gguf_file"):
        return True
    if Path(source).is_dir():
        return has_tokenizer(Path(source) / inside)
    from huggingface_hub import try_to_load_from_cache

    options = {key: where[key] for key in ("cache_dir", "revision") if where.get(key) is not None}
    names = [f"{inside}/{file}" if inside else file for file in TOKENIZER_FILES]
    return any(isinstance(try_to_load_from_cache(str(source), name, **options), str) for name in names)


def _none(source: str | Path) -> SourceError:
    return SourceError(f"{source} has no tokenizer. Copy the tokenizer files of the original model into its folder.")


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens with which the tokenizer begins and ends a text."""
    plain, framed = (list(read_tokens(tokenizer, text="a", add_special_tokens=special)) for special in (False, True))
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return framed[:start], framed[start + len(plain) :]
    return [], []


def tokenize(tokenizer: Any, pieces: Iterable[str]) -> array[int]:
    """The tokens of a text that comes in pieces, without special ones; four bytes each.

    They are those of the text as a whole, but for places that are more than 2^19 characters apart: there it is cut,
    after the end of a line where there is one, between two lines that are not blank where there are such. At them a
    token may differ that spans the cut, or that the tokenizer puts before a text's first word.
    """
    found = array("i")
    for part in _parts(pieces):
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        found.extend(read_tokens(tokenizer, text=part, **options))
    return found


def read_tokens(tokenizer: Any, **given: Any) -> list[int]:
    """The tokens that a tokenizer, so called, finds; SourceError where it lacks what its own files ask for."""
    try:
        found: list[int] = tokenizer(**given).input_ids
    except Exception as error:  # whatever a file can make a tokenizer raise
        source = getattr(tokenizer, "name_or_path", "") or "this model"
        reason = reason_of(error)
        raise SourceError(f"The tokenizer of {source} cannot read text: {reason}. Download it again.") from error
    return found


def _parts(pieces: Iterable[str]) -> Iterator[str]:
    rest = ""
    for piece in pieces:
        rest += piece
        while len(rest) > PIECE:
            end = last = rest.rfind("\n", PIECE // 2, PIECE)
            while end >= 0 and (rest[end - 1].isspace() or rest[end + 1].isspace()):
                end = rest.rfind("\n", PIECE // 2, end)
            end = (end if end >= 0 else last) + 1 or PIECE
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


# --- how much text fits -----------------------------------------------------------------------------


def positions(model: Any, *, decoder: bool = False) -> int | None:
    """Tokens that a `model`, with or without weights, has positions for; None if it names no limit.

    decoder: of what its decoder reads, where encoder and decoder differ.
    """
    settings = model.config.get_text_config()
    side = "max_decoder_position_embeddings" if decoder else "max_encoder_position_embeddings"
    named = [getattr(settings, name, None) for name in ("max_position_embeddings", "n_positions", side)]
    found = [n for n in named if isinstance(n, int) and n >= SHORTEST]
    tokens = _token_table(model)
    for module in model.modules():
        # RoBERTa's first position, and that of all who followed it, comes after the one of padding.
        padding, rows = getattr(module, "padding_idx", None), _rows(module)
        if module is not tokens and isinstance(padding, int) and rows in found:
            found.append(rows - padding - 1)
    return min((n for n in found if n >= SHORTEST), default=None)


def length_limit(model: Any, named: float | None) -> int | None:
    """The longest text, in tokens, that the model has positions for and its tokenizer names; None if neither does.

    named: `model_max_length` of the tokenizer.
    """
    # A tokenizer that knows no limit says 10^30.
    limits = [positions(model), int(named) if named is not None and SHORTEST <= named < 1 << 30 else None]
    return min((n for n in limits if n is not None), default=None)


def named_length(folder: Path) -> float | None:
    """`model_max_length` of the tokenizer in `folder`, which is not loaded; None if its files do not say."""
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("model_max_length")
    except (OSError, ValueError, AttributeError):  # then the tokenizer itself cannot be loaded either, and says so
        return None
    return found if isinstance(found, int | float) else None


def check_tokens(largest: int, model: Any, address: str | Path | None = None) -> None:
    """UsageError if the model lacks the token `largest`; address: what a person calls the tokenizer's checkpoint.

    Before it runs: on a GPU an index out of range ends the process.
    """
    known = _rows(_token_table(model)) or getattr(model.config.get_text_config(), "vocab_size", None)
    if isinstance(known, int) and largest >= known:
        of = "" if address is None else f" of {address}"
        raise UsageError(
            f"The tokenizer{of} yields token {largest}, and the model knows {known}. Give a checkpoint with its own "
            "tokenizer."
        )


def _token_table(model: Any) -> Any:
    """The model's embeddings of tokens; None where it does not say which they are."""
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _rows(module: Any) -> int | None:
    weight: Any = getattr(module, "weight", None)
    return int(weight.shape[0]) if getattr(weight, "ndim", 0) == 2 else None
