"""Column factors moved out of the layers that have them, into the norms and rows that feed those layers.

S_ij = a_i c_j q_ij, and other engines' formats know whole numbers with a factor for a row or a block alone. Where c is
a power of two in each column, as `--grid` makes it, it moves without a rounding (`models.feeds`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models.feeds import Feed
from ..shim.layouts import LayerSpec, column_factors


@dataclass(frozen=True)
class Folding:
    """What the weights of other layers are to be multiplied by.

    rows: module, a norm or a linear layer -> (out,), factors of its rows, or of a norm's entries. columns: linear layer
    -> (in,), the factors of its columns that it is rid of: a compressed one does without them, what else it holds is
    divided by them. kept: coded layers whose factors of columns cannot move.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()


def fold(specs: Mapping[str, LayerSpec], feeds: Mapping[str, Feed], scale_of: Callable[[str], Tensor]) -> Folding:
    """How the factors of these layers move. scale_of: `S_scale` of a coded layer by its name."""
    coded = [name for name, spec in specs.items() if spec.layout == "codes" and spec.kind != "embedding"]
    factors = {name: column_factors(scale_of(name)) for name in coded}
    bare = {name for name, c in factors.items() if bool((c == 1).all())}
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    kept = set(coded) - bare
    for feed in set(feeds.values()):
        readers = [name for name in feed.readers if name in factors]
        if not readers or bare.issuperset(readers):
            continue
        c = factors[readers[0]]
        alike = all(torch.equal(c, factors[name]) for name in readers[1:])
        runs = c.view(-1, feed.repeats, feed.width)
        if not alike or not torch.equal(runs, runs[:, :1].expand_as(runs)) or not _powers_of_two(c):
            continue
        kept -= set(readers)
        rows[feed.source] = runs[:, 0].reshape(-1)
        columns |= dict.fromkeys(feed.readers, c)
    return Folding(rows, columns, frozenset(kept))


def _powers_of_two(c: Tensor) -> bool:
    return bool((torch.frexp(c).mantissa == 0.5).all())
