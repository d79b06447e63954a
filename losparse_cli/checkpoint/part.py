"""A finished part of a run: its units in weight files of its own, and one file that says what they are."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .companions import copy_companions
from .fingerprint import digest, identity
from .journal import Unit
from .output import PART
from .source import Checkpoint, read_json
from .writer import Shard, write_json

SOURCE = "source"  # folder in the first part: what goes along with the model, and its config.json and card
CONTENTS = 64  # bytes of each tensor that tell one model from another
OF_A_MACHINE = ("processor", "threads", "device")
"""Of a run's fingerprint, what makes a result of other bytes, and no worse."""


@dataclass(frozen=True)
class PartFile:
    """What a part says of itself.

    folder: where it lies. number, count: of the part. fingerprint: by which its own run is known again. run: what tells
    the whole run from others. contents: digest of bytes of every tensor of the model. units: as its journal held them.
    place: shard of the part's own -> its weight file, and where its data begins. shards: those of the whole run, as
    [file, bytes of its header, first unit, and one after the last]. source_files: of the model, those in which a unit
    of this part comes first -> size and SHA-256. files: weight file of this part -> its size. about: what the whole
    result says of itself; of the first part alone.
    """

    folder: Path
    number: int
    count: int
    fingerprint: str
    run: dict[str, Any]
    contents: str
    units: tuple[Unit, ...]
    place: tuple[tuple[str, int], ...]
    shards: tuple[tuple[str, int, int, int], ...]
    source_files: dict[str, dict[str, Any]]
    files: dict[str, int]
    about: dict[str, Any] | None = None

    @property
    def whole_shards(self) -> list[Shard]:
        """Those of the whole run."""
        return [Shard(file, header, range(begin, end)) for file, header, begin, end in self.shards]

    @property
    def identity(self) -> dict[str, Any]:
        """What is equal in all parts of a run, whichever machines they were made on."""
        kept = {key: value for key, value in identity(self.run).items() if key not in OF_A_MACHINE}
        return kept | {"contents": self.contents}

    @property
    def machine(self) -> dict[str, Any]:
        """What decides the bytes of a result, and not how good it is."""
        return {key: self.run.get(key) for key in OF_A_MACHINE}

    def parts_of(self, unit: Unit) -> Iterator[tuple[str, str, list[int], Iterator[bytes]]]:
        """A unit as `ShardWriter.append` takes it."""
        file, start = self.place[unit.shard]
        for name, dtype, shape, begin, end in unit.tensors:
            yield name, dtype, shape, _pieces(self.folder / file, start + begin, end - begin)


def write_part(folder: Path, part: PartFile, source: Checkpoint) -> None:
    """Beside the weight files of a part that are in `folder`, all that joining needs."""
    if part.about is not None:
        along = folder / SOURCE
        shutil.rmtree(along, ignore_errors=True)  # of a run that was killed here
        along.mkdir()
        copy_companions(source.folder, along)
        write_json(along / "config.json", source.config)
        if (source.folder / "README.md").is_file():
            shutil.copyfile(source.folder / "README.md", along / "README.md")
    content = {name: getattr(part, name) for name in part.__dataclass_fields__ if name not in ("folder", "units")}
    write_json(folder / PART, content | {"units": [asdict(unit) for unit in part.units]})


def read_part(folder: Path) -> PartFile | None:
    """The part in `folder`, None if there is none; CheckpointError if its file is damaged."""
    path = folder / PART
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        units = tuple(Unit(**unit) for unit in content.pop("units"))
        place = tuple((str(file), int(start)) for file, start in content.pop("place"))
        shards = tuple((str(f), int(h), int(a), int(b)) for f, h, a, b in content.pop("shards"))
        return PartFile(folder, units=units, place=place, shards=shards, **content)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is incomplete ({error!r}). Do that part again.") from error


def contents(checkpoint: Checkpoint) -> str:
    """SHA-256 over the first bytes of every tensor: models of one shape differ in them."""
    files = {file.path: file for file in checkpoint.files}
    first = {
        name: next(iter(files[entry.path].chunks(entry, CONTENTS)), b"").hex()
        for name, entry in sorted(checkpoint.entries.items())
    }
    return digest([checkpoint.config, first])


def _pieces(path: Path, begin: int, nbytes: int) -> Iterator[bytes]:
    """So many bytes of a file from `begin` on, 16 MiB at a time; CheckpointError if it has fewer."""
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        while nbytes:
            piece = file.read(min(nbytes, 16 << 20))
            if not piece:
                raise CheckpointError(f"{path} is shorter than it was. Do that part again.")
            nbytes -= len(piece)
            yield piece


def describes(folder: Path) -> str:
    """What `folder` is instead of a part, as a sentence."""
    partial = folder.with_name(folder.name + ".partial")
    if partial.is_dir():
        return f"{folder} is unfinished: {partial.name} holds what is done. Repeat the command that began it."
    if not folder.exists():
        return f"There is no folder {str(folder)!r}. Give the folders that losparse compress --part wrote."
    return f"{folder} is no part of a run. Give the folders that losparse compress --part wrote."
