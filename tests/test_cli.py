"""The command line: what it imports, what it prints where, and that no name can upset it."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toys
from terminal import bare_environment, done, losparse

SMALL = ("--rank", "4", "--sparsity", "0.8")
LAYERS = 28


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.llama(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def compressed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compressed")
    done("compress", model, "-o", "out", *SMALL, cwd=place)
    return place / "out"


HELP = """
import sys
from losparse_cli.cli.app import app, main
names = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
assert {"compress", "inspect", "export", "verify", "push"} <= set(names), names
for arguments in [["--help"], ["--version"], *([name, "--help"] for name in names)]:
    sys.argv = ["losparse", *arguments]
    try:
        main()
    except SystemExit as ending:
        assert not ending.code, arguments
heavy = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    environment = bare_environment(tmp_path)
    ended = subprocess.run(
        [sys.executable, "-c", HELP], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "--max-shard-size" in ended.stdout
    assert ended.stdout.count("Usage: losparse") >= 6


def test_version() -> None:
    import losparse_cli

    assert done("--version").out == f"losparse {losparse_cli.__version__}\n"


def test_no_command_shows_help() -> None:
    ended = losparse()
    assert "Usage: losparse" in ended.out + ended.err


def test_an_unknown_command_is_wrong_usage() -> None:
    ended = losparse("compres", "x")
    assert ended.code == 2
    assert "compres" in ended.err
    assert "Traceback" not in ended.err


def test_debug_shows_where(tmp_path: Path) -> None:
    ended = losparse("inspect", "./absent", "--debug")
    assert ended.code == 1
    assert "Traceback" in ended.err
    assert "SourceError: There is no folder" in ended.err


# --- what is printed, and where -------------------------------------------------------------------


def test_compress_prints_plain_lines_what_came_of_it_to_standard_output(model: Path, tmp_path: Path) -> None:
    ended = done("compress", model, "-o", "out", *SMALL, cwd=tmp_path)
    assert "\x1b" not in ended.err + ended.out
    assert "\r" not in ended.err + ended.out
    progress = re.findall(r"^layer (\d+)/28  \S+  error 0\.\d{3}$", ended.err, re.MULTILINE)
    assert progress == [*(str(k) for k in range(3, 28, 3)), "28"]  # evenly spaced, and about ten
    assert "compressed layers" in ended.out
    assert "Done. The result is in out." in ended.out
    assert 'losparse_cli.load("out")' in ended.out
    said = [line for line in ended.err.splitlines() if not line.startswith("layer ")]
    assert [line.partition(":")[0] for line in said] == ["warning"]
    assert "keeping 3" in said[0]


PIPED: dict[str, tuple[str, ...]] = {
    "compress": (*SMALL, "-o", "out"),
    "compress --dry-run": (*SMALL, "-o", "out", "--dry-run"),
    "inspect": (),
}


@pytest.mark.parametrize("command", PIPED)
def test_a_pipe_gets_tables_and_their_lines_together_as_wide_as_columns_says(
    command: str, model: Path, tmp_path: Path
) -> None:
    verb, *_ = command.split()
    narrow = done(verb, model, *PIPED[command], cwd=tmp_path, COLUMNS="60").out
    assert 40 < max(len(line.rstrip()) for line in narrow.splitlines() if "load(" not in line) <= 60
    wide = done(verb, model, *PIPED[command], "--overwrite" if verb == "compress" else "--layers", cwd=tmp_path)
    last = {"compress": "load(", "compress --dry-run": "Nothing was written.", "inspect": "layers would be compressed"}
    assert last[command] in wide.out
    assert not [line for line in wide.err.splitlines() if not line.startswith(("layer ", "warning: "))]


def test_compress_as_json(model: Path, tmp_path: Path) -> None:
    ended = done("compress", model, "-o", "out", *SMALL, "--json", cwd=tmp_path)
    shown = json.loads(ended.out)
    assert ended.err == ""
    assert shown["output"] == str(tmp_path / "out")
    assert 0 < shown["bytes_after"] < shown["bytes_before"]
    assert 0 < shown["relative_error"] < 1
    report = json.loads((tmp_path / "out" / "losparse_report.json").read_text())
    assert {key: shown[key] for key in report["totals"]} == report["totals"]


@pytest.mark.parametrize("command", ["compress", "verify", "export"])
def test_quiet_prints_nothing(command: str, model: Path, compressed: Path, tmp_path: Path) -> None:
    arguments = {
        "compress": (model, "-o", "out", *SMALL),
        "verify": (compressed,),
        "export": (compressed, "--dense", "-o", "out"),
    }
    ended = done(command, *arguments[command], "--quiet", cwd=tmp_path)
    assert (ended.out, ended.err) == ("", "")


def test_quiet_still_says_what_went_wrong(tmp_path: Path) -> None:
    assert "There is no folder" in losparse("compress", "./absent", "--quiet", cwd=tmp_path).complaint


def test_json_leaves_errors_on_standard_error(tmp_path: Path) -> None:
    ended = losparse("compress", "./absent", "--json", cwd=tmp_path)
    assert "There is no folder" in ended.complaint
    assert ended.out == ""


def test_verify_as_json(compressed: Path, tmp_path: Path) -> None:
    shown = json.loads(done("verify", compressed, "--json").out)
    assert shown["sound"] is True
    assert shown["problems"] == []
    assert shown["layers"] == LAYERS
    assert shown["hashed"] >= 5


# --- dry run --------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    ended = done("compress", model, "-o", "out", *SMALL, "--dry-run", cwd=tmp_path)
    assert "Nothing was written." in ended.out
    assert "28 compressed" in ended.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        (SMALL, "without any data damages a model badly"),
        (("--values", "float", "--keep", "0.8"), "without any data costs a language model noticeably"),
        (("--values", "float", "--keep", "0.9"), ""),
        (("--bits", "2"), "2 bits a weight leave a language model far from the dense one"),
        (("--bits", "4"), "4 bits a weight cost a language model noticeably"),
        ((), ""),
    ],
)
def test_a_dry_run_tells_time_and_warns_of_ruin_without_text_too(
    options: tuple[str, ...], warns: str, model: Path, tmp_path: Path
) -> None:
    ended = done("compress", model, "-o", "out", *options, "--dry-run", cwd=tmp_path)
    assert re.search(r"^Time     (about )?[\d.]+ (s|min)( to [\d.]+ (s|min))? on this machine", ended.out, re.MULTILINE)
    assert warns in ended.err
    assert bool(warns) == ("warning: " in ended.err)
    shown = json.loads(done("compress", model, "-o", "out", *options, "--dry-run", "--json", cwd=tmp_path).out)
    assert 0 < shown["least_seconds"] <= shown["seconds"] <= shown["most_seconds"]
    assert [sentence for sentence in shown["warnings"] if warns in sentence] or not warns


