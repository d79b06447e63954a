"""What was measured once serves every size: `--sensitivity-file`."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toys
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from losparse_cli.compress import compress, plan
from losparse_cli.compression import foreseen
from losparse_cli.compression.estimate import forecast
from losparse_cli.errors import RecipeError, UsageError
from losparse_cli.text.windows import Calibration
from tests.hearing import Hearing
from tests.killing import Killed, kill_at


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    chance = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(chance.choice("abcdefghij ") for _ in range(6000)), encoding="utf-8")
    return Calibration(source=str(path), tokens=512, length=32)


@pytest.fixture(scope="module")
def dense(toy: Any) -> Path:
    return Path(toy("llama", tokenizer=True))


@pytest.fixture(scope="module")
def file(dense: Path, asked: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    compress(dense, folder / "out", bits=6, calibration=asked, sensitivity_file=folder / "known.safetensors")
    assert not list(folder.glob("*.part*"))
    return folder / "known.safetensors"


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it is known")

    monkeypatch.setattr(foreseen, "measure_sensitivity", measured)


def test_other_sizes_are_the_same_with_it(dense: Path, asked: Calibration, file: Path, tmp_path: Path) -> None:
    anew = compress(dense, tmp_path / "anew", bits=4, calibration=asked)
    told = Hearing()
    known = compress(
        dense, tmp_path / "known", {"bits": 4, "sensitivity_file": str(file)}, calibration=asked, progress=told
    )
    assert toys.tensor_bytes(known.output) == toys.tensor_bytes(anew.output)
    assert (known.output / "config.json").read_bytes() == (anew.output / "config.json").read_bytes()
    assert not [said for said in told.phases if said.startswith("sensitivity")]


def test_a_run_that_has_read_it_goes_on_without_it(
    dense: Path, asked: Calibration, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unmeasured: None
) -> None:
    whole = compress(dense, tmp_path / "whole", bits=5, calibration=asked, sensitivity_file=file).output
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(file.read_bytes())
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            compress(dense, tmp_path / "out", bits=5, calibration=asked, sensitivity_file=mine)
    mine.unlink()
    again = compress(dense, tmp_path / "out", bits=5, calibration=asked, sensitivity_file=mine)
    assert again.resumed
    assert mine.read_bytes() == file.read_bytes()
    assert toys.tensor_bytes(again.output) == toys.tensor_bytes(whole)


def test_a_forecast_knows_of_it(dense: Path, asked: Calibration, file: Path, tmp_path: Path) -> None:
    times = [
        forecast(plan(dense, tmp_path / "out", bits=4, calibration=asked, sensitivity_file=place)).need.seconds
        for place in (file, tmp_path / "new.safetensors")
    ]
    assert times[0] < times[1]


@pytest.mark.parametrize("what", ["text", "tokens", "model", "seed", "layers", "zeros"])
def test_of_something_else_it_is_refused(
    what: str, dense: Path, asked: Calibration, file: Path, toy: Any, tmp_path: Path
) -> None:
    recipe: dict[str, Any] = {"bits": 4}
    text = Path(asked.source).read_text()
    if what == "text":
        (tmp_path / "other.txt").write_text(text[::-1])
        asked = replace(asked, source=str(tmp_path / "other.txt"))
    elif what == "tokens":
        asked = replace(asked, tokens=256)
    elif what == "model":
        dense = toy("gpt2", tokenizer=True)
    elif what == "seed":
        recipe["seed"] = 1
    elif what == "layers":
        recipe["targets"] = ["q_proj"]
    else:
        recipe["sparsity"] = 0.5
    before = file.read_bytes()
    said = "text" if what == "tokens" else what
    with pytest.raises(UsageError, match=rf"measured otherwise \(different: .*\b{said}\b"):
        compress(dense, tmp_path / "out", recipe, calibration=asked, sensitivity_file=file)
    assert file.read_bytes() == before
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("how", ["cut", "other", "empty", "folder", "infinite", "negative", "missing"])
def test_what_is_none_is_refused(how: str, dense: Path, asked: Calibration, file: Path, tmp_path: Path) -> None:
    place = tmp_path / "known.safetensors"
    if how == "folder":
        place.mkdir()
    elif how in ("infinite", "negative", "missing"):
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith(".g"))
        if how == "missing":
            del tensors[name], tensors[name.removesuffix(".g") + ".curve"]
        else:
            tensors[name][0] = float("inf") if how == "infinite" else -tensors[name][0]
        with safe_open(file, "pt") as opened:
            save_file(tensors, place, metadata=opened.metadata())
    elif how == "other":
        save_file({name: x for name, x in load_file(file).items() if name.endswith(".g")}, place)
    else:
        place.write_bytes(file.read_bytes()[:-100] if how == "cut" else b"")
    with pytest.raises(UsageError, match="holds no sensitivities"):
        compress(dense, tmp_path / "out", bits=4, calibration=asked, sensitivity_file=place)


@pytest.mark.parametrize("how", [{"sensitivity": "off"}, {"values": "float"}, {"grid": "int4"}])
def test_where_nothing_is_measured_it_is_refused(
    how: dict[str, Any], dense: Path, asked: Calibration, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="sensitivity on measures"):
        compress(dense, tmp_path / "out", how, calibration=asked, sensitivity_file=tmp_path / "file")
    with pytest.raises(RecipeError, match="sensitivity_file"):
        compress(dense, tmp_path / "out", {**how, "sensitivity_file": "file"}, calibration=asked)


def test_without_text_or_a_place_for_it_it_is_refused(dense: Path, asked: Calibration, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--calibration text"):
        compress(dense, tmp_path / "out", bits=5, sensitivity_file=tmp_path / "file")
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="lies inside the result"):
        compress(dense, tmp_path / "out", bits=5, calibration=asked, sensitivity_file=tmp_path / "out" / "file")
    with pytest.raises(UsageError, match="cannot be written"):
        compress(dense, tmp_path / "out", bits=5, calibration=asked, sensitivity_file=tmp_path / "none" / "file")


def test_a_forecast_refuses_what_a_run_would(dense: Path, asked: Calibration, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no sensitivities"):
        forecast(plan(dense, tmp_path / "out", bits=4, calibration=asked, sensitivity_file=asked.source))
