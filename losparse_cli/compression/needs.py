"""What a job with text needs: bytes of memory, and products, of which a measured speed makes seconds."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..budget.plan import LayerPlan
from ..calibration.sensitivity import LOGITS
from ..checkpoint.config import layer_specs
from ..models.route import Flow
from ..text.documents import SELF
from ..text.sample import HELD_OUT, hold_out
from ..text.windows import Sample
from .foreseen import SENSITIVITY_TOKENS
from .plan import RESIDENT_BASE, Job
from .request import passing
from .rounds import copies_held, moment_bytes, rounds
from .solve import effort

# Measured on SmolLM2-135M, two cores: time of the whole over that of its products alone at full speed.
FORWARD_OVERHEAD, TRAINING_OVERHEAD = 1.6, 1.6
GENERATION_OVERHEAD = 8  # a token at a time is bound by memory: measured against the same products for a whole window
GENERATION_BYTES = 1 << 30  # keys and values of the windows that are written side by side
SOLVER_COPIES = 9  # float32 matrices of the weight's shape that the solver holds at once
BACKWARD_COPIES = 60  # of what flows into a block, that one batch takes inside it with gradients
LOSS_COPIES = 6  # of the logits that are computed at a time
BLOCK_WIDTHS = 30  # of what flows through a block, that it leaves behind for the way back
TRAINED_COPIES = 9  # of what is trained: as it was, as it is and its best state, gradients, Adam's two moments
MATCHING_COPIES = 5  # of the block: U V + S, S, its mask, Adam's two moments; and gradients that wait to be summed


@dataclass(frozen=True)
class Reading:
    """What a job reads, and in which pieces.

    tokens: of its text. nbytes: of it here, 0 before it is there. length: tokens of a window. batch: tokens of a batch.
    together: windows in a pass through a block. passes: through a block, for all of the text; unseen: those for what is
    held out. felt: tokens for which the way back through the model is asked.
    """

    tokens: int
    nbytes: int
    length: int
    batch: int
    together: int
    passes: int
    unseen: int
    felt: int

    @classmethod
    def of(cls, job: Job, windows: Sample | None) -> Reading:
        """windows: the text of the job, None if it is not there yet."""
        asked = job.calibration
        assert asked is not None
        assert asked.length is not None
        tokens, count, length = asked.tokens, asked.windows, asked.length
        if windows is not None:
            tokens, count, length = windows.tokens, len(windows), windows.length
        together = 1 if job.refinement is not None else asked.batch
        passes = -(-count // together)
        held_out = windows is None or len(hold_out(windows)[1]) > 0
        known = job.sensitivity_file is not None and job.sensitivity_file.exists()
        asks = job.start is None and job.recipe.sensitivity == "on" and not known
        return cls(
            tokens, 0 if windows is None else windows.nbytes, length, asked.batch * length, together, passes,
            -(-passes // HELD_OUT) if held_out else 0, min(tokens, SENSITIVITY_TOKENS) if asks else 0,
        )  # fmt: skip


@dataclass(frozen=True)
class Extent:
    """A model's weights: those of each block, and those outside. flows: what passes through each block."""

    sizes: dict[str, int]
    outside: int
    flows: dict[str, Flow]

    @classmethod
    def of(cls, job: Job) -> Extent:
        inside = set(job.unreached).union(*(set(numbers) for numbers in job.blocks.values()))
        sizes = {name: sum(job.entries[k].elements for k in numbers) for name, numbers in job.blocks.items()}
        flows = {name: job.route.flows.get(name, Flow(size, job.hidden_size)) for name, size in sizes.items()}
        return cls(sizes, sum(e.elements for k, e in enumerate(job.entries) if k not in inside), flows)

    @property
    def used(self) -> float:
        """Weights that a token is multiplied with."""
        return self.outside + sum(flow.products for flow in self.flows.values())

    @property
    def wide(self) -> float:
        """Numbers that flow for a token, where they are most."""
        return max(flow.width for flow in self.flows.values())


