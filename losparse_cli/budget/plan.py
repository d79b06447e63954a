"""Plan: layer -> rank, nnz, pattern and bounds on its bytes, fixed before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from ..errors import UnfitError, UsageError
from ..shim.layouts import LayerSpec, bound_index_bytes, candidates, expected_index_bytes, n_of_m
from .notes import Notes
from .recipe import GRIDS, MOST_BITS, MOST_CODE_BITS, RUN, Recipe


@dataclass(frozen=True)
class Layer:
    """A layer that can be compressed: module name in memory, its weight's tensor on disk.

    shape: (out_features, in_features). itemsize: bytes of one stored weight. transposed: the tensor lies
    on disk as (in, out). disk_module: what its tensors are called on disk, without `.weight`. kinds: its class and
    those that it is made from, by name. rows: `embedding`, or `head` of an output head that is tied to none, whose rows
    are coded alone and have bits of their own; empty for other layers.
    """

    name: str
    tensor: str
    disk_module: str
    shape: tuple[int, int]
    itemsize: int
    transposed: bool = False
    kinds: tuple[str, ...] = ()
    rows: str = ""

    @property
    def weights(self) -> int:
        """Entries of its matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def dense_bytes(self) -> int:
        return self.weights * self.itemsize


@dataclass(frozen=True)
class LayerPlan:
    """What one layer gets. nnz: entries of S that may be other than zero. bound_bytes is never exceeded; expected_bytes
    assumes an even spread of S.

    bits: a weight, where S is whole numbers; 0 for floats. expected_bytes is then the layer's share of the bytes that
    all layers of the same pool take together, and one of them may take more if others take less. width: bits that hold
    every code as a two's complement, 0 where any may occur; `bits` are then the most that a weight takes.
    """

    layer: Layer
    rank: int
    nnz: int
    pattern: str
    scope: str
    iterations: int
    bound_bytes: int
    expected_bytes: int
    bits: float = 0.0
    pool: str = ""
    width: int = 0

    @property
    def run(self) -> int:
        """Columns that share a step in a row, as other engines' formats of 4 bits have them; 0 for all of a row."""
        return run_of(self.width, self.layer.shape[1])

    @property
    def sparse(self) -> bool:
        """Whether some entries of S are zero by its pattern."""
        return self.nnz < self.layer.weights

    @property
    def value_bits(self) -> float:
        """Of codes, what is left of the layer's bits for each entry that may be other than zero."""
        beside = mask_bits(self.layer.shape, self.nnz, self.pattern, self.scope)
        beside += 8 * code_overhead(self.layer, self.rank)
        return (self.bits * self.layer.weights - beside) / self.nnz

    @property
    def parameters(self) -> int:
        """r(m + n) + nnz."""
        return self.rank * sum(self.layer.shape) + self.nnz


@dataclass(frozen=True)
class Plan:
    """All targeted layers, and why every other linear layer stays dense. notes: what came out otherwise than it was
    asked for, a sentence each."""

    layers: tuple[LayerPlan, ...]
    skipped: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def dense_bytes(self) -> int:
        return sum(p.layer.dense_bytes for p in self.layers)

    @property
    def expected_bytes(self) -> int:
        return sum(p.expected_bytes for p in self.layers)

    @property
    def bits(self) -> float:
        """Stored, a weight of the layers; embeddings and heads, which have bits of their own, are not counted."""
        layers = [p for p in self.layers if not p.layer.rows] or self.layers
        return 8 * sum(p.expected_bytes for p in layers) / sum(p.layer.weights for p in layers)

    @property
    def kept_parameters(self) -> float:
        """(r(m+n) + nnz) / mn over all layers."""
        return sum(p.parameters for p in self.layers) / sum(p.layer.weights for p in self.layers)

    @property
    def bound_bytes(self) -> int:
        """Most bytes of all layers; codes of many layers together take what was asked for, whatever one layer does."""
        return sum(p.expected_bytes if p.bits else p.bound_bytes for p in self.layers)

    @property
    def workspace_bytes(self) -> int:
        """Most memory that solving one layer takes without text."""
        return _most_workspace(self.layers)

    @property
    def row_workspace_bytes(self) -> int:
        """The same of embeddings and output heads alone, which need no text."""
        return _most_workspace(p for p in self.layers if p.layer.rows)


