"""What a run will do and need, and what it has done: the plan before, the summary after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ..budget.quality import doubt_of_bits, doubt_of_share
from .columns import Column, show_columns
from .console import Console, clean, short, size
from .places import places

if TYPE_CHECKING:
    from ..budget.plan import LayerPlan
    from ..checkpoint.report import Report
    from ..compress import Result
    from ..compression.estimate import Estimate, Forecast
    from ..compression.parts import Part
    from ..compression.plan import Job
    from ..finetune import Finetuned
    from ..join import Joined
    from ..refinement.forecast import RefinementForecast
    from ..refinement.run import RefinedModel


def show_plan(out: Console, found: Forecast, ranks: int = 1) -> None:
    """What a run would do and need (--dry-run); ranks: processes that were started for it."""
    out.data(found.to_dict() | ({"ranks": ranks} if ranks > 1 else {}))
    out.flush()
    job, plan, need = found.job, found.made.plan, found.need
    targeted = sum(p.layer.weights for p in plan.layers)
    kinds: dict[tuple[Any, ...], list[LayerPlan]] = {}
    for p, place in zip(plan.layers, places([p.layer.name for p in plan.layers]), strict=True):
        zeros = f", {1 - p.nnz / p.layer.weights:.0%} zeros" if p.bits and p.sparse else ""
        entries = f"{p.bits:.4g} bits{zeros}" if p.bits else f"{p.nnz:,}"
        kinds.setdefault((place.kind, p.layer.shape, p.rank, entries), []).append(p)
    columns = [
        Column("shape", [f"{shape[0]} x {shape[1]}" for _, shape, _, _ in kinds]),
        Column("rank", [str(rank) for _, _, rank, _ in kinds]),
        Column("S" if job.recipe.coded else "nnz", [entries for _, _, _, entries in kinds], goes=1),
        Column("before", [size(sum(p.layer.dense_bytes for p in members)) for members in kinds.values()], goes=2),
        Column("about", [size(sum(p.expected_bytes for p in members)) for members in kinds.values()]),
        Column("at most", [size(sum(p.bound_bytes for p in members)) for members in kinds.values()]),
    ]
    if job.recipe.coded:  # a layer may take more than its share, and another less
        columns.pop()
    show_columns(out, "layers", [f"{len(members)} x {name}" for (name, *_), members in kinds.items()], columns)
    out.show(f"Layers   {len(plan.layers)} compressed, {len(plan.skipped)} left dense")
    share = targeted / job.parameters
    about, most = size(plan.expected_bytes), size(plan.bound_bytes)
    if job.recipe.coded:
        rows = [p.bits for p in plan.layers if p.layer.rows]
        beside = f"; embeddings and heads {min(rows):g}" if 0 < len(rows) < len(plan.layers) else ""
        out.show(
            f"Share    {share:.1%} of all parameters are targeted, with {plan.bits:.4g} bits each on average{beside}"
        )
        out.show(f"Result   at most {about} of {size(plan.dense_bytes)} in those layers, and hardly less")
    else:
        out.show(f"Share    {share:.1%} of all parameters are targeted; {plan.kept_parameters:.1%} of those are kept")
        out.show(f"Result   {about} of {size(plan.dense_bytes)} in those layers, at most {most}")
    before = f", {size(found.space)} until it is trained" if job.towards is not None else ""
    out.show(f"Disk     at most {size(found.disk_bytes)} in {short(job.output)}{before}; {size(found.free_bytes)} free")
    if not job.source.files:
        out.show(f"Download {size(job.source.nbytes)} from the Hub, kept in its cache")
    if job.calibration is not None:
        out.show(f"Text     {_text(job)}")
    _show_need(out, need)
    _show_ranks(out, need, ranks)
    if job.recipe.allocate == "error":
        out.show("Sizes    --allocate error measures them at the start of the run; the table shows the uniform plan")
    if found.finished:
        out.show("This very run has finished before: there is nothing to do.")
    out.show("Nothing was written.")
    for sentence in found.warnings:
        out.warn(sentence)


def show_refinement_plan(out: Console, found: RefinementForecast, ranks: int = 1) -> None:
    """What a refinement would do and need (--dry-run)."""
    out.data(found.to_dict())
    out.flush()
    job, how = found.job, found.job.towards
    assert job.start is not None
    layers = sum(not p.layer.rows for p in job.plan.layers)
    what = f"each of {len(job.blocks)} blocks, {layers} layers" if how is None else f"the whole model, {layers} layers"
    out.show(f"Matches  {what}, to {escape(clean(job.source.address, 200))}")
    if how is not None:
        bounds = [f"{how.steps:,} steps"] if how.steps is not None else []
        bounds += [f"{minutes(how.seconds)} at most" if bounds else minutes(how.seconds)] if how.seconds else []
        out.show(f"Trains   {', '.join(how.train)}, for {', '.join(bounds)}")
    elif job.refinement is not None:
        out.show(f"Trains   layers and norms, {job.refinement.steps:,} steps for each block")
    out.show(f"Disk     about {size(found.disk_bytes)} in {short(job.output)}; {size(found.free_bytes)} free")
    if not job.source.files:
        out.show(f"Download {size(job.source.nbytes)} from the Hub, kept in its cache")
    out.show(f"Text     {_text(job)}")
    _show_need(out, found.need)
    _show_ranks(out, found.need, ranks)
    if found.finished:
        out.show("This very run has finished before: there is nothing to do.")
    out.show("Nothing was written.")
    for sentence in found.warnings:
        out.warn(sentence)


def _show_ranks(out: Console, need: Estimate, ranks: int) -> None:
    """What each of several processes takes, and all of them; what they do not share takes as long as ever."""
    if ranks > 1:
        each = size(max(need.fixed_bytes + need.activation_bytes // ranks, need.training_bytes))
        least = need.timed_seconds + (need.seconds - need.timed_seconds) / ranks
        out.show(f"Ranks    {ranks}, each about {each} at the peak; at best {minutes(least)} together")


def _show_need(out: Console, need: Estimate) -> None:
    """Memory and time."""
    streamed = need.activation_bytes and need.peak_bytes == need.fixed_bytes + need.activation_bytes
    held = f", {size(need.activation_bytes)} of it activations, which can lie in files" if streamed else ""
    out.show(f"Memory   about {size(need.peak_bytes)} at the peak{held}")
    if need.training_bytes:
        other = f"{size(need.otherwise_bytes)} while it is trained"
        out.show(
            f"         blocks run again on the way back, else {other}"
            if need.recomputes
            else f"         with gradient checkpointing {other}, in place of {size(need.training_bytes)}"
        )
    busy = "; other work runs on it now, so this is uncertain" if need.busy else ""
    out.show(f"Time     {_time(need)} on this machine{busy}")


def _text(job: Job) -> str:
    """What a calibrated job reads, in words."""
    from ..checkpoint.report import text_used
    from ..text.documents import SELF
    from ..text.sample import account

    assert job.calibration is not None
    if job.windows is None:
        own = job.calibration.source == SELF
        whose = "that the model writes itself" if own else f"of {escape(clean(job.calibration.source, 200))}"
        return f"about {job.calibration.tokens:,} tokens {whose}"
    return escape(text_used(account(job.calibration, job.windows)))


def _time(need: Estimate) -> str:
    """About how long, or from how long to how long."""
    short, long = (minutes(seconds) for seconds in (need.least_seconds, need.most_seconds))
    return f"{short} to {long}" if need.busy and short != long else f"about {minutes(need.seconds)}"


def minutes(seconds: float) -> str:
    """0.4 s, 30 s, 12 min, 2.5 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def show_result(out: Console, result: Result) -> None:
    """The summary after a run."""
    from ..checkpoint.report import text_used

    report = result.report
    out.data(
        {"output": str(result.output), "seconds": result.seconds, "resumed_units": result.resumed}
        | _refinement(report)
        | report.totals()
    )
    _show_sizes(out, report, "before", "after")
    took = f", {result.seconds:.1f} s" if result.seconds else ""  # else it was found finished
    out.show(f"{len(report.layers)} layers, {report.targeted_share:.1%} of all parameters{_error(report)}{took}")
    if result.took.predicted is not None and not result.resumed:
        need = result.took.predicted
        out.show(
            f"Predicted {minutes(need.seconds)} and {size(need.peak_bytes)}, took {minutes(result.seconds)} and "
            f"{size(result.took.peak_bytes)} of memory"
        )
    if report.calibration:
        out.show(f"Text: {escape(text_used(report.calibration))}")
    if (matched := report.matching) is not None and matched.before:
        out.show(f"Matching: {matched.change:+.0%} of the blocks' distance from the dense ones, {matched.where}")
    _show_refinement(out, report)
    where = short(result.output)
    out.show(f"[bold green]Done.[/] The result is in {where}. To load it:")
    _show_loading(out, where)
    if not result.seconds:
        out.say("This very run had finished before: nothing was left to do.")
    if starved := report.starved:
        out.warn(
            f"{len(starved)} of {len(report.layers)} layers were solved with fewer tokens than they have inputs, the "
            f"first {starved[0].name} with {starved[0].tokens:,}: experts see what is sent to them alone. Raise "
            "--calibration-tokens."
        )
    if report.targeted_share < 0.5 and not report.recipe.get("targets"):
        out.warn(
            f"only {report.targeted_share:.0%} of the parameters lie in layers that can be compressed; the rest "
            "(embeddings, heads, fused experts) stays as it is. `losparse inspect` on the dense model lists why."
        )
    calibrated = bool(report.calibration)
    doubt = (
        doubt_of_bits(report.bits, calibrated=calibrated, grid=report.recipe.get("grid"))
        if report.coded
        else doubt_of_share(report.kept_parameters, calibrated=calibrated)
    )
    if doubt:
        out.warn(doubt)
    if result.needs_package:
        out.warn("the model brings its own AutoConfig, so this checkpoint loads only where losparse is installed.")


