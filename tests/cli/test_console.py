"""A reader that leaves, a user who interrupts, and the time that is left."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from losparse_cli.cli import app as terminal
from losparse_cli.cli.bars import TimeLeft, bars
from losparse_cli.cli.commands import COMMANDS
from losparse_cli.cli.console import Console as Output
from losparse_cli.cli.console import LayerProgress, Screen, invoked, is_told
from losparse_cli.errors import Interrupted


def test_work_goes_on_where_the_reader_has_left() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as file:
        screen = Screen(file=file, width=80)
        for _ in range(3):
            screen.print("x" * 100)
        file.write("what a library says")  # and the file is closed without a complaint


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("losparse_cli.cli.console.Console", stop)
    monkeypatch.setattr("losparse_cli.cli.console.calm_libraries", stop)
    monkeypatch.setattr(sys, "argv", ["losparse", "verify", "nothing"])
    with pytest.raises(SystemExit) as ended:
        terminal.main()
    assert ended.value.code == 130
    assert "error: Interrupted. The same command begins anew." in " ".join(capsys.readouterr().err.split())


def test_a_command_to_type_is_one_that_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "python").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["-c"])  # as a process that another one began
    monkeypatch.setattr(sys, "executable", str(bin_ / "python"))
    monkeypatch.setenv("PATH", "")
    assert invoked() == "bin/python -m losparse_cli"
    (bin_ / "losparse").touch(0o755)
    assert invoked() == "bin/losparse"
    monkeypatch.setenv("PATH", str(bin_))
    assert invoked() == "losparse"


def test_an_interrupt_before_the_command_is_a_sentence_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "app", stop)
    with pytest.raises(SystemExit) as ended:
        terminal.main()
    assert ended.value.code == 130
    assert "error: Interrupted. Nothing was begun." in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_command_is_registered_with_that_sentence(command: object) -> None:
    found = [info.callback for info in terminal.app.registered_commands]
    assert [getattr(callback, "__wrapped__", None) for callback in found].count(command) == 1


def test_only_a_sentence_comes_of_an_interrupt() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="begins anew"):
        terminal.interruptible(stop)()


def test_the_time_left_is_labelled_and_shown_once() -> None:
    progress = Progress()
    for unit in ("layers", "bytes"):
        progress.add_task(unit, total=10, unit=unit)
    assert [TimeLeft().render(task).plain for task in progress.tasks] == ["--:-- left", ""]
    progress.add_task("items", total=10)
    assert TimeLeft().render(progress.tasks[-1]).plain == "--:-- left"


def shown(width: int, *tasks: dict[str, Any]) -> list[str]:
    """The lines of bars in a terminal of that width."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    progress = bars(console)
    for task in tasks:
        progress.add_task(**task)
    console.print(progress.get_renderable())
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [40, 80, 100, 160])
def test_a_bar_is_one_line_at_every_width(width: int) -> None:
    name = "model.decoder.layers.11.self_attn.out_projection"
    layers = {"description": "Layers", "total": 210, "completed": 123, "note": f"{name}  error 0.123", "unit": "layers"}
    weights = {"description": "Bytes", "total": 26_900_000_000, "completed": 2_690_000_000, "note": "", "unit": "bytes"}
    lines = shown(width, layers, weights)
    assert len(lines) == 2
    assert all(len(line) <= width for line in lines)
    assert "123/210" in lines[0]
    if width > 40:
        assert lines[0].endswith("error 0.123")
        assert "2.7/26.9 GB" in lines[1]
    assert (name in lines[0]) == (width == 160)


def test_a_name_with_brackets_is_shown_as_it_is() -> None:
    assert "[bold]/x" in shown(80, {"description": "Reading [bold]/x", "total": None, "note": "[a]"})[0]


def test_nothing_is_said_of_amount_and_time_before_they_are_known() -> None:
    [line] = shown(80, {"description": "Layers", "total": None, "note": "sensitivity: block 1 of 30", "unit": "layers"})
    assert line.startswith("Layers")
    assert line.endswith("sensitivity: block 1 of 30")
    assert not {"?", "left", "0"} & {*line.replace("of 30", "").replace("/", " ").split()}


def test_per_cent() -> None:
    [line] = shown(80, {"description": "Training", "total": 100, "completed": 42, "note": "step 7", "unit": "percent"})
    assert " 42% " in line


def test_in_a_pipe_the_beginning_of_each_stage_before_the_layers_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with LayerProgress(Output()) as progress:
        for text in ("sensitivity: block 1 of 2", "sensitivity: block 2 of 2", "allocating: block 1 of 2"):
            progress.phase(text)
        progress.start("layers", 30)
        progress.phase("h.0: solving fc")
    assert capsys.readouterr().err.splitlines() == ["sensitivity: block 1 of 2", "allocating: block 1 of 2"]


def test_about_ten_lines_evenly_spaced() -> None:
    assert [done for done in range(1, 16) if is_told(done, 15)] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert [done for done in range(1, 212) if is_told(done, 211)] == [*range(22, 211, 22), 211]
    assert [done for done in range(1, 4) if is_told(done, 3)] == [1, 2, 3]
