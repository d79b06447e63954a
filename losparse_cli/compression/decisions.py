"""What a calibrated run decides before its first layer, and keeps for a run that goes on with it."""

from __future__ import annotations

from pathlib import Path

from ..budget.plan import Plan, make_plan
from ..checkpoint.output import ALLOCATION, GENERATED
from ..checkpoint.source import read_json
from ..checkpoint.writer import write_json
from ..errors import write_errors
from ..load import load
from ..models.device import release
from ..progress import Progress
from ..text.generated import generate_text, kept_windows, write_windows
from ..text.sample import hold_out
from ..text.windows import Sample, Windows
from .allocation import Allocation, allocate_by_error
from .plan import Job
from .team import Team


def kept_text(job: Job, team: Team) -> Sample | None:
    """The text of the job, or what the model wrote for itself before this run was killed.

    None without calibration, or if the model has yet to write: then nothing that was done before counts.
    """
    if job.calibration is None or job.windows is not None:
        return job.windows
    kept = None
    if team.work is not None:
        kept = kept_windows(job.calibration, team.work.path / GENERATED)
        if kept is None:
            with write_errors(team.work.path):
                team.work.journal.keep(0)
    return _of_the_first(team, kept) if team.said(kept is not None) else None


def own_text(job: Job, team: Team, told: Progress) -> Windows:
    """Text that the model writes for itself, kept so that a run that goes on sees the same; see `generate_text`."""
    assert job.calibration is not None
    if team.work is None:
        return _of_the_first(team, None)
    options = {"trust_remote_code": True} if job.trust_remote_code else {}
    model, tokenizer = load(job.source.folder, dtype="auto", **options)
    windows = generate_text(
        job.calibration,
        model,
        tokenizer,
        seed=job.recipe.seed,
        device=job.device,
        on_tokens=lambda done, total: told.phase(f"generating text: {done:,} of {total:,} tokens"),
    )
    del model
    release(job.device)
    team.work.keep(GENERATED, lambda path: write_windows(windows, path))
    return _of_the_first(team, windows)


def _of_the_first(team: Team, windows: Windows | None) -> Windows:
    """The windows that the first rank has, on all of them."""
    fields = {} if windows is None else {"ids": windows.ids, "target_ids": windows.target_ids}
    found = team.heard({name: ids for name, ids in fields.items() if ids is not None})
    return Windows(found["ids"], found.get("target_ids"))


def allocated_plan(job: Job, windows: Sample | None, team: Team, told: Progress) -> Plan:
    """The plan to carry out: the job's, or with --allocate error one with sizes by error, which the first rank finds.

    What was decided is kept for a run that goes on with this one; see `WorkFolder.decided`.
    """
    if job.recipe.allocate != "error":
        return job.plan
    assert windows is not None, "--allocate error is refused without text"

    def read(path: Path) -> dict[str, dict[str, float]]:
        return dict(read_json(path)["layers"])

    def decide() -> dict[str, dict[str, float]]:
        decided = allocate_by_error(job, hold_out(windows)[0], told.phase)
        told.tell(_sentence(decided))
        return decided.layers

    layers = None
    if team.work is not None:
        layers = team.work.decided(ALLOCATION, read, decide, lambda found, path: write_json(path, {"layers": found}))
    recipe = job.recipe.with_overrides(team.said(layers))
    return make_plan([p.layer for p in job.plan.layers], job.plan.skipped, recipe, calibrated=True)


def _sentence(decided: Allocation) -> str:
    shares = sorted(max(fields.get("keep", 0), fields.get("keep_parameters", 0)) for fields in decided.layers.values())
    if not shares:
        return "The uniform plan stays: sizes by error gave no smaller divergence from the dense model."
    checked = "not checked, since the model does not fit in memory whole"
    if decided.gain is not None:
        checked = f"{decided.gain:.0%} of the uniform plan's divergence from the dense model, solved coarsely"
    return f"Sizes by error: {shares[0]:.0%} to {shares[-1]:.0%} of a layer; {checked}."
