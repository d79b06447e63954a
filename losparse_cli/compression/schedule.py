"""What is written by a plan, in which order, and to which files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..budget.plan import LayerPlan, Plan
from ..checkpoint.reader import TensorEntry
from ..checkpoint.writer import Shard, Slot, plan_shards
from ..shim.layouts import INDEX_TENSORS, candidates


@dataclass(frozen=True)
class Schedule:
    """units: each tensor of the source, with the plan of the layer that it is the weight of, or None if it is copied.
    shards: the files that they go to."""

    plan: Plan
    units: tuple[tuple[TensorEntry, LayerPlan | None], ...]
    shards: tuple[Shard, ...]

    @property
    def copied_bytes(self) -> int:
        """Of the tensors that stay as they are."""
        return sum(entry.nbytes for entry, layer in self.units if layer is None)

    @property
    def weight_bytes(self) -> int:
        """Most bytes of all weight files, headers included."""
        return self.plan.bound_bytes + self.copied_bytes + sum(8 + shard.header for shard in self.shards)


def schedule(entries: Iterable[TensorEntry], plan: Plan, max_shard_bytes: int) -> Schedule:
    """What is written of these tensors by `plan`, in their order. CheckpointError if two would have one name."""
    by_tensor = {p.layer.tensor: p for p in plan.layers}
    units = tuple((entry, by_tensor.get(entry.name)) for entry in entries)
    slots = [Slot(tensor_names(entry, layer), layer.bound_bytes if layer else entry.nbytes) for entry, layer in units]
    return Schedule(plan, units, tuple(plan_shards(slots, max_shard_bytes)))


def tensor_names(entry: TensorEntry, plan: LayerPlan | None) -> tuple[str, ...]:
    """What a unit may be written as: the longest set of names."""
    if plan is None:
        return (entry.name,)
    layouts = ("codes",) if plan.bits else candidates(plan.pattern, plan.layer.shape, plan.nnz)
    index = max((INDEX_TENSORS[layout] for layout in layouts), key=lambda names: sum(map(len, names)))
    runs = ("S_runs",) if plan.width else ()
    return tuple(f"{plan.layer.disk_module}.{suffix}" for suffix in ("U", "V", "weight", *index, *runs))
