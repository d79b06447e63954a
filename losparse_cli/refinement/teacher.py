"""What the dense model says about each window, found a block at a time: what its output head is fed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..calibration.activations import trim
from ..checkpoint.output import TRAINING
from ..compression.assembly import activations_of, calibration_model, parameters_by_block, run_calls
from ..compression.plan import Job
from ..compression.team import Team
from ..errors import UsageError
from ..linalg.precision import fast_float32
from ..models.blocks import Relay
from ..models.device import memory_errors
from ..models.head import require_head
from ..parallel.group import Ranks, agreed
from ..parallel.shares import share
from ..progress import Progress
from ..text.windows import Windows

FILE = f"{TRAINING}/teacher.safetensors"


@dataclass(frozen=True)
class Teacher:
    """states: (windows, tokens, hidden), float32, what the dense model's head is fed. weight, bias: of that head."""

    states: Tensor
    weight: Tensor
    bias: Tensor | None


def find_teacher(job: Job, windows: Windows, team: Team, told: Progress, fixed_bytes: int) -> Teacher:
    """The dense model of the job on `windows`, one block in memory at a time; kept for a run that goes on with this.

    Each rank asks about its share of the windows, and all hear everything. fixed_bytes: of memory that is needed beside
    activations. UsageError for a model without an output head.
    """
    known, recalled = team.recalled(lambda work: work.recall(FILE, load_file))
    if known:
        kept = team.heard(recalled or {})
    else:
        kept = _gathered(team.group, agreed(team.group, lambda: _asked(job, windows, team, told, fixed_bytes)))
        if team.work is not None:
            team.work.keep(FILE, lambda path: save_file(kept, path))
    bias = kept.get("bias")
    return Teacher(kept["states"], kept["weight"].to(job.device), None if bias is None else bias.to(job.device))


def _gathered(group: Ranks, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the first rank found, with the states that others did."""
    if group.size == 1:
        return own
    kept = group.broadcast(0, own)
    states = [group.broadcast(rank, {"states": own["states"]})["states"] for rank in range(1, group.size)]
    return kept | {"states": torch.cat([kept["states"], *(one for one in states if len(one))])}


def _asked(job: Job, windows: Windows, team: Team, told: Progress, fixed_bytes: int) -> dict[str, Tensor]:
    assert job.calibration is not None
    batches = windows.batches(job.calibration.batch)
    mine = share(len(batches), team.group.rank, team.group.size)
    batches = [{name: ids.to(job.device) for name, ids in batch.items()} for batch in batches[mine.start : mine.stop]]
    if not batches:
        return {"states": torch.empty(0)}
    assembly = calibration_model(job)
    model = assembly.model
    head: Any = require_head(model)
    parameters, outside = parameters_by_block(model, job.route)
    assembly.load(outside)
    activations = activations_of(job, team.folder, fixed_bytes)
    remedy = "Lower --calibration-tokens or --calibration-length, or set --memory-limit."
    found: list[Tensor] = []

    def hear(states: Tensor) -> Tensor:
        found.append(states.float().cpu())
        return states[..., :1]  # in the place of logits, which are not needed

    with memory_errors(remedy), fast_float32(), torch.no_grad(), Relay(model, list(parameters), batches) as relay:
        for number, (name, calls) in enumerate(relay):
            told.phase(f"the dense model: block {number + 1} of {len(parameters)}")
            assembly.load(parameters[name])
            run_calls(model.get_submodule(name), calls, activations)
            assembly.drop(parameters[name])
            trim()
        head.forward = hear  # hides the class's own method
        for number in range(len(batches)):
            relay.result(number)
            activations.release()
    if [len(states) for states in found] != [len(next(iter(batch.values()))) for batch in batches]:
        raise UsageError(f"{type(model).__name__} does not call its output head once, as other models do.")
    kept = {"states": torch.cat(found), "weight": head.weight.detach().float().cpu().clone()}
    bias = getattr(head, "bias", None)
    return kept if bias is None else kept | {"bias": bias.detach().float().cpu().clone()}
