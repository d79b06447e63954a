"""A job that trains a compressed checkpoint towards what the whole dense model predicts."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.config import layer_specs
from ..checkpoint.fingerprint import digest
from ..checkpoint.finish import read_report
from ..checkpoint.output import TRAINING, check_space
from ..checkpoint.reader import TORCH_DTYPES
from ..checkpoint.report import Report
from ..compression.assembly import keeps_no_cache
from ..compression.estimate import estimate, space_needed
from ..compression.fingerprint import fingerprint
from ..compression.plan import Job
from ..compression.request import ModelRefinement, passing
from ..compression.slices import parted
from ..compression.team import Team, begin, in_its_share, reported, require_alike, require_shared
from ..errors import UsageError
from ..finetuning.states import disk_errors
from ..linalg.precision import fast_float32
from ..load import load
from ..models.device import chosen_dtype, chosen_precision
from ..models.names import NameMap
from ..models.skeleton import empty_model
from ..parallel.group import agreed, ranks
from ..progress import Progress, listener
from ..text.sample import account, held_out
from ..text.windows import Windows
from .recomputation import recompute
from .result import write_refined
from .teacher import FILE as TEACHER
from .teacher import find_teacher
from .training import Look, Moving, Refined, Training


@dataclass(frozen=True)
class RefinedModel:
    """output: the finished folder. looks: the model on held-out text before, during and after; best: as it is written.

    steps, tokens: that it was trained on.
    """

    output: Path
    report: Report
    looks: tuple[Look, ...]
    best: Look
    steps: int
    tokens: int
    seconds: float


def run_model(
    job: Job, *, resume: str = "auto", overwrite: bool = False, progress: Progress | None = None
) -> RefinedModel:
    """Train the compressed checkpoint that `job` starts from as it says; what is coded stays as it is.

    The best of all states that were measured on held-out windows is written, be it the first. Of several processes the
    first writes, and hears progress. Raises as `compress`.
    """
    begun, group = time.monotonic(), ranks()
    told = listener(progress if group.rank == 0 else None)
    require_shared(group, job)
    with group.at_work(), ExitStack() as stack:
        mark = fingerprint(job)
        require_alike(group, mark, told)
        team = begin(stack, job, group, mark, resume, overwrite)
        finished = bool(team.said(team.work is not None and team.work.finished))
        if finished:
            report = reported(group, None if team.work is None else read_report(job.output))
        else:
            report = train_into(team, job, digest(mark), told)
    done, seconds = report.refinement, time.monotonic() - begun
    looks = tuple(Look(*line) for line in done["looks"])
    best = min(looks, key=lambda look: look.divergence)
    return RefinedModel(job.output, report, looks, best, done["steps"], done["tokens"], 0.0 if finished else seconds)


def train_into(team: Team, job: Job, mark: str, told: Progress) -> Report:
    """The result of `run_model`, published from the work folder of a run with this fingerprint."""
    job, work, group = in_its_share(team.group, job), team.work, team.group
    how, windows, start = job.towards, job.windows, job.start
    assert start is not None
    assert how is not None
    assert isinstance(windows, Windows), "a request that is to train has text"
    names = _disk_names(job)
    agreed(group, lambda: check_moving(job))
    if work is not None:
        if not (work.path / TEACHER).is_file():  # else a part of it is written
            check_space(work.path, space_needed(job))
        (work.path / TRAINING).mkdir(exist_ok=True)
    unseen = held_out(windows)
    report = None
    with disk_errors(team.folder):
        need = estimate(job, windows)
        teacher = find_teacher(job, windows, team, told, need.fixed_bytes)
        told.phase("Loading the compressed model")

        def begun() -> Training:
            model = _student(job)
            if need.recomputes:
                recompute(model, job.blocks)
            moving = _moving(job, model, names, how)
            if not moving:
                raise UsageError(f"{start.address} has nothing that --train {','.join(how.train)} could move.")
            return Training(
                model, teacher, windows, unseen, moving, how, batch=passing(windows.length),
                dtype=chosen_dtype(how.precision, job.device), device=job.device, told=told, group=group,
            )  # fmt: skip

        training = agreed(group, begun)
        with fast_float32():
            found = training.run(None if work is None else work.path / TRAINING / "state.safetensors")
        if work is not None:
            told.phase("Writing the result")
            values = {names[name]: value.cpu().contiguous() for name, value in found.values.items()}
            text = account(job.calibration, windows) if job.calibration is not None else {}
            told_of = _account(how, found, len(unseen), chosen_precision(how.precision, job.device)) | {"text": text}
            report = write_refined(job, values, told_of, work, mark)
    if work is not None:
        work.publish()
    return reported(group, report)


def check_moving(job: Job) -> None:
    """UsageError if U and V alone are to be trained, and there are none."""
    assert job.start is not None
    assert job.towards is not None
    ranks = [spec.rank for spec in layer_specs(job.start).values()]
    if set(job.towards.train) == {"lowrank"} and not any(ranks):
        raise UsageError(f"{job.start.address} has no U and V that --train lowrank could move.")


def _student(job: Job) -> Any:
    """The compressed model, of which nothing is to be trained yet."""
    assert job.start is not None
    options = {"trust_remote_code": True} if job.trust_remote_code else {}
    model, _ = load(job.start.folder, dtype=torch.float32, **options)
    model.requires_grad_(False).to(job.device)
    keeps_no_cache(model)
    return model


def _account(how: ModelRefinement, found: Refined, unseen: int, precision: str) -> dict[str, Any]:
    """For the report. unseen: windows that were held out."""
    return {
        "objective": "model",
        "settings": asdict(how) | {"train": list(how.train)},
        "precision": precision,
        "steps": found.steps,
        "tokens": found.tokens,
        "seconds": round(found.looks[-1].seconds, 1),
        "held_out": unseen,
        "divergence_before": found.looks[0].divergence,
        "divergence_after": found.best.divergence,
        "looks": [[look.step, round(look.seconds, 1), look.divergence] for look in found.looks],
    }


def _disk_names(job: Job) -> dict[str, str]:
    """Parameter of the compressed model -> the tensor on disk that holds it, for those that are stored as they are."""
    assert job.start is not None
    model = empty_model(
        job.source.folder, job.source.config, parted(job.source), trust_remote_code=job.trust_remote_code
    )
    dense = NameMap(model, job.source.entries).disk
    found = {name: stored[0] for name, stored in dense.items() if len(stored) == 1}
    for plan in job.plan.layers:
        for suffix in ("weight", "U", "V"):
            found[f"{plan.layer.name}.{suffix}"] = f"{plan.layer.disk_module}.{suffix}"
    return {name: tensor for name, tensor in found.items() if tensor in job.start.entries}


def _moving(job: Job, model: Any, names: dict[str, str], how: ModelRefinement) -> dict[str, Moving]:
    """What is trained: of layers that are no embeddings, and vectors beside them."""
    assert job.start is not None
    specs = layer_specs(job.start)
    layers = {name for name, spec in specs.items() if spec.kind != "embedding"}
    found: dict[str, Moving] = {}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if name not in names:
            continue
        if module in layers and leaf in ("weight", "U", "V"):
            part = "scales" if leaf == "weight" else "lowrank"
        elif (parameter.dim() == 1 and module not in specs) or leaf == "bias":
            part = "norms"
        else:
            continue
        if part in how.train:
            found[name] = Moving.of(parameter, TORCH_DTYPES[job.start.entries[names[name]].dtype])
    return found
