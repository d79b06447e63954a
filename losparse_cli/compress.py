"""Dense checkpoint -> U, V, S checkpoint, one layer in memory at a time."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from . import __version__
from .budget.plan import Layer, LayerPlan, Plan, make_plan
from .budget.recipe import Recipe
from .checkpoint.card import base_metadata, companion_files, copy_companions, write_card
from .checkpoint.config import is_shim, write_config
from .checkpoint.journal import Journal
from .checkpoint.reader import BITS, FLOATING, TORCH_DTYPES, TensorEntry
from .checkpoint.report import LayerReport, Report
from .checkpoint.source import REPORT, TIMING, Checkpoint, open_checkpoint
from .checkpoint.writer import (
    Shard,
    ShardWriter,
    Slot,
    check_output,
    parse_size,
    plan_shards,
    publish,
    sha256,
    tensor_part,
    working_folder,
    write_errors,
    write_json,
)
from .errors import CheckpointError, OutputError, ResumeError, SourceError, UsageError
from .linalg.alternating import decompose
from .linalg.patterns import parse_pattern
from .linalg.svd import seed_of
from .models.names import NameMap
from .models.skeleton import build_skeleton, choose
from .shim.layouts import INDEX_TENSORS, LayerSpec, candidates, smallest

RESIDENT_BASE = 500 << 20  # bytes: the interpreter with torch and transformers, before any weight


class Progress(Protocol):
    """What a caller may watch. Bytes are of the dense model."""

    def start(self, job: Job, layers_done: int, bytes_done: int) -> None: ...
    def layer(self, report: LayerReport) -> None: ...
    def advance(self, nbytes: int) -> None: ...


@dataclass(frozen=True)
class Job:
    """Everything that is fixed before a weight is read.

    units: per tensor of the source, in reading order, the layer it is the weight of, or None if copied.
    """

    source: Checkpoint
    recipe: Recipe
    plan: Plan
    units: tuple[tuple[TensorEntry, LayerPlan | None], ...]
    shards: tuple[Shard, ...]
    output: Path
    device: torch.device

    @property
    def parameters(self) -> int:
        """Elements of all tensors of the source."""
        return sum(entry.nbytes * 8 // BITS[entry.dtype] for entry in self.source.entries.values())

    @property
    def bound_bytes(self) -> int:
        """Most bytes that the result takes on disk."""
        copied = sum(entry.nbytes for entry, layer in self.units if layer is None)
        beside = sum((self.source.folder / path).stat().st_size for path in companion_files(self.source.folder))
        return self.plan.bound_bytes + copied + beside + sum(shard.header for shard in self.shards)

    @property
    def peak_memory(self) -> int:
        """Estimated peak resident bytes: the base, one layer in hand and the next being read."""
        return RESIDENT_BASE + self.plan.workspace_bytes


@dataclass(frozen=True)
class Result:
    """output: the finished folder. seconds: of this run alone. resumed: units found finished.

    needs_package: True if only a machine with losparse installed can load it (see `write_config`).
    """

    output: Path
    report: Report
    seconds: float
    resumed: int
    needs_package: bool


def prepare(
    model: str | Path,
    output: Path | None = None,
    recipe: Recipe | None = None,
    *,
    device: str = "auto",
    revision: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    max_shard_size: str = "5GB",
) -> Job:
    """The plan of a compression: source checked, layers chosen, rank and nnz of each, shards cut.

    Reads headers and config only (a Hub model is downloaded first). Raises UsageError on a request that
    cannot be met, SourceError and CheckpointError on a source that cannot be read.
    """
    recipe = recipe or Recipe()
    shard_bytes = parse_size(max_shard_size)
    source = open_checkpoint(model, revision=revision, cache_dir=cache_dir)
    _refuse_quantized(source)
    skeleton = build_skeleton(source.folder, source.config, trust_remote_code=trust_remote_code)
    layers, skipped = find_layers(source, skeleton, recipe)
    plan = make_plan(layers, skipped, recipe)
    by_tensor = {p.layer.tensor: p for p in plan.layers}
    units = tuple((entry, by_tensor.get(name)) for name, entry in source.entries.items())
    slots = [Slot(_tensor_names(layer), layer.bound_bytes) if layer else Slot((entry.name,), entry.nbytes) for entry, layer in units]
    output = Path(output) if output is not None else Path(f"{source.name.rpartition('/')[2]}-losparse")
    output = output.expanduser().absolute()
    if output == source.folder.resolve() or source.folder.resolve() in output.parents:
        raise UsageError(f"--output {output} lies inside the model's own folder. Choose a place outside it.")
    return Job(source, recipe, plan, units, tuple(plan_shards(slots, shard_bytes)), output, _device(device))


def compress(
    model: str | Path,
    output: Path | None = None,
    recipe: Recipe | None = None,
    *,
    resume: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Compress a Hub id or folder into `output`; options as in `prepare`.

    The result appears at `output` whole or not at all. A killed run goes on where it was when called
    again; resume `required` insists on that, `never` discards what was done. Raises as `prepare`, and
    OutputError or ResumeError if the result cannot be written.
    """
    return run(prepare(model, output, recipe, **options), resume=resume, overwrite=overwrite, progress=progress)