def show_part(out: Console, result: Result, part: Part) -> None:
    """The summary after a part of a run."""
    out.data(
        {"output": str(result.output), "part": str(part), "seconds": result.seconds, "resumed_units": result.resumed}
        | result.report.totals()
    )
    took = f", {result.seconds:.1f} s" if result.seconds else ""
    report = result.report
    out.show(f"{len(report.layers)} layers, {size(report.bytes_before)} to {size(report.bytes_after)}{took}")
    where = short(result.output)
    out.show(f"[bold green]Done.[/] Part {part} is in {where}. When all parts are there, wherever they were made:")
    out.show("  losparse join FOLDER-OF-EACH-PART... -o RESULT", whole=True)
    if not result.seconds:
        out.say("This very part had finished before: nothing was left to do.")


def show_joined(out: Console, result: Joined) -> None:
    """The summary after a joining."""
    out.data({"output": str(result.output), "parts": result.parts, "seconds": result.seconds} | result.report.totals())
    _show_sizes(out, result.report, "before", "after")
    where = short(result.output)
    out.show(f"{result.parts} parts, {len(result.report.layers)} layers{_error(result.report)}")
    out.show(f"[bold green]Done.[/] The result is in {where}. To load it:")
    _show_loading(out, where)
    if not result.seconds:
        out.say("This very run had finished before: nothing was left to do.")


