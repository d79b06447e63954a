"""A model's tokenizer: its files, and what it puts around a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import SourceError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
)
"""One of these stands beside every model that has a tokenizer."""


def has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def check_tokenizer(folder: Path, address: str | None = None) -> None:
    """SourceError if no tokenizer lies beside the model; `address` is what a person calls it, None for the folder."""
    if not has_tokenizer(folder):
        raise SourceError(
            f"{address or folder} has no tokenizer. Copy the tokenizer files of the original model into its folder."
        )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in `folder`; SourceError if there is none, or none that can be loaded."""
    import transformers

    check_tokenizer(folder)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a file can make a tokenizer raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise SourceError(f"The tokenizer of {folder} cannot be loaded: {reason}. Download it again.") from error


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens with which the tokenizer begins and ends a text."""
    plain, framed = (
        tokenizer("a", return_tensors="pt", add_special_tokens=special).input_ids[0].tolist()
        for special in (False, True)
    )
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return framed[:start], framed[start + len(plain) :]
    return [], []
