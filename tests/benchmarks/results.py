"""What long benchmarks share: the texts, and a file of results to which rows are added one by one."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from losparse_cli.demo import encyclopedia_text, news_text, spread
from losparse_cli.evaluate import evaluate
from losparse_cli.text.windows import Calibration

LENGTH = 512  # tokens of a window, of calibration and of measuring


@dataclass(frozen=True)
class Options:
    """small: two blocks, few tokens and windows, to see that everything works. every: n-th block for layer errors.

    results: file that every result is appended to. model: of `permuted.MODELS`, or a dense folder as it stands.
    """

    small: bool = False
    every: int = 1
    results: Path | None = None
    model: Path | None = None

    @cached_property
    def folder(self) -> Path:
        named = os.environ.get("LOSPARSE_BENCH_DIR")
        folder = Path(named) if named else Path(tempfile.gettempdir()) / f"losparse-bench-{os.getpid()}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def file(self) -> Path:
        return self.results or self.folder / "tests-benchmarks-calibrated.jsonl"

    @property
    def windows(self) -> int:
        return 4 if self.small else 32

    @cached_property
    def texts(self) -> dict[str, str]:
        """Name -> text to measure on."""
        return {"encyclopedia": spread(encyclopedia_text()[1], 2 * self.windows), "news": news_text()}

    def calibration(self, source: str = "") -> Calibration:
        """The encyclopedia's own part for it, or another source."""
        return Calibration(source or self._written("calibration.txt", 0), 4096 if self.small else 65536, LENGTH)

    def held_out(self) -> Calibration:
        return Calibration(self._written("held-out.txt", 1), 4096 if self.small else 16384, LENGTH)

    def _written(self, name: str, part: int) -> str:
        path = self.folder / name
        if not path.is_file():
            path.write_text(encyclopedia_text()[part], encoding="utf-8")
        return str(path)

    def targets(self, glob: str = "model.layers.[01].*") -> dict[str, Any]:
        return {"targets": (glob,)} if self.small else {}


def add_result(options: Options, bench: str, row: str, found: dict[str, Any]) -> None:
    line = {"bench": bench, "row": row, "small": options.small, "threads": torch.get_num_threads()} | found
    with options.file.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def results_of(options: Options, bench: str) -> dict[str, dict[str, Any]]:
    """Row -> its last result."""
    if not options.file.is_file():
        return {}
    lines = map(json.loads, options.file.read_text(encoding="utf-8").splitlines())
    return {line["row"]: line for line in lines if line["bench"] == bench and line["small"] == options.small}


def measured(options: Options, folder: Path, dense: Path | None) -> dict[str, Any]:
    """Text -> figures; in float32, so that the arithmetic adds nothing to what is measured."""
    return {
        name: evaluate(folder, text, against=dense, length=LENGTH, windows=options.windows, dtype="float32").to_dict()
        for name, text in options.texts.items()
    }
