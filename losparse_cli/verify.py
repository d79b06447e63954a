"""Hashes, headers, config, every index and every stream of codes of a compressed checkpoint; no model is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .checkpoint.config import fused_tensors, layer_specs, layer_tensors, skipped_layers
from .checkpoint.layers import not_finite, read_layer
from .checkpoint.measured import problem as measured_problem
from .checkpoint.report import Report
from .checkpoint.source import REPORT, Checkpoint, open_checkpoint
from .checkpoint.writer import sha256
from .errors import CheckpointError
from .progress import Progress, listener
from .shim.layouts import LayerSpec


@dataclass(frozen=True)
class Verification:
    """problems: one sentence each, none if the checkpoint is sound. hashed: files whose SHA-256 was checked."""

    problems: tuple[str, ...]
    layers: int
    tensors: int
    hashed: int

    @property
    def sound(self) -> bool:
        return not self.problems


def verify(source: str | Path, *, progress: Progress | None = None) -> Verification:
    """Check a compressed checkpoint; raises only if it cannot be opened or is none (as `open_checkpoint`)."""
    told = listener(progress)
    checkpoint = open_checkpoint(source)
    specs = layer_specs(checkpoint)
    told.start("layers", len(specs))
    problems: list[str] = []
    try:
        skipped_layers(checkpoint)
    except CheckpointError as error:
        problems.append(str(error))
    used: set[str] = set()
    for name, spec in specs.items():
        used.add(f"{spec.tensor or name}.weight")  # whatever else is wrong with it
        try:
            entries = layer_tensors(checkpoint, name, spec)
            used |= {entry.name for entry in entries.values()}
            problems += not_finite(read_layer(checkpoint, name, spec, entries), entries)
        except CheckpointError as error:
            problems.append(str(error))
        told.advance("layers", name=name)
    problems += [
        f"{checkpoint.address}: {part} is missing, a part of {tensor}. Compress the model again."
        for tensor, fused in fused_tensors(checkpoint).items()
        for part in fused.parts
        if part not in checkpoint.entries
    ]
    problems += [
        f"{entry.path}: the tensor {name} belongs to no layer of config.json. Compress the model again."
        for name, entry in checkpoint.entries.items()
        if name not in used
        and name.endswith(".weight")
        and len(entry.shape) == 1
        and f"{name.removesuffix('weight')}V" in checkpoint.entries
    ]
    hashed = _check_hashes(checkpoint, specs, problems)
    measured = measured_problem(checkpoint.folder)
    problems += [measured] if measured else []
    return Verification(tuple(problems), len(specs), len(checkpoint.entries), hashed)


def require_sound(source: str | Path) -> None:
    """CheckpointError with the first problem that `verify` finds."""
    found = verify(source)
    if found.problems:
        more = (
            f" ({len(found.problems) - 1} more; losparse verify {source} lists them)" if len(found.problems) > 1 else ""
        )
        raise CheckpointError(found.problems[0] + more)


def _check_hashes(checkpoint: Checkpoint, specs: dict[str, LayerSpec], problems: list[str]) -> int:
    recorded = checkpoint.report()
    if not recorded:
        return 0  # saved again by transformers: there is nothing to compare with
    report = Report.from_dict(recorded, specs, str(checkpoint.folder / REPORT))
    problems += [
        f"{file.path} is not among the files that losparse wrote. Remove it, or download the checkpoint again."
        for file in checkpoint.files
        if file.path.name not in report.files
    ]
    root = checkpoint.folder.resolve()
    for name, expected in report.files.items():
        path = checkpoint.folder / name
        if root not in (root / name).parents or ".." in Path(name).parts:
            problems.append(f"{checkpoint.folder / REPORT} names {name!r}, outside the folder.")
        elif not path.is_file():
            problems.append(f"{path} is missing. Download or compress the checkpoint again.")
        elif path.stat().st_size != expected.get("size") or sha256(path) != expected.get("sha256"):
            problems.append(
                f"{path} is not the file that was written (SHA-256 differs). Download or compress it again."
            )
    return len(report.files)