def _error(report: Report) -> str:
    """The error that says most about a result, in words; "" if none was measured."""
    from ..checkpoint.report import error_of, telling_error

    measure = telling_error(report.layers)
    error = error_of(report.layers, measure)
    if error is None:
        return ""
    if measure == "relative_error":
        return f", relative Frobenius error {error:.3f}"
    if measure == "held_out_error":
        return f", mean relative output error {error:.3f} on held-out text"
    return f", mean relative output error {error:.3f} on the very text it was solved with"


def show_finetuned(out: Console, result: Finetuned) -> None:
    """The summary after a training."""
    report = result.report
    out.data(
        {"output": str(result.output), "seconds": result.seconds, "steps": result.steps, "scores": result.scores}
        | report.totals()
    )
    _show_sizes(out, report, "dense", "trained")
    if result.scores:
        scores = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        scores.add_column("score, as stored")
        scores.add_column("", justify="right")
        for name, value in result.scores.items():
            scores.add_row(name, f"{value:.4f}")
        out.table(scores)
    where = short(result.output)
    took = f" in {minutes(result.seconds)}" if result.seconds else ""
    out.show(f"[bold green]Done[/]{took}. The result is in {where}. To load it:")
    _show_loading(out, where)


def show_refined(out: Console, result: RefinedModel) -> None:
    """The summary after a training towards the whole dense model."""
    out.data(
        {"output": str(result.output), "seconds": result.seconds} | _refinement(result.report) | result.report.totals()
    )
    _show_sizes(out, result.report, "dense", "refined")
    _show_refinement(out, result.report)
    where = short(result.output)
    done = [f"in {minutes(result.seconds)}"] if result.seconds else []
    done.append(f"{result.steps} step{'s' * (result.steps != 1)} of {result.tokens // max(1, result.steps):,} tokens")
    out.show(f"[bold green]Done[/] {', '.join(done)}. The result is in {where}. To load it:")
    _show_loading(out, where)
    if not result.seconds:
        out.say("This very run had finished before: nothing was left to do.")


