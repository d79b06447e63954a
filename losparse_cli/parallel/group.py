"""The ranks of a run: one process alone, or several over torch.distributed.

All ranks call the same methods in the same order. What they say is JSON, what they hand over are tensors; nothing is
pickled. Ranks that wait can be interrupted, and learn within seconds that one of them has ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from time import monotonic, sleep
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import CheckpointError, LosparseError, OutputError, RankError, ResourceError, SourceError, UsageError
from .launch import is_first, launched, local_place, own_rank
from .tree import TreeSum

T = TypeVar("T")

MEETING = timedelta(minutes=10)  # in which all ranks have to begin
RUN = timedelta(days=30)  # that a rank waits for another at work
WATCH = 1.0  # seconds between two looks whether the others are there
OF_INPUT: tuple[type[LosparseError], ...] = (UsageError, SourceError, CheckpointError, OutputError, ResourceError)
"""Errors of one rank that others end with as their own."""
LAST = 5.0  # seconds in which a rank whose connections broke is found to have ended


class Ranks(Protocol):
    """rank: of this process, from zero. size: how many there are. waited: seconds spent on talking to others, and on
    waiting for them."""

    rank: int
    size: int
    waited: float

    def agree(self, value: Any) -> list[Any]:
        """What every rank says, a JSON value, in the order of ranks."""

    def sum_to(self, owner: int, leaves: TreeSum) -> Tensor | None:
        """The sum of all leaves that ranks hold, at the owner; None at others, and where there is nothing. The leaves
        are let go of."""

    def broadcast(self, source: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What rank `source` gives, by name, on every rank; what others give is ignored."""

    def at_work(self) -> AbstractContextManager[None]:
        """Within it no rank may end before the others; they leave it together."""


