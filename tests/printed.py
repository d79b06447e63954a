"""What a command prints, read as a string."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from unittest.mock import patch

from losparse_cli.cli.console import Console


def printed(show: Callable[[Console], None], width: int) -> str:
    """What `show` prints as results to a pipe, where COLUMNS says this width."""
    text = io.StringIO()
    with patch.dict(os.environ, COLUMNS=str(width)):
        out = Console()
        out.out.file = text
        show(out)
    return text.getvalue()
