"""A run that dies between two units, as none of its except clauses expects."""

from __future__ import annotations

from typing import Any

import pytest

from losparse_cli.checkpoint.writer import ShardWriter


class Killed(BaseException):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let a run die when so many units are finished and it is about to write the next."""
    append = ShardWriter.append

    def dying(self: ShardWriter, *args: Any, **options: Any) -> Any:
        if self.done == number:
            raise Killed
        return append(self, *args, **options)

    monkeypatch.setattr(ShardWriter, "append", dying)
