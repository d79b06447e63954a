"""A run that is killed goes on where it was and ends with the same bytes; a run that differs is refused."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys
from terminal import Running, done, losparse, shared

OPTIONS = ("--rank", "4", "--sparsity", "0.8", "--iterations", "3", "--max-shard-size", "300kB")
JOURNAL = "losparse_journal.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.llama(tmp_path_factory.mktemp("models") / "model", layers=8, shards=2, hidden=160, intermediate=200)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of an undisturbed run into a folder called `out`."""
    place = tmp_path_factory.mktemp("undisturbed")
    done("compress", model, "-o", "out", *OPTIONS, cwd=place)
    found = toys.digests(place / "out")
    assert sum(name.endswith(".safetensors") for name in found) > 3
    return found


STOP = """
import os, signal, threading
from losparse_cli.checkpoint import journal, writer
left = {count}
def stop(for_good=False):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        if for_good:  # the signal may reach another thread first, and this one would finish what it tears
            threading.Event().wait()
append, write_all = journal.Journal._append, writer._write_all
"""
PLACES = {
    "after a line": """
def whole_line(self, line):
    append(self, line)
    stop()
journal.Journal._append = whole_line
""",
    "inside a line": """
def torn_line(self, line):
    if left == 1:
        self._file.write(b'{"number":1,"sha')
    stop(for_good=True)
    append(self, line)
journal.Journal._append = torn_line
""",
    "inside a tensor": """
def half_a_tensor(file, piece):
    write_all(file, bytes(piece)[: len(piece) // 2])
    stop(for_good=True)
    file.seek(-(len(piece) // 2), os.SEEK_CUR)
    write_all(file, piece)
writer._write_all = half_a_tensor
""",
}


def started(place: Path, count: int, *arguments: object, where: str = "after a line") -> Running:
    """A command in `place` that has stopped itself at that line, or tensor, of its own run, and waits for a signal."""
    running = shared().start(*arguments, cwd=place, before=STOP.format(count=count) + PLACES[where])
    while running.state != "T":
        assert running.state != "Z", running.wait()
        time.sleep(0.001)
    return running


def killed(model: Path, place: Path, count: int, where: str = "after a line") -> Path:
    """The working folder of a run that was killed there."""
    running = started(place, count, "compress", model, "-o", "out", *OPTIONS, where=where)
    running.kill()
    assert running.wait().code == -signal.SIGKILL
    assert not (place / "out").exists()
    return place / "out.partial"