class Alone:
    """One process."""

    rank, size, waited = 0, 1, 0.0

    def agree(self, value: Any) -> list[Any]:
        return [json.loads(json.dumps(value))]

    def sum_to(self, owner: int, leaves: TreeSum) -> Tensor | None:
        return leaves.total()

    def broadcast(self, source: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def at_work(self) -> AbstractContextManager[None]:
        return nullcontext()


class Several:
    """One of several processes. UsageError where they do not compute alike, RankError where one does not come.

    Tensors on the CPU go through gloo; those on a GPU through nccl where each rank of a machine has its own, else
    through the CPU.
    """

    def __init__(self) -> None:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        self.rank, self.size, self.waited = own_rank(), launched(), 0.0
        try:
            store, _, _ = next(iter(rendezvous("env://", timeout=MEETING)))
        except (ValueError, RuntimeError, OSError) as error:
            raise RankError(
                f"Rank {self.rank} of {self.size} does not reach the others ({' '.join(str(error).split())[:200]}). "
                "Start all of them with torchrun, at one address and port."
            ) from error
        self._store, self._here = store, _meet(store, self.rank, self.size)
        number, together = local_place()
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        own_gpus = gpus >= together
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if own_gpus else "gloo",
            store=PrefixStore("losparse", store),
            rank=self.rank,
            world_size=self.size,
            timeout=RUN,
        )
        self._dist, self._staged = dist, not own_gpus
        self._device = torch.device("cuda", number % gpus) if gpus else None  # as `models.device.find_device` has it
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._working = False
        self.ended: list[int] = []
        """Ranks that were found to have ended."""
        threading.Thread(target=self._talk, name="losparse-ranks", daemon=True).start()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._told_to_end)
            threading.Thread(target=self._watch, name="losparse-watch", daemon=True).start()

    # --- what ranks do together -------------------------------------------------------------------

    def agree(self, value: Any) -> list[Any]:
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)

        def gather() -> list[bytes]:
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            self._dist.all_gather(sizes, torch.tensor([text.numel()]))
            longest = max(int(size) for size in sizes)
            found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            self._dist.all_gather(found, torch.nn.functional.pad(text, (0, longest - text.numel())))
            return [bytes(one[: int(size)].numpy()) for one, size in zip(found, sizes, strict=True)]

        return [json.loads(one) for one in self._together(gather)]

    def sum_to(self, owner: int, leaves: TreeSum) -> Tensor | None:
        mine = [[*node, value.numel(), str(value.dtype), value.device.type] for node, value in leaves.nodes.items()]
        held = self.agree(mine)
        if self.rank != owner:
            for node in list(leaves.nodes):
                value = leaves.nodes.pop(node).contiguous().view(-1)
                self._together(lambda value=value: self._dist.send(self._sent(value), owner))  # type: ignore[misc]
            return None
        for rank, nodes in enumerate(held):
            for level, k, numel, dtype, kind in nodes if rank != owner else ():
                part = self._room(numel, dtype, kind)
                self._together(lambda part=part, rank=rank: self._dist.recv(part, rank))  # type: ignore[misc]
                leaves.put((level, k), self._arrived(part, kind))
        return leaves.total()

    def broadcast(self, source: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = tensors if self.rank == source else {}
        held = self.agree([[name, list(t.shape), str(t.dtype), t.device.type] for name, t in own.items()])[source]
        found = {}
        for name, shape, dtype, kind in held:
            mine = self.rank == source
            part = self._sent(own[name].contiguous()) if mine else self._room(shape, dtype, kind)
            if part.numel():
                raw = part.view(-1).view(torch.uint8)
                self._together(lambda raw=raw: self._dist.broadcast(raw, source))  # type: ignore[misc]
            found[name] = own[name] if mine else self._arrived(part, kind)
        return found

    @contextmanager
    def at_work(self) -> Iterator[None]:
        self._working = True
        try:
            yield
            self.agree(None)
        except LosparseError as error:
            if not isinstance(error, RankError) and not error.told:
                kind = next((one.__name__ for one in OF_INPUT if isinstance(error, one)), RankError.__name__)
                with suppress(RuntimeError):
                    self._store.compare_set("losparse/why", "", json.dumps([self.rank, kind, str(error)]))
            raise
        finally:
            self._working = False

    # --- how ----------------------------------------------------------------------------------------

    def _sent(self, value: Tensor) -> Tensor:
        return value.cpu() if self._staged else value

    def _arrived(self, value: Tensor, kind: str) -> Tensor:
        return value.to(self._device) if kind == "cuda" and self._device is not None else value

    def _room(self, shape: Any, dtype: str, kind: str) -> Tensor:
        kept = torch.device("cpu") if self._staged or kind == "cpu" or self._device is None else self._device
        return torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=kept)

    def _together(self, task: Callable[[], T]) -> T:
        """What `task` returns, which waits for other ranks, and which a signal may interrupt meanwhile."""
        future: Future[T] = Future()
        self._tasks.put((future, task))
        begun = monotonic()
        try:
            return future.result()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise self._lost() from error
        finally:
            self.waited += monotonic() - begun

    def _talk(self) -> None:
        """All that is said to other ranks is said in one thread: the main one stays free to be interrupted."""
        if self._device is not None:
            torch.cuda.set_device(self._device)
        while True:
            future, task = self._tasks.get()
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)

    def _watch(self) -> None:
        while True:
            sleep(WATCH)
            if self._working and self._gone():
                os.kill(os.getpid(), signal.SIGTERM)  # which interrupts whatever the main thread is at
                return

    def _gone(self) -> list[int]:
        """Ranks whose process is there no more, as whoever saw it first found them: others then end because of it."""
        if not self.ended:
            mine = self._here[self.rank]["host"]
            found = [r for r, one in enumerate(self._here) if one["host"] == mine and not _is_running(int(one["pid"]))]
            if found:
                with suppress(RuntimeError, ValueError), self._stored(found):
                    found = json.loads(self._store.compare_set("losparse/ended", "", json.dumps(found)))
                self.ended = found
        return self.ended

    def _told_to_end(self, number: int, frame: Any) -> None:
        if not self._working:
            raise KeyboardInterrupt
        raise self._lost(LAST if self._gone() else 0.0)

    def _lost(self, patience: float = LAST) -> BaseException:
        """What to raise where the others cannot be reached: a sentence that names who has ended."""
        until = monotonic() + patience
        while not self._gone() and monotonic() < until:
            sleep(0.05)
        if not self.ended and not patience:
            return KeyboardInterrupt()
        error = self._why()
        if error is not None:
            return error
        plural = "s" if len(self.ended) > 1 else ""
        who = f"Rank{plural} {' and '.join(map(str, self.ended))} of {self.size}"
        error = RankError(
            f"{who if self.ended else f'One of {self.size} ranks, on another machine,'} ended before the run did. What "
            "is finished is kept: the same command goes on where it stopped, also with another number of ranks."
        )
        error.told = self.rank != next(rank for rank in range(self.size) if rank not in self.ended)
        return error

    @contextmanager
    def _stored(self, ended: Sequence[int]) -> Iterator[None]:
        """Within it what ranks keep for each other is there; ValueError if it ended with these ranks: where nobody
        started them (`torchrun` does) it is the first one that holds it."""
        if 0 in ended and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            raise ValueError("it ended with rank 0")
        yield

    def _why(self) -> LosparseError | None:
        """What another rank said before it ended; None if it said nothing."""
        with suppress(RuntimeError, ValueError), self._stored(self.ended):
            if self._store.check(["losparse/why"]):
                rank, kind, sentence = json.loads(self._store.get("losparse/why"))
                known = {one.__name__: one for one in OF_INPUT}
                error = known.get(kind, RankError)(f"Rank {rank} of {self.size}: {sentence}")
                error.told = self.rank > 0
                return error
        return None