def _refinement(report: Report) -> dict[str, Any]:
    """What training towards the whole dense model did, in numbers; {} without any, and where blocks followed it: that
    was a run before this one."""
    if not report.refinement or report.refinement.get("followed_by"):
        return {}
    names = ("steps", "tokens", "held_out", "divergence_before", "divergence_after")
    return {name: report.refinement[name] for name in names}


def _show_refinement(out: Console, report: Report) -> None:
    """The same in words."""
    if not _refinement(report) or (found := report.divergence) is None:
        return
    change = f", {found.change:+.0%}" if found.before else ""
    out.show(
        f"From the dense model, {found.where}: {found.before:.4f} nats a token before, {found.after:.4f} after{change}"
    )
    if found.before == found.after and report.refinement["steps"]:
        out.warn("training brought it no nearer, so it is as it was. Try a lower --refine-lr, or more text.")


def _show_sizes(out: Console, report: Report, before: str, after: str) -> None:
    """Bytes and parameters of the layers and of the model; `before` and `after` head their columns."""
    table = Table(box=None, show_header=True, pad_edge=False)
    for column in ("", before, after, "share"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("compressed layers", size(report.bytes_before), size(report.bytes_after), _share(report))
    table.add_row("whole model", size(report.model_bytes_before), size(report.model_bytes_after),
                  f"{report.model_bytes_after / max(1, report.model_bytes_before):.1%}")  # fmt: skip
    if report.coded:
        dense = 8 * report.bytes_before / max(1, report.targeted_parameters)
        for what, bits in (("layers", report.bits), ("embeddings, heads", report.embedding_bits)):
            if bits is not None:
                table.add_row(f"bits a weight of {what}", f"{dense:g}", f"{bits:.3f}", f"{bits / dense:.1%}")
        table.add_row("zeros in S of layers", "", f"{report.zeros:.1%}", "")
    else:
        table.add_row("parameters kept", f"{report.targeted_parameters:,}", f"{sum(x.kept for x in report.layers):,}",
                      f"{report.kept_parameters:.1%}")  # fmt: skip
    out.table(table)


def _show_loading(out: Console, where: str) -> None:
    """The lines that load a result."""
    out.show(f'  import losparse_cli\n  model, tokenizer = losparse_cli.load("{where}")')


def _share(report: Report) -> str:
    return f"{report.bytes_after / report.bytes_before:.1%}" if report.bytes_before else "-"
