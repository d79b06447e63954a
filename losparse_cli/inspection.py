"""Checkpoint -> Report, from headers, config and report alone; weights are read only for spectra."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .checkpoint.config import layer_specs, layer_tensors, skipped_layers
from .checkpoint.reader import BITS
from .checkpoint.report import LayerReport, Report
from .checkpoint.source import REPORT, Checkpoint, open_checkpoint
from .errors import SourceError, UsageError
from .progress import Progress, listener

SPECTRUM_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class DenseLayer:
    """One layer of a dense checkpoint, linear or an embedding. reason: why it would stay dense, or None.

    rows: whether it is an embedding, or an output head that is tied to none, which are compressed where S holds whole
    numbers. energy: rank -> share of ‖W‖²_F that the best matrix of that rank captures; {} of rows, and unasked for.
    curve: the same at closely spaced ranks up to the full one, for a plot; left out of `to_dict`.
    """

    name: str
    shape: tuple[int, int] | None
    nbytes: int
    reason: str | None
    energy: dict[int, float]
    curve: dict[int, float] = field(default_factory=dict, repr=False)
    rows: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "curve"}


@dataclass(frozen=True)
class DenseReport:
    """What `compress` would find in a dense checkpoint, if nothing asks for floats in S."""

    name: str
    layers: tuple[DenseLayer, ...]
    model_bytes: int
    parameters: int
    targeted_parameters: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"layers": [layer.to_dict() for layer in self.layers]}


def inspect(
    source: str | Path,
    *,
    spectrum: bool | None = False,
    revision: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Report | DenseReport:
    """A Report of a compressed checkpoint, a DenseReport of a dense one.

    Of a Hub id only headers, config and report are fetched; `spectrum` needs the weights, so it needs a
    dense folder (UsageError otherwise), and None asks for it of whatever is dense.
    """
    told = listener(progress)
    checkpoint = open_checkpoint(source, revision=revision, cache_dir=cache_dir, headers_only=True)
    if checkpoint.is_compressed:
        if spectrum:
            raise UsageError("--spectrum is for dense checkpoints; a compressed one shows its errors without it.")
        return compressed_report(checkpoint)
    if spectrum is not False and not checkpoint.files:
        raise UsageError(
            f"--spectrum reads the weights, and {source} is on the Hub. Download it first with: hf download {source} "
            "--local-dir FOLDER"
        )
    return _dense_report(checkpoint, spectrum is not False, trust_remote_code, told)


def compressed_report(checkpoint: Checkpoint) -> Report:
    """The Report of a compressed checkpoint: sizes from headers and config, errors from its own report."""
    specs = layer_specs(checkpoint)
    recorded = checkpoint.report()
    base = Report.from_dict(recorded, specs, str(checkpoint.folder / REPORT)) if recorded else Report((), {}, 0, 0, 0)
    known = {layer.name: layer for layer in base.layers}
    layers = []
    inside = 0  # elements of the compressed layers' tensors
    for name, spec in specs.items():
        entries = layer_tensors(checkpoint, name, spec)
        inside += sum(entry.elements for entry in entries.values())
        m, n = spec.shape
        sizes = m * n * BITS[entries["weight"].dtype] // 8, sum(entry.nbytes for entry in entries.values())
        line = known.get(name, LayerReport(name, spec, *sizes))
        layers.append(replace(line, bytes_before=sizes[0], bytes_after=sizes[1]))
    stored = checkpoint.nbytes
    return replace(
        base,
        name=checkpoint.name,
        layers=tuple(layers),
        skipped=skipped_layers(checkpoint),
        model_bytes_before=stored + sum(layer.bytes_before - layer.bytes_after for layer in layers),
        model_bytes_after=stored,
        parameters=base.parameters or checkpoint.elements - inside + sum(layer.parameters for layer in layers),
    )


def _dense_report(checkpoint: Checkpoint, spectrum: bool, trust_remote_code: bool, told: Progress) -> DenseReport:
    from .budget.recipe import Recipe
    from .compression.layers import find_layers
    from .compression.slices import open_experts
    from .models.names import NameMap

    if checkpoint.packing is not None:
        raise SourceError(
            f"{checkpoint.name} is quantized already ({checkpoint.packing}). Inspect the unquantized checkpoint."
        )
    checkpoint, skeleton = open_experts(checkpoint, trust_remote_code=trust_remote_code)
    targeted, skipped = find_layers(checkpoint, skeleton, Recipe().settled())
    tensors = {layer.name: layer.tensor for layer in targeted}
    rows = {layer.name for layer in targeted if layer.rows}  # which have no U and V: spectra would say nothing of them
    disk = NameMap(skeleton.model, checkpoint.entries).disk
    layers = []
    if spectrum:
        told.start("layers", len(tensors) - len(rows))
    for name in (*tensors, *skipped):
        entry = checkpoint.entries.get(tensors.get(name) or next(iter(disk.get(f"{name}.weight", ())), ""))
        curve: dict[int, float] = {}
        if spectrum and name in tensors and name not in rows and entry is not None:
            curve = _energy(checkpoint, entry)
            told.advance("layers", name=name)
        shape = skeleton.linears[name].shape if name in skeleton.linears else None
        if shape is None and entry is not None and len(entry.shape) == 2:
            shape = (entry.shape[0], entry.shape[1])
        energy = {r: curve[r] for r in SPECTRUM_RANKS if r in curve}
        nbytes = entry.nbytes if entry else 0
        layers.append(DenseLayer(name, shape, nbytes, skipped.get(name), energy, curve, name in rows))
    return DenseReport(
        checkpoint.name,
        tuple(layers),
        checkpoint.nbytes,
        checkpoint.elements,
        sum(layer.shape[0] * layer.shape[1] for layer in targeted),
    )


def _energy(checkpoint: Checkpoint, entry: Any) -> dict[int, float]:
    """Rank -> share of the squared Frobenius norm captured, from all singular values.

    The ranks are SPECTRUM_RANKS and others, at most 3 % apart beyond 32, up to the full rank.
    """
    import torch

    file = next(file for file in checkpoint.files if file.path == entry.path)
    captured = torch.linalg.svdvals(file.read(entry).float()).double().square().cumsum(0).tolist()
    ranks, r = {*SPECTRUM_RANKS, len(captured)}, 1
    while r < len(captured):
        ranks.add(r)
        r += max(1, r * 3 // 100)
    return {r: captured[r - 1] / (captured[-1] or 1.0) for r in sorted(ranks) if r <= len(captured)}