def _most_workspace(plans: Iterable[LayerPlan]) -> int:
    """Most memory that one of these layers takes: measured at up to 41 bytes an entry, by pattern and scope."""
    return max((_workspace(p) * p.layer.weights for p in plans), default=0)


def _workspace(plan: LayerPlan) -> int:
    """Bytes an entry: float32 copies, masks and 64-bit indices, and the stored weight twice."""
    if plan.layer.rows:  # codes, those of the step before, their counts by row, and streams; floats are of a few rows
        return 12 + 2 * plan.layer.itemsize
    sorted_in_groups = ":" in plan.pattern or plan.scope == "row"
    return (44 if sorted_in_groups else 30) + 2 * plan.layer.itemsize


def make_plan(layers: Iterable[Layer], skipped: dict[str, str], recipe: Recipe, *, calibrated: bool = False) -> Plan:
    """Rank and nnz of each layer by `recipe`; layers that would not shrink, or that it leaves empty, go to `skipped`.

    calibrated: whether there is text, on which what the recipe leaves open depends. UsageError if nothing is left to
    compress, saying why.
    """
    plans: list[LayerPlan] = []
    skipped = dict(skipped)
    notes = Notes()
    too_small: list[str] = []
    unfit: UnfitError | None = None
    for layer in layers:
        request = recipe.for_rows(layer.name, layer.kinds) if layer.rows else recipe.for_layer(layer.name, layer.kinds)
        request = request.settled(calibrated=calibrated)
        m, n = layer.shape
        if request.rank is not None and request.rank * (m + n) >= m * n:
            skipped[layer.name] = f"rank {request.rank} factors are no smaller than the {m} x {n} matrix"
            notes.stays_dense(layer, skipped[layer.name])
            too_small.append(layer.name)
            continue
        try:
            plan = plan_layer(layer, request)
        except UnfitError as error:  # a gate of one row, say, of whose S whole neurons leave nothing
            skipped[layer.name] = error.reason
            notes.stays_dense(layer, error.reason, f" {error.remedy}.")
            unfit = unfit or error
            continue
        size = plan.expected_bytes if plan.bits else plan.bound_bytes
        if size >= layer.dense_bytes:
            skipped[layer.name] = f"would not shrink: {size:,} of {layer.dense_bytes:,} bytes"
            notes.stays_dense(layer, skipped[layer.name])
            too_small.append(layer.name)
        else:
            plans.append(plan)
            if request.keep is not None and plan.bits:
                notes.share(plan, request.keep)
            if plan.sparse and plan.bits:
                notes.kept(plan)
    if not plans:
        if unfit is not None:
            raise unfit
        if too_small:
            name = too_small[-1]
            raise UsageError(
                f"No layer would shrink; {name}, for example: {skipped[name]}. "
                "Lower --rank, raise --sparsity, or lower --keep."
            )
        raise UsageError(
            "No layer of this model can be compressed. `losparse inspect` on the model lists the reason for each layer."
        )
    return Plan(tuple(plans), skipped, notes.sentences())


def plan_layer(layer: Layer, recipe: Recipe) -> LayerPlan:
    """Rank and nnz of one layer by a settled recipe.

    UnfitError if the budget cannot hold the factors asked for, or leaves nothing.
    """
    assert recipe.threshold_scope is not None
    assert recipe.iterations is not None
    if recipe.coded:
        return _plan_codes(layer, recipe)
    rank, nnz = _rank_and_nnz(layer.shape, layer.itemsize, recipe)
    if rank is None:
        raise UnfitError(
            layer.name,
            layer.shape,
            "does not fit the budget: its factors alone are larger",
            "Lower --rank, raise --keep or --keep-parameters",
        )
    if rank == 0 and nnz == 0:
        raise UnfitError(
            layer.name,
            layer.shape,
            "would have nothing left: rank 0, and an empty S",
            "Raise --rank, --keep or --keep-parameters, lower --sparsity",
        )
    return LayerPlan(
        layer,
        rank,
        nnz,
        recipe.pattern,
        recipe.threshold_scope,
        recipe.iterations,
        bound_bytes=int(_bytes(layer.shape, layer.itemsize, rank, nnz, recipe.pattern, bound=True)),
        expected_bytes=round(_bytes(layer.shape, layer.itemsize, rank, nnz, recipe.pattern, bound=False)),
    )


