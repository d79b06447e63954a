"""What a run is said to need, against what it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys
from terminal import bare_environment

from losparse_cli.checkpoint.report import Report
from losparse_cli.cli.console import size
from losparse_cli.cli.summary import show_plan
from losparse_cli.compress import compress, plan, run
from losparse_cli.compression.estimate import forecast
from losparse_cli.errors import OutputError
from losparse_cli.refine import prepare_refinement
from losparse_cli.refinement import run as refinement
from losparse_cli.text.request import Calibration
from tests.printed import printed

TEXT = " ".join(f"Sentence {k} of the text says that {k * k % 97} is not {k}." for k in range(300))
TRAINED: dict[str, Any] = {"refinement": {"mode": "model", "steps": 2}}


@pytest.fixture
def text(tmp_path: Path) -> Calibration:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return Calibration(str(tmp_path / "text.txt"), tokens=1280, length=32, batch=4)


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("sizes", [{"bits": 3.0}, {"keep": 0.6}])
def test_the_space_that_training_takes(
    sizes: dict[str, Any], toy: Callable[..., Path], text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most what is on the disk when the result is written, and not far above."""
    found: list[int] = []
    write = refinement.write_refined

    def watched(*arguments: Any) -> Report:
        report = write(*arguments)
        found.append(weight_bytes(tmp_path))
        return report

    monkeypatch.setattr(refinement, "write_refined", watched)
    dense = toy("llama", tokenizer=True)
    job = plan(dense, tmp_path / "out", calibration=text, **sizes, **TRAINED)
    said = forecast(job)
    assert f"{size(said.space)} until it is trained" in " ".join(printed(lambda out: show_plan(out, said), 100).split())
    run(job)
    small = compress(dense, tmp_path / "small", **sizes).output
    before = weight_bytes(tmp_path)
    again = prepare_refinement(small, tmp_path / "two", calibration=text, against=dense, **TRAINED)
    needed = forecast(again).space
    refinement.run_model(again)
    with monkeypatch.context() as full:
        full.setattr("losparse_cli.checkpoint.output.free_bytes", lambda place: 0)
        assert forecast(job).finished  # which takes no space
    for taken, space in zip((found[0], found[1] - before), (said.space, needed), strict=True):
        assert taken <= 1.05 * space
        assert space < 2 * taken


def test_a_disk_that_is_too_small_for_training_is_refused_before_the_work(
    toy: Callable[..., Path], text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = plan(toy("llama", tokenizer=True), tmp_path / "out", bits=3.0, calibration=text, **TRAINED)
    space = forecast(job).space
    monkeypatch.setattr("losparse_cli.checkpoint.output.free_bytes", lambda place: space - 1)
    for ask in (forecast, run):
        with pytest.raises(OutputError, match=rf"the run needs about {space:,} more"):
            ask(job)
        assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    monkeypatch.setattr("losparse_cli.checkpoint.output.free_bytes", lambda place: space)
    forecast(job)


@pytest.mark.parametrize("sizes", [("--keep", "0.6"), ("--bits", "4")])
def test_memory_is_not_said_too_low(sizes: tuple[str, str], tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model")
    said = forecast(plan(model, tmp_path / "out", {sizes[0].removeprefix("--"): float(sizes[1])})).peak_bytes
    command = [sys.executable, "-m", "losparse_cli", "compress", model, "-o", tmp_path / "out", *sizes]
    subprocess.run(command, env=bare_environment(tmp_path), capture_output=True, check=True)
    taken = json.loads((tmp_path / "out" / "losparse_timing.json").read_text())["run"]["peak_memory_bytes"]
    assert 0.95 * taken < said < 1.5 * taken
