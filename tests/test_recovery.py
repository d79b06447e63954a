"""A run that failed once, at a write or a read, and is repeated: the same bytes as an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest
import toys
from terminal import done, losparse

from losparse_cli.verify import verify

OPTIONS = ("--rank", 4, "--sparsity", 0.8, "--max-shard-size", "300kB")

FAIL_ONCE = {
    "write": """
import errno
from losparse_cli.checkpoint import writer
whole, calls = writer._write_all, []
def write_all(file, piece):
    calls.append(1)
    if len(calls) == {call}:
        raise OSError(errno.ENOSPC, "No space left on device")
    whole(file, piece)
writer._write_all = write_all
""",
    "read": """
from losparse_cli.checkpoint import reader
from losparse_cli.errors import CheckpointError
whole, calls = reader.SafetensorsFile.chunks, []
def chunks(self, entry, size=16 << 20):
    calls.append(1)
    if len(calls) == {call}:
        raise CheckpointError("the shard went away")
    yield from whole(self, entry, size)
reader.SafetensorsFile.chunks = chunks
""",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.llama(tmp_path_factory.mktemp("models") / "model", layers=2)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("undisturbed")
    done("compress", model, "-o", "out", *OPTIONS, cwd=place)
    return toys.digests(place / "out")


@pytest.mark.parametrize("call", [1, 2, 3, 5])
@pytest.mark.parametrize("what", FAIL_ONCE)
def test_what_failed_once_is_done_again(
    what: str, call: int, model: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    failed = losparse("compress", model, "-o", "out", *OPTIONS, cwd=tmp_path, before=FAIL_ONCE[what].format(call=call))
    assert failed.code == 1
    assert not (tmp_path / "out").exists()
    done("compress", model, "-o", "out", *OPTIONS, cwd=tmp_path)
    assert toys.digests(tmp_path / "out") == whole
    assert verify(tmp_path / "out").sound


def test_a_damaged_result_is_not_called_done(model: Path, tmp_path: Path) -> None:
    done("compress", model, "-o", "out", *OPTIONS, cwd=tmp_path)
    next((tmp_path / "out").glob("*.safetensors")).unlink()
    again = losparse("compress", model, "-o", "out", *OPTIONS, cwd=tmp_path)
    assert again.code == 2
    assert "--overwrite" in again.complaint
    done("compress", model, "-o", "out", *OPTIONS, "--overwrite", cwd=tmp_path)
    assert verify(tmp_path / "out").sound
