"""Reports survive JSON, and their sums are those of their layers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from losparse_cli.checkpoint.report import LayerReport, Report, total_error
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
    ("key", "value"), [("layers", 5), ("layers", [5]), ("files", []), ("files", {"x": 5}), ("recipe", "x")]
)
def test_a_report_of_the_wrong_kind_names_the_file(key: str, value: object) -> None:
    fields = REPORT.to_dict() | {key: value}
    if value == []:
        assert Report.from_dict(fields, SPECS, "x").files == {}
        return
    with pytest.raises(CheckpointError, match=r"^here is incomplete"):
        Report.from_dict(fields, SPECS, "here")
