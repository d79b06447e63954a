"""The files of this folder, copied beside the weights: a machine without losparse reads them with these.

A copy is named losparse_*.py and copies itself on, so that a model saved again carries its loader, too.
"""

from __future__ import annotations

import re
from pathlib import Path

FILES = (
    "codec",
    "embedding",
    "experts",
    "installed",
    "kept",
    "layouts",
    "linear",
    "loader",
    "operator",
    "packed",
    "quantizer",
    "stored",
    "streams",
    "tables",
)


def write_loader(folder: Path) -> None:
    """Copy the loader into a checkpoint's folder; only its relative imports are renamed."""
    for name in FILES:
        text = re.sub(
            r"^from \.(?!losparse_)(\w+) import", r"from .losparse_\1 import", _text(name), flags=re.MULTILINE
        )
        (folder / f"losparse_{name}.py").write_text(text, encoding="utf-8")


def is_loader(file: str) -> bool:
    """True for the name of a loader file in a checkpoint's root."""
    return file in {f"losparse_{name}.py" for name in FILES}


def loader_bytes() -> int:
    """Most bytes that the loader takes in a checkpoint."""
    return sum(len(_text(name).encode()) + 200 for name in FILES)


def _text(name: str) -> str:
    """Source of one file, from the package or from a shipped copy."""
    path = Path(__file__).with_name(f"{name}.py")
    return (path if path.is_file() else path.with_name(f"losparse_{name}.py")).read_text(encoding="utf-8")
