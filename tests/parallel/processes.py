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
import toys
from terminal import Ended, Running, done, shared


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


def by_one(*command: object, cwd: Path) -> dict[str, str]:
    """Digests of what one process makes of it, in a folder `alone`: cards name the folder they were written for."""
    done(*command, "-o", "out", cwd=cwd)
    (cwd / "out").rename(cwd / "alone")
    return toys.digests(cwd / "alone")


def assert_done(ended: list[Ended], said: str = "Done.") -> None:
    """All ranks did what they were to do, and the first alone speaks: `said` at the end."""
    assert [one.code for one in ended] == [0] * len(ended), "\n".join(one.err for one in ended)
    assert all(one.out == "" and one.err == "" for one in ended[1:])
    assert said in ended[0].out


def killed_at(owner: str, method: str, call: int) -> str:
    """Code with which a rank kills itself when this method of the class `owner`, a path, is called for the call-th
    time."""
    module, _, name = owner.rpartition(".")
    return f"""
import os, signal
from {module} import {name}
one, left = {name}.{method}, {call}
def die(self, *arguments):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return one(self, *arguments)
{name}.{method} = die
"""
