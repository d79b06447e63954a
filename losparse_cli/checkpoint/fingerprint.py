"""What tells two states of a checkpoint apart without reading its weights, so that a run goes on with its own work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from .companions import companion_files
from .source import Checkpoint


def file_states(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Weight file -> size and time of its last change, in ns."""
    status = {file.path.name: file.path.stat() for file in checkpoint.files}
    return {name: [found.st_size, found.st_mtime_ns] for name, found in status.items()}


def companion_states(checkpoint: Checkpoint) -> list[list[str | int]]:
    """File beside the weights, its size and time of its last change, in ns."""
    status = [(path, (checkpoint.folder / path).stat()) for path in companion_files(checkpoint.folder)]
    return [[str(path), found.st_size, found.st_mtime_ns] for path, found in status]


def identity(mark: Mapping[str, Any]) -> dict[str, Any]:
    """A run's fingerprint without what a copy of its models elsewhere changes: times of files."""
    read = {key: mark[key] for key in ("source", "start") if isinstance(mark.get(key), dict)}
    sizes = {key: {file: state[0] for file, state in files.items()} for key, files in read.items()}
    return {key: value for key, value in mark.items() if key != "companions"} | sizes


def digest(content: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
