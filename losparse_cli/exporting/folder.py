"""A checkpoint folder of another form: unit by unit, one in memory at a time, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..budget.units import parse_size
from ..checkpoint.card import base_metadata, write_form_card
from ..checkpoint.companions import companion_files, copy_companions
from ..checkpoint.reader import TensorEntry
from ..checkpoint.source import Checkpoint
from ..checkpoint.workfolder import WorkFolder
from ..checkpoint.writer import ShardWriter, Slot, plan_shards, write_json
from ..errors import write_errors
from ..progress import Progress
from ..shim.loader import is_loader

TensorPart = tuple[str, str, Sequence[int], Iterable[Any]]
"""Name, dtype, shape and bytes, as `ShardWriter.append` takes them."""


@dataclass(frozen=True)
class Unit:
    """Tensors that are written together. nbytes: at most. make: what they hold, when it is their turn."""

    names: tuple[str, ...]
    nbytes: int
    make: Callable[[], list[TensorPart]]


def copied(checkpoint: Checkpoint, entry: TensorEntry) -> Unit:
    """A tensor as it is."""
    file = next(file for file in checkpoint.files if file.path == entry.path)
    return Unit((entry.name,), entry.nbytes, lambda: [(entry.name, entry.dtype, entry.shape, file.chunks(entry))])


def write_folder(
    checkpoint: Checkpoint,
    units: Sequence[Unit],
    config: dict[str, Any],
    output: Path,
    form: str,
    *,
    max_shard_size: str,
    overwrite: bool,
    told: Progress,
    beside: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write `units` to `output` with this config.json, and the checkpoint's files that are no weights and not ours.

    form: what is written, by which one run is told from another's. A killed one goes on where it was. beside: writes
    what else belongs into the folder.
    """
    companion_files(checkpoint.folder)  # what may not be copied is reported before the work, not after it
    shards = plan_shards([Slot(unit.names, unit.nbytes) for unit in units], parse_size(max_shard_size))
    mark = _fingerprint(checkpoint, max_shard_size, form)
    with WorkFolder(output, mark, overwrite=overwrite, reads=[checkpoint.folder]) as work:
        if work.finished:  # killed after its last step: only the journal was left to remove
            return
        writer = ShardWriter(work.path, shards, work.journal)
        told.start("tensors", len(units), writer.done)
        for unit in units[writer.done :]:
            writer.append(unit.make())
            told.advance("tensors", name=unit.names[0])
        writer.finish()
        with write_errors(work.path):
            copy_companions(checkpoint.folder, work.path)
            for path in work.path.glob("losparse_*.py"):
                if is_loader(path.name):
                    path.unlink()
            write_json(work.path / "config.json", config)
            beside(work.path)
            write_form_card(work.path, base_metadata(checkpoint.folder), checkpoint.name, form)
        work.publish()


def _fingerprint(checkpoint: Checkpoint, max_shard_size: str, form: str) -> dict[str, Any]:
    paths = [checkpoint.folder / "config.json", *(file.path for file in checkpoint.files)]
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
    source = checkpoint.commit or files
    return {"export": __version__, "form": form, "source": source, "shards": parse_size(max_shard_size)}
