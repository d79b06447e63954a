"""Most bytes that a result takes on disk, file by file."""

from __future__ import annotations

import json
from typing import Any

from ..budget.recipe import Recipe
from ..checkpoint.card import base_metadata
from ..checkpoint.companions import companion_files
from ..checkpoint.source import Checkpoint
from ..shim.loader import loader_bytes
from .schedule import Schedule, tensor_names

FRAME_BYTES = 1 << 14  # of report, card, timing and index, without what is counted below
LAYER_BYTES = 990  # of a layer's lines in config.json, report and timing, without its names; one error of each kind
ERROR_BYTES = 36  # of each further error in the report
FILE_BYTES = 170  # of a file's lines in the report, without its name
LINE_BYTES = 40  # of a line with a name and a word or number


def footprint(source: Checkpoint, made: Schedule, recipe: Recipe) -> int:
    """Most bytes of the whole folder that is made of `source` as `made` says.

    Of a model on the Hub that is not downloaded the files beside its weights are not counted.
    """
    carried = companion_files(source.folder)
    carried_bytes = sum((source.folder / path).stat().st_size for path in carried)
    return made.weight_bytes + carried_bytes + loader_bytes() + _said(source, made, recipe, [*map(str, carried)])


def _said(source: Checkpoint, made: Schedule, recipe: Recipe, carried: list[str]) -> int:
    """Of config.json, index, report, card and timing."""
    errors = sum(ERROR_BYTES * (p.iterations + 10) for p in made.plan.layers if not p.bits)
    names = sum(2 * _size(p.layer.name) + _size(p.layer.tensor) + _size(p.layer.disk_module) for p in made.plan.layers)
    layers = LAYER_BYTES * len(made.plan.layers) + names
    skipped = sum(2 * (_size(name) + _size(reason) + LINE_BYTES) for name, reason in made.plan.skipped.items())
    files = [*carried, *(shard.file for shard in made.shards), *(file.path.name for file in source.files)]
    listed = sum(FILE_BYTES + _size(name) for name in files)
    index = 0
    if len(made.shards) > 1:
        tensors = [name for unit in made.units for name in tensor_names(*unit)]
        index = sum(_size(name) + _size(made.shards[0].file) + LINE_BYTES for name in tensors)
    lines = layers + errors + skipped + listed + index
    return FRAME_BYTES + lines + _size(source.config) + 2 * _size(recipe.to_dict()) + _size_of_card(source)


def _size_of_card(source: Checkpoint) -> int:
    """Of what the card keeps of the source's."""
    return 2 * _size({key: str(value) for key, value in base_metadata(source.folder).items()})


def _size(content: Any) -> int:
    """Bytes of JSON, indented as it is written."""
    return len(json.dumps(content, indent=2, ensure_ascii=False, default=str).encode(errors="replace"))