def run(job: Job, *, resume: str = "auto", overwrite: bool = False, progress: Progress | None = None) -> Result:
    """Carry out a prepared job; see `compress`."""
    if resume not in ("auto", "required", "never"):
        raise UsageError(f"--resume is auto, required or never, not {resume!r}.")
    started = time.monotonic()
    fingerprint = _fingerprint(job)
    finished = _already_done(job, fingerprint)
    if finished is not None and not overwrite:
        return Result(job.output, finished, 0.0, len(job.units), not _ships_loader(job.source.config))
    check_output(job.output, overwrite=overwrite)
    work = working_folder(job.output)
    with write_errors(work):
        if resume == "never" and work.is_dir():
            shutil.rmtree(work)
        if resume == "required" and not work.is_dir():
            raise ResumeError(f"There is nothing to resume at {work}. Leave out --resume required to start anew.")
        job.output.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(exist_ok=True)
        journal = Journal(work, fingerprint, required=resume == "required")
    try:
        writer = ShardWriter(work, job.shards, journal)
        resumed = writer.done
        _check_space(job, work, sum(u.end - u.begin for u in journal.units))
        if progress is not None:
            done = job.units[:resumed]
            progress.start(job, sum(p is not None for _, p in done), sum(e.nbytes for e, _ in done))
        with ThreadPoolExecutor(1, "hash") as hasher:
            hashes = hasher.submit(_source_hashes, job.source)
            _compress_units(job, writer, progress)
            writer.finish()
            report = _finish(job, work, journal, hashes.result(), fingerprint)
        publish(work, job.output)
    finally:
        journal.close()
    return Result(job.output, report, time.monotonic() - started, resumed, not _ships_loader(job.source.config))


# --- before -----------------------------------------------------------------------------------------


def find_layers(source: Checkpoint, skeleton: Any, recipe: Recipe) -> tuple[list[Layer], dict[str, str]]:
    """Targeted layers with their tensors on disk, and every layer left dense with the reason."""
    chosen, skipped = choose(skeleton, recipe.targets, recipe.ignore)
    for glob, _ in recipe.overrides:
        choose(skeleton, (glob,), ())  # raises if it matches nothing
    names = NameMap(skeleton.model, source.entries)
    layers = []
    for linear in chosen:
        parameter = f"{linear.name}.weight"
        tensors = names.disk.get(parameter, [])
        if len(tensors) != 1 or not tensors[0].endswith(".weight"):
            if not tensors and parameter not in names.converted:
                raise CheckpointError(
                    f"The tensor {parameter} ({linear.shape[0]} x {linear.shape[1]}) is missing from {source.folder}. "
                    "Download the checkpoint again, or leave the layer out with --ignore."
                )
            skipped[linear.name] = "assembled from other tensors at load"
            continue
        entry = source.entries[tensors[0]]
        if entry.dtype not in FLOATING:
            raise UsageError(
                f"{entry.name} in {entry.path} is stored as {entry.dtype}, not as floating point: it is quantized "
                "already. Start from the unquantized checkpoint."
            )
        on_disk = tuple(reversed(linear.shape)) if linear.transposed else linear.shape
        if entry.shape != on_disk:
            raise CheckpointError(
                f"{entry.name} in {entry.path} has shape {list(entry.shape)}, but config.json asks for {list(on_disk)}. "
                "config.json and the weights do not belong together."
            )
        disk_module = names.disk_module(linear.name, entry.name)
        if disk_module is None:
            skipped[linear.name] = "transformers would rename its factors at load"
            continue
        itemsize = BITS[entry.dtype] // 8
        layers.append(Layer(linear.name, entry.name, disk_module, linear.shape, itemsize, linear.transposed))
    return layers, skipped


