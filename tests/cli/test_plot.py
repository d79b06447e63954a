"""What a picture shows, counted in the SVG; the page's table; and that a failure leaves nothing behind."""

from __future__ import annotations

import itertools
import os
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from terminal import done, losparse

from losparse_cli.checkpoint.report import LayerReport, Report
from losparse_cli.cli.figures import MOST_KINDS, styles
from losparse_cli.cli.places import places
from losparse_cli.cli.plot import render, save_plot
from losparse_cli.errors import MissingExtraError, OutputError, UsageError
from losparse_cli.inspection import DenseReport, inspect
from losparse_cli.shim.layouts import LayerSpec

pytest.importorskip("matplotlib")

NASTY = '<script>alert("x")</script>&$\\frac$'
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def report_of(*names: str, model: str = "some model") -> Report:
    """Layers of growing error, 1000 bytes before and 600 after."""
    layers = tuple(
        LayerReport(name, LayerSpec((20, 25), 2, 100, "unstructured", "csr"), 1000, 600, 1.0, (0.01 * (i + 1)) ** 2)
        for i, name in enumerate(names)
    )
    return Report(layers, {}, 10_000, 5_000, 1000 * len(names), source={"name": model})


def texts(svg: bytes) -> list[str]:
    return [node.text or "" for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def marked(svg: bytes, prefix: str) -> dict[str, ET.Element]:
    """Groups of the SVG whose id begins with prefix."""
    nodes = ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}g")
    return {node.get("id", ""): node for node in nodes if node.get("id", "").startswith(prefix)}


def corners(node: ET.Element) -> list[tuple[float, float]]:
    """The points of the first path in a group."""
    path = next(node.iter("{http://www.w3.org/2000/svg}path")).get("d", "")
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path)]


def height(node: ET.Element) -> float:
    ys = [y for _, y in corners(node)]
    return max(ys) - min(ys)


# --- places --------------------------------------------------------------------------------------------


def test_a_kind_is_the_shortest_end_that_tells_it_apart() -> None:
    bert = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]
    found = places([f"bert.encoder.layer.{k}.{name}" for k in (0, 1) for name in bert] + ["bert.pooler.dense"])
    assert [place.kind for place in found[:4]] == ["query", "attention.output.dense", "intermediate.dense",
                                                   "output.dense"]  # fmt: skip
    assert [place.block for place in found] == [0] * 4 + [1] * 4 + [None]
    assert found[-1].kind == "pooler.dense"
    t5 = places(
        ["encoder.block.1.layer.0.SelfAttention.q", "decoder.block.1.layer.0.SelfAttention.q",
         "decoder.block.1.layer.1.EncDecAttention.q", "decoder.block.1.layer.2.DenseReluDense.wo"]
    )  # fmt: skip
    assert [place.kind for place in t5] == ["SelfAttention.q", "SelfAttention.q", "EncDecAttention.q", "wo"]
    assert [place.stack for place in t5] == ["encoder.block"] + ["decoder.block"] * 3
    experts = places([f"model.layers.3.experts.{k}.w1" for k in range(4)])
    assert len(set(experts)) == 1
    assert [place.block for place in places(["0.linear", "7", "a\n.12.b", f"h.{'9' * 5000}.fc"])] == [0, None, 12, None]


def test_the_smallest_of_too_many_kinds_share_a_style() -> None:
    few = styles({f"kind{i}": 10 for i in range(MOST_KINDS)})
    assert len(set(few.values())) == MOST_KINDS
    many = styles({f"kind{i}": i for i in range(MOST_KINDS + 3)})
    assert len(set(many.values())) == MOST_KINDS
    assert {kind for kind, style in many.items() if style.label == "4 other kinds"} == {f"kind{i}" for i in range(4)}


# --- a compressed checkpoint ---------------------------------------------------------------------------


@pytest.mark.slow
def test_every_kind_and_every_block_is_drawn(compressed: Callable[..., Path]) -> None:
    report = inspect(compressed("llama", rank=4, sparsity=0.5))
    assert isinstance(report, Report)
    svg = render(report, "svg")
    said = texts(svg)
    assert [said.count(kind) for kind in LLAMA] == [1] * 7
    assert "relative error of weight" in said
    share = report.bytes_after / report.bytes_before
    assert any(f"{share:.1%} of their bytes" in text and f"{report.targeted_share:.1%}" in text for text in said)
    assert report.source["name"] in said
    assert {len(corners(node)) for node in marked(svg, "error-").values()} == {2}  # blocks
    assert len(marked(svg, "error-")) == 7
    assert len(marked(svg, "bytes-before-")) == len(marked(svg, "bytes-after-")) == 14
    assert svg == render(report, "svg")


