"""Tensors on disk that hold a matrix of all experts -> an entry for each expert's, as if they lay there one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from difflib import SequenceMatcher
from typing import Any

from ..checkpoint.reader import FLOATING, TensorEntry
from ..checkpoint.source import Checkpoint
from ..errors import CheckpointError, UsageError
from ..models.names import NameMap
from ..models.skeleton import Skeleton, build_skeleton
from ..shim.experts import SplitExperts


def open_experts(source: Checkpoint, *, trust_remote_code: bool = False) -> tuple[Checkpoint, Skeleton]:
    """The dense checkpoint with an entry for each matrix of each expert, and its skeleton with a layer for each.

    What lies one by one on disk does already. UsageError if a tensor of all experts is no floating point, and
    CheckpointError if it has another shape than config.json asks for.
    """
    folder, config = source.folder, source.config
    together = [entry.name for entry in source.entries.values() if len(entry.shape) == 3]
    skeleton = build_skeleton(folder, config, together, trust_remote_code=trust_remote_code)
    found = dict(_slices(source, skeleton.model))
    if not found:
        return source, skeleton
    if any(not parts for parts in found.values()):  # the loader would not find them again: all stay as they are
        return source, build_skeleton(folder, config, trust_remote_code=trust_remote_code)
    entries = {part.name: part for entry in source.entries.values() for part in found.get(entry.name, (entry,))}
    return replace(source, entries=entries), skeleton


def parted(source: Checkpoint) -> list[str]:
    """The tensors on disk that its entries are parts of."""
    return list(dict.fromkeys(entry.part.whole for entry in source.entries.values() if entry.part is not None))


def _slices(source: Checkpoint, model: Any) -> Iterator[tuple[str, list[TensorEntry]]]:
    """Tensor of all experts -> its entries, none if transformers would rename what is stored in their place."""
    names = NameMap(model, ())
    for owner, module in model.named_modules():
        if not isinstance(module, SplitExperts):
            continue
        for parameter, tensor in module.stored.items():
            entry = source.entries[tensor]
            m, n = module.form.shapes[parameter]
            if entry.dtype not in FLOATING:
                raise UsageError(
                    f"{tensor} in {entry.path} is stored as {entry.dtype}, not as floating point: it is quantized "
                    "already. Start from the unquantized checkpoint."
                )
            memory = module.shapes[parameter]
            if entry.shape not in (memory, (module.count, m, n), (module.count, n, m)):
                raise CheckpointError(
                    f"{tensor} in {entry.path} has shape {list(entry.shape)}, but config.json asks for {list(memory)}, "
                    f"of {module.count} experts. config.json and the weights do not belong together."
                )
            # Where transformers turns a tensor at load it does so by its shape: what has the shape already stays.
            transposed = module.form.turned if entry.shape == memory else not module.form.turned
            first = names.disk_module(f"{owner}.0.{parameter}", f"{_beside(tensor, owner)}.0.{parameter}.weight")
            place = (first or "").rsplit(".", 2)[0]
            parts = [f"{place}.{number}.{parameter}.weight" for number in range(module.count)]
            yield tensor, entry.matrices(parts, transposed=transposed) if first else []


def _beside(tensor: str, owner: str) -> str:
    """What the module `owner` is called on disk, beside a tensor of it: by the prefix of that, where it has another."""
    disk, memory = tensor.split("."), owner.split(".")
    run = SequenceMatcher(None, disk, memory, autojunk=False).find_longest_match()
    return ".".join([*disk[: run.a], *memory[run.b :]])
