"""Several ranks of one run: functions in forked processes, and commands as torchrun starts them."""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from terminal import Ended, Running, shared


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def places(size: int) -> list[dict[str, str]]:
    """The environment of each rank of a run on this machine."""
    port = str(free_port())
    return [
        {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(size)
    ]  # fmt: skip


def together(size: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` returns, as JSON, in so many forked processes; an error as its text."""
    children = []
    for rank, environment in enumerate(places(size)):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.environ |= environment
            torch.set_num_threads(1)
            try:
                said = json.dumps(work(rank))
            except BaseException as error:
                traceback.print_exc(file=sys.__stderr__)
                said = json.dumps(f"{type(error).__name__}: {error}")
            os.write(writing, said.encode())
            os._exit(0)
        os.close(writing)
        children.append((pid, reading))
    found = []
    for pid, reading in children:
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()
        status = os.waitpid(pid, 0)[1]
        found.append(json.loads(said) if said else f"signal {os.waitstatus_to_exitcode(status)}")
    return found


def started(
    size: int, *arguments: object, cwd: Path, before: dict[int, str] | None = None, **environment: str
) -> list[Running]:
    """`losparse ARGUMENTS` on each of so many ranks. before: rank -> Python code that it runs first."""
    return [
        shared().start(*arguments, cwd=cwd, before=(before or {}).get(rank, ""), **place, **environment)
        for rank, place in enumerate(places(size))
    ]


def ran(size: int, *arguments: object, cwd: Path, **options: Any) -> list[Ended]:
    """The same, to their end."""
    return [running.wait() for running in started(size, *arguments, cwd=cwd, **options)]
