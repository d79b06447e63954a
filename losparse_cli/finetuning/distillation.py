"""Distance from a teacher: of softened predictions (Hinton et al., arXiv 1503.02531), and of hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .request import Finetuning

# Logits of which probabilities are made at a time: what stays in a CPU's cache, and enough to fill a GPU.
CHUNK_ON_CPU, CHUNK = 1 << 20, 1 << 24
OVER_TOKENS = ("start_logits", "end_logits")
"""Predictions that are distributions over the tokens of a sequence, not over classes or a vocabulary."""


def distance(
    outputs: Mapping[str, Any], teacher: Mapping[str, Any], inputs: Mapping[str, Any], how: Finetuning
) -> Tensor:
    """α T² KL(teacher ‖ model) + the weighted mean squared distance of hidden states, over what is no padding.

    outputs, teacher: of the same `inputs`, as transformers' models return them. Logits of one value (regression) are
    compared by their mean square.
    """
    mask = inputs.get("attention_mask")
    total = torch.zeros((), device=_logits(outputs)[0][1].device)
    if how.distill_weight:
        for name, logits in _logits(outputs):
            goal = teacher[name]
            if name in OVER_TOKENS:
                if mask is not None:
                    logits, goal = (x.masked_fill(mask == 0, torch.finfo(x.dtype).min) for x in (logits, goal))
            elif logits.dim() == 3:
                counted = _counted(outputs, inputs)
                if counted is not None:
                    logits, goal = logits[counted], goal[counted]
            if logits.shape[-1] == 1:
                total = total + how.distill_weight * F.mse_loss(logits.float(), goal.float())
            else:
                rows = logits.reshape(-1, logits.shape[-1]), goal.reshape(-1, goal.shape[-1])
                total = total + how.distill_weight * soft_divergence(*rows, how.temperature)
    if how.hidden_weight:
        total = total + how.hidden_weight * _hidden(outputs, teacher, inputs)
    return total


def soft_divergence(logits: Tensor, goal: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(goal / T) ‖ softmax(logits / T)), the mean over rows; gradients to `logits` alone.

    logits, goal: (rows, classes).
    """
    found: Tensor = _SoftDivergence.apply(logits, goal, temperature)  # type: ignore[no-untyped-call]
    return found


class _SoftDivergence(torch.autograd.Function):
    """The gradient is known in closed form and made with the value, in pieces: of a large vocabulary, the usual way
    keeps four matrices as large as the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, goal: Tensor, temperature: float) -> Tensor:
        gradient = torch.empty_like(logits)
        total = torch.zeros((), device=logits.device, dtype=torch.float32)
        rows = max(1, (CHUNK_ON_CPU if logits.device.type == "cpu" else CHUNK) // logits.shape[1])
        for s, t, g in zip(*(torch.split(x, rows) for x in (logits, goal, gradient)), strict=True):
            log_p, log_q = ((x.float() / temperature).log_softmax(-1) for x in (t, s))
            p = log_p.exp()
            # What both rule out is at −∞ in both.
            total += torch.dot(p.view(-1), log_p.sub_(log_q).masked_fill_(p == 0, 0).view(-1))
            torch.sub(log_q.exp_(), p, out=g)
        ctx.save_for_backward(gradient)
        ctx.rows = max(1, len(logits))
        ctx.temperature = temperature
        mean: Tensor = total * temperature**2 / ctx.rows
        return mean

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (above[0] * ctx.temperature / ctx.rows).to(gradient.dtype), None, None


def _logits(outputs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    names = ("logits", *OVER_TOKENS)
    return [(name, outputs[name]) for name in names if outputs.get(name) is not None]


def _counted(outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> Tensor | None:
    """(batch, tokens), bool: where a model predicts tokens that count; None for everywhere."""
    if outputs.get("encoder_last_hidden_state") is not None:
        labels = inputs.get("labels")
        counted = None if labels is None else labels >= 0
    else:
        mask = inputs.get("attention_mask")
        counted = None if mask is None else mask > 0
    return None if counted is None or bool(counted.all()) else counted


def _hidden(outputs: Mapping[str, Any], teacher: Mapping[str, Any], inputs: Mapping[str, Any]) -> Tensor:
    """Mean squared distance of all hidden states, each over the mean square of the teacher's."""
    parts = []
    for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        mask = inputs.get("attention_mask")
        if name == "decoder_hidden_states":
            labels = inputs.get("labels")
            mask = None if labels is None else labels >= 0
        for state, goal in zip(outputs.get(name) or (), teacher.get(name) or (), strict=True):
            state, goal = state.float(), goal.float()
            if mask is not None and mask.shape == state.shape[:2]:
                state, goal = state[mask > 0], goal[mask > 0]
            parts.append((state - goal).square().mean() / goal.square().mean().clamp_min(1e-12))
    return torch.stack(parts).mean()
