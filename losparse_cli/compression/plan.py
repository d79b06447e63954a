"""Source and recipe -> Job: layers chosen, rank and nnz of each, text read; no weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..budget.fit import plan_within
from ..budget.plan import Layer, Plan, make_plan, plan_as_stored
from ..budget.recipe import Recipe
from ..budget.units import parse_size
from ..checkpoint.config import dense_config, layer_specs
from ..checkpoint.output import output_path
from ..checkpoint.reader import TensorEntry, finite
from ..checkpoint.source import Checkpoint, open_checkpoint
from ..errors import SourceError, UsageError
from ..models.blocks import bias_heads, block_of, hidden_size, holding
from ..models.device import available, find_device
from ..models.head import require_head
from ..models.names import NameMap
from ..models.route import Route, assumed_route, find_route
from ..models.skeleton import Skeleton, build_skeleton
from ..text.inputs import read_inputs
from ..text.windows import Calibration, Sample, read_windows, settle
from .footprint import footprint
from .layers import find_layers, not_checked
from .parts import Part
from .request import Matching, ModelRefinement, Request
from .schedule import Schedule, part_of, schedule
from .slices import open_experts

OF_NO_MODEL = (
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "auto_map", "architectures",
    "id2label", "label2id",
)  # fmt: skip
"""Of config.json, what may differ between a model and what was made from it."""
RESIDENT_BASE = 680 << 20  # bytes, measured: torch and transformers as they are at work, and tensors in pieces, copied


@dataclass(frozen=True)
class Job:
    """Everything that is fixed before a weight is read; none of it changes while the job is done.

    recipe: settled. plan: what each layer gets; with --allocate error what it would get if all were alike, and a later
    stage decides (`decisions.allocated_plan`). entries: tensors of the source in the order of writing. calibration:
    what text was asked for, settled, None without any; windows: its tokens, None if the model is to write them
    (`decisions.own_text`). blocks: block of the model -> where its entries lie, in the order of the forward pass; {}
    without calibration. route: where text goes. unreached: where those of blocks lie that it never reaches, which are
    never in memory together. memory_limit: bytes, None for three quarters of what is free. hidden_size: width of what
    flows between blocks. bias_heads: of the biases of positions that flow along. refinement: how blocks
    are matched. towards: how the whole model is trained when its layers are compressed. start: the compressed
    checkpoint whose layers are refined, None if they are solved anew. part: that is to be done, None for all; the plan
    is of the whole run, and `scheduled` says what is written. sensitivity_file: has what the loss minds, or is to have
    it (`foreseen.foresee`). unseen, masks: tensors that are copied whatever they hold, and those that may hold
    infinities (`layers.not_checked`).
    """

    source: Checkpoint
    recipe: Recipe
    plan: Plan
    entries: tuple[TensorEntry, ...]
    output: Path
    device: torch.device
    max_shard_bytes: int
    hidden_size: int
    bias_heads: int
    trust_remote_code: bool = False
    calibration: Calibration | None = None
    windows: Sample | None = None
    blocks: dict[str, range] = field(default_factory=dict)
    route: Route = field(default_factory=Route)
    unreached: range = range(0)
    refinement: Matching | None = None
    towards: ModelRefinement | None = None
    memory_limit: int | None = None
    start: Checkpoint | None = None
    part: Part | None = None
    sensitivity_file: Path | None = None
    unseen: frozenset[str] = frozenset()
    masks: frozenset[str] = frozenset()

    def scheduled(self, plan: Plan | None = None) -> Schedule:
        """What is written, by the job's plan or another."""
        made = schedule(self.entries, plan or self.plan, self.max_shard_bytes)
        return made if self.part is None else part_of(made, self.part, self.max_shard_bytes)

    def copied(self, checkpoint: Checkpoint, name: str) -> Iterator[bytes]:
        """A tensor of the source, or of what is refined, in pieces; CheckpointError if it holds what it may not."""
        entry = checkpoint.entries[name]
        file = next(file for file in checkpoint.files if file.path == entry.path)
        pieces = file.chunks(entry)
        return pieces if name in self.unseen else finite(pieces, entry, infinities=name in self.masks)

    @property
    def parameters(self) -> int:
        """Elements of all tensors of the source."""
        return self.source.elements

    @property
    def memory(self) -> int:
        """Bytes that the job may take: its limit, or three quarters of what is free now."""
        return available(self.device) * 3 // 4 if self.memory_limit is None else self.memory_limit

    @property
    def solved_blocks(self) -> list[str]:
        """Blocks up to the last in which a layer is compressed: no later one has to run for what layers are fed."""
        blocks = list(self.blocks)
        held = holding(blocks, [p.layer.name for p in self.plan.layers])
        return blocks[: blocks.index(held[-1]) + 1]

    @property
    def reads(self) -> list[Path]:
        """Folders that are read."""
        return [checkpoint.folder for checkpoint in (self.source, self.start) if checkpoint is not None]

    @property
    def peak_memory(self) -> int:
        """Estimated peak resident bytes without text: the base, one layer in hand and the next being read."""
        return RESIDENT_BASE + self.plan.workspace_bytes


