"""Finished parts -> what is to be published of the whole run; nothing is computed again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint.fingerprint import digest
from ..checkpoint.finish import About, finish
from ..checkpoint.journal import differences
from ..checkpoint.output import check_space
from ..checkpoint.part import SOURCE, PartFile, describes, read_part
from ..checkpoint.report import Report
from ..checkpoint.source import read_config
from ..checkpoint.workfolder import WorkFolder
from ..checkpoint.writer import ShardWriter
from ..errors import CheckpointError, UsageError
from ..progress import Progress


def check_parts(folders: Sequence[Path]) -> list[PartFile]:
    """The parts in these folders, in their order in the run; raises as `join`."""
    if not folders:
        raise UsageError("There is nothing to join. Give the folders that losparse compress --part wrote.")
    found: dict[int, PartFile] = {}
    for folder in folders:
        part = read_part(folder)
        if part is None:
            raise UsageError(describes(folder))
        first = next(iter(found.values()), part)
        _require_same(first, part)
        other = found.setdefault(part.number, part)
        if other is not part:
            raise UsageError(
                f"{other.folder} and {part.folder} are both part {part.number}/{part.count}. Give one of them."
            )
    count = next(iter(found.values())).count
    missing = [f"{number}/{count}" for number in range(1, count + 1) if number not in found]
    if missing:
        raise UsageError(
            f"{'Part' if len(missing) == 1 else 'Parts'} {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
            "missing. Give the folder of every part; losparse compress --part makes one."
        )
    return [found[number] for number in range(1, count + 1)]


def _require_same(first: PartFile, part: PartFile) -> None:
    """UsageError that says in what two parts are of different runs."""
    different = differences(first.identity, part.identity)
    if first.count != part.count:
        different.insert(0, f"--part {first.number}/{first.count}, now {part.number}/{part.count}")
    if different:
        raise UsageError(
            f"{first.folder} and {part.folder} are parts of different runs (different: {', '.join(different)}). Do one "
            "of them again, as the other was done."
        )
    made = part.run.get("losparse")
    if made != __version__:
        raise UsageError(f"{part.folder} was made by losparse {made}, and this is {__version__}. Join with that one.")


def run_of(parts: Sequence[PartFile]) -> dict[str, Any]:
    """The fingerprint of the run that the parts are of; one of its own, if not all were computed alike."""
    run = parts[0].run
    alike = all(part.machine == parts[0].machine for part in parts)
    return run if alike else run | {"parts": [part.machine for part in parts]}


def join_into(work: WorkFolder, parts: Sequence[PartFile], told: Progress) -> Report:
    """All that is to be published of `join`, but how long it took; `parts` as `check_parts` gives them."""
    for part in parts[1:]:
        different = differences(parts[0].machine, part.machine)
        if different:
            told.warn(
                f"{parts[0].folder.name} and {part.folder.name} were not computed alike ({', '.join(different)}): the "
                "result is as good, but not byte for byte that of one run."
            )
    units = [(part, unit) for part in parts for unit in part.units]
    about = parts[0].about
    if about is None:
        raise CheckpointError(f"{parts[0].folder} does not say what it is a part of. Do that part again.")
    writer = ShardWriter(work.path, parts[0].whole_shards, work.journal)
    check_space(work.path, sum(unit.end - unit.begin for _, unit in units) - writer.nbytes)
    told.start("tensors", len(units), writer.done)
    for part, unit in units[writer.done :]:
        written = writer.append(part.parts_of(unit), unit.stats, unit.seconds)
        if written.crc != unit.crc:
            raise CheckpointError(f"{part.folder} is damaged at {unit.tensors[0][0]}. Do that part again.")
        told.advance("tensors", name=unit.tensors[0][0])
    writer.finish()
    base = parts[0].folder / SOURCE
    hashes = {name: known for part in parts for name, known in part.source_files.items()}
    config, mark = read_config(base / "config.json"), digest(run_of(parts))
    in_order = {name: hashes[name] for name in sorted(hashes)}
    return finish(work.path, base, config, About(**about), work.journal.units, in_order, mark, work.output.name)