def _is_running(pid: int) -> bool:
    """Whether there is such a process, and not only what is left of one."""
    status = Path(f"/proc/{pid}/stat")
    try:
        if status.parent.parent.joinpath("self").exists():
            return status.read_text().rpartition(")")[2].split()[0] not in "ZX"
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, IndexError):
        return False
    return True


def _meet(store: Any, rank: int, size: int) -> list[dict[str, Any]]:
    """What every rank says of itself, once all have come; raises as `Several`."""
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "threads": torch.get_num_threads()}
    store.set(f"losparse/{rank}", json.dumps(mine | {"torch": torch.__version__}))
    try:
        store.wait([f"losparse/{other}" for other in range(size)], MEETING)
    except RuntimeError as error:
        missing = [str(other) for other in range(size) if not store.check([f"losparse/{other}"])]
        raise RankError(
            f"{'Rank' if len(missing) == 1 else 'Ranks'} {', '.join(missing)} of {size} did not begin within "
            f"{MEETING.seconds // 60} minutes. Look at what they say, and start all of them again."
        ) from error
    found = [json.loads(store.get(f"losparse/{other}")) for other in range(size)]
    store.add("losparse/read", 1)
    until = monotonic() + LAST
    while rank == 0 and store.add("losparse/read", 0) < size and monotonic() < until:
        sleep(0.01)  # it may hold what the others are still to read
    for other, one in enumerate(found):
        if one["torch"] != found[0]["torch"]:
            raise UsageError(
                f"Rank {other} runs torch {one['torch']}, and rank 0 {found[0]['torch']}: results would differ. "
                "Install the same version on all machines."
            )
        if one["threads"] != found[0]["threads"]:
            raise UsageError(
                f"Rank {other} computes with {one['threads']} threads, and rank 0 with {found[0]['threads']}: results "
                "would differ. Set OMP_NUM_THREADS to the same number for all."
            )
    return found


def ranks() -> Ranks:
    """Those of this run, as torchrun, accelerate or a cluster started them; raises as `Several`."""
    return _several() if launched() > 1 else Alone()


@cache
def _several() -> Several:
    return Several()


def require_alone(what: str) -> None:
    """UsageError if several processes were started for what one does."""
    if launched() > 1:
        raise UsageError(f"{what} runs in one process, and {launched()} were started. Start it without torchrun.")


def said_once(group: Ranks, error: LosparseError) -> LosparseError:
    """An error that all ranks raise; the first one tells a person."""
    error.told = group.rank > 0
    return error


def agreed(group: Ranks, work: Callable[[], T]) -> T:
    """What `work` returns on each rank; where it fails on some, all end with the sentence of the first of these."""
    failed: LosparseError | None = None
    try:
        result = work()
    except LosparseError as error:
        failed = error
    said = group.agree(None if failed is None else [str(failed), failed.exit_code])
    first = next((rank for rank, one in enumerate(said) if one is not None), None)
    if first is None:
        return result
    if failed is None or said[group.rank] != said[first]:
        failed = RankError(f"Rank {first} of {group.size}: {said[first][0]}")
        failed.exit_code = said[first][1]
    raise said_once(group, failed)


def must_tell(error: BaseException) -> bool:
    """Whether this process is to tell a person of an error: the first one, or one that the first knows nothing of."""
    return is_first() or (_several.cache_info().currsize > 0 and not getattr(error, "told", True))
