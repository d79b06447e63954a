"""What is written by a plan, in which order, and to which files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..budget.plan import LayerPlan, Plan
from ..checkpoint.reader import TensorEntry
from ..checkpoint.writer import Shard, Slot, plan_shards
from ..errors import UsageError
from ..parallel.shares import cut
from ..shim.layouts import INDEX_TENSORS, candidates
from .parts import Part, section_count

COPYING = 32  # entries that are copied in the time in which one is compressed, at least


@dataclass(frozen=True)
class Schedule:
    """units: each tensor of the source, with the plan of the layer that it is the weight of, or None if it is copied.
    shards: the files that they go to. sections: runs of units, in a row, that have nothing to do with each other where
    there is no text: layers share bytes within one."""

    plan: Plan
    units: tuple[tuple[TensorEntry, LayerPlan | None], ...]
    shards: tuple[Shard, ...]
    sections: tuple[range, ...]

    @property
    def copied_bytes(self) -> int:
        """Of the tensors that stay as they are."""
        return sum(entry.nbytes for entry, layer in self.units if layer is None)

    def cut(self, count: int) -> list[range]:
        """Numbers of the sections in so many runs that cost about the same."""
        units = (self.units[section.start : section.stop] for section in self.sections)
        return cut([sum(plan.layer.weights for _, plan in inside if plan is not None) for inside in units], count)

    @property
    def weight_bytes(self) -> int:
        """Most bytes of all weight files, headers included."""
        return self.plan.bound_bytes + self.copied_bytes + sum(8 + shard.header for shard in self.shards)


def schedule(entries: Iterable[TensorEntry], plan: Plan, max_shard_bytes: int) -> Schedule:
    """What is written of these tensors by `plan`, in their order. CheckpointError if two would have one name."""
    by_tensor = {p.layer.tensor: p for p in plan.layers}
    units = tuple((entry, by_tensor.get(entry.name)) for entry in entries)
    slots = [Slot(tensor_names(entry, layer), layer.bound_bytes if layer else entry.nbytes) for entry, layer in units]
    costs = [entry.elements // COPYING if layer is None else layer.layer.weights for entry, layer in units]
    sections = cut(costs, section_count(len(plan.layers)))
    return Schedule(plan, units, tuple(plan_shards(slots, max_shard_bytes)), tuple(sections))


def units_of(made: Schedule, part: Part) -> range:
    """Where the units of a part lie: sections in a row; UsageError if there are not as many."""
    if part.count > len(made.sections):
        raise UsageError(
            f"--part {part}: {len(made.plan.layers)} layers make {len(made.sections)} parts at most. Give "
            f"{min(part.number, len(made.sections))}/{len(made.sections)}, or fewer parts."
        )
    found = made.cut(part.count)[part.number - 1]
    return range(made.sections[found.start].start, made.sections[found.stop - 1].stop)


def part_of(made: Schedule, part: Part, max_shard_bytes: int) -> Schedule:
    """What is written of a part, to files of its own."""
    here = units_of(made, part)
    units = made.units[here.start : here.stop]
    layers = {plan.layer.name for _, plan in units if plan is not None}
    plan = replace(made.plan, layers=tuple(p for p in made.plan.layers if p.layer.name in layers))
    inside = [s for s in made.sections if s.start in here]
    return replace(
        schedule((entry for entry, _ in units), plan, max_shard_bytes),
        sections=tuple(range(s.start - here.start, s.stop - here.start) for s in inside),
    )


def tensor_names(entry: TensorEntry, plan: LayerPlan | None) -> tuple[str, ...]:
    """What a unit may be written as: the longest set of names."""
    if plan is None:
        return (entry.name,)
    layouts = ("codes",) if plan.bits else candidates(plan.pattern, plan.layer.shape, plan.nnz)
    index = max((INDEX_TENSORS[layout] for layout in layouts), key=lambda names: sum(map(len, names)))
    runs = ("S_runs",) if plan.width else ()
    return tuple(f"{plan.layer.disk_module}.{suffix}" for suffix in ("U", "V", "weight", *index, *runs))
