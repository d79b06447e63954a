"""What the demo found: two sizes beside dense and rounding, what each model says, and how to go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from .columns import Column, show_columns
from .console import Console, invoked, short, size

if TYPE_CHECKING:
    from ..demo import Measured
    from ..tasks.paired import Estimate


def show_comparison(out: Console, rows: Sequence[Measured]) -> None:
    """Dense beside compressed: bytes, perplexity and its distance from dense's, time, and what the model says."""
    from ..demo import CALIBRATION_TEXT, HELD_OUT_TEXT, NEW_TOKENS, PROMPT, ROUNDING, WINDOWS

    dense, ours = rows[0], rows[-1]
    perplexities = [_with_error(row.perplexity, ".1f" if row.perplexity.value < 1e4 else ".2g") for row in rows]
    columns = [
        Column("layers", [f"{size(row.layer_bytes)} {row.layer_bytes / dense.layer_bytes:4.0%}" for row in rows]),
        Column("model", [size(row.model_bytes) for row in rows]),
        Column("perplexity", perplexities),
        Column("log gap", [_with_error(row.gap, ".3f") if row.gap is not None else "" for row in rows]),
        Column("took", [f"{row.seconds:.0f} s" if row.seconds else "" for row in rows], goes=1),
    ]
    show_columns(out, "", [row.name for row in rows], columns, bold=ours.name)
    for row in rows:
        out.show(f"[bold]{row.name}[/] says: {escape(row.sentence)}")
    out.show(
        f"\nOn the first {WINDOWS} of README's 32 windows, in float32; with its longer calibration losparse comes "
        f"closer. Log gap: log-perplexity above that of dense; ± one standard error. Bytes of {ROUNDING} are nominal: "
        "what it would take in a format of such bits, for its folder holds ordinary weights."
    )
    command, folder, place = invoked(), short(ours.folder), ours.folder.parent
    text, unseen, whole = short(place / CALIBRATION_TEXT), short(place / HELD_OUT_TEXT), short(dense.folder)
    asks = f"--raw --temperature 0 --new-tokens {NEW_TOKENS}"
    out.show(f"Sentences are those of: {command} generate FOLDER '{PROMPT}' {asks}", whole=True)
    out.show(f"\nDense model: {whole}\nCalibrated on: {text}\nMeasured on: {unseen}", whole=True)
    out.show(f"\nGo on with: {command} inspect {folder} --layers", whole=True)
    out.show(f"or a picture: {command} inspect {folder} --plot losparse.html", whole=True)
    out.show(f"or ask: {command} generate {folder} 'Why is ice light?'", whole=True)
    out.show(f"or measure: {command} eval {folder} --against {whole} --text {unseen}", whole=True)
    out.show(f"or train it on: {command} refine {folder} --against {whole} --calibration {text}", whole=True)


def _with_error(estimate: Estimate, shape: str) -> str:
    error = "" if estimate.error is None else f" ± {estimate.error:{shape}}"
    return f"{estimate.value:{shape}}{error}"
