"""A compressed model trained towards its dense one: what moves, the steps, the best state, and where a run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..compression.request import ModelRefinement
from ..errors import CheckpointError, UsageError, write_whole
from ..models.head import Head
from ..parallel.group import Alone, Ranks, said_once
from ..parallel.shares import share
from ..parallel.sums import add_for_all, sum_for_all
from ..parallel.tree import TreeSum
from ..progress import Progress, listener
from ..text.windows import Windows
from .divergence import divergence
from .teacher import Teacher

WARMUP = 0.05  # of the run, in which the learning rate rises
LOOKS = 8  # times that the model is measured on held-out windows while it is trained
SMALLEST = 0.1  # of a vector's typical entry: what an entry of less is trained as


@dataclass
class Moving:
    """A parameter that is trained: p = start + scale · s, with s from zero, so that one learning rate suits all.

    kept: the dtype in which it is stored.
    """

    parameter: nn.Parameter
    kept: torch.dtype
    start: Tensor
    scale: Tensor
    s: Tensor

    @classmethod
    def of(cls, parameter: nn.Parameter, kept: torch.dtype) -> Moving:
        start = parameter.detach().clone()
        typical = start.square().mean().sqrt()
        scale = start.abs().clamp_min(SMALLEST * typical) if start.dim() == 1 else typical.expand_as(start)
        parameter.requires_grad_()
        return cls(parameter, kept, start, scale, torch.zeros_like(start))

    def exact(self) -> Tensor:
        return self.start + self.scale * self.s

    def value(self) -> Tensor:
        """What is stored now."""
        return self.exact().to(self.kept)


@dataclass(frozen=True)
class Look:
    """The model on held-out windows: nats a token from the dense model, after so many steps and seconds."""

    step: int
    seconds: float
    divergence: float


@dataclass(frozen=True)
class Refined:
    """values: name -> what is to be stored. looks: the first is before any step. best: the one of `values`."""

    values: dict[str, Tensor]
    looks: tuple[Look, ...]
    best: Look
    steps: int
    tokens: int


class Training:
    """One model, its teacher and its text. moving: name -> what is trained; `model` computes with it.

    batch: windows of a pass. dtype: that passes through the model compute in; loss, and what is trained, are float32.
    group: ranks that share the passes of a step, and of a look at held-out windows; each holds all of the model and
    takes the same steps.
    """

    def __init__(
        self,
        model: Any,
        teacher: Teacher,
        windows: Windows,
        held_out: Sequence[int],
        moving: dict[str, Moving],
        how: ModelRefinement,
        *,
        batch: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device,
        told: Progress | None = None,
        group: Ranks | None = None,
    ) -> None:
        self.model, self.teacher, self.windows, self.moving, self.how = model, teacher, windows, moving, how
        self._device, self._batch, self._told = device, batch, listener(told)
        self._group, self._dtype = group or Alone(), dtype
        self._unseen = list(held_out)
        self._seen = [k for k in range(len(windows.ids)) if k not in set(held_out)]
        with self._within():
            self._head = Head(model, self._inputs(self._seen[:1]))
        if self._head.module is None:
            raise UsageError(f"{type(model).__name__} has no head over a vocabulary that could be called apart.")
        self._optimizer = torch.optim.Adam([one.s for one in moving.values()], lr=how.lr, betas=(0.9, 0.95))
        self._step, self._before, self._looks = 0, 0.0, list[Look]()
        self._best: dict[str, Tensor] = {}
        self._length = teacher.states.shape[1]  # tokens that are predicted in a window
        self._each = how.windows(self._length)  # windows of a step

    # --- the run --------------------------------------------------------------------------------------

    def run(self, state: Path | None = None) -> Refined:
        """Train until steps or time are up, which is for the first rank to say. state: of that rank, the file to go on
        from, and to save to whenever the model was looked at.

        It ends early where the loss stops being a number. CheckpointError if it never was one.
        """
        self._resume(state)
        self._begun = time.monotonic() - self._before
        if not self._looks:
            self._look(state)
        self._told.phase("the first step")
        last, percent = 0.0, int(100 * self._progress(0))
        self._told.start("percent", 100, percent)
        while (progress := self._progress(last)) < 1:
            begun = time.monotonic()
            lost = self._one(progress)
            if not math.isfinite(lost):
                self._told.warn(
                    f"The loss became {lost} at step {self._step + 1}, where training ends; the best state before is "
                    f"kept. A lower --refine-lr than {self.how.lr:g} may go further."
                )
                break
            last = time.monotonic() - begun
            self._told.phase(f"step {self._step}, {lost:.3f} nats from the dense model")
            done = self._progress(last)
            self._told.advance("percent", int(100 * done) - percent)
            percent = int(100 * done)
            if done * LOOKS >= len(self._looks):
                self._look(state)
        else:
            if self._step == 0:
                self._told.warn("There was no time for a single step, so nothing was trained. Raise --refine-minutes.")
        if self._looks[-1].step < self._step:
            self._look(state)
        best = min(self._looks, key=lambda look: look.divergence)
        return Refined(self._best, tuple(self._looks), best, self._step, self._step * self._each * self._length)

    def _progress(self, last: float) -> float:
        """How much of the run is done, 0 to 1; 1 where another step as long as the last would be one too many."""
        found = 0.0
        if self.how.steps is not None:
            found = self._step / self.how.steps
        if self.how.seconds is not None:
            elapsed = time.monotonic() - self._begun
            found = max(found, 1.0 if elapsed + last > self.how.seconds else elapsed / self.how.seconds)
        return float(self._group.agree(found)[0])

    def _one(self, progress: float) -> float:
        """A step of Adam; the mean of the loss over its tokens. Nothing moves where that is no number."""
        rate = self.how.lr * min(1.0, (progress + 1e-3) / WARMUP) * 0.5 * (1 + math.cos(math.pi * progress))
        chosen = self._chosen(self._step)
        tokens = len(chosen) * self._length
        leaves = self._leaves(chosen)
        sums, lost = TreeSum(min(leaves, default=0)), list[float]()
        for number, part in leaves.items():
            value, gradient = self._gradient(part, tokens)
            lost.append(value)
            sums.add(number, gradient)
        total = add_for_all(self._group, lost)
        if not math.isfinite(total):
            return total
        whole = sum_for_all(self._group, sums)
        moving = list(self.moving.values())
        for one, gradient in zip(moving, torch.split(whole, [one.s.numel() for one in moving]), strict=True):
            one.s.grad = gradient.view_as(one.s) * one.scale
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._set(Moving.exact)
        self._step += 1
        return total / tokens

    def _leaves(self, numbers: Sequence[int]) -> dict[int, list[int]]:
        """Number of each pass over some windows that is for this rank, and its windows."""
        parts = list(_parts(numbers, self._batch))
        return {number: parts[number] for number in share(len(parts), self._group.rank, self._group.size)}

    def _gradient(self, part: list[int], tokens: int) -> tuple[float, Tensor]:
        """The loss summed over the windows of a pass, and the gradient of its share in a mean over `tokens`, in one
        vector."""
        for one in self.moving.values():
            one.parameter.grad = None
        with torch.enable_grad():
            states = self._states(part)
        lost, slope = divergence(self._head, states, self._goals(part), self.teacher, gradients=True)
        torch.autograd.backward([states], [slope / tokens])
        found = ((one.parameter, one.parameter.grad) for one in self.moving.values())
        return lost, torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in found])

    def _chosen(self, step: int) -> list[int]:
        """The windows of a step: all of them in an order of each round's own."""
        found: list[int] = []
        for place in range(step * self._each, (step + 1) * self._each):
            epoch, number = divmod(place, len(self._seen))
            order = torch.randperm(len(self._seen), generator=torch.Generator().manual_seed(self.how.seed + epoch))
            found.append(self._seen[int(order[number])])
        return found

    def _inputs(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        return self.windows.take(numbers).batches(len(numbers), self._device)[0]

    def _within(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)

    def _states(self, numbers: Sequence[int]) -> Tensor:
        """What the head is fed for these windows, float32."""
        with self._within():
            return self._head.states(self._inputs(numbers)).float()

    def _goals(self, numbers: Sequence[int]) -> Tensor:
        return self.teacher.states[torch.tensor(numbers)].to(self._device)

    @torch.no_grad()
    def _set(self, value: Callable[[Moving], Tensor]) -> None:
        for one in self.moving.values():
            one.parameter.copy_(value(one))

    # --- looks, and states ----------------------------------------------------------------------------

    def _look(self, state: Path | None) -> None:
        """Measure what would be stored now, and keep it if it is the best."""
        self._set(Moving.value)
        measured = self._measure()
        if not math.isfinite(measured):
            if not self._looks:
                error = CheckpointError("The compressed model gives no numbers on its text, so it cannot be trained.")
                raise said_once(self._group, error)
            measured = math.inf
        when = f"After {self._step} step{'s' * (self._step > 1)}" if self._step else "At first"
        where = "held-out text" if self._unseen else "the text that it is trained on"
        self._told.tell(f"{when}: {measured:.4f} nats a token from the dense model on {where}")
        self._looks.append(Look(self._step, time.monotonic() - self._begun, measured))
        if measured <= min(look.divergence for look in self._looks):
            self._best = {name: one.value().clone() for name, one in self.moving.items()}
        self._set(Moving.exact)
        if state is not None:
            self._save(state)

    @torch.no_grad()
    def _measure(self) -> float:
        numbers = self._unseen or self._seen[: max(1, len(self._seen) // 20)]
        lost = []
        for part in self._leaves(numbers).values():
            states = self._states(part)
            lost.append(divergence(self._head, states, self._goals(part), self.teacher, gradients=False)[0])
        return add_for_all(self._group, lost) / (len(numbers) * self._length)

    def _save(self, path: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for name, one in self.moving.items():
            held = self._optimizer.state.get(one.s, {})
            tensors |= {f"{name}:s": one.s, f"{name}:best": self._best[name]}
            tensors |= {f"{name}:{key}": value for key, value in held.items()}
        looks = torch.tensor([[look.step, look.seconds, look.divergence] for look in self._looks], dtype=torch.float64)
        kept = {key: value.contiguous() for key, value in (tensors | {":looks": looks}).items()}
        write_whole(path, lambda part: save_file(kept, part))

    def _resume(self, path: Path | None) -> None:
        """From what the first rank saved, if anything is there, and whole."""
        found = self._group.broadcast(0, {} if path is None else _saved(path))
        if not found:
            return
        self._looks = [Look(int(step), seconds, lost) for step, seconds, lost in found.pop(":looks").tolist()]
        self._step, self._before = self._looks[-1].step, self._looks[-1].seconds
        for name, one in self.moving.items():
            one.s.copy_(found[f"{name}:s"])
            self._best[name] = found[f"{name}:best"].to(one.s.device)
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}:{key}" in found]
            held = {key: found[f"{name}:{key}"].to("cpu" if key == "step" else one.s.device) for key in keys}
            if held:
                self._optimizer.state[one.s] = held
        self._set(Moving.exact)


def _saved(path: Path) -> dict[str, Tensor]:
    """Tensors of a state; {} if there is none, or if it is torn: then it is removed."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError:
        path.unlink()
        return {}


def _parts(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    for begin in range(0, len(numbers), size):
        yield list(numbers[begin : begin + size])
