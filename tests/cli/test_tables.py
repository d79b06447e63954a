"""Tables at the widths of terminals: names stay whole or folded unambiguously, and nothing goes in silence."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from losparse_cli.checkpoint.report import LayerReport, Report
from losparse_cli.cli.columns import Column, fold, show_columns
from losparse_cli.cli.console import Console
from losparse_cli.cli.summary import show_plan
from losparse_cli.cli.tables import show_report
from losparse_cli.compress import plan
from losparse_cli.compression.estimate import forecast
from losparse_cli.errors import UsageError
from losparse_cli.inspection import DenseLayer, DenseReport
from losparse_cli.shim.layouts import LayerSpec
from tests.printed import printed

WIDTHS = [80, 100, 160]
LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
STACKS = {
    "llama": [f"model.layers.{k}.{name}" for k in range(12) for name in LLAMA],
    "experts": [f"model.layers.{k}.mlp.experts.{e}.gate_proj" for k in range(3) for e in range(12)],
    "bart": [f"model.{part}.layers.{k}.encoder_attn.out_proj" for part in ("encoder", "decoder") for k in range(3)],
    "tower": [f"vision_model.encoder.layers.{k}.self_attn.attention.query_projection" for k in range(3)],
    "plain": ["fc", "head.0.dense", "proj"],
}


def compressed(names: list[str], *, varied: bool = True, **changes: Any) -> Report:
    layers = tuple(
        LayerReport(
            name,
            LayerSpec((4096, 14336), 128 + i * varied, 12_345_678, "unstructured", "gaps8" if i % 2 else "bitmask"),
            117_440_512, 60_000_000 + i, 1.0, (0.01 + 0.001 * i) ** 2,
        )
        for i, name in enumerate(names)
    )  # fmt: skip
    return Report(layers, {"lm_head": "output head"}, 10**10, 6 * 10**9, 10**10, {"name": "dense/model"}, **changes)


def dense(names: list[str], *, spectra: bool) -> DenseReport:
    energy = {rank: 1 - 1 / rank for rank in (1, 2, 4, 8, 16, 32, 64, 128, 256)} if spectra else {}
    layers = [DenseLayer(name, (4096, 14336), 1000 + i, None, energy) for i, name in enumerate(names)]
    reason = "DebertaV2Linear, which may compute more than a product"
    return DenseReport("dense/model", (*layers, DenseLayer("lm_head", None, 5000, reason, {})), 10**9, 10**9, 10**8)


def shown(report: Report | DenseReport, width: int, **options: Any) -> str:
    asked = {"every_layer": True, "sort": "name", "as_csv": False, "as_json": False} | options
    found = printed(lambda out: show_report(out, report, **asked), width)
    assert all(len(line.rstrip()) <= width for line in found.splitlines())
    return found


def unfolded(text: str) -> list[str]:
    """First words of the lines, with what … stands for in its place."""
    prefix = re.search(r"… stands for (\S+)", text)
    firsts = [line.split()[0] for line in text.splitlines() if line.strip() and "stands for" not in line]
    return [word.replace("…", prefix[1]) if prefix else word for word in firsts]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("varied", [True, False])
def test_every_layer_of_a_compressed_checkpoint_has_its_whole_name(stack: str, width: int, varied: bool) -> None:
    names = STACKS[stack]
    text = shown(compressed(names, varied=varied), width)
    assert [word for word in unfolded(text) if word in names] == names
    assert {"after", "share", "error"} <= set(text.split())
    heads = next(line for line in text.splitlines() if "share" in line).split()
    said = " ".join(text.split())
    for head in ("shape", "rank", "nnz", "density", "layout", "before"):
        assert head in heads or re.search(rf"left out for want of room:[\w ,]*\b{head}|\b{head} \w", said), head
    if width == 160:
        assert "left out" not in text


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("spectra", [True, False])
def test_every_layer_of_a_dense_model_has_its_whole_name_and_reason(stack: str, width: int, spectra: bool) -> None:
    names = STACKS[stack]
    text = shown(dense(names, spectra=spectra), width)
    assert [word for word in unfolded(text) if word in names] == names
    if "left out for want of room: shape, bytes, compress?" not in " ".join(text.split()) or not spectra:
        for word in ["DebertaV2Linear,", "which", "may", "compute", "more", "than", "a", "product"]:
            assert word in text
    if spectra:
        assert "rank 8" in text


def test_spectra_for_a_picture_alone_leave_the_table_short() -> None:
    report = dense(STACKS["llama"], spectra=True)
    text = shown(report, 80, spectra=False)
    assert "rank 8" not in text
    assert text == shown(dense(STACKS["llama"], spectra=False), 80)
    short = shown(report, 80, spectra=False, every_layer=False)
    assert [word for word in unfolded(short) if "self_attn" in word] == [f"model.layers.*.{name}" for name in LLAMA[:3]]


def test_blocks_are_titled_by_the_checkpoint_with_its_source_below() -> None:
    text = shown(compressed(STACKS["llama"], name="small"), 80, every_layer=False)
    assert text.startswith("small\nmade from dense/model\n")
    assert [word for word in unfolded(text) if word.startswith("model.")] == [f"model.layers.{k}" for k in range(12)]
    assert shown(compressed(["a"]), 80).startswith("dense/model\n")  # as it comes from a run


@pytest.mark.parametrize("width", WIDTHS)
def test_the_total_tells_layers_from_embeddings_and_heads(width: int) -> None:
    """Who asked for 3.25 bits finds them, whatever embeddings take."""

    def layer(name: str, nbytes: int, kind: str = "", *, head: bool = False) -> LayerReport:
        spec = LayerSpec((1000, 64), 0, 64000, "unstructured", "codes", index_bytes=nbytes, kind=kind)
        return LayerReport(name, spec, 128_000, nbytes, 1.0, 1e-4, head=head)

    layers = [layer(name, 26_000) for name in STACKS["llama"]]
    report = Report((layer("embed", 64_000, "embedding"), *layers, layer("lm_head", 48_000, head=True)), {}, 1, 1, 1)
    lines = [line.strip() for line in shown(report, width, every_layer=False).splitlines()]
    [at] = [k for k, line in enumerate(lines) if line.startswith("60 layers")]
    assert "3.25" in lines[at].split()
    assert lines[at + 1].startswith("1 embedding, 1 head")
    assert "7.00" in lines[at + 1].split()
    assert (report.totals()["bits"], report.totals()["embedding_bits"]) == (3.25, 7.0)
    text = shown(replace(report, layers=tuple(layers)), width, every_layer=False)
    assert "60 layers" in text
    unknown = replace(report.layers[0], residual_squared=None)
    [depth] = re.findall("error by depth  (\\S+)", shown(replace(report, layers=(*layers, unknown)), width))
    assert len(depth) == 12  # of which no error is known has no place there
    assert "embedding" not in text


def test_the_range_is_that_of_single_layers() -> None:
    report = compressed(STACKS["llama"])
    for every in (True, False):
        assert "single layers 0.010 to 0.069" in shown(report, 100, every_layer=every)


@pytest.mark.parametrize("sort", ["rank", "nnz", "density"])
def test_the_column_that_was_asked_for_stays(sort: str) -> None:
    names = [f"model.decoder.layers.{k}.some_attention.out_projection" for k in range(3)]
    text = shown(compressed(names), 80, sort=sort)
    assert "left out" in text
    assert not re.search(rf"left out.*{sort}", text)


def test_a_dense_model_is_sorted_by_what_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    report = dense(["a", "b"], spectra=False)
    for every in (True, False):
        words = [word for word in unfolded(shown(report, 80, sort="bytes", every_layer=every)) if word in ("a", "b")]
        assert words == ["b", "a"]
    shown(report, 80, sort="bytes", as_csv=True)
    assert [line[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["l", "b", "a"]
    with pytest.raises(UsageError, match="--sort error is for compressed checkpoints; a dense one has name and bytes"):
        shown(report, 80, sort="error")


def test_layers_without_errors_have_no_column_of_them() -> None:
    report = compressed(["a", "b"])
    layers = tuple(replace(layer, weight_squared=None, residual_squared=None) for layer in report.layers)
    unmeasured = replace(report, layers=layers, name="tuned")
    assert "error" in shown(report, 120)
    for every in (True, False):
        assert "error" not in shown(unmeasured, 120, every_layer=every)
    for form in ({}, {"as_csv": True}, {"as_json": True}):
        with pytest.raises(UsageError, match=r"--sort error .* of the layers of tuned no error is recorded"):
            shown(unmeasured, 120, sort="error", **form)
    partly = replace(report, layers=(report.layers[0], layers[1]), name="refined")
    assert "error" in shown(partly, 120, sort="error")


def test_csv_and_json_are_sorted_too(capsys: pytest.CaptureFixture[str]) -> None:
    report = compressed(["a", "b", "c"])
    shown(report, 80, sort="error", as_csv=True)
    assert [line[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["c", "b", "a"]
    out = Console(json=True)
    show_report(out, replace(report, name="x"), every_layer=False, sort="error", as_csv=False, as_json=True)
    assert [layer["name"] for layer in out._data["layers"]] == ["c", "b", "a"]
    assert out._data["name"] == "x"


def test_what_no_column_may_go_for_stands_close() -> None:
    out, text = Console(), io.StringIO()
    out.out = RichConsole(file=text, width=44, highlight=False)
    show_columns(out, "name", ["a.b.first", "a.b.second"], [Column(f"head {i}", ["12345", "1"]) for i in range(5)])
    assert "…" in text.getvalue()
    assert text.getvalue().count("head") == 5


def test_rows_of_a_plan_are_told_apart(toy: Any, tmp_path: Path) -> None:
    """Three kinds of layers of BERT have names that end with `dense`."""
    found = forecast(plan(toy("bert"), tmp_path / "out", {"values": "float", "keep": 0.8}))
    rows = re.findall(r"^ *2 x (\S+)", printed(lambda out: show_plan(out, found), 100), re.MULTILINE)
    assert sorted(rows) == sorted(
        ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    )


def test_fold() -> None:
    assert fold(["a", "bb"]) == (["a", "bb"], "")
    assert fold([]) == ([], "")
    names = [f"model.layers.{k}.mlp.up" for k in range(11)]
    folded, prefix = fold([*names, "lm_head"])
    assert prefix == "model.layers."
    assert folded == [*(f"…{k}.mlp.up" for k in range(11)), "lm_head"]
