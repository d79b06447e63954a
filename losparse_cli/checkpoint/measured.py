"""What `losparse eval --record` measured of a checkpoint: losparse_evaluation.json beside it, and a part of its card.

Written after the report, and so in no hash; bound to the checkpoint by the report's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UsageError, write_errors
from .card import place_section
from .source import EVALUATION, REPORT, read_json
from .writer import sha256, write_json

FIGURES = {
    "perplexity": "perplexity",
    "log_difference": "log-perplexity, difference to dense",
    "kl": "KL(dense \\|\\| this), nats a token",
    "agreement": "same likeliest token",
    "cosine": "cosine to dense",
}
"""Fields of an evaluation on a text -> what the card calls them."""


def require_recordable(folder: Path) -> None:
    """UsageError if figures cannot be kept in `folder`: it is no folder here, or no compressed checkpoint."""
    if not (folder / REPORT).is_file():
        raise UsageError(
            f"--record keeps figures in a folder that losparse wrote, and {folder} has no {REPORT}. Leave it out."
        )


def record(folder: Path, on: str, protocol: str, figures: dict[str, Any]) -> None:
    """Keep an evaluation in `folder`, and show it on the card; one of the same model on the same is replaced.

    on: the text, task or tasks. protocol: how it was measured, in a sentence. figures: JSON, without paths. Raises as
    `require_recordable`, and OutputError.
    """
    require_recordable(folder)
    kept = [] if problem(folder) else _evaluations(folder)
    kept = [entry for entry in kept if entry["on"] != on]
    kept.append({"on": on, "protocol": protocol, "figures": figures})
    with write_errors(folder):
        write_json(folder / EVALUATION, {"report_sha256": sha256(folder / REPORT), "evaluations": kept})
        place_section(folder, "Evaluation", _section(kept))


def problem(folder: Path) -> str | None:
    """What is wrong with the figures kept in `folder`, a sentence; None if nothing is, or if there are none."""
    path = folder / EVALUATION
    if not path.is_file():
        return None
    remedy = "Measure again with losparse eval --record, or remove it."
    try:
        _section(_evaluations(folder))
        if read_json(path)["report_sha256"] != sha256(folder / REPORT):
            return f"{path} was measured of another checkpoint. {remedy}"
    except (CheckpointError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return f"{path} is damaged. {remedy}"
    return None


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    path = folder / EVALUATION
    return list(read_json(path)["evaluations"]) if path.is_file() else []


def _section(evaluations: list[dict[str, Any]]) -> str:
    lines = ["| measured on | | this | dense |", "|---|---|---|---|"]
    for entry in evaluations:
        lines += [f"| {_cell(entry['on'])} | {' | '.join(row)} |" for row in _rows(entry["figures"])]
    lines += ["", *(f"{_cell(entry['on'])}: {_cell(entry['protocol'])}\n" for entry in evaluations)]
    return "\n".join(lines).rstrip("\n")


def _rows(figures: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(figure, of this model, of the dense one), as shown."""
    if "scores" not in figures:
        for name, shown in FIGURES.items():
            if figures.get(name) is not None:
                yield shown, _estimate(figures[name]), _estimate(figures.get(f"dense_{name}"))
        return
    dense = figures.get("dense_scores") or {}
    for name, score in figures["scores"].items():
        if "value" in score:
            yield _cell(name), _estimate(score), _estimate(dense.get(name))
        else:  # of the harness, by task
            for inner, value in score.items():
                yield f"{_cell(name)}, {_cell(inner)}", _estimate(value), _estimate((dense.get(name) or {}).get(inner))


def _estimate(figure: dict[str, Any] | None) -> str:
    if figure is None or figure["value"] is None:
        return "-"
    error = figure.get("error")
    return f"{figure['value']:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _cell(text: object) -> str:
    """A name that any file may hold, on one line and within its cell."""
    return " ".join(str(text).split()).replace("|", "\\|")
