"""Parts of a run, joined: the very files of the undivided run, or one sentence."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys
from terminal import done, losparse, signalled_after

from losparse_cli.checkpoint.output import PART
from losparse_cli.compress import compress
from losparse_cli.errors import CheckpointError, UsageError
from losparse_cli.join import join
from tests.hearing import Hearing

RECIPES: dict[str, dict[str, Any]] = {
    "codes": {"bits": 4},
    "codes of two pools": {"bits": 4, "layers": {"down_proj": {"bits": 6}}},
    "codes with zeros": {"bits": 4, "sparsity": 0.5, "rank": 2},
    "grid": {"grid": "int4"},
    "floats": {"rank": 4, "sparsity": 0.8, "iterations": 2},
    "size": {"size": "300kB"},
}
SMALL = "100kB"  # shards, so that there are several and some lie in two parts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what goes along: a card, a tokenizer's file, a sub-folder."""
    folder = toys.llama(tmp_path_factory.mktemp("models") / "model", shards=2, hidden=96, intermediate=160)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# A model\n")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (folder / "more").mkdir()
    (folder / "more" / "words.txt").write_text("one two")
    return folder


@pytest.fixture(scope="module")
def parts(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three, of codes. Read only."""
    place = tmp_path_factory.mktemp("parts")
    return [made(model, place, f"{k}/3", RECIPES["codes"]) for k in (1, 2, 3)]


def made(model: Path, place: Path, part: str, recipe: dict[str, Any]) -> Path:
    return compress(model, place / f"part-{part[0]}", recipe, part=part, max_shard_size=SMALL).output


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("count", [2, 5])
def test_joined_parts_are_the_undivided_run(recipe: str, count: int, model: Path, tmp_path: Path) -> None:
    whole = compress(model, tmp_path / "whole" / "out", RECIPES[recipe], max_shard_size=SMALL)
    folders = [made(model, tmp_path, f"{k}/{count}", RECIPES[recipe]) for k in range(count, 0, -1)]
    joined = join(folders, tmp_path / "joined" / "out")
    assert toys.digests(joined.output) == toys.digests(whole.output)
    assert joined.report == whole.report
    assert len(list(joined.output.glob("*.safetensors"))) > 1
    assert sorted(path.name for path in (tmp_path / "joined").iterdir()) == ["out"]


def test_each_part_does_its_own_share_and_counts_it(model: Path, parts: list[Path], tmp_path: Path) -> None:
    heard = Hearing()
    part = compress(model, tmp_path / "part", RECIPES["codes"], part="2/3", max_shard_size=SMALL, progress=heard)
    layers = [json.loads((folder / PART).read_text()) for folder in parts]
    names = [[unit["stats"]["name"] for unit in one["units"] if unit["stats"]] for one in layers]
    assert heard.totals["layers"] == len(part.report.layers) == len(names[1])
    assert heard.done["bytes"] == heard.totals["bytes"]
    assert len({name for part_names in names for name in part_names}) == sum(map(len, names)) == 4 * 7
    assert not (tmp_path / "part" / "config.json").exists()  # nothing takes it for a model


def test_a_part_that_is_done_is_found_so(model: Path, parts: list[Path]) -> None:
    before = toys.digests(parts[1])
    again = compress(model, parts[1], RECIPES["codes"], part="2/3", max_shard_size=SMALL)
    assert again.seconds == 0
    assert toys.digests(parts[1]) == before


def test_a_join_is_found_done_by_the_undivided_run(model: Path, parts: list[Path], tmp_path: Path) -> None:
    joined = join(parts, tmp_path / "out")
    assert join(parts, tmp_path / "out").seconds == 0 < joined.seconds
    assert compress(model, tmp_path / "out", RECIPES["codes"], max_shard_size=SMALL).seconds == 0


def test_a_part_made_anew_replaces_the_old_one(model: Path, tmp_path: Path) -> None:
    made(model, tmp_path, "1/2", {"bits": 4})
    with pytest.raises(UsageError, match="exists already"):
        made(model, tmp_path, "1/2", {"bits": 5})
    compress(model, tmp_path / "part-1", {"bits": 5}, part="1/2", overwrite=True)
    assert json.loads((tmp_path / "part-1" / PART).read_text())["run"]["recipe"]["bits"] == 5


# --- in processes ---------------------------------------------------------------------------------


def test_a_killed_part_and_a_killed_join_go_on(model: Path, tmp_path: Path) -> None:
    options = ("--bits", "4", "--max-shard-size", SMALL)
    done("compress", model, "-o", "undivided/out", *options, cwd=tmp_path)
    for part in ("1/3", "2/3", "3/3"):
        command = ("compress", model, "-o", f"part-{part[0]}", "--part", part, *options)
        if part == "2/3":
            assert losparse(*command, cwd=tmp_path, before=signalled_after(6)).code == -signal.SIGKILL
            unfinished = losparse("join", "part-1", "part-2", "-o", "out", cwd=tmp_path)
            assert "part-2 is unfinished: part-2.partial holds" in unfinished.complaint
            assert unfinished.code == 2
            command = (*command, "--resume", "required")
        ended = done(*command, cwd=tmp_path)
        assert f"Part {part} is in part-{part[0]}" in ended.out
    command = ("join", "part-3", "part-1", "part-2", "-o", "out")
    assert losparse(*command, cwd=tmp_path, before=signalled_after(6)).code == -signal.SIGKILL
    shown = json.loads(done(*command, "--resume", "required", "--json", cwd=tmp_path).out)
    assert shown["parts"] == 3
    assert toys.digests(tmp_path / "out") == toys.digests(tmp_path / "undivided" / "out")
    done("verify", "out", cwd=tmp_path)


# --- what is refused ------------------------------------------------------------------------------

WRONG: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "none": (("--part", "0/0"), ("1/N to N/N, not 0/0",)),
    "beyond": (("--part", "5/4"), ("not 5/4",)),
    "zero": (("--part", "0/4"), ("not 0/4",)),
    "no fraction": (("--part", "2"), ("--part is K/N", "'2'")),
    "more than there are": (("--part", "40/60"), ("28 layers make 8 parts at most", "8/8")),
    "with text": (("--part", "1/2", "--calibration", "self"), ("without text", "torchrun")),
    "pushed": (("--part", "1/2", "--push-to-hub", "a/b"), ("join the parts first",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_part_that_is_none(case: str, model: Path, tmp_path: Path) -> None:
    options, says = WRONG[case]
    ended = losparse("compress", model, "-o", "out", *options, cwd=tmp_path)
    assert all(text in ended.complaint for text in says), ended.complaint
    assert ended.code == 2
    assert not list(tmp_path.iterdir())


def _other_model(model: Path, place: Path) -> Path:
    return toys.llama(place / "other" / "model", shards=2, hidden=96, intermediate=160, seed=1)


OTHERS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "recipe": (lambda model, place: made(model, place, "2/3", {"bits": 5}), "--bits 4, now 5"),
    "count": (lambda model, place: made(model, place, "2/4", RECIPES["codes"]), "--part 1/3, now 2/4"),
    "model": (
        lambda model, place: made(_other_model(model, place), place, "2/3", RECIPES["codes"]),
        "different: contents",
    ),
    "twice": (lambda model, place: Path(shutil.copytree(place / "part-1", place / "copy")), "both part 1/3"),
    "no part": (lambda model, place: model, "is no part of a run"),
    "nothing": (lambda model, place: place / "nowhere", "There is no folder"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_parts_that_are_of_no_one_run(case: str, model: Path, parts: list[Path], tmp_path: Path) -> None:
    shutil.copytree(parts[0], tmp_path / "part-1")
    make, says = OTHERS[case]
    other = make(model, tmp_path)
    with pytest.raises(UsageError) as raised:
        join([tmp_path / "part-1", other, parts[2]], tmp_path / "out")
    assert says in str(raised.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_missing_parts_are_named(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Parts 1/3, 3/3 are missing"):
        join([parts[1]], tmp_path / "out")
    with pytest.raises(UsageError, match="Part 2/3 is missing"):
        join([parts[0], parts[2]], tmp_path / "out")


def test_a_part_of_another_version_is_refused(parts: list[Path], tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(part, tmp_path / part.name)) for part in parts]
    for folder in folders:
        run = json.loads((folder / PART).read_text())["run"]
        toys.change_json(folder / PART, run=run | {"losparse": "0.0.9"})
    with pytest.raises(UsageError, match=r"made by losparse 0\.0\.9, and this is"):
        join(folders, tmp_path / "out")
    toys.change_json(folders[1] / PART, run=run | {"torch": "1.0"})
    with pytest.raises(UsageError, match=r'torch "1\.0", now'):
        join(folders[::-1][1:], tmp_path / "out")


def test_parts_of_unlike_machines_are_joined_with_a_warning(parts: list[Path], tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(part, tmp_path / part.name)) for part in parts]
    run = json.loads((folders[1] / PART).read_text())["run"]
    toys.change_json(folders[1] / PART, run=run | {"threads": 64})
    heard = Hearing()
    joined = join(folders, tmp_path / "out", progress=heard)
    assert len(heard.warned) == 1
    assert "part-1 and part-2 were not computed alike (threads" in heard.warned[0]
    assert joined.report.fingerprint != join(parts, tmp_path / "alike").report.fingerprint


def test_a_part_on_another_disk_at_another_time_is_the_same(parts: list[Path], tmp_path: Path) -> None:
    """What a copy of the model changes, times of files, says nothing."""
    folders = [Path(shutil.copytree(part, tmp_path / part.name)) for part in parts]
    run = json.loads((folders[1] / PART).read_text())["run"]
    moved = {name: [size, 1] for name, (size, _) in run["source"].items()}
    toys.change_json(folders[1] / PART, run=run | {"source": moved, "companions": "others"})
    assert toys.digests(join(folders, tmp_path / "a" / "out").output) == toys.digests(
        join(parts, tmp_path / "b" / "out").output
    )


def test_a_damaged_part_is_named_and_leaves_nothing(parts: list[Path], tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(part, tmp_path / part.name)) for part in parts]
    file = max(folders[1].glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"part-2 is damaged at model\..*Do that part again"):
        join(folders, tmp_path / "out")
    (folders[0] / PART).write_text('{"units": 5}')
    with pytest.raises(CheckpointError, match="is incomplete"):
        join(folders, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-1", "part-2", "part-3"]
