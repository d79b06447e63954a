"""What flows from block to block, in memory as long as it fits, else in a file that nobody else sees."""

from __future__ import annotations

import ctypes
import mmap
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)


class Activations:
    """Keeps tensors within a limit of resident bytes; those beyond it live in unnamed files in `folder`.

    A kept tensor is used like any other. On another device than the CPU nothing is moved to files.
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
        with tempfile.TemporaryFile(dir=self._folder) as file:  # its bytes are freed with the last tensor over them
            file.truncate(nbytes)
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
        if self.spilled and _TRIM is not None:
            _TRIM(0)  # glibc keeps freed tensors of up to 32 MiB for itself

    def _forget(self, nbytes: int) -> None:
        self._resident -= nbytes
