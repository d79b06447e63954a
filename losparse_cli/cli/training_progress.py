"""What a person sees while a model trains."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich import progress as rich
from rich.markup import escape

from ..progress import Progress
from .bars import bars
from .console import Console, is_told

if TYPE_CHECKING:
    from ..finetuning.prepare import Training
    from ..finetuning.trainer import Step


class TrainingProgress(Progress):
    """One bar of steps with loss, share of S and score; a plain line every tenth where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: rich.Progress | None = None
        self._task = rich.TaskID(0)
        self._main, self._smooth = "", 0.0
        self._rows = self._scored = 0
        if console.err.is_terminal and not console.quiet:
            self._bars = bars(console.err)

    def introduce(self, training: Training) -> None:
        """What is going to happen, in a few lines."""
        self._main = training.task.main_score
        plan, say = training.plan, self._console.say
        weights = sum(p.layer.shape[0] * p.layer.shape[1] for p in plan.layers)
        kept = sum(p.parameters for p in plan.layers)
        low_rank = sum(p.rank * sum(p.layer.shape) for p in plan.layers)
        pattern = plan.layers[0].pattern
        say(f"Data     {len(training.features):,} examples" + (
            f", {len(training.unseen):,} to score on" if training.unseen is not None else ""
        ))  # fmt: skip
        say(
            f"Layers   {len(plan.layers)}, of which {kept / weights:.1%} is kept: {low_rank / weights:.1%} in U and V, "
            f"{(kept - low_rank) / weights:.1%} in S ({pattern})"
        )
        schedule = training.pruner.schedule
        if schedule is not None:
            last = schedule.total - schedule.final_warmup
            say(f"Pruning  from step {schedule.initial_warmup} to {last} of {schedule.total}")

    def phase(self, text: str) -> None:
        if self._bars is not None and self._bars.live.is_started:
            self._bars.update(self._task, note=text)
        else:
            self._console.say(f"[dim]{escape(text)}[/]")

    def warn(self, sentence: str) -> None:
        self._console.warn(sentence)

    def step(self, step: Step) -> None:
        self._smooth = step.loss if not self._smooth else 0.9 * self._smooth + 0.1 * step.loss
        score = step.scores.get(self._main)
        note = f"loss {self._smooth:.3f}  S {step.remaining:.1%}" + (
            "" if score is None else f"  {self._main} {score:.4g}"
        )
        if self._bars is not None:
            if not self._bars.live.is_started:
                self._bars.start()
                self._task = self._bars.add_task("Training", total=step.total, completed=step.step, note=note)
            self._bars.update(self._task, completed=step.step, note=note)
        elif is_told(step.step, step.total):
            self._console.say(f"step {step.step}/{step.total}  {note}")

    def start(self, unit: str, total: int, done: int = 0) -> None:
        self._rows, self._scored = total, done

    def advance(self, unit: str, count: int = 1, name: str = "") -> None:
        self._scored += count
        if self._bars is not None and self._bars.live.is_started:
            self._bars.update(self._task, note=f"scoring {self._scored:,} of {self._rows:,}")

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bars is not None and self._bars.live.is_started:
            self._bars.stop()
