"""Text that a model writes itself: drawn from its own distribution, reproducible, kept by a run that is killed."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from conftest import VOCABULARY, toy_model
from safetensors.torch import save_file
from terminal import done, losparse, shared

from losparse_cli import load
from losparse_cli.budget.recipe import Recipe
from losparse_cli.compress import plan, run
from losparse_cli.errors import UsageError
from losparse_cli.progress import Progress
from losparse_cli.text.generated import (
    BATCH,
    PIECE,
    batch_that_fits,
    generate_text,
    generate_windows,
    kept_windows,
    start_token,
    write_windows,
)
from losparse_cli.text.windows import Calibration, Windows

CPU = torch.device("cpu")
GENERATED = "losparse_generated.safetensors"


def generated(model: Any, **changes: Any) -> torch.Tensor:
    options: dict[str, Any] = {"tokens": 160, "length": 16, "seed": 0, "batch": 4, "device": CPU}
    return generate_windows(model, **options | changes)


def sharp(name: str = "llama", **changes: Any) -> Any:
    """A toy whose distribution is far from uniform, so that a temperature shows."""
    model = toy_model(name, **changes)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6)
    return model


# --- the windows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mamba", "mixtral"])
def test_windows_are_full_and_begin_with_the_start_token(name: str) -> None:
    ids = generated(toy_model(name))
    assert ids.shape == (10, 16)
    assert ids.dtype == torch.int64
    assert (ids[:, 0] == 1).all()
    assert len({tuple(row.tolist()) for row in ids}) == 10


def test_long_windows_are_packed_from_short_texts() -> None:
    """Each text knows nothing of the one before it: what follows a start token is drawn as at the very beginning."""
    model = toy_model("llama", max_position_embeddings=512)
    heard: list[tuple[int, int]] = []
    ids = generated(model, tokens=900, length=300, on_tokens=lambda done, total: heard.append((done, total)))
    assert ids.shape == (3, 300)
    assert (ids.flatten()[::PIECE] == 1).all()
    assert heard[-1] == (900, 900)
    texts = [generated(model, tokens=1024, length=PIECE)[k] for k in range(8)]
    assert torch.equal(ids.flatten(), torch.cat(texts)[:900])


def test_a_seed_gives_the_same_text_and_leaves_the_callers_generator_alone() -> None:
    model = toy_model("llama")
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    one = generated(model)
    torch.rand(5)
    torch.random.set_rng_state(before)
    two, other = generated(model), generated(model, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


SETTINGS = {
    "none": {},
    "all that could bend it": {
        "temperature": 0.1, "top_k": 1, "top_p": 0.1, "do_sample": False, "repetition_penalty": 3.0, "max_length": 5,
        "suppress_tokens": [5, 6], "min_p": 0.5, "bos_token_id": 1, "eos_token_id": [2, 7],
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
def test_tokens_are_drawn_from_the_models_own_distribution(settings: str) -> None:
    """Whatever its generation_config says: frequencies of the first token are those of the softmax."""
    import transformers

    model = sharp()
    model.generation_config = own = transformers.GenerationConfig(**SETTINGS[settings])
    count = 4000
    ids = generated(model, tokens=count * 8, length=8, batch=1000)
    assert model.generation_config is own
    with torch.no_grad():
        expected = model(torch.tensor([[1]])).logits[0, -1].double().softmax(0)
    counts = torch.bincount(ids[:, 1], minlength=VOCABULARY).double()
    likely = expected > 5 / count
    statistic = ((counts - count * expected) ** 2 / (count * expected))[likely].sum()
    freedom = int(likely.sum())
    assert freedom > 10
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5  # chi-squared, five standard deviations
    half = (expected / 0.5).softmax(0)
    assert (expected - counts / count).abs().sum() < (expected - half).abs().sum() / 4


def test_the_end_of_a_text_neither_ends_a_window_nor_is_forbidden() -> None:
    ids = generated(toy_model("llama"), tokens=6400, length=32, batch=50)
    ends = (ids == 2).sum().item()
    assert ends > 10
    assert (ids[:, -1] != 0).any()  # no padding


def test_what_is_heard_of_progress() -> None:
    heard: list[tuple[int, int]] = []
    generated(toy_model("llama"), on_tokens=lambda done, total: heard.append((done, total)))
    assert [total for _, total in heard] == [160] * len(heard)
    counts = [count for count, _ in heard]
    assert counts == sorted(set(counts))
    assert counts[-1] == 160


def test_the_start_token() -> None:
    model = toy_model("llama", bos_token_id=None, eos_token_id=[9, 2])
    model.generation_config.bos_token_id = None
    assert start_token(model) == 9
    assert start_token(toy_model("llama")) == 1
    bare = toy_model("llama", bos_token_id=None, eos_token_id=None)
    bare.generation_config.bos_token_id = bare.generation_config.eos_token_id = None
    with pytest.raises(UsageError, match=r"Add bos_token_id to config\.json, or give --calibration a file"):
        generated(bare)

    class Tokenizer:
        bos_token_id = 4

    assert start_token(bare, Tokenizer()) == 4


def test_a_batch_whose_cache_fits() -> None:
    model = toy_model("llama")
    assert batch_that_fits(model, 48) == BATCH
    model.config.num_hidden_layers, model.config.num_key_value_heads, model.config.head_dim = 32, 32, 128
    assert batch_that_fits(model, 512) == 2  # float32
    assert batch_that_fits(model, 1 << 20) == 1
    assert batch_that_fits(toy_model("mamba"), 512) >= 1


def test_a_checkpoint_in_its_stored_dtype(toy: Callable[..., Path]) -> None:
    folder = toy("llama", dtype=torch.bfloat16)
    calibration = Calibration("self", tokens=96, length=16)
    one, two = (generate_text(calibration, *load(folder, dtype="auto"), seed=0, device=CPU) for _ in range(2))
    assert one.ids.shape == (6, 16)
    assert one.digest() == two.digest()


# --- what is kept ---------------------------------------------------------------------------------


def test_what_is_kept_is_whole_or_nothing(tmp_path: Path) -> None:
    calibration = Calibration("self", tokens=96, length=16)
    windows = Windows(torch.arange(96).view(6, 16))
    path = tmp_path / GENERATED
    assert kept_windows(calibration, path) is None
    write_windows(windows, path)
    assert [p.name for p in tmp_path.iterdir()] == [GENERATED]
    found = kept_windows(calibration, path)
    assert found is not None
    assert torch.equal(found.ids, windows.ids)
    assert kept_windows(Calibration("self", tokens=96, length=8), path) is None
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert kept_windows(calibration, path) is None
    path.write_bytes(raw[:-7])
    assert kept_windows(calibration, path) is None
    save_file({"other": windows.ids}, path)
    assert kept_windows(calibration, path) is None


SELF = (
    "--rank", "4", "--sparsity", "0.8", "--solver", "oats", "--iterations", "1", "--max-shard-size", "300kB",
    "--calibration", "self", "--calibration-tokens", "256", "--calibration-length", "32",
)  # fmt: skip

NEVER = """
import sys
def never(*arguments, **options):
    raise AssertionError("generated again")
