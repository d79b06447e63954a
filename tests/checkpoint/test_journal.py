"""A journal keeps whole lines, belongs to one run and to one process, and notices a full disk."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from losparse_cli.checkpoint.journal import FILE, Journal, Unit, crc_of, require_same
from losparse_cli.errors import OutputError, ResumeError

RUN: dict[str, Any] = {"seed": 0, "shape": (1, 2)}


def unit(number: int) -> Unit:
    return Unit(number, 0, 10 * number, 10 * number + 10, 7, [("a", "U8", [10], 0, 10)], {"name": "x"}, 0.5)


def write(folder: Path, count: int) -> bytes:
    journal = Journal(folder, RUN)
    for number in range(len(journal.units), count):
        journal.add(unit(number))
    journal.close()
    return (folder / FILE).read_bytes()


def reopened(folder: Path, **options: bool) -> list[int]:
    journal = Journal(folder, RUN, **options)
    journal.close()
    return [found.number for found in journal.units]


def test_units_come_back(tmp_path: Path) -> None:
    write(tmp_path, 4)
    journal = Journal(tmp_path, RUN, required=True)
    assert [found.stats for found in journal.units] == [{"name": "x"}] * 4
    assert [found.number for found in journal.units] == [0, 1, 2, 3]
    journal.keep(2)
    journal.add(unit(2))
    journal.close()
    assert reopened(tmp_path) == [0, 1, 2]


@given(data=st.data())
def test_any_cut_loses_no_more_than_the_line_it_tears(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("journal")
    raw = write(folder, 5)
    cut = data.draw(st.integers(0, len(raw)))
    (folder / FILE).write_bytes(raw[:cut])
    whole = max(0, raw[:cut].count(b"\n") - 1)
    assert reopened(folder) == list(range(whole))
    assert write(folder, 5) == raw


@given(data=st.data())
def test_any_damaged_byte_ends_the_journal_there(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("journal")
    raw = bytearray(write(folder, 5))
    first = raw.index(b"\n") + 1
    at = data.draw(st.integers(first, len(raw) - 1))
    line = raw[:at].count(b"\n") - 1
    raw[at] = 0
    (folder / FILE).write_bytes(raw)
    assert reopened(folder) == list(range(line))


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    before = write(tmp_path, 3)
    for other, differs in (
        ({"seed": 1, "shape": (1, 2)}, "seed 0, now 1"),
        ({"seed": 1}, "seed 0, now 1, shape"),
        ({**RUN, "new": 1}, "new null, now 1"),
    ):
        with pytest.raises(ResumeError, match=rf"different: {differs}\)"):
            Journal(tmp_path, other)
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("began", "now", "differs"),
    [
        ({"towards": {"minutes": 1.0}}, {"towards": {"minutes": 2.0}}, "--refine-minutes 1.0, now 2.0"),
        ({"towards": None}, {"towards": {"minutes": 2.0, "tokens": 1024, "seed": 0, "lr": 1e-4}}, "--refine"),
        ({"towards": None, "refinement": {"steps": 192, "lr": 5e-4, "x": "y" * 40}},
         {"towards": {"minutes": 2.0, "tokens": 1024, "seed": 0}, "refinement": None}, "--refine"),
        ({"calibration": {"source": "a", "tokens": 1}}, {"calibration": {"source": "b", "tokens": 2}},
         '--calibration "a", now "b", --calibration-tokens 1, now 2'),
        ({"recipe": {"rank_ratio": 0.1, "layers": {"*.fc": {"keep": 0.2}}}},
         {"recipe": {"rank_ratio": 0.2, "layers": {"*.fc": {"keep": 0.3}}}},
         "layers.*.fc.keep 0.2, now 0.3, --rank-ratio 0.1, now 0.2"),
        ({"start": "x", "towards": {"train": "norms"}}, {"start": "x", "towards": {"train": "lowrank"}},
         '--train "norms", now "lowrank"'),
        ({"training": {"max_steps": 1, "pruning": {"every": 2, "beta": 0.5}}},
         {"training": {"max_steps": 2, "pruning": {"every": 3, "beta": 0.6}}},
         "--max-steps 1, now 2, --beta 0.5, now 0.6, --prune-every 2, now 3"),
        ({"threads": 1, "source": {"a.json": "x"}}, {"threads": 2, "source": {"a.json": "y"}},
         'source.a.json "x", now "y", threads 1, now 2'),
    ],
)  # fmt: skip
def test_what_differs_goes_by_the_names_of_options(
    began: dict[str, Any], now: dict[str, Any], differs: str, tmp_path: Path
) -> None:
    with pytest.raises(ResumeError) as raised:
        require_same(tmp_path, began, now)
    assert f"(different: {differs})" in str(raised.value)


def test_required_insists(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="nothing to resume"):
        Journal(tmp_path, RUN, required=True)


def test_discard_removes_what_was_there(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (tmp_path / "model.safetensors").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    journal = Journal(tmp_path, {"another": "run"}, discard=True)
    journal.close()
    assert journal.units == []
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_folder_of_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for discard in (False, True):
        with pytest.raises(OutputError, match="losparse did not make it"):
            Journal(tmp_path, RUN, discard=discard)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("discard", [False, True])
def test_a_second_process_is_kept_out(discard: bool, tmp_path: Path) -> None:
    """flock belongs to the open file, so a second one in this process stands for another process."""
    journal = Journal(tmp_path, RUN)
    journal.add(unit(0))
    with pytest.raises(ResumeError, match="Another losparse is writing"):
        Journal(tmp_path, RUN, discard=discard)
    journal.add(unit(1))
    journal.close()
    assert reopened(tmp_path) == [0, 1]


def test_a_journal_that_was_moved_away_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process published the folder between our opening the file and our locking it."""
    lock = fcntl.flock

    def late(*arguments: Any) -> None:
        (tmp_path / FILE).unlink()
        lock(*arguments)

    write(tmp_path, 1)
    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ResumeError, match="has just finished"):
        Journal(tmp_path, RUN)


def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    write(tmp_path, 2)
    assert reopened(tmp_path) == [0, 1]


def test_a_full_disk_is_noticed_at_once(tmp_path: Path) -> None:
    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, raw: bytes) -> int:
            if len(raw) > 20:
                return int(self.file.write(raw[:20]))  # a short write first, as a filling disk gives
            raise OSError(errno.ENOSPC, "full")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    write(tmp_path, 2)
    journal = Journal(tmp_path, RUN)
    journal._file = Full(journal._file)
    with pytest.raises(OSError, match="full"):
        journal.add(unit(2))
    assert len(journal.units) == 2
    journal.close()
    assert reopened(tmp_path) == [0, 1]


def test_checksums_of_a_range(tmp_path: Path) -> None:
    import zlib

    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    assert crc_of(path, 10, 20) == zlib.crc32(bytes(range(10, 20)))
    assert crc_of(path, 5, 5) == 0
    assert crc_of(path, 90, 101) is None
