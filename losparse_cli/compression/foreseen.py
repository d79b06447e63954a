"""What is measured of a model before its codes are chosen: how much the loss minds an error in each output of each
layer, and how a layer's bits fall with the step. None of it depends on the size that is asked for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..budget.plan import LayerPlan, Plan
from ..calibration.moments import Fed
from ..calibration.sensitivity import Sensitivity
from ..checkpoint.fingerprint import digest
from ..checkpoint.output import BACKWARD, SENSITIVITY
from ..checkpoint.workfolder import WorkFolder
from ..errors import UsageError, write_whole
from ..linalg.integers import column_metric, row_steps
from ..linalg.rates import Curve
from ..progress import Progress
from ..shim.layouts import COLUMN_FACTORS
from ..text.sample import hold_out
from ..text.windows import Sample
from .coded import curve_of, support_of
from .fingerprint import fingerprint
from .plan import Job
from .sensitivity import measure_sensitivity
from .solve import as_matrix
from .team import Team

SENSITIVITY_TOKENS = 16_384
NATS = "nats"  # in the file that keeps what was measured, beside names of layers
OF = "losparse"  # in its metadata: what it was measured of
CONTENTS = "sha256"  # of what is in it, there, too


@dataclass(frozen=True)
class Foreseen:
    """Of a layer. g: (out,), Fisher information of its outputs. curve: bits a code by the step."""

    g: Tensor
    curve: Curve


@dataclass(frozen=True)
class Measured:
    """layers: what is foreseen of each that text reaches. nats: the text's loss a token, None if it is not known."""

    layers: dict[str, Foreseen]
    nats: float | None


def foresee(
    job: Job, plans: Sequence[LayerPlan], windows: Sample, team: Team, told: Progress, fixed_bytes: int
) -> Measured:
    """What is foreseen of the job's coded layers; fixed_bytes: of memory beside activations.

    It is kept for a run that goes on with this one (see `WorkFolder.recall`), and in the job's `sensitivity_file`,
    from which runs of other sizes have it. One process that is ended while it measures goes on after the last block
    that was run backwards. UsageError if that file is of another model or text, OutputError if it cannot be written.
    """
    seen = _seen(windows)
    file = job.sensitivity_file
    mark = {} if file is None else _decided_by(job, plans, seen)

    def recall(work: WorkFolder) -> Measured | None:
        known = None if file is None else _read(file, job, mark)
        found = work.recall(SENSITIVITY, lambda path: _measures(load_file(path)))
        if found is None and known is not None:
            _keep(work, known)
        elif found is not None and known is None and file is not None:
            _write(file, found, mark)  # the run before came no further
        return found or known

    is_known, found = team.recalled(recall)
    if is_known:
        found = _measures(team.heard({} if found is None else _tensors(found)))
    else:
        found = _measured(job, plans, seen, team, told, fixed_bytes)
        if team.work is not None:
            _keep(team.work, found)
            if file is not None:
                _write(file, found, mark)
    if team.work is not None:
        (team.work.path / BACKWARD).unlink(missing_ok=True)
    return found


def coded_layers(plan: Plan) -> list[LayerPlan]:
    """Those whose codes follow the loss."""
    return [p for p in plan.layers if p.bits and not p.layer.rows and not p.width]


def check_known(job: Job) -> None:
    """UsageError if the job's `sensitivity_file` is of another model or text, as far as the text is there."""
    if job.sensitivity_file is not None and job.windows is not None:
        plans = coded_layers(job.scheduled().plan)
        _read(job.sensitivity_file, job, _decided_by(job, plans, _seen(job.windows)))


def _keep(work: WorkFolder, found: Measured) -> None:
    work.keep(SENSITIVITY, lambda path: save_file(_tensors(found), path))