def prepare(
    model: str | Path,
    output: str | Path | None = None,
    request: Request | None = None,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    start: Checkpoint | None = None,
    plan_only: bool = False,
) -> Job:
    """The plan of a compression: source checked, layers chosen, rank and nnz of each, text read.

    A Hub model is planned from its headers, so that a request it cannot meet is refused before it is
    downloaded; with `plan_only` it never is, and the Job cannot be run. With `start`, a compressed checkpoint of the
    model, the plan is to refine what it holds. Raises UsageError on a request that
    cannot be met, SourceError and CheckpointError on a source that cannot be read.
    """
    request = request or Request()
    calibration = request.calibration
    with request.errors():
        recipe = request.settled()
        shard_bytes, device = parse_size(request.max_shard_size), find_device(request.device)
        limit = None if request.memory_limit is None else parse_size(request.memory_limit, "--memory-limit")
    source = _open(model, revision, cache_dir, plan_only)
    _refuse_quantized(source)
    if start is not None:
        _check_start(start, source)
        start.check_vocabulary(source)
        _check_alike(start, source)
    output = output_path(output or f"{source.name.rpartition('/')[2]}-losparse")
    whole = source
    source, skeleton = open_experts(whole, trust_remote_code=trust_remote_code)
    if request.towards is not None:
        require_head(skeleton.model)
    with request.errors():
        layers, skipped = find_layers(source, skeleton, recipe)
        if start is None:
            plan = _plan(source, layers, skipped, request, recipe)
        else:
            plan = plan_as_stored(layers, skipped, layer_specs(start))
    calibration = calibration and settle(calibration, skeleton.model, source.folder)
    if request.towards is not None and calibration is not None and calibration.image_field is not None:
        raise UsageError(
            f"{calibration.source} has images, and a whole model is trained on text alone. Give rows without "
            f"{calibration.image_field!r}, or calibrate with them and call losparse refine on text afterwards."
        )
    if not source.files and not plan_only:
        whole = open_checkpoint(model, revision=source.commit, cache_dir=cache_dir)  # of the very headers planned from
        source, skeleton = open_experts(whole, trust_remote_code=trust_remote_code)
        if recipe.size is not None:  # of which the files beside the weights take a part, and now they are there
            plan = _plan(source, layers, skipped, request, recipe)
    if source is not whole and not any(source.entries[p.layer.tensor].part for p in plan.layers):
        source = whole  # no expert is apart when the result is loaded
        skeleton = build_skeleton(source.folder, source.config, trust_remote_code=trust_remote_code)
    entries: tuple[TensorEntry, ...] = tuple(source.entries.values())
    blocks: dict[str, range] = {}
    windows: Sample | None = None
    route, unreached = Route(), range(0)
    if calibration is not None:
        if source.files:
            read = read_windows if calibration.image_field is None else read_inputs
            windows = read(calibration, skeleton.model, source.folder, recipe.seed, trust_remote_code=trust_remote_code)
        chosen = [p.layer.name for p in plan.layers if not p.layer.rows]
        if windows is None and calibration.image_field is not None:  # a plan from headers, without a processor
            route = assumed_route(skeleton.model, chosen)
        else:
            route = find_route(skeleton.model, chosen, [] if windows is None else windows.kinds())
        entries, blocks, unreached = _by_block(source, skeleton, route)
    job = Job(
        source,
        recipe,
        plan,
        entries,
        output,
        device,
        shard_bytes,
        hidden_size(skeleton.model),
        bias_heads(skeleton.model),
        trust_remote_code,
        calibration,
        windows,
        blocks,
        route,
        unreached,
        None if request.blocks is None else request.blocks.settled(coded=bool(recipe.coded)),
        request.towards,
        limit,
        start,
        request.part,
        None if request.sensitivity_file is None else Path(request.sensitivity_file).expanduser().absolute(),
        *not_checked(source, skeleton, recipe),
    )
    job.scheduled()  # CheckpointError where two tensors would have one name, UsageError for too many parts
    return job


