"""A trained model -> a checkpoint: parts as they are stored, config, companions, report and card."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.companions import copy_companions
from ..checkpoint.config import write_config
from ..checkpoint.fingerprint import digest
from ..checkpoint.finish import close, versions
from ..checkpoint.journal import FILE as JOURNAL
from ..checkpoint.layers import encode_layer
from ..checkpoint.output import UNDER_WAY
from ..checkpoint.reader import SafetensorsFile
from ..checkpoint.report import LayerReport, Report
from ..checkpoint.source import read_json
from ..linalg.factors import LowRankSparse
from ..models.names import NameMap
from ..models.reading import output_embeddings
from ..progress import Progress
from ..shim.layouts import LayerSpec
from .conversion import coded_modules, finish, trained_layers
from .experts import fused_record
from .prepare import Training


def write_result(training: Training, model: Any, work: Path, seconds: float, told: Progress) -> Report:
    """The trained model with its parts as they are stored, and all that stands beside the weights.

    seconds: that training took. The scores are those of the model as it is written.
    """
    plans = {p.layer.name: p for p in training.plan.layers}
    reports: list[LayerReport] = []
    specs: dict[str, LayerSpec] = {}

    def encode(name: str, factors: LowRankSparse) -> tuple[LayerSpec, dict[str, Tensor]]:
        spec, tensors = encode_layer(plans[name], factors)
        reports.append(LayerReport(name, spec, plans[name].layer.dense_bytes, spec.nbytes(training.dtype)))
        specs[name] = spec
        return spec, tensors

    for left in work.iterdir():  # by a run that was killed while it wrote
        if left.name not in (JOURNAL, *UNDER_WAY):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    before = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for layer in trained_layers(model).values() for p in (layer.U, layer.V, layer.S) if p is not None
    )
    finish(model, training.dtype, encode)
    coded = coded_modules(model)
    for name, module in coded.items():
        parts = module.state_dict()
        parts.pop("bias", None)
        before -= sum(p.numel() for p in parts.values() if p.is_floating_point())
        m, n = module.spec.shape
        stored = sum(p.numel() * p.itemsize for p in parts.values())
        dense, head = m * n * training.dtype.itemsize, module is output_embeddings(model)
        reports.append(LayerReport(name, module.spec, dense, stored, head=head))
        specs[name] = module.spec
    model.to(training.device)  # where FSDP had it in parts, it is whole on the CPU, and may only fit now
    scores = training.score(model, told)
    recorded = getattr(getattr(model.config, "quantization_config", None), "fused", {})
    model.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    vars(model).pop("save_pretrained", None)  # of compressed models: it would write its own account of the layers
    copy_companions(training.source.folder, work)
    model.save_pretrained(work, max_shard_size=training.max_shard_size)
    _save_tokenizer(training.tokenizer, work)
    disk = _names_on_disk(model, work)
    specs = {name: replace(spec, tensor=disk[name] if disk[name] != name else "") for name, spec in specs.items()}
    reports = [replace(layer, spec=specs[layer.name]) for layer in reports]
    fused = fused_record(model, recorded, disk)
    write_config(work, read_json(work / "config.json"), specs, training.plan.skipped, fused)
    dense = sum(layer.parameters for layer in reports)
    report = Report(
        layers=tuple(reports),
        skipped=training.plan.skipped,
        model_bytes_before=(before + dense) * training.dtype.itemsize,
        model_bytes_after=sum(t.numel() * t.element_size() for t in _unique(model.state_dict())),
        parameters=before + dense,
        source={
            "name": training.source.name,
            "commit": training.source.commit,
            "architecture": type(model).__name__,
            "files": {},
        },
        recipe={"pattern": training.plan.layers[0].pattern},
        versions=versions(),
        fingerprint=digest(training.fingerprint),
        training={
            "objective": training.how.objective,
            "task": training.task.name,
            "steps": training.steps,
            "seconds": round(seconds, 1),
            "settings": training.how.to_dict(),
            "scores": scores,
        },
    )
    return close(work, report, training.source.folder, training.output.name)


def _names_on_disk(model: Any, work: Path) -> dict[str, str]:
    """Module -> what the tensors of it are called in the files that transformers has just written."""
    tensors = [name for path in sorted(work.glob("*.safetensors")) for name in SafetensorsFile(path).entries]
    disk = NameMap(model, tensors).disk
    return {
        parameter.removesuffix(".weight"): stored[0].removesuffix(".weight")
        for parameter, stored in disk.items()
        if parameter.endswith(".weight")
    }


def _save_tokenizer(tokenizer: Any, work: Path) -> None:
    """Without the truncation and padding of its last call, which a fast one would write into tokenizer.json."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(work)


def _unique(state: dict[str, Tensor]) -> list[Tensor]:
    """Tied weights once."""
    return list({(t.data_ptr(), t.shape): t for t in state.values()}.values())
