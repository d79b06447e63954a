"""The demo on a toy in place of the packaged model: what it measures, what it says, and how that looks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from losparse_cli import demo
from losparse_cli.cli.comparison import show_comparison
from losparse_cli.cli.console import invoked
from losparse_cli.generate import generate
from losparse_cli.tasks.paired import Estimate
from losparse_cli.verify import verify
from tests.printed import printed

TEXT = "\n\n".join(f"{number} bottles of beer on the wall, {number} bottles of beer." for number in range(99, 0, -1))


NO_BARS = """
import sys, types
import subprocess
import sys
from pathlib import Path
from losparse_cli.cli.commands.demo import demo
verb = types.ModuleType("losparse_cli.demo")
def show(*_, **__):
    import torch
    from tqdm import tqdm
    raise SystemExit(0 if tqdm([]).disable else "tqdm draws bars")
verb.demo = show
sys.modules["losparse_cli.demo"] = verb
demo(Path("out"))
"""


def test_unpacking_draws_no_bar_between_the_lines() -> None:
    done = subprocess.run([sys.executable, "-c", NO_BARS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_compiling_is_told_and_comes_before_the_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop() -> None:
        raise InterruptedError

    monkeypatch.setattr(demo, "smollm2", lambda on_step: tmp_path)
    monkeypatch.setattr(demo, "encyclopedia_text", lambda: (TEXT, TEXT))
    monkeypatch.setattr(demo.native, "is_ready", lambda: False)
    monkeypatch.setattr(demo.native, "library", stop)
    said: list[str] = []
    with pytest.raises(InterruptedError):
        demo.demo(tmp_path, on_step=lambda message, _: said.append(message))
    assert len(said) == 1
    assert said[0].startswith("Compiling")


def test_two_sizes_beside_dense_and_rounding(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = toy("llama", tokenizer=True, max_position_embeddings=600)
    monkeypatch.setattr(demo, "smollm2", lambda on_step: dense)
    monkeypatch.setattr(demo, "encyclopedia_text", lambda: (TEXT, TEXT))
    monkeypatch.setattr(demo, "WINDOWS", 2)
    said: list[tuple[str, float | None]] = []
    reports: list[Any] = []
    rows = demo.demo(tmp_path, on_step=lambda *step: said.append(step), on_report=reports.append)
    assert [row.name for row in rows] == list(demo.WORK) == ["dense", demo.ROUNDING, *demo.WAYS]
    assert rows[0].gap is None
    for row in rows[1:]:
        assert row.layer_bytes < 0.7 * rows[0].layer_bytes
        assert row.gap is not None
        assert row.gap.error is not None
        assert row.perplexity.error is not None
    for row in rows[2:]:
        assert verify(row.folder).sound
    for name in (demo.CALIBRATION_TEXT, demo.HELD_OUT_TEXT):  # to go on with
        assert "bottles of beer" in (tmp_path / name).read_text(encoding="utf-8")
    again = generate(rows[-1].folder, demo.PROMPT, raw=True, temperature=0, new_tokens=demo.NEW_TOKENS).text
    assert rows[-1].sentence == " ".join(f"{demo.PROMPT}{again}".split())
    gaps = [row.gap.value for row in rows if row.gap is not None]
    assert abs(gaps[1]) < abs(gaps[0])  # a toy knows nothing, and may as well be better
    assert rows[2].layer_bytes < rows[1].layer_bytes
    assert [report.bytes_after for report in reports] == [rows[-1].layer_bytes]
    # It is said first that it takes minutes; then, with every compression, what is left in all.
    assert "minutes" in said[0][0]
    left = [seconds for _, seconds in said if seconds is not None]
    assert len(left) == 2
    assert all(seconds > 0 for seconds in left)


def test_the_comparison_fits_a_terminal() -> None:
    half, place = (118_900_000, 175_500_000), Path("demo").absolute()
    whole = Path("/models/dense")
    rows = [
        demo.Measured("dense", whole, 212_336_640, 269_030_016, Estimate(22.149, 3.21), None, "Water.", 0.0),
        demo.Measured("magnitude", place / "m", *half, Estimate(3.2e5, 1e4), Estimate(9.5, 0.1), "…", 9.9),
        demo.Measured("losparse", place / "l", *half, Estimate(31.9, 4.9), Estimate(0.365, 0.0213), "Ice.", 801.0),
    ]
    shown = printed(lambda out: show_comparison(out, rows), 80)
    assert "22.1 ± 3.2" in shown
    assert "3.2e+05 ± 1e+04" in shown
    assert "0.365 ± 0.021" in shown
    assert "801 s" in shown
    assert "first 8 of README's 32" in shown
    assert all(len(line.rstrip()) <= 80 for line in shown.splitlines() if invoked() not in line)
    assert "Bytes of 4-bit rounding are nominal" in " ".join(shown.split())
    for line in (
        "Dense model: /models/dense", "Calibrated on: demo/calibration.txt", "Measured on: demo/held-out.txt",
        f"Go on with: {invoked()} inspect demo/l --layers",
        f"or measure: {invoked()} eval demo/l --against /models/dense --text demo/held-out.txt",
        f"or train it on: {invoked()} refine demo/l --against /models/dense --calibration demo/calibration.txt",
    ):  # fmt: skip
        assert line in shown.splitlines()
    assert f"generate FOLDER '{demo.PROMPT}' --raw --temperature 0 --new-tokens {demo.NEW_TOKENS}" in shown
    assert "…" not in shown.partition("dense says")[0]  # nothing is cut