CHOICES: dict[str, tuple[str, ...]] = {
    "rank and sparsity": SMALL,
    "default": (),
    "keep": ("--keep", "0.5", "--rank", "4"),
    "rows": ("--pattern", "rows", "--sparsity", "0.7", "--rank", "4"),
    "columns": ("--pattern", "columns", "--keep", "0.6"),
    "2:4": ("--pattern", "2:4", "--rank", "4"),
    "many shards": (*SMALL, "--max-shard-size", "10kB"),
    "a layer a shard": (*SMALL, "--max-shard-size", "1"),
    "row scope": ("--threshold-scope", "row", "--sparsity", "0.95", "--rank", "2"),
    "low rank alone": ("--rank", "8", "--sparsity", "1"),
    "sparse alone": ("--sparsity", "0.97"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_bounds_of_a_dry_run_hold(case: str, model: Path, tmp_path: Path) -> None:
    options = CHOICES[case]
    plan = json.loads(done("compress", model, "-o", "out", *options, "--dry-run", "--json", cwd=tmp_path).out)
    done("compress", model, "-o", "out", *options, cwd=tmp_path)
    report = json.loads((tmp_path / "out" / "losparse_report.json").read_text())
    planned = {layer["name"]: layer for layer in plan["layers"]}
    assert planned.keys() == {layer["name"] for layer in report["layers"]}
    for layer in report["layers"]:
        expected = planned[layer["name"]]
        assert layer["rank"] == expected["rank"]
        # Of whole numbers what is zero is not known before.
        assert layer["nnz"] <= expected["nnz"] if layer["layout"] == "codes" else layer["nnz"] == expected["nnz"]
        assert layer["bytes_after"] <= expected["bound_bytes"]
    weights = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert weights == sorted(plan["shards"])
    on_disk = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert on_disk <= plan["disk_bytes"]
    assert report["skipped"] == plan["skipped"]
    done("verify", "out", cwd=tmp_path)


# --- inspect --------------------------------------------------------------------------------------


def test_inspect_groups_layers_by_block(compressed: Path) -> None:
    shown = done("inspect", compressed).out
    for k in range(4):
        assert len(re.findall(rf"model\.layers\.{k}\b", shown)) == 1
    assert "28 layers" in shown
    assert "whole model" in shown
    assert "left dense" in shown


def test_inspect_shows_every_layer_if_asked(compressed: Path) -> None:
    shown = done("inspect", compressed, "--layers").out
    assert len(re.findall(r"model\.layers\.\d+\.\S+_proj", shown)) == LAYERS


def layer_size(layer: dict[str, Any]) -> int:
    m, n = layer["shape"]
    return int(m * n)


def test_inspect_as_csv(compressed: Path) -> None:
    ended = done("inspect", compressed, "--csv")
    rows = list(csv.DictReader(io.StringIO(ended.out)))
    assert ended.err == ""
    assert len(rows) == LAYERS
    report = json.loads((compressed / "losparse_report.json").read_text())
    for row, layer in zip(rows, report["layers"], strict=True):
        assert row["layer"] == layer["name"]
        assert [int(row["out_features"]), int(row["in_features"])] == layer["shape"]
        assert int(row["bytes_after"]) == layer["bytes_after"]
        assert float(row["bits"]) == pytest.approx(layer["bits"]) == 8 * layer["bytes_after"] / layer_size(layer)
        error = (layer["residual_squared"] / layer["weight_squared"]) ** 0.5
        assert float(row["relative_error"]) == pytest.approx(error, rel=1e-5)


def test_inspect_as_json(compressed: Path) -> None:
    shown = json.loads(done("inspect", compressed, "--json").out)
    report = json.loads((compressed / "losparse_report.json").read_text())
    assert shown["layers"] == report["layers"]
    assert shown["totals"] == report["totals"]


@pytest.mark.parametrize(
    ("order", "column"), [("error", "error"), ("bytes", "after"), ("nnz", "nnz"), ("density", "density")]
)
def test_inspect_sorts(order: str, column: str, tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model")
    recipe = "sparsity: 0.8\nlayers:\n" + "".join(
        f"  '*.layers.{k}.*': {{sparsity: {0.7 + 0.05 * k}}}\n" for k in (1, 0, 3)
    )
    (tmp_path / "recipe.yaml").write_text(recipe)
    done("compress", model, "-o", "out", "--recipe", "recipe.yaml", cwd=tmp_path)
    shown = done("inspect", "out", "--sort", order, cwd=tmp_path).out
    found = [int(k) for k in re.findall(r"model\.layers\.(\d)\b", shown)]
    kept = {0: 0.7, 1: 0.75, 2: 0.8, 3: 0.85}
    assert found == sorted(range(4), key=lambda k: kept[k], reverse=order == "error"), column


def test_inspect_a_dense_model(model: Path) -> None:
    shown = done("inspect", model).out
    assert "28 layers would be compressed" in shown
    assert "no: too small to matter" in shown
    rows = list(csv.DictReader(io.StringIO(done("inspect", model, "--csv").out)))
    assert sum(not row["reason"] for row in rows) == LAYERS
    data = json.loads(done("inspect", model, "--json").out)
    assert sum(layer["reason"] is None for layer in data["layers"]) == LAYERS


def test_inspect_shows_the_spectrum(model: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(done("inspect", model, "--spectrum", "--csv").out)))
    energies = [[float(row[f"energy_{r}"]) for r in (1, 2, 4, 8, 16, 32)] for row in rows if not row["reason"]]
    assert len(energies) == LAYERS
    for energy in energies:
        assert energy == sorted(energy)
        assert 0 < energy[0] < energy[-1] <= 1 + 1e-6
        assert energy[2] > 0.5  # four directions stand out of the noise, by construction


# --- names that are not plain words -----------------------------------------------------------------

NAMES = [
    "a model",
    "modèle-模型",
    "[red]model[/red]",
    "[/]x",
    "[bold",
    'quo"te',
    "it's",
    "back\\slash\\",
    "%s{x}",
    "-dash",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("terminal", [False, True])
def test_any_name_of_a_folder_works(name: str, terminal: bool, tmp_path: Path) -> None:
    """In a terminal too, where rich draws bars and reads markup."""
    look: dict[str, Any] = {"FORCE_COLOR": "1", "TERM": "xterm"} if terminal else {}
    toys.llama(tmp_path / name, layers=1)
    here = f"./{name}"
    for arguments in (
        ("compress", here, "-o", f"{here} out", *SMALL, "--dry-run"),
        ("compress", here, "-o", f"{here} out", *SMALL),
        ("inspect", f"{here} out"),
        ("verify", f"{here} out"),
        ("export", f"{here} out", "--dense", "-o", f"{here} dense"),
        ("inspect", here),
    ):
        ended = losparse(*arguments, cwd=tmp_path, **look)
        assert ended.code == 0, ended.err
    assert Path(name).name in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", ended.out)
    assert (tmp_path / f"{name} dense" / "model.safetensors").is_file()


def test_a_folder_whose_name_is_no_unicode_works(tmp_path: Path) -> None:
    name = os.fsdecode(b"mod\xe8le")
    toys.llama(tmp_path / name, layers=1)
    done("compress", f"./{name}", "-o", f"./{name}-out", *SMALL, cwd=tmp_path)
    done("verify", f"./{name}-out", cwd=tmp_path)
    report = json.loads((tmp_path / f"{name}-out" / "losparse_report.json").read_text())
    assert report["source"]["name"] == "mod\ufffdle"


@pytest.mark.parametrize("name", ["[red]absent[/red]", "[/]", "[bold", "ab\\"])
def test_a_complaint_shows_a_name_as_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir(parents=True)
    assert f"{name} has no config.json" in losparse("compress", f"./{name}", cwd=tmp_path).complaint
    ended = losparse("compress", f"./{name}", cwd=tmp_path, FORCE_COLOR="1", TERM="xterm")
    assert f"{name} has no config.json" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", ended.err)
