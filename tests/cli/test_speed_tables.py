"""What `losparse bench` shows: the tables at any width, JSON, and the picture in its three forms."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cli.test_plot import Table, height, marked, texts
from rich.console import Console as RichConsole
from terminal import done

from losparse_cli.benchmark.report import BenchReport, LayerSpeed, ModelSpeed
from losparse_cli.cli.console import Console
from losparse_cli.cli.plot import render, save_plot
from losparse_cli.cli.speed_figure import setting, times
from losparse_cli.cli.speed_tables import show_speed
from losparse_cli.errors import UsageError
from tests.printed import printed

NASTY = '[red]<script>alert("x")</script>&$\\frac$; \x1b'
QUICK = ("--prompt", "4", "--new-tokens", "2", "--rounds", "1", "--rows", "1,3", "--threads", "1", "--device", "cpu")
LITTLE = """
from losparse_cli.benchmark import layers, timing
timing.COPY_BYTES, layers.COLD_BYTES = 1 << 20, 1 << 16
import losparse_cli.bench, sys
sys.modules["losparse_cli.bench"].resident = lambda *_: 5_000_000
"""
"""Small copies, and no fresh process: tests/test_bench.py has one."""


def case(
    shape: tuple[int, int], rows: int, ours: float, dense: float, form: str = "bits", pattern: str = "unstructured"
) -> LayerSpeed:
    m, n = shape
    return LayerSpeed(shape, 48, 16, 0.1, pattern, form, rows, ours, dense, m * n // 4, m * n * 2)


LAYERS = (
    case((14336, 4096), 1, 2.0, 8.0), case((14336, 4096), 256, 125.0, 100.0),
    case((4096, 14336), 1, 4.0, 8.0, "gaps"), case((4096, 14336), 256, 50.0, 100.0, "gaps"),
)  # fmt: skip
DENSE = ModelSpeed(1000.0, 10.0, 16_000_000_000, 16_000_000_000, 17_000_000_000)
SMALL = ModelSpeed(800.0, 25.0, 4_000_000_000, 4_800_000_000, 5_100_000_000)
REPORT = BenchReport(
    "some/model", "cpu", "bfloat16", 2, "Some Processor, AVX512", 2e10, 1, 128, 32, "dense/model", LAYERS, SMALL, DENSE
)


def shown(report: BenchReport, width: int = 140) -> str:
    return printed(lambda out: show_speed(out, report), width)


def line(text: str, *begins: str) -> list[str]:
    """The words of the only line that begins so."""
    (found,) = [words for words in map(str.split, text.splitlines()) if words[: len(begins)] == [*begins]]
    return found[len(begins) :]


# --- the tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 100, 140])
def test_every_figure_is_shown_at_any_width(width: int) -> None:
    text = shown(REPORT, width)
    assert "…" not in text
    assert all(len(row.rstrip()) <= width for row in text.splitlines())
    assert "some/model beside dense/model" in text
    assert "rank 16, density 0.100" in text  # said once
    assert line(text, "14336", "x", "4096") == ["48", "bits", "1", "8.000", "2.000", "4.00x", "2.00", "37%"]
    assert line(text, "256", "100.0", "125.0") == ["0.80x", "2.00", "1%"]
    assert line(text, "prefill,", "tokens/s") == ["1,000", "800.0", "0.80x"]
    assert line(text, "decode,", "tokens/s") == ["10.0", "25.0", "2.50x"]
    assert line(text, "bytes", "on", "disk") == ["16.0", "GB", "4.0", "GB", "25.0%"]
    assert line(text, "bytes", "of", "parameters", "and", "buffers")[-1] == "30.0%"
    assert line(text, "resident", "memory")[-1] == "30.0%"


@pytest.mark.parametrize("width", [80, 100])
def test_llama_cpp_stands_beside_it(width: int) -> None:
    other = ModelSpeed(400.0, 50.0, 8_000_000_000, None, 6_000_000_000)
    ours = replace(SMALL, token_bytes=4_000_000_000, plain="it is new")
    text = shown(REPORT.with_(peer=other, peer_file="x.gguf", compressed=ours), width)
    assert "…" not in text
    assert all(len(row.rstrip()) <= width for row in text.splitlines())
    assert line(text, "prefill,", "tokens/s") == ["1,000", "800.0", "400.0", "0.80x", "2.00x"]
    assert line(text, "decode,", "tokens/s")[-2:] == ["2.50x", "0.50x"]
    assert line(text, "bytes", "of", "parameters", "and", "buffers")[-2:] == ["30.0%", "-"]
    assert line(text, "bytes", "that", "a", "token", "reads")[:4] == ["-", "4.0", "GB", "-"]
    assert "transformers' own loop, because it is new" in text
    alone = shown(REPORT.with_(peer=other, dense=None, against=None), width)
    assert line(alone, "decode,", "tokens/s") == ["25.0", "50.0", "0.50x"]


def test_a_busy_machine_is_named() -> None:
    assert "busy" not in shown(REPORT.with_(load=0.2)) + shown(REPORT)
    assert "busy (load 3.1)" in shown(REPORT.with_(load=3.1))


def test_the_widest_table_fits_80_columns() -> None:
    others = (case((4096, 4096), 1, 1.0, 2.0, pattern="2:4"), case((10240, 10240), 1, 142.1, 1.0, "columns", "columns"))
    varied = replace(LAYERS[0], rank=128, density=0.25)
    text = shown(replace(REPORT, layers=(*LAYERS, *others, varied)), 80)
    assert "…" not in text
    assert "2:4 bits" in text
    assert all(len(row.rstrip()) <= 80 for row in text.splitlines())


def test_one_model_alone() -> None:
    text = shown(replace(REPORT, against=None, dense=None, compressed=replace(SMALL, decode=None, resident=None)))
    assert "beside" not in text
    assert line(text, "prefill,", "tokens/s") == ["800.0"]
    assert "decode" not in text
    assert "resident" not in text


def test_what_only_one_side_knows_has_no_ratio() -> None:
    text = shown(replace(REPORT, dense=replace(DENSE, resident=None)))
    assert line(text, "resident", "memory") == ["-", "5.1", "GB", "-"]


def test_slower_and_faster_look_apart() -> None:
    out, text = Console(), io.StringIO()
    out.out = RichConsole(file=text, width=140, force_terminal=True, color_system="standard", highlight=False)
    show_speed(out, REPORT)
    assert "\x1b[32m4.00x" in text.getvalue()
    assert "\x1b[31m0.80x" in text.getvalue()


@pytest.mark.parametrize(
    ("value", "said"), [(0.8, "0.80x"), (1.0, "1.00x"), (9.99, "9.99x"), (12.34, "12.3x"), (99.97, "100x")]
)
def test_times(value: float, said: str) -> None:
    assert times(value) == said


def test_names_in_the_tables_are_no_markup() -> None:
    text = shown(replace(REPORT, name="[red]a[/]", against="[/b", processor="[bold]"))
    assert "[red]a[/] beside [/b" in text
    assert "([bold])" in text


# --- the picture ----------------------------------------------------------------------------------


pytest.importorskip("matplotlib")


def test_bars_are_the_figures() -> None:
    svg = render(REPORT, "svg")
    bars = {name: height(node) for name, node in marked(svg, "speedup-").items()}
    assert set(bars) == {f"speedup-{i}-{k}" for i, k in itertools.product((0, 1), repeat=2)}
    one = bars["speedup-0-0"] / 4
    assert [bars[f"speedup-{i}-{k}"] / one for i in (0, 1) for k in (0, 1)] == pytest.approx([4, 0.8, 2, 2], rel=1e-3)
    model = {name: height(node) for name, node in marked(svg, "model-").items()}
    assert set(model) == {f"model-{name}" for name, ratio in REPORT.ratios.items() if ratio is not None}
    unit = model["model-decode_speedup"] / 2.5
    assert [bar / unit for bar in model.values()] == pytest.approx([0.8, 2.5, 0.25, 0.3, 0.3], rel=1e-3)
    assert len(marked(svg, "even")) == 2
    said = texts(svg)
    assert {"1 row of x", "256 rows of x", "0.80x", "2.50x", "25%", "30%", "14336 × 4096", "bits", "gaps"} <= set(said)
    assert {"some/model beside dense/model", *setting(REPORT).split("; ")} <= set(said)
    assert svg == render(REPORT, "svg")
    assert render(REPORT, "png") == render(REPORT, "png")


def test_without_a_dense_model_there_are_only_layers() -> None:
    svg = render(replace(REPORT, against=None, dense=None), "svg")
    assert len(marked(svg, "speedup-")) == 4
    assert not marked(svg, "model-")
    assert len(marked(svg, "even")) == 1


def test_many_shapes_and_many_rows() -> None:
    layers = tuple(case((100 + i, 50), rows, 1.0, 2.0) for i in range(12) for rows in range(1, 18))
    svg = render(replace(REPORT, layers=layers), "svg")
    assert len(marked(svg, "speedup-")) == 12 * 17
    assert "111 × 50, bits" in texts(svg)


def test_shapes_that_differ_in_nothing_shown_stay_apart() -> None:
    svg = render(replace(REPORT, layers=(LAYERS[0], LAYERS[1]) * 2), "svg")
    assert len(marked(svg, "speedup-")) == 4


def test_names_in_the_picture_are_no_markup(tmp_path: Path) -> None:
    report = replace(REPORT, name=NASTY, against=NASTY, processor=NASTY, layers=(replace(LAYERS[0], pattern=NASTY),))
    said = texts(render(report, "svg"))  # which parses as XML
    clean = NASTY.replace("\x1b", "\ufffd")
    assert f"{clean} beside {clean}" in said
    assert render(report, "png")
    save_plot(report, tmp_path / "page.html")
    table = Table((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [name for name, _ in table.tags].count("script") == 1
    assert table.rows[1][table.rows[0].index("pattern")] == clean


def test_the_page_has_a_row_for_every_case(tmp_path: Path) -> None:
    save_plot(REPORT, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    head, *rows = Table(text).rows
    assert len(rows) == len(LAYERS)
    assert rows[1] == ["14336 × 4096", "48", "16", "10.0%", "unstructured", "bits", "256", "100.0000", "125.0000",
                       "0.80x", "117,440,512", "14,680,064", "0.6%"]  # fmt: skip
    assert len(head) == len(rows[0])
    assert "<svg" in text
    assert "some/model beside dense/model" in text
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_report_without_layers_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to draw"):
        save_plot(replace(REPORT, layers=()), tmp_path / "x.svg")
    assert not list(tmp_path.iterdir())


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_shows_and_draws(compressed: Callable[..., Path], toy: Callable[..., Path], tmp_path: Path) -> None:
    small = compressed("llama", rank=4, sparsity=0.5)
    ended = done("bench", small, "--against", toy("llama"), *QUICK, "--plot", "x.svg", cwd=tmp_path, before=LITTLE)
    assert "The picture is in x.svg." in ended.err
    assert line(ended.out, "decode,", "tokens/s")[-1].endswith("x")
    assert line(ended.out, "resident", "memory") == ["5.0", "MB", "5.0", "MB", "100.0%"]
    assert "float32, 1 thread, copy" in ended.out
    assert len(re.findall(r"\d\.\d\dx|\d\d\.\dx|\d\d\dx", ended.out)) >= 10
    assert marked((tmp_path / "x.svg").read_bytes(), "model-decode_speedup")
    assert [path.name for path in tmp_path.iterdir()] == ["x.svg"]


def test_the_command_as_json(compressed: Callable[..., Path], tmp_path: Path) -> None:
    small = compressed("bert", rank=4, sparsity=0.5)
    for name in ("x.png", "x.html"):
        ended = done("bench", small, *QUICK, "--json", "--plot", name, cwd=tmp_path, before=LITTLE)
        found = json.loads(ended.out)
        assert ended.err == ""
        assert found["name"] == str(small)
        assert found["dense"] is found["against"] is found["prefill_speedup"] is None
        assert found["compressed"]["resident"] == 5_000_000
        assert [layer["rows"] for layer in found["layers"]][:2] == [1, 3]
        assert all(layer["speedup"] > 0 for layer in found["layers"])
        assert (tmp_path / name).stat().st_size > 5000
    assert done("bench", small, *QUICK, "--quiet", cwd=tmp_path, before=LITTLE).out == ""
