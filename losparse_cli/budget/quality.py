"""What a size costs a language model, as far as SmolLM2-135M tells (docs/performance.md): a warning before a run, and
after it."""

from __future__ import annotations

FEW_BITS, CALIBRATED_FEW_BITS = 4.5, 2.75
"""Of whole numbers, without text and with it: what is lost below is about a fifth of a nat and more."""
TOO_FEW_BITS, CALIBRATED_TOO_FEW_BITS = 3.25, 2.25
"""Below which it is more than half a nat: perplexity doubles, and soon is far more."""
NOTICED, RUINED, CALIBRATED_RUINED = 0.75, 0.6, 0.4
"""Shares of the parameters below which floats are told from the dense model, and no longer useful: without text
perplexity goes from 33 to 61 at 0.69 and to 247 at 0.54."""


def doubt_of_bits(bits: float, *, calibrated: bool, grid: str | None = None) -> str:
    """A sentence on so many bits a weight of whole numbers; "" where little is lost. grid: their width, if fixed."""
    more = "raise --bits" if grid is None else "take --grid int8"
    remedy = more if calibrated else f"{more}, or give text: --calibration FILE"
    few, too_few = (CALIBRATED_FEW_BITS, CALIBRATED_TOO_FEW_BITS) if calibrated else (FEW_BITS, TOO_FEW_BITS)
    known = " (with text SmolLM2-135M loses 0.33 in log-perplexity at 2.5 bits, and 1.0 at 1.8)"
    if bits < too_few:
        return (
            f"{bits:.3g} bits a weight leave a language model far from the dense one{known}. Measure it with `losparse "
            f"eval`, or {remedy}."
        )
    if bits < few:
        return (
            f"{bits:.3g} bits a weight cost a language model noticeably{known if calibrated else ''}. Measure it with "
            f"`losparse eval`, or {remedy}."
        )
    return ""


def doubt_of_share(kept: float, *, calibrated: bool) -> str:
    """A sentence on so large a share of the parameters, in floats; "" where little is lost."""
    if calibrated:
        return (
            ""
            if kept >= CALIBRATED_RUINED
            else f"keeping {kept:.0%} of the parameters costs a language model much of its quality, calibrated or not. "
            "Measure it with `losparse eval`; it is a start for fine-tuning."
        )
    if kept < RUINED:
        return (
            f"keeping {kept:.0%} of the parameters without any data damages a model badly: expect a language model to "
            "lose its language. It is a start for fine-tuning, not a result. For use as it is, store whole numbers "
            "instead (--bits 5.25 takes a third of the bytes and is nearer), or keep more: --keep 0.85 or above."
        )
    if kept < NOTICED:
        return (
            f"keeping {kept:.0%} of the parameters without any data costs a language model noticeably. Whole "
            "numbers take fewer bytes and are nearer: --bits 5.25. Else keep more (--keep 0.85 or above), or calibrate."
        )
    return ""