def _refuse_quantized(source: Checkpoint) -> None:
    if source.is_compressed:
        raise UsageError(
            f"{source.name} is compressed by losparse already. Give the dense model, or make one with: "
            f"losparse export {source.name} --dense -o DENSE"
        )
    if source.quantization is not None:
        method = source.quantization.get("quant_method", "an unknown method")
        raise UsageError(f"{source.name} is quantized already ({method}). Start from the unquantized checkpoint.")


def _tensor_names(plan: LayerPlan) -> tuple[str, ...]:
    layouts = candidates(plan.pattern, plan.layer.shape, plan.nnz)
    index = max((INDEX_TENSORS[layout] for layout in layouts), key=lambda names: sum(map(len, names)))
    return tuple(f"{plan.layer.disk_module}.{suffix}" for suffix in ("U", "V", "weight", *index))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device is auto, cpu, cuda or cuda:N, not {name!r}.")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here. Use --device cpu.")
    return device


def _fingerprint(job: Job) -> dict[str, Any]:
    files = {}
    for file in job.source.files:
        status = file.path.stat()
        files[file.path.name] = [status.st_size, status.st_mtime_ns]
    plan = [[e.name, e.dtype, e.shape, p and [p.rank, p.nnz, p.pattern, p.scope, p.iterations]] for e, p in job.units]
    return {
        "losparse": __version__,
        "torch": torch.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} x{torch.get_num_threads()} {job.device}",
        "source": job.source.commit or files,
        "config": _digest(job.source.config),
        "recipe": job.recipe.to_dict(),
        "plan": _digest([plan, [[s.file, s.header] for s in job.shards]]),
    }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _already_done(job: Job, fingerprint: dict[str, Any]) -> Report | None:
    """The report at the output, if it is of this very run: killed after its last step, or repeated."""
    path = job.output / REPORT
    if not path.is_file():
        return None
    report = Report.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))
    return report if report.fingerprint == _digest(fingerprint) else None


def _check_space(job: Job, work: Path, written: int) -> None:
    copied = sum(entry.nbytes for entry, layer in job.units if layer is None)
    need = job.plan.expected_bytes + copied - written
    free = shutil.disk_usage(work).free
    if need > free:
        raise OutputError(
            f"{work.parent} has {free:,} bytes free, and the result needs about {need:,} more. Free some space, or "
            "choose another disk with --output."
        )


# --- the work ---------------------------------------------------------------------------------------


def _compress_units(job: Job, writer: ShardWriter, progress: Progress | None) -> None:
    """Read ahead, solve, and write behind: one thread each, one layer between them."""
    files = {file.path: file for file in job.source.files}
    todo = job.units[writer.done :]
    upcoming = iter([entry for entry, plan in todo if plan is not None])

    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as pen:

        def read_next() -> Future[Tensor] | None:
            entry = next(upcoming, None)
            return None if entry is None else reader.submit(files[entry.path].read, entry)

        ahead, behind = read_next(), None
        for entry, plan in todo:
            if plan is None:
                part = (entry.name, entry.dtype, entry.shape, _watched(files[entry.path].chunks(entry), progress))
                submitted = pen.submit(writer.append, [part])
            else:
                assert ahead is not None, "one read is submitted for each layer"
                begun = time.monotonic()
                stored, ahead = ahead.result(), read_next()
                report, spec, tensors = _solve(plan, stored, job)
                parts = [tensor_part(f"{plan.layer.disk_module}.{suffix}", t) for suffix, t in tensors.items()]
                stats = {"spec": spec.to_dict(), **report.to_dict()}
                submitted = pen.submit(writer.append, parts, stats, time.monotonic() - begun)
                if progress is not None:
                    progress.layer(report)
                    progress.advance(entry.nbytes)
            if behind is not None:
                behind.result()  # no more than one unit waits to be written
            behind = submitted
        if behind is not None:
            behind.result()


def _watched(pieces: Iterator[bytes], progress: Progress | None) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        if progress is not None:
            progress.advance(len(piece))


