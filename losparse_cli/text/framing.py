"""What a tokenizer puts around a text."""

from __future__ import annotations

from typing import Any


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
