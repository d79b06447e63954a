"""A file, a dataset of the Hub -> rows, complete enough for the task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import UsageError, flag
from ..text.files import find_file
from ..text.hub import open_dataset
from ..text.rows import read_file, value_of
from .columns import columns_of
from .request import TaskRequest


@dataclass(frozen=True)
class Rows:
    """columns: the names there are. rows: name -> value. name: the file or dataset, for messages.

    numbers: of every row in its source, counted from 1 (lines of a file of JSON lines; empty: 1, 2, 3, ...).
    class_names: of a column of class numbers that comes with names, the names in order.
    """

    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    name: str
    numbers: tuple[int, ...] = ()
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, k: int) -> str:
        """Where the k-th row (from 0) lies, for a message."""
        return f"{self.name}, row {self.numbers[k] if self.numbers else k + 1}"


def read_rows(request: TaskRequest, part: str) -> Rows:
    """The rows of a part, "train" or "validation", in the order they lie in; at most as many as were asked for.

    Fewer than there are are drawn by the request's seed, for files are often sorted by label. UsageError if nothing
    was named for that part, if there are no rows, or if a column is missing; SourceError for what cannot be read;
    MissingExtraError without the package that reads it.
    """
    made = _from_hub(request, part) if request.dataset_name else _from_file(request, part)
    for role, column in columns_of(request, made.columns, made.name).items():
        for k, row in enumerate(made.rows):
            value_of(row, column, flag(role), made.place(k))
    return made


def _from_hub(request: TaskRequest, part: str) -> Rows:
    assert request.dataset_name
    split = getattr(request, f"{part}_split")
    choose = f"Choose with {flag(f'{part}_split')}, or a configuration with --dataset-config-name."
    name = f"{request.dataset_name} ({split})"
    with open_dataset(request.dataset_name, request.dataset_config_name, split, choose=choose) as found:
        chosen = _draw(len(found), request, part, name)
        rows = found.select(chosen).to_list()
    classes = {column: tuple(kind.names) for column, kind in found.features.items() if hasattr(kind, "int2str")}
    return Rows(tuple(found.column_names), rows, name, tuple(k + 1 for k in chosen), classes)


def _from_file(request: TaskRequest, part: str) -> Rows:
    file = getattr(request, f"{part}_file")
    if not file:
        raise UsageError(f"There are no rows for {part}. Give {flag(f'{part}_file')}, or --dataset-name.")
    path = find_file(file, flag(f"{part}_file"), ", or give --dataset-name for a dataset of the Hub")
    found = list(read_file(path))
    chosen = _draw(len(found), request, part, file)
    columns = tuple(dict.fromkeys(name for _, _, row in found for name in row))
    return Rows(columns, [found[k][2] for k in chosen], file, tuple(found[k][1] for k in chosen))


def _draw(count: int, request: TaskRequest, part: str, name: str) -> list[int]:
    if not count:
        raise UsageError(f"{name} is empty: it has no rows. Give some for {part}.")
    limit: int | None = getattr(request, f"max_{part}_samples")
    if limit is None or limit >= count:
        return list(range(count))
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(request.seed))[:limit].tolist()
    return sorted(order)
