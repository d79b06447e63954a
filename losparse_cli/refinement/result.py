"""The refined checkpoint: the tensors of the one it began with, byte for byte but for the values that were trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..checkpoint.companions import copy_companions
from ..checkpoint.config import dense_config, fused_tensors, layer_specs, write_config
from ..checkpoint.finish import close, read_report, versions
from ..checkpoint.report import LayerReport, Report
from ..checkpoint.workfolder import WorkFolder
from ..checkpoint.writer import ShardWriter, Slot, plan_shards, tensor_part
from ..compression.plan import Job


def write_refined(job: Job, values: Mapping[str, Tensor], how: dict[str, Any], work: WorkFolder, mark: str) -> Report:
    """values: tensor on disk -> its new value, of the same shape and dtype. how: for the report. mark: fingerprint."""
    start = job.start
    assert start is not None
    _write_weights(job, values, work)
    before = read_report(start.folder) or _report_of(job)
    copy_companions(start.folder, work.path)
    write_config(work.path, dense_config(start.config), layer_specs(start), before.skipped, fused_tensors(start))
    changed = {name.removesuffix(".weight") for name in values}
    layers = tuple(_unmeasured(layer) if layer.name in changed else layer for layer in before.layers)
    report = replace(before, layers=layers, versions=versions(), fingerprint=mark, refinement=how, files={}, name="")
    return close(work.path, report, job.source.folder, job.output.name)


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


def _write_weights(job: Job, values: Mapping[str, Tensor], work: WorkFolder) -> None:
    start = job.start
    assert start is not None
    work.journal.keep(0)  # of a run that was killed while it wrote: what it trained may have been another state
    slots = [Slot((name,), entry.nbytes) for name, entry in start.entries.items()]
    writer = ShardWriter(work.path, plan_shards(slots, job.max_shard_bytes), work.journal)
    files = {file.path: file for file in start.files}
    for name, entry in start.entries.items():
        if name in values:
            part = tensor_part(name, values[name])
            assert sum(map(len, part[3])) == entry.nbytes, f"{name} keeps its size"
            writer.append([part])
        else:
            writer.append([(name, entry.dtype, entry.shape, files[entry.path].chunks(entry))])
    writer.finish()
