"""KL divergence of what a model predicts from what its teacher does, some tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..calibration.sensitivity import LOGITS
from ..finetuning.distillation import soft_divergence
from ..models.head import Head
from .teacher import Teacher


def divergence(head: Head, states: Tensor, goal: Tensor, teacher: Teacher, *, gradients: bool) -> tuple[float, Tensor]:
    """KL(teacher ‖ model) summed over tokens, and its gradient by `states`, zeros if none is asked for.

    states, goal: (batch, tokens, hidden), what the heads of the model and of the teacher are fed.
    """
    rows, goals = states.detach().flatten(0, -2), goal.flatten(0, -2)
    size = max(1, LOGITS // (4 * teacher.weight.shape[0]))
    total, slope = 0.0, torch.zeros_like(rows)
    for begin in range(0, len(rows), size):
        part = slice(begin, begin + size)
        leaf = rows[part].requires_grad_(gradients)
        with torch.no_grad():
            wanted = head.logits_of_another(goals[part].to(rows), teacher.weight, teacher.bias)
        with torch.set_grad_enabled(gradients):
            loss = soft_divergence(head.logits(leaf), wanted, 1.0) * len(leaf)
            if gradients:
                (slope[part],) = torch.autograd.grad(loss, leaf)
        total += float(loss.detach())
    return total, slope.view(states.shape)