sys.modules["losparse_cli.compression.decisions"].generate_text = never
"""
DIE = """
import os, signal, sys
from losparse_cli.checkpoint import workfolder
from losparse_cli.compression import decisions, run
def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
"""
AFTER_UNITS = (
    DIE
    + """
from losparse_cli.checkpoint import writer
append, left = writer.ShardWriter.append, [14]
def counted(*arguments, **options):
    left[0] -= 1
    return append(*arguments, **options) if left[0] else die()
writer.ShardWriter.append = counted
"""
)
WHILE_GENERATING = DIE + "decisions.write_windows = die\n"
AFTER_GENERATING = DIE + "run.CalibratedRun = die\n"
BEFORE_PUBLISHING = DIE + "workfolder.WorkFolder.publish = die\n"
AFTER_THE_RENAME = (
    DIE
    + """
import pathlib
rename = pathlib.Path.rename
pathlib.Path.rename = lambda *paths: (rename(*paths), die())
"""
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.llama(tmp_path_factory.mktemp("models") / "model", layers=3)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("undisturbed")
    ended = done("compress", model, "-o", "out", *SELF, cwd=place)
    stage, warned, *lines = ended.err.splitlines()[:9]
    assert stage.startswith("generating text: "), ended.err
    assert warned.startswith("warning: 256 tokens are few"), ended.err
    assert all(line.startswith("layer") for line in lines), ended.err
    return toys.digests(place / "out")


def test_a_model_without_data_or_tokenizer(model: Path, whole: dict[str, str], tmp_path: Path) -> None:
    done("compress", model, "-o", "out", *SELF, cwd=tmp_path)
    assert toys.digests(tmp_path / "out") == whole
    assert not any(name.startswith((GENERATED, "losparse_journal")) for name in whole)
    report = json.loads((tmp_path / "out" / "losparse_report.json").read_text())
    assert report["calibration"]["source"] == "self"
    assert report["calibration"]["tokens_used"] == 256
    assert GENERATED not in report["files"]
    again = done("compress", model, "-o", "out", *SELF, cwd=tmp_path, before=NEVER)
    assert "nothing was left to do" in again.err
    done("verify", "out", cwd=tmp_path)


@pytest.mark.parametrize("before", [AFTER_UNITS, AFTER_GENERATING, BEFORE_PUBLISHING])
def test_a_killed_run_goes_on_with_the_same_text(
    before: str, model: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    ended = losparse("compress", model, "-o", "out", *SELF, cwd=tmp_path, before=before)
    assert ended.code == -signal.SIGKILL, ended.err
    assert (tmp_path / "out.partial" / GENERATED).is_file()
    again = done("compress", model, "-o", "out", *SELF, cwd=tmp_path, before=NEVER)
    assert ("Going on after layer" in again.err) == (before != AFTER_GENERATING)
    assert toys.digests(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_while_writing_the_text_or_after_the_rename(model: Path, whole: dict[str, str], tmp_path: Path) -> None:
    ended = losparse("compress", model, "-o", "out", *SELF, cwd=tmp_path, before=WHILE_GENERATING)
    assert ended.code == -signal.SIGKILL, ended.err
    assert not (tmp_path / "out.partial" / GENERATED).exists()
    losparse("compress", model, "-o", "out", *SELF, cwd=tmp_path, before=AFTER_THE_RENAME)
    done("compress", model, "-o", "out", *SELF, cwd=tmp_path, before=NEVER)
    assert toys.digests(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_its_text_a_run_begins_anew(model: Path, whole: dict[str, str], tmp_path: Path) -> None:
    losparse("compress", model, "-o", "out", *SELF, cwd=tmp_path, before=AFTER_UNITS)
    kept = tmp_path / "out.partial" / GENERATED
    raw = bytearray(kept.read_bytes())
    raw[-5] ^= 1
    kept.write_bytes(raw)
    again = done("compress", model, "-o", "out", *SELF, cwd=tmp_path)
    assert "Going on" not in again.err
    assert toys.digests(tmp_path / "out") == whole


def test_another_seed_may_not_go_on(model: Path, tmp_path: Path) -> None:
    losparse("compress", model, "-o", "out", *SELF, cwd=tmp_path, before=AFTER_UNITS)
    assert "a different run" in losparse("compress", model, "-o", "out", *SELF, "--seed", "1", cwd=tmp_path).complaint
    done("compress", model, "-o", "out", *SELF, "--seed", "1", "--resume", "never", cwd=tmp_path)


def test_a_dry_run_generates_nothing(model: Path, tmp_path: Path) -> None:
    done("compress", model, "-o", "out", *SELF, "--dry-run", cwd=tmp_path, before=NEVER)
    assert not list(tmp_path.iterdir())
    job = plan(model, tmp_path / "out", Recipe(), calibration=Calibration("self", tokens=256))
    assert job.windows is None
    assert job.calibration is not None
    assert job.calibration.length == 64


def test_progress_says_how_far_the_text_is(model: Path, tmp_path: Path) -> None:
    said: list[str] = []

    class Watching(Progress):
        def phase(self, text: str) -> None:
            said.append(text)

    recipe = Recipe(rank=4, sparsity=0.8, solver="oats", iterations=1)
    calibration = Calibration("self", tokens=2048, length=32)
    run(plan(model, tmp_path / "out", recipe, calibration=calibration), progress=Watching())
    assert "generating text: 2,048 of 2,048 tokens" in said


def test_a_model_that_names_no_start(tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model", layers=1, bos_token_id=None, eos_token_id=None)
    ended = losparse("compress", model, "-o", "out", *SELF, cwd=tmp_path)
    assert "names no token that a text begins with" in ended.complaint
    assert ended.code == 2


def test_interrupted_while_generating(model: Path, whole: dict[str, str], tmp_path: Path) -> None:
    before = """
import os, signal, sys
compress = sys.modules["losparse_cli.compress"]
decisions = sys.modules["losparse_cli.compression.decisions"]
generate = decisions.generate_text
def interrupted(*arguments, **options):
    def hear(done, total):
        if done > 100:
            os.kill(os.getpid(), signal.SIGINT)
    return generate(*arguments, **options | {"on_tokens": hear})
decisions.generate_text = interrupted
"""
    ended = shared().run("compress", model, "-o", "out", *SELF, cwd=tmp_path, before=before)
    assert ended.code == 130
    assert "goes on where it stopped" in ended.err.splitlines()[-1]
    done("compress", model, "-o", "out", *SELF, cwd=tmp_path)
    assert toys.digests(tmp_path / "out") == whole