def _plan(source: Checkpoint, layers: list[Layer], skipped: dict[str, str], request: Request, recipe: Recipe) -> Plan:
    """What each layer gets by a settled recipe; with --size what all files together leave for it."""
    calibrated = request.calibration is not None
    if recipe.size is None:
        return make_plan(layers, skipped, recipe, calibrated=calibrated)
    shard_bytes = parse_size(request.max_shard_size)

    def total(plan: Plan) -> int:
        return footprint(source, schedule(source.entries.values(), plan, shard_bytes), recipe)

    return plan_within(layers, skipped, recipe, total, calibrated=calibrated)


def _open(model: str | Path, revision: str | None, cache_dir: Path | None, plan_only: bool) -> Checkpoint:
    """The source, of a Hub model only its headers where they can be had alone."""
    try:
        return open_checkpoint(model, revision=revision, cache_dir=cache_dir, headers_only=True)
    except SourceError:  # no safetensors, or no network: then what is in the cache will do, or the reason is told
        if plan_only:
            raise
        return open_checkpoint(model, revision=revision, cache_dir=cache_dir)


def _by_block(
    source: Checkpoint, skeleton: Skeleton, route: Route
) -> tuple[tuple[TensorEntry, ...], dict[str, range], range]:
    """Tensors in the order of the forward pass, where each block's lie among them, and where those never reached do.

    First come those in blocks that text never reaches, then what lies outside all blocks.
    """
    names = NameMap(skeleton.model, source.entries)
    parameter = {tensor: name for name, tensors in names.disk.items() for tensor in tensors}
    parameter |= names.converted_from
    entries = source.entries.values()
    of = [block_of(parameter.get(entry.name, ""), (*route.blocks, *route.unreached)) for entry in entries]
    ordered = [entry for entry, block in zip(entries, of, strict=True) if block in route.unreached]
    unreached = range(len(ordered))
    ordered += [entry for entry, block in zip(entries, of, strict=True) if block is None]
    where = {}
    for block in route.blocks:
        start = len(ordered)
        ordered += [entry for entry, other in zip(entries, of, strict=True) if other == block]
        where[block] = range(start, len(ordered))
    return tuple(ordered), where, unreached


def _check_start(start: Checkpoint, dense: Checkpoint) -> None:
    """UsageError if what `start` does not compress is no longer that of the dense model."""
    if start.report().get("training"):
        raise UsageError(
            f"{start.address} was trained by losparse finetune, embeddings and head too, so it cannot be matched to "
            "the dense model. Refine first and train then, or go on with losparse finetune."
        )
    ours, theirs = (checkpoint.config.get("architectures") for checkpoint in (start, dense))
    if ours and theirs and ours != theirs:
        raise UsageError(
            f"{start.address} is a {ours[0]}, and {dense.address} a {theirs[0]}. Give the dense model that it was made "
            "from with --against."
        )


def _check_alike(start: Checkpoint, dense: Checkpoint) -> None:
    """UsageError if the two say different things of what they are; what only one of them says is no difference."""
    ours = dense_config(start.config)
    for key, value in dense.config.items():
        if key not in OF_NO_MODEL and key in ours and ours[key] != value:
            raise UsageError(
                f"{start.address} and {dense.address} are not of the same model: {key} is {ours[key]!r} in one "
                f"config.json and {value!r} in the other. Give the dense model that it was made from with --against."
            )


def _refuse_quantized(source: Checkpoint) -> None:
    if source.is_compressed:
        raise UsageError(
            f"{source.name} is compressed by losparse already. Give the dense model, or make one with: "
            f"losparse export {source.address} --dense -o DENSE"
        )
    source.require_floats()
