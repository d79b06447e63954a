"""The last files of a result: hashes, report and card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import __version__
from .card import base_metadata, write_card
from .config import specs_of
from .journal import FILE as JOURNAL
from .output import UNDER_WAY
from .report import Report
from .source import REPORT, TIMING, read_config, read_json
from .writer import sha256, write_json


def close(work: Path, report: Report, base: Path, place: str) -> Report:
    """Write report and card beside the files that are in `work`, and return the report, now with their hashes.

    base: folder of the model that the result was made from, whose card's metadata is carried over. place: what the
    loading snippet names.
    """
    report = replace(report, files=_hashes(work))
    write_json(work / REPORT, report.to_dict())
    write_card(work, report, base_metadata(base), place=place)
    return report


def read_report(folder: Path) -> Report | None:
    """The report of the compressed checkpoint in `folder`, None without one; CheckpointError if it is damaged."""
    path = folder / REPORT
    if not path.is_file():
        return None
    specs = specs_of(read_config(folder / "config.json"), str(folder))
    return Report.from_dict(read_json(path), specs, str(path))


def versions() -> dict[str, str]:
    """Of what made the result."""
    import safetensors
    import torch
    import transformers

    return {
        "losparse": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }


def _hashes(work: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file but the card, which its owner may edit, and what is written after this."""
    aside = ("README.md", REPORT, TIMING, JOURNAL, *UNDER_WAY)
    paths = [p for p in sorted(work.rglob("*")) if p.is_file() and p.relative_to(work).parts[0] not in aside]
    return {str(p.relative_to(work)): {"size": p.stat().st_size, "sha256": sha256(p)} for p in paths}
