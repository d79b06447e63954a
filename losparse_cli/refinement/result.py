"""The refined checkpoint: the files of the one it began with, byte for byte but for the values that were trained."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.companions import copy_companions
from ..checkpoint.config import dense_config, layer_specs, write_config
from ..checkpoint.finish import close, read_report, versions
from ..checkpoint.reader import SafetensorsFile
from ..checkpoint.report import LayerReport, Report
from ..checkpoint.source import INDEX, Checkpoint
from ..checkpoint.writer import tensor_part
from ..compression.plan import Job
from ..errors import CheckpointError


def write_refined(job: Job, values: Mapping[str, Tensor], how: dict[str, Any], work: Path, mark: str) -> Report:
    """values: tensor on disk -> its new value, of the same shape and dtype. how: for the report. mark: fingerprint."""
    start = job.start
    assert start is not None
    _copy_weights(start, values, work)
    before = read_report(start.folder) or _report_of(job)
    copy_companions(start.folder, work)
    write_config(work, dense_config(start.config), layer_specs(start), before.skipped)
    changed = {name.removesuffix(".weight") for name in values}
    layers = tuple(_unmeasured(layer) if layer.name in changed else layer for layer in before.layers)
    report = replace(
        before, layers=layers, versions=versions(), fingerprint=mark, refinement=how, blocks=(), files={}, name=""
    )
    return close(work, report, job.source.folder, job.output.name)


def _report_of(job: Job) -> Report:
    """Of a compressed checkpoint without one, as save_pretrained writes it: sizes alone."""
    assert job.start is not None
    sizes: dict[str, int] = {}
    for name, entry in job.start.entries.items():
        module, _, part = name.rpartition(".")
        sizes[module] = sizes.get(module, 0) + (0 if part == "bias" else entry.nbytes)
    layers = tuple(
        LayerReport(
            p.layer.name, layer_specs(job.start)[p.layer.name], p.layer.dense_bytes, sizes[p.layer.disk_module],
            head=p.layer.rows == "head",
        )
        for p in job.plan.layers
    )  # fmt: skip
    source = {
        "name": job.source.name,
        "commit": job.source.commit,
        "architecture": (job.source.config.get("architectures") or [None])[0],
        "files": {},
    }
    sizes_of_model = job.source.nbytes, job.start.nbytes, job.parameters
    return Report(layers, job.plan.skipped, *sizes_of_model, source=source, versions=versions())


def _unmeasured(layer: LayerReport) -> LayerReport:
    """Without the errors that were measured before its factors moved."""
    return replace(layer, residual_squared=None, errors=(), output_errors=(), held_out_error=None)


def _copy_weights(start: Checkpoint, values: Mapping[str, Tensor], work: Path) -> None:
    if (start.folder / INDEX).is_file():
        shutil.copyfile(start.folder / INDEX, work / INDEX)
    for file in start.files:
        if not isinstance(file, SafetensorsFile):
            raise CheckpointError(f"{file.path} is no safetensors file. Compress the model again.")
        target = work / file.path.name
        shutil.copyfile(file.path, target)
        with open(target, "r+b") as out:
            for name, entry in file.entries.items():
                if name in values:
                    raw = tensor_part(name, values[name])[3][0]
                    assert len(raw) == entry.nbytes, f"{name} keeps its size"
                    out.seek(file.data_start + entry.offset)
                    out.write(raw)
