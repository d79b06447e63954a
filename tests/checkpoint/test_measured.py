"""Figures of eval kept beside a checkpoint: on the card once, replaced when measured again, of no other checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from losparse_cli.checkpoint.measured import problem, record, require_recordable
from losparse_cli.errors import UsageError

CARD = "---\nlicense: mit\n---\n\n# out\n\nWhat its owner wrote.\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "losparse_report.json").write_text('{"files": {}}')
    (tmp_path / "README.md").write_text(CARD)
    return tmp_path


def figure(value: float | None, error: float | None = None) -> dict[str, Any]:
    return {"value": value, "error": error}


TEXT = {
    "perplexity": figure(21.25, 1.5), "dense_perplexity": figure(20.5, 1.25), "kl": figure(0.125, 0.01),
    "cosine": None, "dense": "user/model",
}  # fmt: skip


def test_the_card_shows_figures_beside_those_of_dense_and_keeps_what_else_it_says(folder: Path) -> None:
    record(folder, "news.txt", "8 windows of 512 tokens.", TEXT)
    text = (folder / "README.md").read_text()
    assert text.startswith(CARD)
    assert "| news.txt | perplexity | 21.25 ± 1.5 | 20.5 ± 1.2 |" in text
    assert "| news.txt | KL(dense \\|\\| this), nats a token | 0.125 ± 0.01 | - |" in text
    assert "news.txt: 8 windows of 512 tokens." in text
    assert "cosine" not in text
    assert problem(folder) is None
    kept = json.loads((folder / "losparse_evaluation.json").read_text())
    assert [entry["on"] for entry in kept["evaluations"]] == ["news.txt"]
    assert kept["evaluations"][0]["figures"] == TEXT


def test_what_is_measured_again_is_replaced_and_other_figures_stand_beside_it(folder: Path) -> None:
    record(folder, "news.txt", "8 windows.", TEXT)
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nAdded below.\n")
    record(folder, "arc", "a protocol", {"scores": {"arc": {"acc": figure(0.5, 0.1)}}, "dense_scores": {"arc": {}}})
    record(folder, "dev.csv", "rows", {"scores": {"f1|x": figure(0.75)}, "dense_scores": {"f1|x": figure(None)}})
    record(folder, "news.txt", "8 windows.", TEXT | {"perplexity": figure(30.0)})
    text = (folder / "README.md").read_text()
    assert text.count("## Evaluation") == 1
    assert text.rstrip().endswith("Added below.")
    assert "21.25" not in text
    assert "| news.txt | perplexity | 30 | 20.5 ± 1.2 |" in text
    assert "| arc | arc, acc | 0.5 ± 0.1 | - |" in text
    assert "| dev.csv | f1\\|x | 0.75 | - |" in text


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"evaluations": [5], "report_sha256": ""}'])
def test_damaged_figures_are_a_problem_and_are_begun_anew(damage: str, folder: Path) -> None:
    (folder / "losparse_evaluation.json").write_text(damage)
    assert "is damaged" in str(problem(folder))
    record(folder, "news.txt", "8 windows.", TEXT)
    assert problem(folder) is None


def test_figures_of_another_checkpoint_are_a_problem(folder: Path) -> None:
    record(folder, "news.txt", "8 windows.", TEXT)
    (folder / "losparse_report.json").write_text('{"files": {"other": {}}}')
    assert "was measured of another checkpoint" in str(problem(folder))
    (folder / "README.md").unlink()
    record(folder, "dev.csv", "rows", TEXT)  # those of the other one are gone
    assert len(json.loads((folder / "losparse_evaluation.json").read_text())["evaluations"]) == 1
    assert not (folder / "README.md").exists()


def test_only_a_folder_that_losparse_wrote_keeps_figures(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "user" / "model"):
        with pytest.raises(UsageError, match="--record"):
            require_recordable(place)