def test_heights_are_the_figures() -> None:
    report = report_of("h.0.mlp.fc", "h.1.mlp.fc", "h.2.mlp.fc", "h.0.mlp.proj", "h.1.mlp.proj", "h.2.mlp.proj")
    svg = render(report, "svg")
    bars = {side: [height(node) for node in marked(svg, f"bytes-{side}-").values()] for side in ("before", "after")}
    for before, after in zip(bars["before"], bars["after"], strict=True):
        assert after / before == pytest.approx(0.6, rel=1e-3)
    ys = [y for kind in (0, 1) for _, y in corners(marked(svg, f"error-{kind}")[f"error-{kind}"])]
    steps = [b - a for a, b in itertools.pairwise(ys)]
    assert steps == pytest.approx([steps[0]] * 5, rel=1e-3)  # errors are 0.01, 0.02, ...
    assert steps[0] < 0  # upwards


def test_what_lies_outside_blocks_leaves_them_their_room() -> None:
    """Embeddings take many times the bytes of a block, whose bars would be too low to tell apart."""
    blocks = report_of(*(f"h.{k}.fc" for k in range(4)))
    embedding = replace(
        blocks.layers[0], name="embed", spec=replace(blocks.layers[0].spec, kind="embedding", layout="codes"),
        bytes_before=20_000, bytes_after=9_000,
    )  # fmt: skip
    for share, cut in ((1, True), (0.05, False)):
        one = replace(embedding, bytes_before=int(20_000 * share), bytes_after=int(9_000 * share))
        svg = render(replace(blocks, layers=(*blocks.layers, one)), "svg")
        bars = [height(node) for node in marked(svg, "bytes-before-0-").values()]
        assert min(bars) > 90  # points, of about 210 that the panel has
        assert any("cut: 20.0 kB dense," in text for text in texts(svg)) == cut


def test_bits_head_a_picture_of_whole_numbers() -> None:
    spec = LayerSpec((20, 25), 0, 500, "unstructured", "codes", index_bytes=100)
    layers = [LayerReport(f"h.{k}.fc", spec, 1000, 200, 1.0, 1e-4) for k in range(2)]
    layers.append(LayerReport("embed", replace(spec, kind="embedding"), 1000, 500, 1.0, 1e-4))
    found = " ".join(texts(render(Report(tuple(layers), {}, 3000, 900, 1500), "svg")))
    assert "3.20 bits a weight and 8.00 of embeddings and heads" in found


def test_layers_of_one_kind_in_a_block_make_one_mark() -> None:
    report = report_of(*(f"layers.{k}.experts.{e}.w1" for k in range(3) for e in range(4)))
    svg = render(report, "svg")
    assert len(marked(svg, "bytes-after-")) == 3
    assert len(corners(marked(svg, "error-")["error-0"])) == 3


