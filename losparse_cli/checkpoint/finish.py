"""The last files of a result: config, what goes along, hashes, report and card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import write_errors
from ..shim.layouts import LayerSpec
from .card import base_metadata, write_card
from .companions import copy_companions
from .config import FusedTensor, specs_of, write_config
from .journal import FILE as JOURNAL
from .journal import Unit
from .output import UNDER_WAY
from .report import LayerReport, Report
from .source import REPORT, TIMING, read_config, read_json
from .writer import sha256, write_json


@dataclass(frozen=True)
class About:
    """What a result says of itself, but for what its units say; JSON.

    order: its layers by name, as the model has them. model_bytes, parameters: of the dense model. fused: tensor -> the
    fields of its FusedTensor. The rest is that of Report; source without its files.
    """

    order: list[str]
    skipped: dict[str, str]
    model_bytes: int
    parameters: int
    source: dict[str, Any]
    recipe: dict[str, Any]
    versions: dict[str, str]
    calibration: dict[str, Any]
    fused: dict[str, dict[str, Any]]
    refinement: dict[str, Any]


def finish(
    work: Path, base: Path, config: Mapping[str, Any], about: About, units: Sequence[Unit], hashes: dict[str, Any],
    mark: str, place: str,
) -> Report:  # fmt: skip
    """Config, shim, companions, report and card: all that stands beside the weights in `work`; the report.

    base: folder of the dense model, or of what goes along with it; config: its config.json. units: all that was
    written. hashes: weight file of the dense model -> size and SHA-256. mark: of the run. place: as `close` takes it.
    """
    order = {name: k for k, name in enumerate(about.order)}
    stats = sorted((unit.stats for unit in units if unit.stats is not None), key=lambda line: order[line["name"]])
    specs = {line["name"]: LayerSpec.from_dict(line["spec"]) for line in stats}
    with write_errors(work):
        copy_companions(base, work)
        fused = {tensor: FusedTensor(**fields) for tensor, fields in about.fused.items()}
        write_config(work, config, specs, about.skipped, fused)
        report = Report(
            layers=tuple(LayerReport.from_dict(line, specs[line["name"]]) for line in stats),
            skipped=about.skipped,
            model_bytes_before=about.model_bytes,
            model_bytes_after=sum(unit.end - unit.begin for unit in units),
            parameters=about.parameters,
            source=about.source | {"files": hashes},
            recipe=about.recipe,
            versions=about.versions,
            fingerprint=mark,
            calibration=about.calibration,
            blocks=tuple(line["block"] for line in stats if "block" in line),
            refinement=about.refinement,
        )
        return close(work, report, base, place)


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
