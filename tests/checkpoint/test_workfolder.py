"""The life of a work folder: published whole, kept for the next try, or gone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from losparse_cli.checkpoint.journal import FILE as JOURNAL
from losparse_cli.checkpoint.workfolder import WorkFolder
from losparse_cli.errors import CheckpointError, OutputError, ResumeError, SourceError, UsageError

RUN = {"recipe": {"rank": 8, "seed": 0}, "threads": 2, "text": "a" * 64}


def fill(work: WorkFolder) -> None:
    (work.path / "model.safetensors").write_bytes(b"weights")


def ended(
    output: Path,
    error: BaseException,
    cause: BaseException | None = None,
    fill: Callable[[WorkFolder], object] = fill,
) -> None:
    """A run that wrote something and then ended with `error`."""
    with WorkFolder(output, RUN) as work:
        fill(work)
        raise error from cause


def test_it_is_published_without_its_journal_and_leaves_nothing_beside(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("{}")
    with WorkFolder(output, RUN, overwrite=True) as work:
        fill(work)
        assert (output / "config.json").is_file()  # until all is written
        work.publish()
    assert [path.name for path in output.iterdir()] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OutputError("full"), MemoryError(), RuntimeError("a bug")])
def test_what_ends_otherwise_than_by_its_input_is_kept(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        ended(tmp_path / "out", error)
    assert (tmp_path / "out.partial" / "model.safetensors").is_file()
    with WorkFolder(tmp_path / "out", RUN, resume="required") as work:  # the lock was let go of
        assert (work.path / "model.safetensors").is_file()


def test_where_nothing_was_finished_nothing_is_kept(tmp_path: Path) -> None:
    for error in (OutputError("no room"), RuntimeError("at once")):
        with pytest.raises(type(error)):
            ended(tmp_path / "made" / "out", error, fill=lambda work: (work.path / "training").mkdir())
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [UsageError, SourceError, CheckpointError])
def test_what_ends_because_of_its_input_leaves_nothing(kind: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(kind):
        ended(tmp_path / "made" / "here" / "out", kind("an infinity"))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError), WorkFolder(tmp_path / "there" / "out", RUN):
        raise UsageError("no")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_file_that_could_not_be_read_may_be_there_the_next_time(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        ended(tmp_path / "out", CheckpointError("Cannot read"), OSError(5, "Input/output error"))
    assert (tmp_path / "out.partial" / "model.safetensors").is_file()


def test_killed_after_the_rename(tmp_path: Path) -> None:
    """Only the journal was left to remove; of another run, the folder is in the way."""
    with WorkFolder(tmp_path / "out", RUN) as work:
        fill(work)
        kept = (work.path / JOURNAL).read_bytes()
        work.publish()
    (tmp_path / "out" / JOURNAL).write_bytes(kept)
    with pytest.raises(UsageError, match="exists already"), WorkFolder(tmp_path / "out", RUN | {"threads": 1}):
        pass
    with WorkFolder(tmp_path / "out", RUN) as work:
        assert work.finished
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_a_refused_resume_names_the_setting_and_both_values(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        ended(tmp_path / "out", KeyboardInterrupt())
    other = {"recipe": {"rank": 4, "seed": 0}, "threads": 2, "text": "b" * 64}
    work = WorkFolder(tmp_path / "out", other)
    for begin in (work.check, work.__enter__):
        with pytest.raises(ResumeError, match=r"\(different: --rank 8, now 4, text\)"):
            begin()
    WorkFolder(tmp_path / "out", other, resume="never").check()


def test_a_check_touches_nothing(tmp_path: Path) -> None:
    WorkFolder(tmp_path / "new" / "out", RUN).check()
    assert not list(tmp_path.iterdir())


def test_of_several_processes_one_owns_it(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "out", RUN) as work:
        with WorkFolder(tmp_path / "out", RUN, owner=False) as other:
            assert other.path == work.path
        fill(work)
        work.publish()
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("made", "resume"), [("folder", "auto"), ("folder", "never"), ("file", "auto"), ("link", "auto")]
)
def test_what_stands_in_the_way_is_known_beforehand(made: str, resume: str, tmp_path: Path) -> None:
    place = tmp_path / "out.partial"
    if made == "folder":
        place.mkdir()
        (place / "notes.txt").write_text("of somebody else")
    elif made == "file":
        place.write_text("of somebody else")
    else:
        place.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="is there, and losparse did not make it"):
        WorkFolder(tmp_path / "out", RUN, resume=resume).check()


def test_an_empty_folder_holds_nothing_to_go_on_with(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    WorkFolder(tmp_path / "out", RUN).check()
    with pytest.raises(ResumeError, match="nothing to resume"):
        WorkFolder(tmp_path / "out", RUN, resume="required").check()


@pytest.mark.parametrize("output", ["file/out", "file/deep/out", "x" * 254])
def test_a_place_that_cannot_be_is_known_beforehand(output: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"Choose another place with --output\.$"):
        WorkFolder(tmp_path / output, RUN).check()
