"""Runs `python -m losparse_cli` in real processes that start in a tenth of a second.

One process imports torch, transformers and losparse, and forks a child for each command. A child's standard
output and error are files, its working folder is its own, and it may be killed like any other process.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from losparse_cli.demo import cache_folder

PACKAGE = Path(__file__).parent.parent

PROGRESS = re.compile(
    r"layer \d+/\d+  \S+  error \d\.\d+|Going on after layer \d+ of \d+\.|warning: .*|sensitivity: 1/.*"
)


@dataclass(frozen=True)
class Ended:
    """What a command left: its exit code (minus the signal, if killed), standard output and error."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line that an error is, after lines of progress; an AssertionError if it is more, or no error."""
        lines = [line for line in self.err.strip().splitlines() if not PROGRESS.fullmatch(line)]
        assert self.code in (1, 2), self
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        assert "Traceback" not in self.err, self.err
        assert "Unexpected error" not in self.err, self.err
        return lines[0].removeprefix("error: ")


@functools.cache
def shared() -> Terminal:
    """One terminal for all tests that need no other environment."""
    terminal = Terminal()
    atexit.register(terminal.close)
    return terminal


def losparse(*arguments: object, **options: Any) -> Ended:
    """Run a command in the shared terminal; see `Terminal.start`."""
    return shared().run(*arguments, **options)


def done(*arguments: object, **options: Any) -> Ended:
    """`losparse`, and an AssertionError with what was said if it failed."""
    ended = losparse(*arguments, **options)
    assert ended.code == 0, ended.err
    return ended


class Running:
    """A command under way."""

    def __init__(self, terminal: Terminal, pid: int, folder: Path) -> None:
        self.pid, self._terminal, self._folder = pid, terminal, folder

    @property
    def state(self) -> str:
        """As Linux names it: R running, S sleeping, T stopped, Z ended, which it stays until `wait`."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Ended:
        code = int(self._terminal._ask({"wait": self.pid}))
        out, err = ((self._folder / name).read_text("utf-8", "surrogateescape") for name in ("out", "err"))
        return Ended(code, out, err)


class Terminal:
    """The process that forks. `environment` is added to a bare one, before anything is imported."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="losparse-terminal-")
        self.environment = bare_environment(Path(self._home.name)) | dict(environment or {})
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=self.environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._count = 0

    def start(self, *arguments: object, cwd: Path | None = None, before: str = "", **environment: str) -> Running:
        """Begin `losparse ARGUMENTS`. before: Python code that the child runs first, such as a patch."""
        self._count += 1
        folder = Path(self._home.name) / f"command-{self._count}"
        folder.mkdir()
        request = {"argv": [str(a) for a in arguments], "cwd": str(cwd or folder), "folder": str(folder),
                   "before": before, "environment": environment}  # fmt: skip
        return Running(self, int(self._ask(request)), folder)

    def run(self, *arguments: object, cwd: Path | None = None, before: str = "", **environment: str) -> Ended:
        """`start` and wait for the end."""
        return self.start(*arguments, cwd=cwd, before=before, **environment).wait()

    def _ask(self, request: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the forking process has died"
        return answer

    def close(self) -> None:
        self._process.communicate()
        self._home.cleanup()


def bare_environment(home: Path) -> dict[str, str]:
    """An environment without the caller's tokens, caches and terminal; one thread a process.

    Compiled kernels are those of the caller: they lie by the hash of their source, and making them takes seconds. So is
    what matplotlib knows of the machine's fonts.
    """
    return {
        "PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8",
        "COLUMNS": "200", "PYTHONPATH": str(PACKAGE), "LOSPARSE_CACHE": str(cache_folder()),
        "MPLCONFIGDIR": str(cache_folder() / "matplotlib"),
    }  # fmt: skip


def _serve() -> None:
    """Read requests, fork, answer."""
    import transformers.models.llama.modeling_llama  # noqa: F401 - imported for the children

    import losparse_cli.cli.console
    import losparse_cli.cli.tables
    import losparse_cli.compress
    import losparse_cli.export
    import losparse_cli.inspection
    import losparse_cli.push
    import losparse_cli.verify  # noqa: F401 - imported for the children

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
    requests, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    _warm_up()
    for line in requests:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        else:
            pid = os.fork()
            if pid == 0:
                _become(request)
            answers.write(f"{pid}\n")
        answers.flush()


def _warm_up() -> None:
    """A dry run here fills every cache that the children inherit. It starts no thread, so forking stays safe."""
    import toys

    from losparse_cli.cli.app import main

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(SystemExit), open(os.devnull, "w") as nowhere:
        sys.argv = ["losparse", "compress", str(toys.llama(Path(folder) / "toy")), "-o", f"{folder}/out", "--dry-run"]
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            main()
    assert threading.active_count() == 1, threading.enumerate()


def _become(request: dict[str, Any]) -> NoReturn:
    os.environ |= request["environment"]
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, f"{request['folder']}/out", os.O_WRONLY | os.O_CREAT),
        (2, f"{request['folder']}/err", os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(path, flags), descriptor)
    os.chdir(request["cwd"])
    sys.argv = ["losparse", *request["argv"]]
    code = 0
    try:
        exec(request["before"], {})  # a test's own patch
        runpy.run_module("losparse_cli", run_name="__main__")
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking torch down in good order would cost a second


def signalled_after(lines: int, number: int = signal.SIGKILL) -> str:
    """A patch, as `before` takes it: the process sends itself that signal after so many lines of its journal."""
    return f"""
import os
from losparse_cli.checkpoint import journal
left, append = {lines}, journal.Journal._append
def send(self, line):
    global left
    append(self, line)
    left -= 1
    if not left:
        os.kill(os.getpid(), {int(number)})
journal.Journal._append = send
"""


if __name__ == "__main__":
    _serve()