@dataclass(frozen=True)
class Needs:
    """fixed: bytes of all but what flows between blocks, which takes `carried`. work: flops, weighted with their
    overhead."""

    fixed: float
    carried: float
    work: float


def needs(job: Job, reading: Reading, extent: Extent) -> Needs:
    """What blocks take, one in memory at a time; not what training the whole model afterwards does."""
    assert job.calibration is not None
    solves, matches = job.start is None, job.refinement is not None
    widest, wide, batch, felt = max(extent.sizes.values()), extent.wide, reading.batch, reading.felt
    each = [_block(job, reading, name, extent.sizes[name], extent.flows[name]) for name in job.blocks]
    moments, solver = max(one.moments for one in each), max(one.solver for one in each)
    work = sum(one.work for one in each)

    matching = MATCHING_COPIES + job.calibration.batch.bit_length()
    training = matching * 4 * widest if matches else 0
    left = 4 * reading.together * reading.length * 16 * wide  # what one pass leaves behind inside a block
    base = RESIDENT_BASE + reading.nbytes
    fixed = base + 4 * (extent.outside + widest) + moments + max(solver, training + left)
    if solves:  # rows of embeddings are coded while the weights that lie outside blocks are there
        fixed = max(fixed, base + 4 * extent.outside + job.plan.row_workspace_bytes)
    held = 3 if matches else 2
    biases = 4 * job.bias_heads * reading.length**2 * reading.passes * (held - 1)
    carried = 4 * reading.tokens * wide * held + biases
    if felt:  # what every block returned waits for the way back
        backward = BACKWARD_COPIES * 4 * batch * wide + _loss_bytes(job, batch)
        fixed = max(fixed, RESIDENT_BASE + 4 * (extent.outside + widest) + backward)
        work += FORWARD_OVERHEAD * 2 * 3 * extent.outside * felt
        carried = max(carried, 4 * felt * (sum(flow.width for flow in extent.flows.values()) + held * wide))
    if not reading.nbytes and job.calibration.source == SELF:  # before the rest all of the model, with keys and values
        fixed = max(fixed, RESIDENT_BASE + job.source.nbytes + GENERATION_BYTES)
        work += FORWARD_OVERHEAD * GENERATION_OVERHEAD * 2 * extent.used * reading.tokens
    return Needs(fixed, carried, work)


@dataclass(frozen=True)
class _Block:
    """moments, solver: bytes of second moments, and of what solves a group of layers. work: as of Needs."""

    moments: int
    solver: int
    work: float


def _block(job: Job, reading: Reading, name: str, size: int, flow: Flow) -> _Block:
    """What one block takes. size: its weights."""
    units = job.scheduled().units
    plans = [plan for k in job.blocks[name] if (plan := units[k][1]) is not None]
    solves, matches, tokens = job.start is None, job.refinement is not None, reading.tokens
    often = flow.products / max(1, size)  # vectors that a layer sees for each token, on average
    moments, passes = _moments(job, reading, plans)
    work = 0.0
    if solves or _relocates(job):
        squares = sum(plan.layer.shape[1] ** 2 for plan in plans)
        work += FORWARD_OVERHEAD * 2 * tokens * squares * often
    if solves:
        work += sum(effort(plan, job.recipe) for plan in plans)
    passes = passes * bool(plans) + (name in job.solved_blocks) if solves or matches else 0
    passes += job.towards is not None  # what the dense model says is asked of all blocks
    work += FORWARD_OVERHEAD * 2 * passes * flow.products * tokens
    work += FORWARD_OVERHEAD * 2 * 4 * flow.products * reading.felt  # forwards, and backwards with forwards again
    if job.refinement is not None and plans:
        work += TRAINING_OVERHEAD * 6 * flow.products * reading.batch * job.refinement.steps
    # Two matrices are often solved side by side: gate and up, or k and v.
    shapes = [plan.layer.shape for plan in plans] if solves else []
    solver = max((4 * (2 * SOLVER_COPIES * m * n + 4 * n * n) for m, n in shapes), default=0)
    return _Block(moments, solver, work)


