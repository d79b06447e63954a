"""What a calibration text can tell: which windows are held out of it, and what makes it a poor sample."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from .request import Calibration
from .windows import SEQUENCE, Sample

S = TypeVar("S", bound=Sample)

HELD_OUT = 20  # windows, of which one is held out
ENOUGH = 8192  # tokens below which a result hangs on which text it was
STRANGE = 100  # perplexity of a text above which it is none that the model knows: of common prose it is below 50
REPEATED = 0.5  # share of such sequences that were there before, above which a text repeats itself


def hold_out(windows: S) -> tuple[S, S]:
    """Windows that a result is solved with, and those that it is only measured on: see `held_out`."""
    out = held_out(windows)
    return windows.take([k for k in range(len(windows)) if k not in out]), windows.take(out)


def held_out(windows: Sample) -> list[int]:
    """Numbers of the windows that a result is only measured on: a twentieth, evenly spread.

    Of two windows or more one at least is held out; none of a text that repeats itself, where it was seen all the same.
    """
    count = len(windows)
    number = max(1, count // HELD_OUT) if count > 1 else 0
    out = sorted({(2 * k + 1) * count // (2 * number) for k in range(number)})
    kept = windows.take([k for k in range(count) if k not in out])
    seen = torch.isin(windows.take(out).pieces(), kept.pieces())
    return [] if int(seen.sum()) > REPEATED * len(seen) else out


def repeated_share(windows: Sample) -> float:
    """Share of the text's sequences of 16 tokens, or of its rows of images, that stand in it before, 0 to 1."""
    found = windows.pieces().tolist()
    return 1 - len(set(found)) / len(found) if found else 0.0


def doubts(calibration: Calibration, windows: Sample | None) -> tuple[str, ...]:
    """What makes a settled request's text a poor sample, a sentence each; windows: None if they are yet to be had."""
    assert calibration.length is not None
    found = []
    tokens = windows.seen if windows is not None else calibration.windows * calibration.length
    if tokens < ENOUGH:
        wanted = min(calibration.tokens, calibration.windows * calibration.length)
        short = windows is not None and windows.seen < wanted
        remedy = "Give more text." if short else "Raise --calibration-tokens."
        found.append(f"{tokens:,} tokens are few to calibrate with: below {ENOUGH:,} it matters much which. {remedy}")
    repeated = repeated_share(windows) if windows is not None else 0.0
    if repeated > REPEATED:
        what = "rows" if calibration.image_field is not None else f"sequences of {SEQUENCE} tokens"
        found.append(
            f"The text repeats itself: {repeated:.0%} of its {what} stand in it before. Errors "
            "on it say nothing about other text. Give text as the model will read it."
        )
    return tuple(found)


def strangeness(nats: float | None) -> tuple[str, ...]:
    """The same of the loss that the dense model has on each next token of the text, None where that is not known."""
    if nats is None or nats <= math.log(STRANGE):
        return ()
    perplexity = math.exp(min(nats, math.log(1e9)))
    found = f"The text is strange to the model: its perplexity is {perplexity:,.0f}, where common prose has some tens."
    return (f"{found} Give text as the model will read it.",)


def account(calibration: Calibration, windows: Sample | None, nats: float | None = None) -> dict[str, Any]:
    """What was asked for, what of it there is and what is wrong with it; JSON. Of a file's path its name alone.

    nats: see `strangeness`.
    """
    found: dict[str, Any] = asdict(calibration)
    if Path(calibration.source).expanduser().exists():
        found["source"] = Path(calibration.source).name
    if windows is not None:
        found |= {
            "tokens_used": windows.tokens,
            "windows": len(windows),
            "held_out": len(hold_out(windows)[1]),
            "sha256": windows.digest(),
        }
    return found | {"warnings": [*doubts(calibration, windows), *strangeness(nats)]}
