"""Importance-driven pruning of S while the model trains (LoSparse, Li et al., ICML 2023, section 3.2).

The importance of an entry is |w ∂L/∂w|, that of a neuron the mean over its entries. It is averaged over the steps of
a window, and windows are smoothed exponentially. The least important neurons of the whole model are set to zero; until
the last phase gradients still reach them, so that they can come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from ..linalg.patterns import largest
from .layers import TrainedLinear
from .schedule import CubicSchedule

IMPORTANCE = ("sensitivity", "movement", "magnitude")
THRESHOLDS = ("global", "layer")


@dataclass(frozen=True)
class Pruning:
    """How S is pruned; UsageError for a value that is none.

    importance: sensitivity is |w ∂L/∂w|; movement is −w ∂L/∂w (Sanh et al., arXiv 2005.07683), which is large for
    weights that move away from zero; magnitude is |w|. beta: of the exponential smoothing. threshold: one for all S of
    the model, or one for each layer. every: optimizer steps between two choices of masks. initial_warmup, final_warmup:
    steps before and after pruning, None for a tenth and a third of all.
    """

    importance: str = "sensitivity"
    threshold: str = "global"
    beta: float = 0.85
    every: int = 10
    initial_warmup: int | None = None
    final_warmup: int | None = None

    def __post_init__(self) -> None:
        if self.importance not in IMPORTANCE:
            raise UsageError(f"--importance is one of {', '.join(IMPORTANCE)}, not {self.importance!r}.")
        if self.threshold not in THRESHOLDS:
            raise UsageError(f"--threshold is global or layer, not {self.threshold!r}.")
        if not 0 <= self.beta < 1:
            raise UsageError(f"--beta is a number >= 0 and below 1, not {self.beta}; 0.85 is the paper's.")

    def schedule(self, start: float, share: float, total: int) -> CubicSchedule:
        """From `start` to `share` of S in `total` steps; UsageError if the phases do not fit."""
        before = total // 10 if self.initial_warmup is None else self.initial_warmup
        after = total // 3 if self.final_warmup is None else self.final_warmup
        return CubicSchedule(share, total, before, after, self.every, start)


class Pruner:
    """Chooses which units of S live; its state lies in the layers' buffers.

    layers: some of the model. sizes: entries of S that each may keep at last: their sum is the budget of one global
    threshold, and each is that of its layer otherwise. total: optimizer steps. UsageError as of CubicSchedule.
    """

    def __init__(self, layers: Sequence[TrainedLinear], sizes: Sequence[int], pruning: Pruning, total: int) -> None:
        pairs = [(layer, size) for layer, size in zip(layers, sizes, strict=True) if layer.S is not None]
        self.layers = [layer for layer, _ in pairs]
        self.sizes = [size for _, size in pairs]
        self.pruning = pruning
        self._full = [len(layer.kept) * layer.unit_size for layer in self.layers]
        self._dense = max(1, sum(layer.shape[0] * layer.shape[1] for layer in self.layers))
        start, share = sum(self._full) / self._dense, sum(self.sizes) / self._dense
        # Where S has its final size already, nothing is pruned.
        self.schedule = None if start == share else pruning.schedule(start, share, total)

    @torch.no_grad()
    def watch(self) -> None:
        """Add the importance that the gradients now in place speak of; before the optimizer's step.

        Gradients that are not finite add nothing: in float16 the optimizer skips such a step.
        """
        layers = [layer for layer in self.layers if layer.S is not None and layer.S.grad is not None]
        if self.schedule is None or not layers:
            return
        values = [layer.S.detach() for layer in layers]  # type: ignore[union-attr]
        if self.pruning.importance == "magnitude":
            scores = torch._foreach_abs(values)
        else:
            scores = torch._foreach_mul(values, [layer.S.grad for layer in layers])  # type: ignore[union-attr,misc]
            if self.pruning.importance == "sensitivity":
                torch._foreach_abs_(scores)
            else:
                torch._foreach_neg_(scores)
        means = [layer.mean_of_units(_whole(score)) for layer, score in zip(layers, scores, strict=True)]
        if not bool(torch.stack([mean.sum() for mean in means]).isfinite().all()):
            return
        torch._foreach_add_([layer.window for layer in layers], means)
        torch._foreach_add_([layer.steps for layer in layers], 1)

    @torch.no_grad()
    def prune(self, step: int) -> None:
        """Choose masks if it is time, and set to zero what they prune; after optimizer step `step`, counted from 1."""
        if self.schedule is None or not self.schedule.renews(step):
            return
        for layer in self.layers:
            # Without a step between, as where a run goes on, there is nothing to add.
            mean = layer.window / layer.steps.clamp_min(1)
            layer.smoothed.lerp_(mean, (1 - self.pruning.beta) * layer.steps.clamp_max(1).float())
            layer.window.zero_()
            layer.steps.zero_()
        share = self.schedule.remaining(step)
        if self.pruning.threshold == "layer":
            self._choose_by_layer(share)
        else:
            self._choose_globally(share)
        values = [layer.S.detach() for layer in self.layers]  # type: ignore[union-attr]
        masks = [layer.mask() for layer in self.layers]
        torch._foreach_mul_(values, [_like(mask, value) for mask, value in zip(masks, values, strict=True)])

    def _choose_globally(self, share: float) -> None:
        """The most important units of all layers together, as many as `share` of the dense entries pays for."""
        scores = torch.cat([layer.smoothed for layer in self.layers])
        counts, budget = [len(layer.kept) for layer in self.layers], round(share * self._dense)
        if all(layer.unit_size == 1 for layer in self.layers):  # sorting millions of entries would take seconds
            kept = largest(scores - scores.min(), min(budget, len(scores)))
        else:
            each = torch.tensor([layer.unit_size for layer in self.layers])
            sizes = torch.repeat_interleave(each, torch.tensor(counts)).to(scores.device)
            order = torch.argsort(scores, descending=True, stable=True)
            kept = torch.zeros_like(scores, dtype=torch.bool)
            kept[order[torch.cumsum(sizes[order], 0) <= budget]] = True
        for layer, part in zip(self.layers, torch.split(kept, counts), strict=True):
            layer.kept.copy_(part)

    def _choose_by_layer(self, share: float) -> None:
        """The most important units of each layer; all layers are equally far on their way to their sizes."""
        assert self.schedule is not None, "something is to be pruned"
        left = (share - self.schedule.share) / (self.schedule.start - self.schedule.share)
        for layer, size, full in zip(self.layers, self.sizes, self._full, strict=True):
            count = round((size + left * (full - size)) / layer.unit_size)
            layer.kept.zero_()
            layer.kept[torch.argsort(layer.smoothed, descending=True, stable=True)[:count]] = True

    def remaining(self) -> float:
        """Entries of S that the masks leave, over the entries of the weights."""
        if not self.layers:
            return 0.0
        kept = torch.stack([layer.kept.sum() * layer.unit_size for layer in self.layers])
        return float(kept.sum()) / self._dense


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP keeps in parts."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _like(mask: Tensor, value: Tensor) -> Tensor:
    """`mask` in the parts that FSDP keeps `value` in."""
    if not hasattr(value, "full_tensor"):
        return mask
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(mask.expand(value.shape).contiguous(), value.device_mesh, value.placements)  # type: ignore[attr-defined]