def _solve(plan: LayerPlan, stored: Tensor, job: Job) -> tuple[LayerReport, LayerSpec, dict[str, Tensor]]:
    """U, V, S of one layer, and its tensors as they are stored, by suffix."""
    layer = plan.layer
    W = stored.to(job.device).float()
    if layer.transposed:
        W = W.T.contiguous()
    _require_finite(W, layer)
    solved = decompose(
        W,
        plan.rank,
        plan.nnz,
        parse_pattern(plan.pattern),
        scope=plan.scope,
        iterations=plan.iterations,
        exact_svd=job.recipe.exact_svd,
        seed=seed_of(job.recipe.seed, layer.name),
        dtype=stored.dtype,
    )
    factors = solved.factors
    spec, index = smallest(factors.support, factors.rank, plan.pattern)
    disk = layer.disk_module if layer.disk_module != layer.name else ""
    spec = replace(spec, transposed=layer.transposed, tensor=disk)
    tensors = {"U": factors.U, "V": factors.V} if factors.rank else {}
    tensors |= {"weight": factors.values, **index}
    report = LayerReport(
        layer.name,
        layer.shape,
        factors.rank,
        factors.nnz,
        plan.pattern,
        spec.layout,
        layer.dense_bytes,
        spec.nbytes(stored.dtype),
        solved.weight_squared,
        solved.residual_squared,
        solved.errors,
    )
    return report, spec, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _require_finite(W: Tensor, layer: Layer) -> None:
    if torch.isfinite(W.sum()):  # NaN and infinity survive a sum
        return
    wrong = torch.nonzero(~torch.isfinite(W))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise CheckpointError(
            f"{layer.tensor} holds {W[row, column].item()} at row {row}, column {column} ({len(wrong)} such values). "
            f"Repair the checkpoint, or leave the layer out with --ignore '{layer.name}'."
        )


# --- after ------------------------------------------------------------------------------------------


def _ships_loader(config: dict[str, Any]) -> bool:
    return "AutoConfig" not in (config.get("auto_map") or {})


def _source_hashes(source: Checkpoint) -> dict[str, dict[str, Any]]:
    files = {}
    for file in source.files:
        blob = file.path.resolve().name  # in the Hub's cache a file's target is named by its SHA-256
        known = blob if file.path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob) else sha256(file.path)
        files[file.path.name] = {"size": file.path.stat().st_size, "sha256": known}
    return files


def _finish(job: Job, work: Path, journal: Journal, hashes: dict[str, Any], fingerprint: dict[str, Any]) -> Report:
    """Config, shim, companions, card, report: all that stands beside the weights."""
    import safetensors
    import transformers

    order = {p.layer.name: k for k, p in enumerate(job.plan.layers)}  # the model's, not the files'
    stats = sorted((u.stats for u in journal.units if u.stats is not None), key=lambda line: order[line["name"]])
    specs = {line["name"]: LayerSpec.from_dict(line["spec"]) for line in stats}
    with write_errors(work):
        copy_companions(job.source.folder, work)
        write_config(work, job.source.config, specs, job.plan.skipped)
        weights = {shard.file for shard in job.shards}
        report = Report(
            layers=tuple(LayerReport.from_dict(line) for line in stats),
            skipped=job.plan.skipped,
            model_bytes_before=job.source.nbytes,
            model_bytes_after=sum(unit.end - unit.begin for unit in journal.units),
            parameters=job.parameters,
            source={
                "name": job.source.name,
                "commit": job.source.commit,
                "architecture": (job.source.config.get("architectures") or [None])[0],
                "files": hashes,
            },
            recipe=job.recipe.to_dict(),
            versions={
                "losparse": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "safetensors": safetensors.__version__,
            },
            fingerprint=_digest(fingerprint),
        )
        report = replace(report, files=_file_hashes(work, weights))
        write_json(work / REPORT, report.to_dict())
        write_card(work, report, base_metadata(job.source.folder), place=job.output.name)
        seconds = {job.units[unit.number][0].name: unit.seconds for unit in journal.units if unit.stats is not None}
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_json(work / TIMING, {"finished": now, "threads": torch.get_num_threads(), "seconds": seconds})
    return report


def _file_hashes(work: Path, weights: set[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file that decides what is loaded, by name."""
    decisive = [
        path for path in sorted(work.rglob("*"))
        if path.is_file() and (path.name in weights or path.suffix in (".json", ".py") or is_shim(path.name))
        and path.name not in (REPORT, TIMING)
    ]  # fmt: skip
    return {str(p.relative_to(work)): {"size": p.stat().st_size, "sha256": sha256(p)} for p in decisive}
