"""`losparse refine`: a compressed checkpoint brought closer to its dense model, at the same size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import answer
from safetensors.torch import load_file
from terminal import done, losparse
from toys import digests

from losparse_cli.budget.recipe import Recipe
from losparse_cli.checkpoint.config import layer_specs
from losparse_cli.checkpoint.source import open_checkpoint
from losparse_cli.compress import compress, plan
from losparse_cli.compression.estimate import estimate
from losparse_cli.compression.request import ModelRefinement, Refinement
from losparse_cli.errors import CheckpointError, LosparseError, ResumeError, UsageError
from losparse_cli.load import load
from losparse_cli.refine import prepare_refinement, refine
from losparse_cli.text.request import Calibration
from losparse_cli.verify import verify

TEXT = " ".join(f"Sentence {k} of the text says that {k * k % 97} is not {k}." for k in range(200))


@pytest.fixture
def text(tmp_path: Path) -> Calibration:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return Calibration(str(tmp_path / "text.txt"), tokens=768, length=32, batch=4)


@pytest.fixture
def small(toy: Callable[..., Path], tmp_path: Path) -> Path:
    """A toy Llama, compressed without data."""
    return compress(toy("llama", tokenizer=True), tmp_path / "small", Recipe(rank=4, sparsity=0.6)).output


def test_closer_to_the_dense_model_at_the_same_size(
    toy: Callable[..., Path], small: Path, text: Calibration, tmp_path: Path
) -> None:
    dense = toy("llama", tokenizer=True)
    result = refine(
        small, tmp_path / "refined", calibration=text, against=dense, refinement=Refinement(steps=60, lr=3e-3)
    )
    assert verify(result.output).sound
    assert len(result.report.blocks) == 2
    for block in result.report.blocks:
        assert block["loss_after"] < 0.9 * block["loss_before"]
    before, after = (layer_specs(open_checkpoint(folder)) for folder in (small, result.output))
    assert before == after  # ranks, supports' sizes and layouts
    models = {name: load(folder)[0] for name, folder in (("dense", dense), ("small", small), ("new", result.output))}
    answers = {name: answer(model) for name, model in models.items()}
    distance = {name: float((found - answers["dense"]).square().mean()) for name, found in answers.items()}
    assert distance["new"] < distance["small"]


def test_supports_stay_and_norms_are_trained(
    toy: Callable[..., Path], small: Path, text: Calibration, tmp_path: Path
) -> None:
    out = refine(
        small, tmp_path / "refined", calibration=text, against=toy("llama", tokenizer=True),
        refinement=Refinement(steps=10, lr=3e-3),
    ).output  # fmt: skip
    old, new = (load_file(folder / "model.safetensors") for folder in (small, out))
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        if ".S_" in name or "embed" in name:
            assert torch.equal(tensor, new[name]), name
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert "model.layers.0.self_attn.q_proj.U" in changed
    assert "model.layers.1.input_layernorm.weight" in changed


def test_refined_norms_are_where_the_next_refinement_starts(
    toy: Callable[..., Path], small: Path, text: Calibration, tmp_path: Path
) -> None:
    dense, options = toy("llama", tokenizer=True), {"calibration": text, "refinement": Refinement(steps=30, lr=3e-3)}
    first = refine(small, tmp_path / "first", against=dense, **options)
    second = refine(first.output, tmp_path / "second", against=dense, **options)
    # What the first block lost at the end of one refinement it loses at the start of the next.
    assert second.report.blocks[0]["loss_before"] == pytest.approx(first.report.blocks[0]["loss_after"], rel=1e-4)


def test_a_killed_refinement_goes_on(
    toy: Callable[..., Path], small: Path, text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from losparse_cli.checkpoint.writer import ShardWriter

    options: dict[str, Any] = {
        "calibration": text, "against": toy("llama", tokenizer=True), "refinement": Refinement(steps=4, lr=1e-3)
    }  # fmt: skip
    whole = digests(refine(small, tmp_path / "whole" / "out", **options).output)
    append, left = ShardWriter.append, 14  # into the second block

    def dies(self: ShardWriter, *args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return append(self, *args, **kwargs)

    monkeypatch.setattr(ShardWriter, "append", dies)
    with pytest.raises(KeyboardInterrupt):
        refine(small, tmp_path / "killed" / "out", **options)
    monkeypatch.setattr(ShardWriter, "append", append)
    result = refine(small, tmp_path / "killed" / "out", **options)
    assert result.resumed > 0
    assert digests(result.output) == whole


def test_the_report_says_how_the_layers_came_about(
    toy: Callable[..., Path], small: Path, text: Calibration, tmp_path: Path
) -> None:
    """The recipe is that of the compressed model, whose sizes stay, and not the default of a calibrated one."""
    how = Refinement(steps=2)
    result = refine(small, tmp_path / "out", calibration=text, against=toy("llama", tokenizer=True), refinement=how)
    before = json.loads((small / "losparse_report.json").read_text())["recipe"]
    assert result.report.recipe == before
    assert (before["rank"], before["keep"]) == (4, None)
    assert "rank 4" in (result.output / "README.md").read_text()


def test_requests_that_cannot_be_met(toy: Callable[..., Path], small: Path, text: Calibration, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--against"):
        refine(small, tmp_path / "out", calibration=text)
    with pytest.raises(UsageError, match="is not compressed"):
        refine(toy("llama"), tmp_path / "out", calibration=text, against=toy("llama", tokenizer=True))
    with pytest.raises(UsageError, match="--against"):
        refine(small, tmp_path / "out", calibration=text, against=toy("qwen2", tokenizer=True))
    with pytest.raises(UsageError, match="inside the folder"):
        refine(small, small / "out", calibration=text, against=toy("llama", tokenizer=True))
    report = json.loads((small / "losparse_report.json").read_text())
    trained = shutil.copytree(small, tmp_path / "trained") / "losparse_report.json"
    trained.write_text(json.dumps(report | {"training": {"objective": "distill"}}))
    with pytest.raises(UsageError, match=r"was trained by losparse finetune, .*\. Refine first and train then"):
        refine(trained.parent, tmp_path / "out", calibration=text, against=toy("llama", tokenizer=True))
    other = shutil.copytree(toy("llama", tokenizer=True), tmp_path / "classifier") / "config.json"
    other.write_text(other.read_text().replace("LlamaForCausalLM", "LlamaForSequenceClassification"))
    with pytest.raises(UsageError, match=r"is a LlamaForCausalLM, and .* a LlamaForSequenceClassification\."):
        refine(small, tmp_path / "out", calibration=text, against=other.parent)
    with pytest.raises(UsageError, match="--refine-lr"):
        Refinement(lr=0.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [{"source": None}, {"layers": None}, {"recipe": 3}])
def test_a_damaged_report_is_said_at_once(
    toy: Callable[..., Path], small: Path, text: Calibration, tmp_path: Path, damage: dict[str, Any]
) -> None:
    path = small / "losparse_report.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | damage), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"losparse_report\.json is incomplete"):
        refine(small, tmp_path / "out", calibration=text, against=toy("llama", tokenizer=True))
    assert not (tmp_path / "out.partial").exists()


def test_command(toy: Callable[..., Path], small: Path, text: Calibration, tmp_path: Path) -> None:
    dense = toy("llama", tokenizer=True)
    run = done(
        "refine", small, "--against", dense, "--calibration", text.source, "--calibration-tokens", "256",
        "--calibration-length", "32", "--refine-steps", "5", "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert json.loads(run.out)["output"] == str(tmp_path / "out")
    assert verify(tmp_path / "out").sound


@pytest.mark.parametrize("objective", ["blocks", "model"])
def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    toy: Callable[..., Path], small: Path, text: Calibration, tmp_path: Path, objective: str
) -> None:
    dense, out = toy("llama", tokenizer=True), tmp_path / "out"
    command = (
        "refine", small, "--against", dense, "--calibration", text.source, "--calibration-tokens", "256",
        "--calibration-length", "32", "--objective", objective, "--refine-steps", "5", "-o", out, "--dry-run",
    )  # fmt: skip
    run = done(*command)
    said = " ".join(run.out.split())
    for words in ("14 layers, to ", "5 steps", "Disk about ", "Memory about ", "Time ", "256 tokens in 8 windows"):
        assert words in said
    assert said.endswith("Nothing was written.")
    assert "warning: 256 tokens are few to calibrate with" in " ".join(run.err.split())
    shown = json.loads(done(*command, "--json").out)
    assert (shown["objective"], shown["settings"]["steps"], len(shown["layers"])) == (objective, 5, 14)
    assert 0 < shown["least_seconds"] <= shown["seconds"] <= shown["most_seconds"]
    assert shown["peak_memory_bytes"] > 0
    assert shown["calibration"]["tokens_used"] == 256
    assert not out.exists()
    assert not out.with_name("out.partial").exists()
    (out / "mine").mkdir(parents=True)
    assert "exists already" in losparse(*command).complaint


def test_a_dry_run_checks_what_training_could_move(toy: Callable[..., Path], text: Calibration, tmp_path: Path) -> None:
    dense = toy("llama", tokenizer=True)
    flat = compress(dense, tmp_path / "flat", bits=4.0).output
    asked = ("refine", flat, "--against", dense, "--calibration", text.source, "--calibration-length", "32")
    run = losparse(*asked, "--train", "lowrank", "--dry-run")
    assert run.code == 2
    assert "has no U and V that --train lowrank could move" in run.complaint


def test_time_of_what_is_forecast(toy: Callable[..., Path], small: Path, text: Calibration, tmp_path: Path) -> None:
    """Layers are there, so that only text passes; steps take as long as they are many, and minutes bound them."""
    dense, place = toy("llama", tokenizer=True), tmp_path / "out"
    seconds, rates = {}, [1e9] * 7
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("losparse_cli.compression.estimate._speeds", lambda device: rates)
        for steps, minutes in ((1, None), (1001, None), (10**9, 2)):
            how = ModelRefinement(minutes=minutes, steps=steps)
            job = prepare_refinement(small, place, calibration=text, against=dense, refinement=how)
            seconds[steps] = estimate(job, job.windows).seconds
            assert estimate(job, job.windows).peak_bytes > 4 * job.parameters
        compressing = plan(dense, place, calibration=text, values="float")
        written = estimate(compressing, compressing.windows).seconds
        # A text that is not downloaded yet is none that the model writes.
        assert estimate(compressing, None).seconds == pytest.approx(written, rel=0.1)
    parameters, per_step = job.parameters, 1000 * job.towards.tokens if job.towards else 0
    assert 4e-9 * parameters * per_step < seconds[1001] - seconds[1] < 12e-9 * parameters * per_step
    assert 120 <= seconds[10**9] < 120 + written
    assert seconds[1] < written


@pytest.mark.parametrize("objective", ["blocks", "model"])
def test_shards_are_no_larger_than_asked(
    toy: Callable[..., Path], small: Path, text: Calibration, tmp_path: Path, objective: str
) -> None:
    how = Refinement(steps=1) if objective == "blocks" else ModelRefinement(steps=1, tokens=64)
    out = refine(
        small, tmp_path / "out", calibration=text, against=toy("llama", tokenizer=True), refinement=how,
        max_shard_size="50kB",
    ).output  # fmt: skip
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 1
    assert all(path.stat().st_size < 60_000 for path in shards)
    assert verify(out).sound
    held = [name for path in shards for name in load_file(path)]
    assert sorted(held) == sorted(load_file(small / "model.safetensors"))
    load(out)


# --- compressed and trained in one go -------------------------------------------------------------


def test_compress_trains_the_whole_model_in_one_go(toy: Callable[..., Path], text: Calibration, tmp_path: Path) -> None:
    dense = toy("llama", tokenizer=True)
    options: dict[str, Any] = {"bits": 3.0, "calibration": text}
    plain = compress(dense, tmp_path / "plain", **options)
    how = {"mode": "model", "steps": 6, "lr": 3e-3}
    trained = compress(dense, tmp_path / "out", **options, refinement=how)
    assert trained.report.refinement["steps"] == 6
    assert trained.report.refinement["divergence_after"] < trained.report.refinement["divergence_before"]
    assert trained.report.bits == plain.report.bits
    assert verify(trained.output).sound
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain", "text.txt"]
    again = compress(dense, tmp_path / "out", **options, refinement=how)
    assert again.seconds == 0
    assert again.report.refinement == trained.report.refinement


@pytest.mark.parametrize("stage", ["compression.block.Block.encode", "refinement.run.write_refined"])
def test_killed_in_either_stage_it_goes_on(
    toy: Callable[..., Path], text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    dense = toy("llama", tokenizer=True)
    options: dict[str, Any] = {"bits": 3.0, "calibration": text, "refinement": {"mode": "model", "steps": 4}}
    whole = compress(dense, tmp_path / "whole", **options).output

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"losparse_cli.{stage}", killed)
        with pytest.raises(KeyboardInterrupt):
            compress(dense, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    out = compress(dense, tmp_path / "out", **options).output
    assert digests(out)["model.safetensors"] == digests(whole)["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt", "whole"]


def test_what_lies_beside_the_output_is_left_alone(toy: Callable[..., Path], text: Calibration, tmp_path: Path) -> None:
    beside = [tmp_path / name for name in ("out.coded", "out.compressed")]
    for folder in beside:
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    how: dict[str, Any] = {"bits": 3.0, "calibration": text, "refinement": {"mode": "model", "steps": 2}}
    for _ in range(2):
        compress(toy("llama", tokenizer=True), tmp_path / "out", **how)
    assert all((folder / "mine.txt").read_text() == "mine" for folder in beside)


def test_another_request_after_a_kill_is_told_so_and_may_begin_anew(
    toy: Callable[..., Path], text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = toy("llama", tokenizer=True)
    how: dict[str, Any] = {"calibration": text, "refinement": {"mode": "model", "steps": 2}}

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("losparse_cli.refinement.run.write_refined", killed)
        with pytest.raises(KeyboardInterrupt):
            compress(dense, tmp_path / "out", bits=3.0, **how)
    with pytest.raises(ResumeError):
        compress(dense, tmp_path / "out", bits=4.0, **how)
    assert compress(dense, tmp_path / "out", bits=4.0, resume="never", **how).report.bits > 3.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]


def test_what_began_in_the_first_stage_can_be_required_to_go_on(
    toy: Callable[..., Path], text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"bits": 3.0, "calibration": text, "refinement": {"mode": "model", "steps": 2}}
    dense = toy("llama", tokenizer=True)

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("losparse_cli.compression.block.Block.encode", killed)
        with pytest.raises(KeyboardInterrupt):
            compress(dense, tmp_path / "out", **how)
    assert compress(dense, tmp_path / "out", resume="required", **how).report.refinement["steps"] == 2


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_cannot_be_trained_is_refused_before_anything_is_compressed(
    name: str, toy: Callable[..., Path], text: Calibration, tmp_path: Path
) -> None:
    source: Any = "self" if name == "llama" else text
    with pytest.raises(UsageError, match="text that people wrote" if name == "llama" else "losparse finetune"):
        plan(toy(name, tokenizer=True), tmp_path / "out", calibration=source, refinement="model")


@pytest.mark.parametrize(
    "refine",
    [
        {"mode": "model", "train": 5}, {"mode": "model", "train": [1]}, {"mode": "model", "train": {"scales": 1}},
        {"mode": ["model"]}, {"mode": "model", "seed": "x"}, {"mode": "model", "seed": 1.5},
        {"mode": "model", "tokens": 0}, {"mode": "blocks", "minutes": 3}, "all",
    ],
)  # fmt: skip
def test_a_recipe_that_asks_for_what_is_none(refine: Any, toy: Callable[..., Path], text: Calibration) -> None:
    with pytest.raises(LosparseError):
        plan(toy("llama", tokenizer=True), recipe={"calibration": {"source": text.source}, "refine": refine})


def test_the_mode_of_a_recipe_stands_beside_other_settings(toy: Callable[..., Path], text: Calibration) -> None:
    asks: dict[str, Any] = {"calibration": {"source": text.source, "tokens": 256, "length": 32}}
    dense = toy("llama", tokenizer=True)
    assert plan(dense, recipe=asks | {"refine": "model"}, refinement={"steps": 2}).towards == ModelRefinement(steps=2)
    found = plan(dense, recipe=asks | {"refine": {"minutes": 1, "train": "scales, norms"}}).towards
    assert found == ModelRefinement(minutes=1, train=("scales", "norms"))
