"""The files of the base model that go along: tokenizer, generation, code, licence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import CheckpointError
from .hub import OTHER_FOLDERS, OTHER_WEIGHTS
from .journal import FILE as JOURNAL
from .source import EVALUATION, REPORT, TIMING

# Tokenizers keep what they know in files of any ending, so what stays is named, and all else goes along.
LEFT_BEHIND = (
    "config.json", "README.md", REPORT, TIMING, EVALUATION, JOURNAL,
    "*.safetensors", "*.bin", *OTHER_WEIGHTS, "*.index.json", "*.index.*.json",
    "trainer_state.json", "events.out.tfevents.*", "*.log", "*.lock", "*.partial", "*.tmp", "*.pyc",
)  # fmt: skip
LEFT_FOLDERS = (
    *(pattern.removesuffix("/*") for pattern in OTHER_FOLDERS),
    "checkpoint-*", "runs", "wandb", "logs", "__pycache__", "*.partial",
)  # fmt: skip
MODEL_OF_ITS_OWN = ("config.json", "adapter_config.json", "model_index.json")
CARRIED_BYTES = 256 << 20  # a tokenizer is never larger; a stray data set may be


def companion_files(folder: Path) -> list[Path]:
    """Files beside the weights that a compressed copy needs, relative: all but weights and what a run leaves.

    Of sub-folders, what lies in those that hold no model of their own, and all that lies in those that
    sentence-transformers' modules.json names. Nothing is opened. CheckpointError on a link that leads out of the
    folder: a copy, pushed, would publish what it points to.
    """
    root = folder.resolve()
    homes = (root, root.parent.parent / "blobs")  # the Hub's cache keeps a snapshot as links to its blobs
    found = []
    for path in _candidates(folder):
        if not any(home in path.resolve().parents for home in homes):
            raise CheckpointError(
                f"{path} is a link to {path.resolve()}, outside the model's folder. Copy the file there if it "
                "belongs to the model, or remove the link."
            )
        found.append(path.relative_to(folder))
    return found


def copy_companions(folder: Path, destination: Path) -> None:
    """Copy the companion files byte for byte."""
    for relative in companion_files(folder):
        target = destination / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / relative, target)


def _candidates(folder: Path) -> Iterator[Path]:
    modules = _sentence_modules(folder)
    for path in _visible(folder):
        if path.is_dir():
            yield from _of_sub_folder(path, whole=path.name in modules)
        elif path.is_file() and not _is_left(path.name, LEFT_BEHIND) and path.stat().st_size <= CARRIED_BYTES:
            yield path


def _of_sub_folder(folder: Path, *, whole: bool) -> list[Path]:
    """Files of a sub-folder, none if it is a model of its own or a data set; `whole`: all, with their weights."""
    files = [path for path in _visible(folder) if path.is_file()]
    if whole:
        return files
    if _is_left(folder.name, LEFT_FOLDERS) or any((folder / name).is_file() for name in MODEL_OF_ITS_OWN):
        return []
    files = [path for path in files if not _is_left(path.name, LEFT_BEHIND)]
    return files if sum(path.stat().st_size for path in files) <= CARRIED_BYTES else []


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder, without hidden and unprintable names; nothing if it may not be listed, as lost+found."""
    try:
        names = sorted(os.listdir(folder))
    except PermissionError:
        return []
    return [folder / name for name in names if not name.startswith(".") and name.isprintable()]


def _is_left(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)


def _sentence_modules(folder: Path) -> set[str]:
    """Sub-folders in which sentence-transformers keeps what follows the transformer, such as 1_Pooling."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    listed = modules if isinstance(modules, list) else []
    return {str(module["path"]) for module in listed if isinstance(module, dict) and module.get("path")}
