"""Activations beyond a limit lie in files, equal bit for bit, and take no memory until they are read."""

from __future__ import annotations

import errno
import gc
import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from losparse_cli.calibration.activations import Activations
from losparse_cli.errors import OutputError

MIB = 1 << 20


def resident() -> int:
    """Bytes of this process that are in memory, those of mapped files included."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (0, 4), (4097,)])
def test_what_is_kept_is_equal_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = random(*shape, dtype=dtype)
    kept = Activations(tmp_path, 0).keep(tensor)
    assert (kept.dtype, kept.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(kept, tensor)
    assert (kept is tensor) == (tensor.numel() == 0)


def test_a_tensor_that_is_not_contiguous_and_nan(tmp_path: Path) -> None:
    activations = Activations(tmp_path, 0)
    tensor = random(6, 8).T[1:, ::2]
    assert torch.equal(activations.keep(tensor), tensor)
    strange = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-42])
    assert torch.equal(activations.keep(strange).view(torch.int32), strange.view(torch.int32))


def test_it_is_used_like_any_other(tmp_path: Path) -> None:
    activations = Activations(tmp_path, 0)
    tensor = random(64, 64)
    kept = activations.keep(tensor)
    activations.release()
    assert torch.equal(kept @ kept, tensor @ tensor)
    kept.add_(1)
    activations.release()  # what was written to it since is kept, too
    assert torch.equal(kept, tensor + 1)


def test_the_limit_is_kept_to_and_freed_room_is_used_again(tmp_path: Path) -> None:
    activations = Activations(tmp_path, 10_000)
    tensors = [random(1000, seed=k) for k in range(4)]  # 4,000 bytes each
    kept = [activations.keep(tensor) for tensor in tensors]
    assert [a is b for a, b in zip(kept, tensors, strict=True)] == [True, True, False, False]
    assert activations.spilled == 8000
    small = random(500)
    assert activations.keep(small) is small  # what still fits stays
    last = random(1)
    assert activations.keep(last) is not last
    del kept[0], tensors[0]
    gc.collect()
    again = random(1000)
    assert activations.keep(again) is again
    assert activations.spilled == 8004


def test_a_view_of_what_is_kept_is_no_use_of_the_room_for_ever(tmp_path: Path) -> None:
    activations = Activations(tmp_path, 4000)
    for _ in range(5):
        tensor = random(1000)
        assert activations.keep(tensor) is tensor
        del tensor
    assert activations.spilled == 0


@pytest.mark.slow
@needs_proc
def test_memory_falls_on_release_and_what_was_kept_comes_back(tmp_path: Path) -> None:
    activations = Activations(tmp_path, 0)
    size = 64 * MIB
    kept = activations.keep(torch.full((size,), 7, dtype=torch.uint8))
    gc.collect()
    base = resident()
    assert int(kept.sum(dtype=torch.int64)) == 7 * size
    assert resident() - base > 0.8 * size
    activations.release()
    assert resident() - base < 0.2 * size
    assert int(kept.sum(dtype=torch.int64)) == 7 * size


@needs_proc
def test_keeping_takes_no_memory_by_itself(tmp_path: Path) -> None:
    activations = Activations(tmp_path, 0)
    size = 40 * MIB  # above the 32 MiB up to which glibc may hold on to what is freed
    base = resident()
    kept = [activations.keep(torch.full((size,), k, dtype=torch.uint8)) for k in range(3)]
    gc.collect()
    assert resident() - base < 0.5 * size
    assert [int(tensor[-1]) for tensor in kept] == list(range(3))
    assert activations.spilled == 3 * size


def mapped(folder: Path) -> int:
    """Mapped areas whose file lies, or lay, in `folder`."""
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.slow
@needs_proc
def test_files_have_no_name_and_go_with_the_last_tensor(tmp_path: Path) -> None:
    activations = Activations(tmp_path, 0)
    kept = [activations.keep(random(5000, seed=k)) for k in range(3)]
    assert list(tmp_path.iterdir()) == []
    assert mapped(tmp_path) == 3
    part = kept[0][:10]
    first = part.clone()
    del kept
    gc.collect()
    activations.release()
    assert mapped(tmp_path) == 1
    assert torch.equal(part, first)  # a view alone holds on to its file
    del part
    gc.collect()
    assert mapped(tmp_path) == 0
    activations.release()
    assert len(os.listdir("/proc/self/fd")) < 200


def test_a_folder_that_is_gone_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        Activations(tmp_path / "nowhere", 0).keep(random(10))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room is reserved with posix_fallocate")
def test_a_full_disk_is_an_error_and_no_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written without its room, a mapped file would end the process."""

    def full(*arguments: int) -> None:
        assert arguments[1:] == (0, 40)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="The disk is full"):
        Activations(tmp_path, 0).keep(random(10))
    assert not os.listdir(tmp_path)
