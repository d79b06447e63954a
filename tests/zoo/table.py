"""docs/architectures.md: what came of the sweep, a row a model type."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OPEN = ("fails", "not tried")
"""Outcomes that another run of the sweep may change."""

HEAD = """# Architectures

{tried} of the {all} model types of transformers {version}, each tiny, with random weights, all through losparse.
Written by `make test-zoo`; `python -m tests.zoo llama` tries one type again.

A class counts as **equal** when it was compressed without data, loaded by `losparse_cli.load` and, by plain
transformers, with the loader that the checkpoint carries; when tensors and outputs were those of its dense export both
times; and when it was saved, loaded again, and still the same. It counts as **calibrated** when it was compressed with
text, too, and that result gave what its dense export gives.

Outputs are compared to a thousandth of their largest entry, or, where float32 itself takes them further from those of
float64, to four times that. There is one batch: a model that takes text alone gets nothing else, so of its towers for
pictures and sounds only the tensors are compared. A class that no Auto class knows was not loaded with the checkpoint's
own loader.

"""


def known(results: Path) -> list[dict[str, Any]]:
    """The newest line of each class of each type."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    if results.is_file():
        for text in results.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            found[line["type"], line["class"]] = line
    return sorted(found.values(), key=lambda line: (line["type"], line["class"]))


def outcome(line: dict[str, Any]) -> str:
    """Of one class: equal, no layer, fails, not tried, or no model."""
    if line.get("faults") or line.get("fault"):
        return "fails"
    if line.get("stopped") == "no model of its own":
        return "no model"
    if line.get("stopped"):
        return "not tried"
    return "equal" if line["layers"] else "no layer"


def write_page(lines: list[dict[str, Any]], page: Path) -> None:
    """Write the page: counts, then a table."""
    import transformers

    counts = {kind: [line for line in lines if outcome(line) == kind] for kind in
              ("equal", "no layer", "not tried", "no model", "fails")}  # fmt: skip
    calibrated = sum(line.get("calibrated") == "yes" for line in counts["equal"])
    reading = sum("calibrated" in line for line in counts["equal"])
    tried = len({line["type"] for line in lines})
    rows = [
        ("model types tried", f"{tried} of {len(transformers.CONFIG_MAPPING.keys())}"),
        ("classes compressed, and equal", len(counts["equal"])),
        ("of these: without an Auto class, so by losparse alone", sum(not line["auto"] for line in counts["equal"])),
        (
            "of these: where compression moved outputs by less than a hundredth",
            sum(map(_hardly_moved, counts["equal"])),
        ),
        ("of these: calibrated, out of those that read text", f"{calibrated} of {reading}"),
        ("classes without a layer that can be compressed", len(counts["no layer"])),
        ("classes for which no tiny model, or no input, was found", len(counts["not tried"])),
        ("of these: for want of a library", sum("requires the" in line["stopped"] for line in counts["not tried"])),
        ("of these: without a forward pass", sum("no forward pass" in line["stopped"] for line in counts["not tried"])),
        ("types that are a part of others, and no model", len(counts["no model"])),
        ("classes that fail", len(counts["fails"])),
    ]
    text = HEAD.format(version=transformers.__version__, tried=tried, all=len(transformers.CONFIG_MAPPING.keys()))
    text += _table(("", ""), rows, right=True)
    text += "\n## By type\n\nA layer is a linear layer: S holds floats, so embeddings and output heads stay dense.\n\n"
    text += _table(("type", "class", "compressed", "calibrated", "left dense, or why not"), map(_row, lines))
    page.write_text(text, encoding="utf-8")


def _hardly_moved(line: dict[str, Any]) -> bool:
    """Whether the outputs say little of the compressed layers."""
    return bool(line["moved"] < 1e-2)


def _row(line: dict[str, Any]) -> tuple[str, str, str, str, str]:
    kind = outcome(line)
    left = ", ".join(f"{reason} ({n})" for reason, n in line.get("skipped", {}).items() if reason not in ORDINARY)
    why = line.get("stopped") or line.get("fault") or "; ".join(line.get("faults", ())) or line.get("note", "")
    if kind == "equal" and not line["auto"]:
        why = "; ".join(filter(None, (why, "no Auto class")))
    calibrated = line.get("calibrated", "reads no text") if kind == "equal" else ""
    if calibrated not in ("yes", "reads no text", ""):
        why, calibrated = "; ".join(filter(None, (why, calibrated))), "no"
    compressed = f"{line['layers']} layers" if kind == "equal" else kind
    return line["type"], line["class"], compressed, calibrated, "; ".join(filter(None, (left, why)))


ORDINARY = ("embedding", "output head")


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]], *, right: bool = False) -> str:
    rule = ["---"] * len(head)
    if right:
        rule[-1] = "---:"
    lines = [head, tuple(rule), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
