"""How much of S is left at each step: the cubic schedule of Zhu and Gupta (arXiv 1710.01878), as LoSparse uses it."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError


@dataclass(frozen=True)
class CubicSchedule:
    """Share of S kept at optimizer step t, 1 <= t <= total; UsageError if the phases do not fit.

    share: at last; start: at first. Until `initial_warmup` nothing is pruned; in the last `final_warmup` steps the
    share stays, and masks are renewed at every step; between, every `every` steps.
    """

    share: float
    total: int
    initial_warmup: int
    final_warmup: int
    every: int = 10
    start: float = 1.0

    def __post_init__(self) -> None:
        if self.share > self.start:
            raise UsageError(
                f"{self.share:.1%} of S is asked for, and it holds {self.start:.1%} now: training can only prune. Ask "
                "for less with --sparsity or --keep-parameters."
            )
        if min(self.initial_warmup, self.final_warmup) < 0 or self.every < 1 or self.total < 1:
            raise UsageError(
                "--initial-warmup-steps and --final-warmup-steps are whole numbers >= 0, --prune-every one >= 1."
            )
        if self.initial_warmup + self.final_warmup >= self.total:
            raise UsageError(
                f"Of {self.total} steps, {self.initial_warmup} and {self.final_warmup} are to be before and after "
                "pruning, which leaves none for it. Lower --initial-warmup-steps or --final-warmup-steps, or train "
                "longer."
            )

    def remaining(self, step: int) -> float:
        """Share of S that `step` leaves."""
        if step <= self.initial_warmup:
            return self.start
        pruning = self.total - self.initial_warmup - self.final_warmup
        left = max(0.0, 1 - (step - self.initial_warmup) / pruning)
        return self.share + (self.start - self.share) * left**3

    def is_final(self, step: int) -> bool:
        """Whether the share has reached its last value."""
        return step >= self.total - self.final_warmup

    def renews(self, step: int) -> bool:
        """Whether masks are chosen anew after `step`."""
        return step > self.initial_warmup and (self.is_final(step) or step % self.every == 0)
