"""What flows from block to block, in memory as long as it fits, else in a file that nobody else sees."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from ..errors import write_errors

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim() -> None:
    """Give back what was freed: glibc keeps tensors of up to 32 MiB for itself."""
    if _TRIM is not None:
        _TRIM(0)


def _reserve(file: int, nbytes: int) -> None:
    """Bytes that are there: on a full disk, to write to a mapping of bytes that are not would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, nbytes)
    else:  # macOS
        os.truncate(file, nbytes)


class Activations:
    """Keeps tensors within a limit of resident bytes; those beyond it live in unnamed files in `folder`.

    A kept tensor is used like any other. OutputError if a file cannot be written. On another device than the CPU
    nothing is moved to files.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._resident = 0
        self._mapped: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
        self.spilled = 0
        """Bytes written to files so far."""

    def keep(self, tensor: Tensor) -> Tensor:
        """`tensor`, or its copy in a file; equal to it bit by bit."""
        nbytes = tensor.numel() * tensor.itemsize
        if tensor.device.type != "cpu" or nbytes == 0 or self._resident + nbytes <= self._limit:
            self._resident += nbytes
            weakref.finalize(tensor, self._forget, nbytes)
            return tensor
        # Its bytes are freed with the last tensor over them.
        with write_errors(self._folder), tempfile.TemporaryFile(dir=self._folder) as file:
            _reserve(file.fileno(), nbytes)
            area = mmap.mmap(file.fileno(), nbytes)
        copy = torch.frombuffer(area, dtype=tensor.dtype).view(tensor.shape)
        copy.copy_(tensor)
        self._mapped[id(area)] = area
        area.madvise(mmap.MADV_DONTNEED)
        self.spilled += nbytes
        return copy

    def release(self) -> None:
        """Let go of the pages of files that were read since; what they hold stays."""
        for area in list(self._mapped.values()):
            area.madvise(mmap.MADV_DONTNEED)
        if self.spilled:
            trim()

    def _forget(self, nbytes: int) -> None:
        self._resident -= nbytes
