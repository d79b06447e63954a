"""Labels drawn from what a model says, and their loss: the mean of its squared gradient is Fisher information.

Labels of the text would give the empirical Fisher, which is another thing (Kunstner et al., arXiv 1905.12558).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.blocks import hidden_states, parts_of

GROUP = 256  # labels among which one is drawn at a time


def logits_of(output: Any) -> dict[str, Tensor]:
    """Field -> scores, of whatever in the output of a model is called logits, or something that ends so."""
    return {
        name: value
        for name, value in parts_of(output).items()
        if isinstance(name, str) and name.endswith("logits") and isinstance(value, Tensor) and value.is_floating_point()
    }


def drawn_loss(
    output: Any, masks: Mapping[str, Tensor], generator: torch.Generator, *, several: bool = False
) -> Tensor:
    """The loss of labels that are drawn from the model's own distribution, summed over all that it says.

    A label for every token that a head classifies, over a vocabulary or not; for every text; for the places where an
    answer begins and ends. A head with one score has a normal distribution of variance one around it. With `several`
    every score is one of a label by itself. A model without a head has the same distribution around each entry of its
    last hidden states, which is the identity as metric. masks: attention masks; what they hide counts nothing.
    """
    found = logits_of(output)
    if not found:
        return _normal(hidden_states(output), masks, generator)
    total: Any = 0.0
    for logits in found.values():
        if logits.shape[-1] == 1:
            total = total + _normal(logits, masks, generator)
        elif several:
            total = total + _bernoulli(logits, generator)
        else:
            total = total + categorical(logits, masks, uniform(logits.shape[:-1], logits.device, generator))
    return torch.as_tensor(total)


def uniform(shape: torch.Size, device: torch.device, generator: torch.Generator) -> Tensor:
    """Random numbers between 0 and 1, one for each label that is to be drawn."""
    return torch.rand(shape, dtype=torch.float64, generator=generator).to(device)


def categorical(logits: Tensor, masks: Mapping[str, Tensor], chance: Tensor) -> Tensor:
    """Cross-entropy of labels that `chance` draws from `logits`, summed over all of them that no mask hides."""
    logits = logits.float()
    for mask in masks.values():
        if mask.shape == logits.shape:  # scores of places in a text
            logits = logits.masked_fill(mask == 0, float("-inf"))
            break
    rows = logits.reshape(-1, logits.shape[-1])
    with torch.no_grad():
        labels = _drawn(torch.softmax(rows, dim=-1), chance.reshape(-1, 1))
    losses = F.cross_entropy(rows, labels, reduction="none")
    seen = shown(masks, logits.shape[:-1])
    return losses.sum() if seen is None else losses[seen.reshape(-1)].sum()


def _drawn(probabilities: Tensor, chance: Tensor) -> Tensor:
    """(rows,), the label that each chance (rows, 1) picks from probabilities (rows, labels).

    First one of GROUP labels, then one of them: to sum up a whole vocabulary step by step takes as long as its logits.
    """
    rows, count = probabilities.shape
    groups = F.pad(probabilities, (0, -count % GROUP)).view(rows, -1, GROUP)
    sums = groups.sum(-1).cumsum(-1, dtype=torch.float64)
    picked = chance * sums[:, -1:]
    group = torch.searchsorted(sums, picked, right=True).clamp_(max=groups.shape[1] - 1)
    picked = picked - F.pad(sums, (1, 0)).gather(1, group)
    inside = groups.gather(1, group.unsqueeze(-1).expand(-1, -1, GROUP)).squeeze(1).cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(inside, picked, right=True).clamp_(max=GROUP - 1)
    return (group * GROUP + place).squeeze(1).clamp_(max=count - 1)


@torch.no_grad()
def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor | None) -> tuple[float, int]:
    """Cross-entropy in nats of each token of `ids` (batch, tokens) but the first by the `logits` before it, summed, and
    how many they are; mask: of the same shape, whose zeros count nothing."""
    goals = ids[:, 1:]
    losses = F.cross_entropy(logits[:, : goals.shape[1]].float().flatten(0, 1), goals.flatten(), reduction="none")
    seen = torch.ones_like(goals, dtype=torch.bool) if mask is None else mask[:, 1:] != 0
    return float(losses[seen.flatten()].double().sum()), int(seen.sum())


def shown(masks: Mapping[str, Tensor], shape: torch.Size) -> Tensor | None:
    """Which of (batch, tokens) no mask hides, None where there is no mask of this shape; the decoder's comes first."""
    fitting = [name for name in masks if masks[name].shape == shape]
    return masks[max(fitting, key=len)] != 0 if fitting else None


def _normal(values: Tensor, masks: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    values = values.float()
    direction = torch.randn(values.shape, generator=generator).to(values.device)
    seen = shown(masks, values.shape[:-1])
    return (values * (direction if seen is None else direction * seen.unsqueeze(-1))).sum()


def _bernoulli(logits: Tensor, generator: torch.Generator) -> Tensor:
    labels = uniform(logits.shape, logits.device, generator) < torch.sigmoid(logits.detach().double())
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum")