def test_ten_kills_change_nothing(model: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """At random places: after a line of the journal, inside one, and inside a tensor."""
    chance = random.Random(0)
    reached = []
    for kill in range(10):
        work = killed(model, tmp_path, chance.randint(3, 9), [*PLACES][kill % 3])
        reached.append((work / JOURNAL).read_bytes().count(b"\n"))
    assert reached == sorted(reached)  # each went on where the last one was
    assert 10 < reached[-1] < 8 * 9 + 2
    ended = done("compress", model, "-o", "out", *OPTIONS, "--resume", "required", cwd=tmp_path)
    assert "Going on after layer" in ended.err
    assert toys.digests(tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


DIE = """
import os, pathlib, signal
from losparse_cli.checkpoint import finish, workfolder, writer
rename = pathlib.Path.rename
def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
{where}
"""

WINDOWS = {
    "before the headers": "writer.ShardWriter.finish = die",
    "before the card": "finish.close = die",
    "before publishing": "workfolder.WorkFolder.publish = die",
    "before the rename": "pathlib.Path.rename = die",
    "after the rename": "pathlib.Path.rename = lambda *paths: (rename(*paths), die())",
}


@pytest.mark.parametrize("window", WINDOWS)
def test_a_kill_while_the_result_is_finished(window: str, model: Path, whole: dict[str, str], tmp_path: Path) -> None:
    before = DIE.format(where=WINDOWS[window])
    ended = losparse("compress", model, "-o", "out", *OPTIONS, cwd=tmp_path, before=before)
    assert ended.code == -signal.SIGKILL
    assert (tmp_path / "out").exists() == (window == "after the rename")
    again = losparse("compress", model, "-o", "out", *OPTIONS, cwd=tmp_path)
    assert again.code == 0, again.err
    assert ("Going on after layer 56 of 56." in again.err) == (window != "after the rename")
    assert not re.search(r"^layer \d", again.err, re.MULTILINE)  # nothing was solved again
    assert toys.digests(tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


SECOND_RENAME = """
renamed = []
pathlib.Path.rename = lambda *paths: die() if renamed else renamed.append(rename(*paths))
"""


def test_a_kill_while_an_old_result_is_replaced(model: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """Between the two renames the old result has its other name, and the new one is still whole."""
    done("compress", model, "-o", "out", "--rank", "2", "--sparsity", "0.9", cwd=tmp_path)
    old = toys.digests(tmp_path / "out")
    before = DIE.format(where=SECOND_RENAME)
    losparse("compress", model, "-o", "out", *OPTIONS, "--overwrite", cwd=tmp_path, before=before)
    assert toys.digests(tmp_path / "out.replaced-by-losparse") == old
    done("compress", model, "-o", "out", *OPTIONS, "--overwrite", "--resume", "required", cwd=tmp_path)
    assert toys.digests(tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_overwrite_replaces_the_whole_folder(model: Path, whole: dict[str, str], tmp_path: Path) -> None:
    done("compress", model, "-o", "out", "--rank", "2", "--sparsity", "0.9", cwd=tmp_path)
    (tmp_path / "out" / "stale.json").write_text("{}")
    assert losparse("compress", model, "-o", "out", *OPTIONS, cwd=tmp_path).code == 2
    done("compress", model, "-o", "out", *OPTIONS, "--overwrite", cwd=tmp_path)
    assert toys.digests(tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_same_command_again_does_nothing(model: Path, whole: dict[str, str], tmp_path: Path) -> None:
    done("compress", model, "-o", "out", *OPTIONS, cwd=tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    for resume in ("auto", "required", "never"):
        again = done("compress", model, "-o", "out", *OPTIONS, "--resume", resume, cwd=tmp_path)
        assert "layer 1" not in again.err
        assert "Done." in again.out
        assert "0.0 s" not in again.out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times
    assert toys.digests(tmp_path / "out") == whole


# --- what a crash may leave -----------------------------------------------------------------------


def tear_last_line(work: Path) -> None:
    path = work / JOURNAL
    raw = path.read_bytes()
    path.write_bytes(raw[: raw[:-1].rindex(b"\n") + 20])


def join_last_lines(work: Path) -> None:
    """What a crash of the machine can leave: a block of zeros inside the journal."""
    path = work / JOURNAL
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 100] = bytes(100)
    path.write_bytes(raw)


def damage_first_shard(work: Path) -> None:
    path = min(work.glob("*.safetensors"))
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def cut_last_shard(work: Path) -> None:
    path = max(work.glob("*.safetensors"))
    os.truncate(path, path.stat().st_size // 2)


def lose_a_shard(work: Path) -> None:
    max(work.glob("*.safetensors")).unlink()


def lengthen_a_shard(work: Path) -> None:
    with max(work.glob("*.safetensors")).open("ab") as file:
        file.write(bytes(1000))


@pytest.mark.parametrize(
    "harm", [tear_last_line, join_last_lines, damage_first_shard, cut_last_shard, lose_a_shard, lengthen_a_shard]
)
def test_harm_behind_the_journals_back_is_done_again(
    harm: Callable[[Path], None], model: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    work = killed(model, tmp_path, 40)
    harm(work)
    done("compress", model, "-o", "out", *OPTIONS, cwd=tmp_path)
    assert toys.digests(tmp_path / "out") == whole


@pytest.mark.parametrize("content", [b"", b"{", b"\n", b"[1]\n", b'{"losparse": "0.0.0"', b"5\n"])
def test_a_journal_without_a_beginning_is_begun_anew(
    content: bytes, model: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / JOURNAL).write_bytes(content)
    required = losparse("compress", model, "-o", "out", *OPTIONS, "--resume", "required", cwd=tmp_path)
    assert "nothing to resume" in required.complaint
    done("compress", model, "-o", "out", *OPTIONS, cwd=tmp_path)
    assert toys.digests(tmp_path / "out") == whole


# --- the wrong run --------------------------------------------------------------------------------

DIFFERENT: dict[str, tuple[tuple[str, ...], str]] = {
    "another seed": ((*OPTIONS, "--seed", "1"), "--seed 0, now 1"),
    "another rank": (("--rank", "5", *OPTIONS[2:]), "--rank 4, now 5"),
    "other shards": ((*OPTIONS[:-1], "200kB"), "plan"),
    "fewer layers": ((*OPTIONS, "--ignore", "*.0.*"), '--ignore [], now ["*.0.*"]'),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_another_request_may_not_go_on(case: str, model: Path, tmp_path: Path) -> None:
    options, differs = DIFFERENT[case]
    work = killed(model, tmp_path, 10)
    before = toys.digests(work)
    for resume in ("auto", "required"):
        ended = losparse("compress", model, "-o", "out", *options, "--resume", resume, cwd=tmp_path)
        assert f"of a different run (different: {differs})" in ended.complaint
        assert "--resume never" in ended.complaint
        assert ended.code == 1
    assert toys.digests(work) == before
    done("compress", model, "-o", "out", *options, "--resume", "never", cwd=tmp_path)
    done("verify", "out", cwd=tmp_path)


def test_a_source_that_changed_may_not_be_gone_on_with(tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model", layers=8)
    killed(model, tmp_path, 10)
    toys.llama(model, layers=8, seed=1)
    ended = losparse("compress", model, "-o", "out", *OPTIONS, cwd=tmp_path)
    assert "(different: source.model.safetensors)" in ended.complaint


def test_resume_never_starts_anew(model: Path, whole: dict[str, str], tmp_path: Path) -> None:
    work = killed(model, tmp_path, 30)
    (work / "model-09999-of-09999.safetensors").write_bytes(b"of a plan long gone")
    ended = done("compress", model, "-o", "out", *OPTIONS, "--resume", "never", cwd=tmp_path)
    assert "Going on" not in ended.err
    assert toys.digests(tmp_path / "out") == whole


@pytest.mark.parametrize("resume", ["auto", "required", "never"])
def test_two_runs_at_once(resume: str, model: Path, whole: dict[str, str], tmp_path: Path) -> None:
    first = started(tmp_path, 5, "compress", model, "-o", "out", *OPTIONS)
    second = losparse("compress", model, "-o", "out", *OPTIONS, "--resume", resume, cwd=tmp_path)
    os.kill(first.pid, signal.SIGCONT)
    assert "Another losparse is writing" in second.complaint
    assert "out.partial" in second.complaint
    ended = first.wait()
    assert ended.code == 0, ended.err
    assert toys.digests(tmp_path / "out") == whole


# --- export ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compressed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compressed")
    done("compress", model, "-o", "out", *OPTIONS, cwd=place)
    return place / "out"


def test_a_killed_export_goes_on(compressed: Path, tmp_path: Path) -> None:
    export = ("export", compressed, "--dense", "-o", "dense", "--max-shard-size", "300kB")
    done(*export, cwd=tmp_path)
    undisturbed = toys.digests(tmp_path / "dense")
    shutil.rmtree(tmp_path / "dense")
    for where in PLACES:
        running = started(tmp_path, 15, *export, where=where)
        running.kill()
        assert running.wait().code == -signal.SIGKILL
    done(*export, cwd=tmp_path)
    assert toys.digests(tmp_path / "dense") == undisturbed


def test_an_export_does_not_go_on_from_a_compression(compressed: Path, model: Path, tmp_path: Path) -> None:
    killed(model, tmp_path, 5)
    ended = losparse("export", compressed, "--dense", "-o", "out", cwd=tmp_path)
    assert "a different run" in ended.complaint
    assert "delete that folder" in ended.complaint


def test_an_export_notices_another_config(compressed: Path, tmp_path: Path) -> None:
    source = shutil.copytree(compressed, tmp_path / "source")
    running = started(tmp_path, 5, "export", source, "--dense", "-o", "dense")
    running.kill()
    assert running.wait().code == -signal.SIGKILL
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    toys.write_json(source / "config.json", config | {"torch_dtype": "float32"})
    ended = losparse("export", source, "--dense", "-o", "dense", cwd=tmp_path)
    assert "(different: source.config.json)" in ended.complaint


def test_an_interrupted_run_goes_on(model: Path, whole: dict[str, str], tmp_path: Path) -> None:
    running = started(tmp_path, 20, "compress", model, "-o", "out", *OPTIONS)
    os.kill(running.pid, signal.SIGINT)
    os.kill(running.pid, signal.SIGCONT)
    ended = running.wait()
    assert ended.code == 130
    assert "goes on where it stopped" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err
    again = done("compress", model, "-o", "out", *OPTIONS, cwd=tmp_path)
    assert "Going on after layer" in again.err
    assert toys.digests(tmp_path / "out") == whole