def _plan_codes(layer: Layer, recipe: Recipe) -> LayerPlan:
    """UnfitError if factors and streams alone take more than what was asked for, or if all entries are to be zero."""
    (m, n), rank, scope = layer.shape, recipe.rank or 0, recipe.threshold_scope or "matrix"
    nnz = count_nnz(layer.shape, 1 - (recipe.sparsity or 0.0), recipe.pattern, scope)
    if nnz == 0:
        raise UnfitError(
            layer.name, layer.shape, "would have nothing left of S", "Lower --sparsity, say --values float"
        )
    beside = code_overhead(layer, rank)
    mask = mask_bits(layer.shape, nnz, recipe.pattern, scope)
    width = GRIDS[recipe.grid] if recipe.grid is not None else 0
    if recipe.value_bits is not None:
        bits, pool = (recipe.value_bits * nnz + mask + 8 * beside) / (m * n), f"{recipe.value_bits:g} a value"
    elif recipe.bits is not None:
        bits, pool = recipe.bits, f"{recipe.bits!r}"
    elif recipe.grid is not None:
        run = run_of(width, n)
        beside += m * (n // run) if run else 0
        bits, pool = (width * nnz + mask + 8 * beside) / (m * n), recipe.grid
    else:
        bits = min(MOST_BITS, 8 * layer.itemsize * (recipe.keep or 0.0))
        pool = f"{bits!r}"
    option = "--embedding-bits" if layer.rows else "--bits"
    if bits * m * n / 8 <= beside:
        least = 8 * beside / (m * n) + 0.05
        remedies = [f"raise {option} to {least:.2f} at least"] * (least <= MOST_BITS) + ["lower --rank"] * (rank > 0)
        raise UnfitError(
            layer.name,
            layer.shape,
            f"cannot be stored in {bits:.3g} bits a weight: factors and stream alone take {8 * beside / (m * n):.3g}",
            ", ".join(remedies or ["say --values float"]).capitalize(),
        )
    useful = (nnz * (1 + MOST_CODE_BITS) + mask) / 8 + beside
    expected = int(min(bits * m * n / 8, useful))
    # What a layer takes depends on how much the loss minds it, and on the others: this is what no real one came near.
    bound = expected if layer.rows else 2 * m * n + 2 * beside + 4096
    return LayerPlan(layer, rank, nnz, recipe.pattern, scope, 1, bound, expected, bits, pool, width)


def run_of(width: int, in_features: int) -> int:
    """Columns that share a step in a row of codes of `width` bits; 0 for all of a row."""
    return RUN if width == 4 and in_features % RUN == 0 else 0


def code_overhead(layer: Layer, rank: int) -> int:
    """Bytes of a coded layer beside the codes: U, V, factors of rows and columns, and what a stream says first."""
    m, n = layer.shape
    lanes = -(-m * n // 2048) if n < 2048 else m
    return rank * (m + n) * layer.itemsize + m * layer.itemsize + n + (m + n) // 2 + 4 * lanes + 64


def mask_bits(shape: tuple[int, int], nnz: int, pattern: str, scope: str) -> float:
    """Bits that say which entries of S may be other than zero: log2 of how many supports there are."""
    m, n = shape
    if pattern == "rows":
        return _log_choices(m, nnz // n)
    if pattern == "columns":
        return _log_choices(n, nnz // m)
    if ":" in pattern:
        keep, group = n_of_m(pattern)
        tail = n % group
        return m * (n // group * _log_choices(group, keep) + _log_choices(tail, min(keep, tail)))
    return m * _log_choices(n, nnz // m) if scope == "row" else _log_choices(m * n, nnz)


def _log_choices(n: int, k: int) -> float:
    """log2 of n over k."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def plan_as_stored(layers: Iterable[Layer], skipped: dict[str, str], specs: Mapping[str, LayerSpec]) -> Plan:
    """The plan that a compressed checkpoint of these layers, with these specs, was made by.

    UsageError if it compresses a layer that is not among them, or one of another shape.
    """
    known = {layer.name: layer for layer in layers}
    plans = []
    for name, spec in specs.items():
        layer = known.pop(name, None)
        if layer is None or layer.shape != tuple(spec.shape):
            raise UsageError(
                f"The compressed checkpoint has a layer {name} of {spec.shape[0]} x {spec.shape[1]}, which the dense "
                "model has not. Give the dense model that it was made from with --against."
            )
        size = layer.shape, layer.itemsize, spec.rank, spec.nnz, spec.pattern
        bound, expected = int(_bytes(*size, bound=True)), round(_bytes(*size, bound=False))
        plans.append(LayerPlan(layer, spec.rank, spec.nnz, spec.pattern, "matrix", 0, bound, expected))
    return Plan(tuple(plans), skipped | dict.fromkeys(known, "dense in the checkpoint that is refined"))


def count_nnz(shape: tuple[int, int], density: float, pattern: str, scope: str) -> int:
    """Entries of S at `density`, a number that the pattern can keep exactly.

    Whole neurons for `rows` and `columns`, a whole number a row for scope `row`, always N/M for `N:M`.
    """
    m, n = shape
    density = min(1.0, max(0.0, density))
    if pattern == "rows":
        return round(density * m) * n
    if pattern == "columns":
        return round(density * n) * m
    if ":" in pattern:
        keep, group = n_of_m(pattern)
        return m * (n // group * keep + min(keep, n % group))
    return round(density * n) * m if scope == "row" else round(density * m * n)


@lru_cache(maxsize=4096)
def _rank_and_nnz(shape: tuple[int, int], itemsize: int, recipe: Recipe) -> tuple[int | None, int]:
    m, n = shape
    ratio = recipe.rank_ratio or 0.0
    pattern, scope = recipe.pattern, recipe.threshold_scope or "matrix"

    def rank_for(nnz: int) -> int:
        if recipe.rank is not None:
            return recipe.rank
        # κ = r(m+n) / (r(m+n) + nnz), solved for r.
        return min(min(m, n), round(ratio / (1 - ratio) * nnz / (m + n))) if ratio < 1 else 0

    fixed_pattern = ":" in pattern
    if recipe.sparsity is not None or (fixed_pattern and recipe.keep is None and recipe.keep_parameters is None):
        nnz = count_nnz(shape, 1 - (recipe.sparsity or 0.0), pattern, scope)
        return rank_for(nnz), nnz
    if recipe.keep_parameters is not None:

        def cost(rank: int, nnz: int) -> float:
            return rank * (m + n) + nnz

        budget = recipe.keep_parameters * m * n
    else:

        def cost(rank: int, nnz: int) -> float:
            return _bytes(shape, itemsize, rank, nnz, pattern, bound=False)

        assert recipe.keep is not None, "a settled recipe has a size, unless the pattern is one"
        budget = recipe.keep * m * n * itemsize

    if fixed_pattern or ratio == 1:
        # S is settled, and the rank takes what is left.
        nnz = count_nnz(shape, 1.0, pattern, scope) if fixed_pattern else 0
        rank = int((budget - cost(0, nnz)) / (cost(1, nnz) - cost(0, nnz)))
        return (min(rank, min(m, n)), nnz) if rank >= 0 else (None, 0)
    if cost(rank_for(0), 0) > budget:
        return None, 0

    def fullest(cost_of: Callable[[int], float]) -> int:
        """The largest nnz whose cost stays within the budget; bisection, since the cost only grows."""
        low, high = 0.0, 1.0
        for _ in range(48):
            middle = (low + high) / 2
            if cost_of(count_nnz(shape, middle, pattern, scope)) <= budget:
                low = middle
            else:
                high = middle
        return count_nnz(shape, low, pattern, scope)

    # A whole rank is a large step at a small budget: S takes what it leaves over.
    rank = rank_for(fullest(lambda nnz: cost(rank_for(nnz), nnz)))
    return rank, fullest(lambda nnz: cost(rank, nnz))


def _bytes(shape: tuple[int, int], itemsize: int, rank: int, nnz: int, pattern: str, *, bound: bool) -> float:
    """Bytes of U, V and S in the smallest layout: at most, or on average."""
    measure = bound_index_bytes if bound else expected_index_bytes
    index = min(measure(layout, pattern, shape, nnz) for layout in candidates(pattern, shape, nnz))
    return (rank * sum(shape) + nnz) * itemsize + index
