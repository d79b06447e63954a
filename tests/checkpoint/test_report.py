"""Reports survive JSON, and their sums are those of their layers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from losparse_cli.checkpoint.report import LayerReport, Report, error_of, telling_error, text_used, total_error
from losparse_cli.errors import CheckpointError
from losparse_cli.shim.layouts import LayerSpec

A = LayerReport("a", LayerSpec((10, 20), 2, 30, "unstructured", "gaps4", 4, 20), 400, 200, 100.0, 4.0, (0.3, 0.2))
B = LayerReport("b", LayerSpec((5, 4), 0, 10, "rows", "rows"), 40, 30, 25.0, 0.0, (0.0,))
REPORT = Report(
    (A, B), {"head": "output head"}, 1000, 790, 500, files={"x": {"size": 1, "sha256": "0"}}, fingerprint="f"
)

SPECS = {"a": A.spec, "b": B.spec}


def test_a_report_survives_json() -> None:
    assert Report.from_dict(json.loads(json.dumps(REPORT.to_dict())), SPECS, "x") == REPORT


def test_sums() -> None:
    assert A.parameters == 200
    assert A.kept == 2 * 30 + 30
    assert A.density == 30 / 200
    assert A.relative_error == 0.2
    assert REPORT.bytes_before == 440
    assert REPORT.bytes_after == 230
    assert REPORT.targeted_parameters == 220
    assert REPORT.targeted_share == 220 / 500
    assert REPORT.kept_parameters == (90 + 10) / 220
    assert REPORT.relative_error == (4 / 125) ** 0.5
    assert REPORT.totals()["model_bytes_after"] == 790


def test_errors_that_are_not_known() -> None:
    assert total_error([A, replace(B, residual_squared=None)]) is None
    assert total_error([replace(A, weight_squared=0.0)]) is None
    assert total_error([]) is None


@pytest.mark.parametrize("key", ["layers", "skipped", "model_bytes_before", "model_bytes_after", "parameters"])
def test_a_report_without_a_field_names_the_file(key: str) -> None:
    fields = REPORT.to_dict()
    del fields[key]
    if key == "skipped":  # a map: absent means empty
        assert Report.from_dict(fields, SPECS, "x").skipped == {}
        return
    with pytest.raises(CheckpointError, match=r"^here/losparse_report\.json is incomplete.*again"):
        Report.from_dict(fields, SPECS, "here/losparse_report.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [("layers", 5), ("layers", [5]), ("files", []), ("files", {"x": 5}), ("recipe", "x"), ("parameters", "many")],
)
def test_a_report_of_the_wrong_kind_names_the_file(key: str, value: object) -> None:
    fields = REPORT.to_dict() | {key: value}
    if value == []:
        assert Report.from_dict(fields, SPECS, "x").files == {}
        return
    with pytest.raises(CheckpointError, match=r"^here is incomplete"):
        Report.from_dict(fields, SPECS, "here")


@pytest.mark.parametrize("figure", [name for name in A.measured() if name not in ("name", "head")])
def test_a_figure_that_is_no_number_names_the_file(figure: str) -> None:
    wrong = ["x"] if isinstance(getattr(A, figure), tuple) else "x"
    fields = REPORT.to_dict() | {"layers": [A.to_dict() | {figure: wrong}]}
    with pytest.raises(CheckpointError, match=r"^here is incomplete"):
        Report.from_dict(fields, SPECS, "here")


def test_text_is_named_without_folders_and_counted_as_it_is() -> None:
    asked = {"source": "/home/somebody/secret/wiki.txt", "tokens": 65536, "length": 512, "windows": 8, "held_out": 1}
    assert text_used(asked) == (
        "4,096 of 65,536 tokens asked for (the text has no more) in 8 windows from wiki.txt, 1 of them held out"
    )
    assert text_used(asked | {"tokens": 4200, "held_out": 0}) == (
        "4,096 tokens in 8 windows from wiki.txt, none of them held out"
    )
    assert "from user/data," in text_used(asked | {"source": "user/data", "split": "train"})
    assert "from text that the model wrote itself," in text_used(asked | {"source": "self"})
    text_used({"windows": "many", "length": None})  # a report may hold anything


def test_the_error_on_held_out_text_says_most_then_that_of_outputs() -> None:
    weights = replace(A, weight_squared=4.0, residual_squared=1.0)
    outputs = replace(weights, output_errors=(0.5, 0.2))
    unseen = replace(outputs, held_out_error=0.3)
    for layers, measure, error in (
        ([weights, outputs], "relative_error", 0.5),
        ([outputs, outputs], "output_error", 0.2),
        ([outputs, unseen, replace(unseen, held_out_error=0.4)], "held_out_error", 0.35),  # an expert is not reached
    ):
        assert telling_error(layers) == measure
        assert error_of(layers, measure) == pytest.approx(error)
    assert telling_error([]) == "relative_error"
    assert LayerReport.from_dict(unseen.measured(), unseen.spec) == unseen