def _seen(windows: Sample) -> Sample:
    """Of the text, what the loss is measured on."""
    seen = hold_out(windows)[0]
    return seen.take(range(max(1, min(len(seen), SENSITIVITY_TOKENS * len(seen) // max(1, seen.seen)))))


def _decided_by(job: Job, plans: Sequence[LayerPlan], seen: Sample) -> dict[str, Any]:
    """What decides what is measured; of it, what a person would call it -> JSON."""
    assert job.calibration is not None
    run = fingerprint(job)
    sparse = {p.layer.name: [p.nnz, p.pattern, p.scope] for p in plans if p.sparse}
    return {
        "version": [run["losparse"], run["torch"], run["transformers"]],
        "model": [run["source"], run["config"]],
        "text": [seen.digest(), seen.length, job.calibration.batch],
        "seed": job.recipe.seed,
        "solver": job.recipe.solver,
        "layers": digest([[p.layer.name, list(p.layer.shape)] for p in plans]),
        "zeros": digest(sparse),
    }


def _read(file: Path, job: Job, mark: dict[str, Any]) -> Measured | None:
    """What the file holds, None where it is to be written; UsageError if it is something else, or of something else, or
    has no place."""
    if job.output in file.parents:
        raise UsageError(f"--sensitivity-file {file} lies inside the result, which is replaced. Name another place.")
    if not file.exists():
        if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
            raise UsageError(f"--sensitivity-file {file} cannot be written: {file.parent} is no folder that takes it.")
        return None
    try:
        with safe_open(file, "pt") as opened:
            found = json.loads((opened.metadata() or {})[OF])
        different = [name for name in mark if found.get(name) != mark[name]]
        if not different:
            tensors = load_file(file)
            if found[CONTENTS] != _contents(tensors):
                raise ValueError("other numbers than were written")
            return _measures(tensors)
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--sensitivity-file {file} holds no sensitivities: it is another file, or damaged. Name one that is not "
            "there yet, and it is written."
        ) from error
    raise UsageError(
        f"--sensitivity-file {file} was measured otherwise (different: {', '.join(different)}). Name one that is not "
        "there yet, and it is written."
    )


def _write(file: Path, found: Measured, mark: dict[str, Any]) -> None:
    tensors = _tensors(found)
    told = json.dumps(mark | {CONTENTS: _contents(tensors)})  # one entry, as several come in any order
    write_whole(file, lambda part: save_file(tensors, part, metadata={OF: told}))


def _contents(tensors: dict[str, Tensor]) -> str:
    """By which damage is noticed: safetensors has no checksums."""
    return digest({name: hashlib.sha256(x.numpy().tobytes()).hexdigest() for name, x in tensors.items()})


def _measured(
    job: Job, plans: Sequence[LayerPlan], seen: Sample, team: Team, told: Progress, fixed_bytes: int
) -> Measured:
    by_name = {p.layer.name: p for p in plans}
    files = {file.path: file for file in job.source.files}
    group = team.group
    metrics: dict[str, tuple[Tensor | float, float]] = {}  # of the layers whose second moments lie here
    found: dict[str, Foreseen] = {}
    losses: list[tuple[float, int]] = []

    def forward(block: str, fed: list[Fed]) -> None:
        for moments in (one.moments() for one in fed if one.owner == group.rank):
            metric = None
            if job.recipe.solver == "feedback" and bool(moments.H.any()):
                try:
                    metric = column_metric(moments.H, COLUMN_FACTORS)
                except ValueError:  # then the solver will say so, of what the layer is fed by then
                    continue
            for layer in moments.layers:
                metrics[_full(block, layer)] = (1.0, 1.0) if metric is None else (metric.columns, metric.scale)

    def backward(block: str, sensitivities: dict[str, Sensitivity]) -> None:
        for layer, one in sensitivities.items():
            name = _full(block, layer)
            if name not in metrics or name not in by_name or not bool(one.g.any()):
                continue  # nothing that it puts out matters for the loss: it gets bytes of its own
            plan = by_name[name]
            entry = job.source.entries[plan.layer.tensor]
            W = as_matrix(files[entry.path].read(entry), plan.layer, job.device)
            columns, scale = metrics.pop(name)
            g = one.g * one.share
            X = W / columns / (scale * row_steps(g))[:, None]
            found[name] = Foreseen(g.cpu(), curve_of(X, plan, support_of(X, plan) if plan.sparse else None))

    def text(nats: float, tokens: int) -> None:
        losses.append((nats, tokens))

    # What several know, each of its own windows, another number of them could not go on with.
    state = team.work.path / BACKWARD if team.work is not None and group.size == 1 else None
    measure_sensitivity(
        job, seen, told, group, folder=team.folder, fixed_bytes=fixed_bytes, on_forward=forward, on_backward=backward,
        on_text=text, state=state,
    )  # fmt: skip
    of_all = [loss for its in group.agree(losses) for loss in its]  # in the order of the text
    predicted = sum(tokens for _, tokens in of_all)
    nats = sum(nats for nats, _ in of_all) / predicted if predicted else None
    layers: dict[str, Foreseen] = {}
    for rank in range(group.size):
        layers |= _measures(group.broadcast(rank, _tensors(Measured(found, None)))).layers
    return Measured(layers, nats)


def _full(block: str, layer: str) -> str:
    return f"{block}.{layer}" if block else layer


def _tensors(found: Measured) -> dict[str, Tensor]:
    tensors = {} if found.nats is None else {NATS: torch.tensor(found.nats, dtype=torch.float64)}
    for name, one in found.layers.items():
        tensors[f"{name}.g"] = one.g.contiguous()
        tensors[f"{name}.curve"] = torch.tensor(
            [one.curve.anchor, one.curve.density, *one.curve.bits], dtype=torch.float64
        )
    return tensors


def _measures(tensors: dict[str, Tensor]) -> Measured:
    """What `_tensors` made of it."""
    nats = tensors.pop(NATS, None)
    found = {}
    for key, tensor in tensors.items():
        if key.endswith(".curve"):
            anchor, density, *bits = tensor.tolist()
            name = key.removesuffix(".curve")
            found[name] = Foreseen(tensors[f"{name}.g"], Curve(anchor, tuple(bits), density))
    return Measured(found, None if nats is None else float(nats))