def test_the_checkpoint_and_what_it_was_made_from_head_a_picture_with_the_range_of_its_table(tmp_path: Path) -> None:
    report = replace(report_of("h.0.fc", "h.1.fc", "h.2.fc"), name="small")
    said = texts(render(report, "svg"))
    assert "small" in said
    totals = " ".join(said[said.index("small") :])
    assert totals.startswith("small Made from some model. Compressed layers: 60.0%")
    assert "Single layers have a relative error of weight of 0.010 to 0.030." in totals
    save_plot(report, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "0.010 to 0.030" in text
    assert text.count("Made from some model.") == 1
    assert [row[1] for row in Table(text).rows[1:]] == ["0.0100", "0.0200", "0.0300"]


def test_errors_of_outputs_are_drawn_if_all_are_known() -> None:
    report = report_of("h.0.fc", "h.1.fc")

    def measured(*errors: float | None) -> Report:
        pairs = zip(report.layers, errors, strict=True)
        layers = tuple(replace(layer, output_errors=() if e is None else (e,)) for layer, e in pairs)
        return replace(report, layers=layers)

    both = render(measured(0.5, 0.25), "svg")
    assert "relative error of in-sample output" in texts(both)
    (_, first), (_, second) = corners(marked(both, "error-")["error-0"])
    assert second > first  # lower on the page
    assert "relative error of weight" in texts(render(measured(0.5, None), "svg"))
    layers = tuple(replace(layer, held_out_error=0.6) for layer in measured(0.5, 0.25).layers)
    unseen = replace(report, layers=layers)
    assert "relative error of held-out output" in texts(render(unseen, "svg"))


def test_unknown_errors_are_said_to_be_unknown(tmp_path: Path) -> None:
    report = report_of("h.0.fc")
    bare = replace(report, layers=(replace(report.layers[0], weight_squared=None, residual_squared=None),))
    assert "No errors were recorded." in texts(render(bare, "svg"))
    save_plot(bare, tmp_path / "bare.html")
    assert Table((tmp_path / "bare.html").read_text()).rows[1][1] == "unknown"
    assert "No errors were recorded." not in texts(render(report, "svg"))
    endless = replace(report, layers=(replace(report.layers[0], residual_squared=float("inf")),))
    assert "No errors were recorded." in texts(render(endless, "svg"))


@pytest.mark.parametrize("name", ["t5", "gpt2", "mixtral", "bert"])
def test_other_architectures(name: str, compressed: Callable[..., Path]) -> None:
    report = inspect(compressed(name, rank=4, sparsity=0.5))
    assert isinstance(report, Report)
    said = texts(render(report, "svg"))
    assert {place.kind for place in places([layer.name for layer in report.layers])} <= set(said)
    assert ({"encoder.block", "decoder.block"} <= set(said)) is (name == "t5")


@pytest.mark.slow
def test_a_hundred_blocks_and_a_layer_outside() -> None:
    report = report_of(*(f"model.layers.{k}.{kind}" for k in range(100) for kind in LLAMA), "lm_head")
    svg = render(report, "svg")
    assert len(marked(svg, "bytes-after-")) == 701
    assert {"0", "95", "outside", "lm_head"} <= set(texts(svg)), texts(svg)
    assert "96" not in texts(svg)


def test_names_are_not_read_as_markup() -> None:
    report = report_of(f"_h.0.{NASTY}", "_h.0._hidden", "_h.0.a\x00\x1b\n\ud800b", model=NASTY)
    said = texts(render(report, "svg"))  # which parses as XML
    assert {NASTY, "_hidden", "a\ufffd\ufffd\ufffd\ufffdb"} <= set(said)
    assert render(report, "png")


# --- a dense folder ------------------------------------------------------------------------------------


def test_spectra_of_every_kind(toy: Callable[..., Path]) -> None:
    report = inspect(toy("llama"), spectrum=None)
    assert isinstance(report, DenseReport)
    svg = render(report, "svg")
    assert [texts(svg).count(kind) for kind in LLAMA] == [1] * 7
    lines = marked(svg, "energy-")
    assert len(lines) == len(marked(svg, "band-")) == 7
    for node in lines.values():
        ys = [y for _, y in corners(node)]
        assert len(ys) > 20
        assert ys == sorted(ys, reverse=True)  # energy grows with rank
    assert report.to_dict()["layers"][0].keys() == {"name", "shape", "nbytes", "reason", "energy", "rows"}


def test_the_curve_is_the_energy_at_more_ranks(toy: Callable[..., Path]) -> None:
    report = inspect(toy("bert"), spectrum=True)
    assert isinstance(report, DenseReport)
    for layer in report.layers:
        assert layer.energy.items() <= layer.curve.items()
        if layer.reason is None:
            assert layer.shape is not None
            assert (min(layer.curve), max(layer.curve)) == (1, min(layer.shape))
            assert layer.curve[min(layer.shape)] == 1.0


def test_without_spectra_there_is_nothing_to_draw(toy: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to draw"):
        save_plot(inspect(toy("llama")), tmp_path / "x.svg")
    with pytest.raises(UsageError, match="nothing to draw"):
        save_plot(report_of(), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


# --- files ---------------------------------------------------------------------------------------------


class Table(HTMLParser):
    """The cells of every row, the tags, and all text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def test_the_page_has_a_row_for_every_layer(tmp_path: Path) -> None:
    report = report_of("h.0.fc", f"h.1.{NASTY}", model=NASTY)
    save_plot(report, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    table = Table(text)
    assert [len(row) for row in table.rows] == [12] * 3
    assert table.rows[0][1] == "relative error of weight"  # where a narrow window shows it
    assert table.rows[1] == ["h.0.fc", "0.0100", "60.0%", "9.600", "600", "1,000", "20 × 25", "2", "100", "20.0%",
                             "unstructured", "csr"]  # fmt: skip
    assert table.rows[2][0] == f"h.1.{NASTY}"
    assert table.rows[2][1] == "0.0200"
    names = [name for name, _ in table.tags]
    assert names.count("script") == 1
    assert names.count("svg") == names.count("table") == names.count("figure") == 1
    for name, values in table.tags:
        assert name not in ("link", "img", "iframe", "object", "image")
        assert all(value is None or value.startswith("#") for key, value in values.items() if key.endswith("href"))
        assert not {key for key in values if key.startswith("on") or key == "src"}
    assert not re.search(r"url\((?!#)|@import", text)
    assert NASTY not in texts(text[text.index("<svg") : text.index("</figure>")].encode())  # the title stands above it


def test_the_page_of_a_dense_model(toy: Callable[..., Path], tmp_path: Path) -> None:
    report = inspect(toy("bert"), spectrum=None)
    assert isinstance(report, DenseReport)
    save_plot(report, tmp_path / "page.HTML")
    head, *rows = Table((tmp_path / "page.HTML").read_text(encoding="utf-8")).rows
    assert len(rows) == len(report.layers)
    for row, layer in zip(rows, report.layers, strict=True):
        assert row[head.index("layer")] == layer.name
        assert row[head.index("bytes")] == f"{layer.nbytes:,}"
        assert row[head.index("rank 8")] == (f"{layer.energy[8]:.1%}" if layer.energy else "")


def test_a_png_is_large_and_not_blank(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    save_plot(report_of("h.0.fc", "h.1.fc"), tmp_path / "x.png")
    picture = image.open(tmp_path / "x.png").convert("RGB")
    assert 900 < picture.width < 1800
    assert 600 < picture.height < 1200
    counts = {colour: count for count, colour in picture.getcolors(1 << 20)}
    assert counts[0, 0x72, 0xB2] > 10_000  # the bars of the only kind
    assert counts[255, 255, 255] > 100_000


@pytest.mark.slow
def test_the_command_draws_beside_every_form(
    compressed: Callable[..., Path], toy: Callable[..., Path], tmp_path: Path
) -> None:
    small = compressed("llama", rank=4, sparsity=0.5)
    ended = done("inspect", small, "--plot", "x.svg", cwd=tmp_path)
    assert "The picture is in x.svg." in ended.err
    assert "q_proj" in texts((tmp_path / "x.svg").read_bytes())
    for form in ("--json", "--csv"):
        (tmp_path / "x.svg").unlink()
        beside = done("inspect", small, form, "--plot", "x.svg", cwd=tmp_path)
        assert beside.out == done("inspect", small, form).out
        assert (tmp_path / "x.svg").is_file()
    dense = done("inspect", toy("llama"), "--plot", "x.svg", "--csv", cwd=tmp_path)
    assert "energy_64" in dense.out
    assert marked((tmp_path / "x.svg").read_bytes(), "energy-")
    assert [path.name for path in tmp_path.iterdir()] == ["x.svg"]


# --- failures ------------------------------------------------------------------------------------------


def test_another_suffix_is_wrong_usage_before_any_work(tmp_path: Path) -> None:
    for name in ("x.pdf", "x", "png", "x.svg.gz"):
        ended = losparse("inspect", "no-such-model", "--plot", name, cwd=tmp_path)
        assert ended.code == 2
        assert ".png, .svg and .html" in ended.complaint
    assert "no-such-model" in losparse("inspect", "./no-such-model", "--plot", "x.png", cwd=tmp_path).complaint


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path) -> None:
    gone = "import sys; sys.modules['matplotlib'] = None"
    ended = losparse("inspect", "no-such-model", "--plot", "x.png", cwd=tmp_path, before=gone)
    assert ended.code == 1
    assert ended.complaint.endswith("pip install 'losparse[plot]'")


def test_a_broken_package_is_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match="matplotlib"):
        render(report_of("h.0.fc"), "png")


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of("h.0.fc")
    with pytest.raises(OutputError, match=r"absent does not exist\. Make it"):
        save_plot(report, tmp_path / "absent" / "x.svg")
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "link.svg").symlink_to("elsewhere")
    for name in ("folder.svg", "link.svg"):
        with pytest.raises(OutputError, match=r"no regular file\. Choose another name"):
            save_plot(report, tmp_path / name)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match=r"not writable\. Choose another place"):
        save_plot(report, tmp_path / "x.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.svg", "link.svg"]


def test_a_failure_leaves_the_old_picture_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.svg"
    path.write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OutputError, match=r"No space left on device\. Choose another place"):
            save_plot(report_of("h.0.fc"), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    save_plot(report_of("h.0.fc"), path)
    assert "fc" in texts(path.read_bytes())
    assert list(tmp_path.iterdir()) == [path]
