from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def known(results: Path) -> list[dict[str, Any]]:
    """The newest line of each class of each type."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    if results.is_file():
        for text in results.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            found[line["type"], line["class"]] = line
    return list(found.values())


def failed(line: dict[str, Any]) -> bool:
    """Whether anything went wrong that losparse should have done, or said."""
    return bool(line.get("faults") or line.get("fault"))