def _relocates(job: Job) -> bool:
    """Whether it is found again what codes that are there already would have been rounded from, which takes the second
    moments of what their layers are fed."""
    return job.start is not None and job.refinement is not None and bool(job.recipe.coded)


def _moments(job: Job, reading: Reading, plans: Sequence[LayerPlan]) -> tuple[int, int]:
    """Bytes of the second moments that a block with these layers has at once, and the rounds in which it gathers them.

    Of what layers are solved with, and of what is held out to measure them by.
    """
    solves = job.start is None
    if not solves and job.refinement is None:
        return 0, 0
    here, room = {plan.layer.name: plan for plan in plans}, job.memory // 2

    def most(made: list[list[str]], copies: float) -> int:
        return int(copies * max((sum(moment_bytes(here[layer]) for layer in layers) for layers in made), default=0))

    if solves:
        copies = copies_held(reading.passes, reading.unseen)
        made = rounds(here, room, copies)
        return most(made, copies), len(made)
    needed, made = most([list(here)], copies_held(reading.unseen, 0)) if reading.unseen else 0, [list(here)]
    if _relocates(job) and here:  # of what is held out at once, and of the rest in rounds
        copies = copies_held(reading.passes, 0)
        made = rounds(here, room, copies)
        needed += most(made, copies)
    return needed, len(made)


# --- training the whole model -----------------------------------------------------------------------


def trained(job: Job, parts: Collection[str]) -> int:
    """Numbers of the layers that training moves; norms are few beside them."""
    if job.start is not None:
        layers = [spec for spec in layer_specs(job.start).values() if spec.kind != "embedding"]
        sizes = [(one.shape, one.rank, one.nnz, one.layout == "codes") for one in layers]
    else:
        sizes = [(p.layer.shape, p.rank, p.nnz, p.bits > 0) for p in job.plan.layers if not p.layer.rows]
    found = 0
    for shape, rank, nnz, coded in sizes:
        found += (rank * sum(shape) if "lowrank" in parts else 0) + (shape[0] if coded else nnz) * ("scales" in parts)
    return found


def training_seconds(job: Job, used: float, speed: float, again: bool) -> float:
    """Of training the whole model: until its time or its steps are up. used: weights that a token is multiplied with.
    again: whether blocks run twice."""
    how = job.towards
    if how is None:
        return 0.0
    # Codes stand still, so that backwards takes no more products than forwards.
    step = TRAINING_OVERHEAD * (6 if again else 4) * used * how.tokens / speed
    return min(how.seconds or math.inf, math.inf if how.steps is None else how.steps * step)


def training_bytes(job: Job, tokens: int, again: bool) -> int:
    """Of memory, while the whole model is trained: its weights, codes in a byte and the rest as floats, what moves,
    what it leaves for the way back, and what the dense one said. again: whether blocks run twice, and leave what flows
    into them."""
    if job.towards is None:
        return 0
    coded = [p.layer.weights for p in job.plan.layers if p.bits]
    weights = 4 * job.parameters - 3 * sum(coded) + 4 * max(coded, default=0)  # of which one is unfolded at a time
    assert job.calibration is not None
    assert job.calibration.length is not None
    together = passing(job.calibration.length) * job.calibration.length
    widths = len(job.blocks) + BLOCK_WIDTHS if again else len(job.blocks) * BLOCK_WIDTHS
    left = 4 * together * job.hidden_size * widths + TRAINED_COPIES * 4 * trained(job, job.towards.train)
    return RESIDENT_BASE + weights + left + _loss_bytes(job, together) + 4 * tokens * job.hidden_size


def _loss_bytes(job: Job, tokens: int) -> int:
    """Of memory, for the loss of so many tokens at once."""
    return LOSS_COPIES * min(LOGITS, 4 * tokens * (job.source.vocabulary or LOGITS))
