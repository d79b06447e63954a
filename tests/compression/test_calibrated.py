"""Compression with calibration text: closer to the dense model, the same bytes every time, killed or not."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from conftest import TOYS, character_tokenizer, toy_model
from torch import Tensor

import losparse_cli
from losparse_cli.budget.recipe import Recipe
from losparse_cli.checkpoint.output import ALLOCATION
from losparse_cli.checkpoint.workfolder import WorkFolder
from losparse_cli.checkpoint.writer import ShardWriter
from losparse_cli.compress import Result, compress, plan, run
from losparse_cli.compression import allocation, assembly, block, decisions
from losparse_cli.compression.assembly import Assembly
from losparse_cli.compression.estimate import estimate
from losparse_cli.compression.plan import Job
from losparse_cli.compression.request import Refinement
from losparse_cli.compression.schedule import schedule
from losparse_cli.compression.team import Team
from losparse_cli.errors import UsageError
from losparse_cli.models import route
from losparse_cli.models.blocks import THREAD
from losparse_cli.parallel.group import Alone
from losparse_cli.progress import Progress
from losparse_cli.text.sample import hold_out
from losparse_cli.text.windows import Calibration
from tests.killing import Killed, kill_at

RECIPE = Recipe(keep=0.6, rank_ratio=0.2, iterations=8)
LENGTH = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of a small vocabulary, so that what is measured on one part of it holds on another."""
    chance = random.Random(0)
    words = ["".join(chance.choice("abcdefghijklmnop") for _ in range(chance.randint(2, 7))) for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(chance.choice(words) for _ in range(900)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def asked(text: Path) -> Calibration:
    return Calibration(source=str(text), tokens=512, length=LENGTH)


def held_out(text: Path, rows: int = 8) -> Tensor:
    """Other text of the same words, as windows."""
    words = text.read_text(encoding="utf-8").split()
    random.Random(1).shuffle(words)
    ids = character_tokenizer()(" ".join(words), return_tensors="pt").input_ids[0]
    return ids[: rows * LENGTH].view(rows, LENGTH)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **extra).logits.float()


def far(folder: Path, dense: Path, ids: Tensor) -> float:
    """How far what the checkpoint says is from what the dense one says, relative to how that varies."""
    model, expected = (logits(losparse_cli.load(place)[0], ids) for place in (folder, dense))
    return float((model - expected).norm() / (expected - expected.mean(dim=tuple(range(expected.dim() - 1)))).norm())


def killed_then_resumed(
    monkeypatch: pytest.MonkeyPatch, number: int, again: Callable[[], Result], *, stops: range | None = None
) -> Result:
    """The result of a run that died at each of `stops`, or only at unit `number`, and then went on."""
    for stop in stops or (number,):
        with monkeypatch.context() as patched:
            kill_at(patched, stop)
            with pytest.raises(Killed):
                again()
        assert [thread for thread in threading.enumerate() if thread.name == THREAD] == []
    return again()


# --- what is held out ---------------------------------------------------------------------------------


def test_the_held_out_error_is_that_of_outputs_for_windows_that_the_solver_did_not_see(
    toy: Any, asked: Calibration, tmp_path: Path
) -> None:
    source = toy("llama", tokenizer=True)
    job = plan(source, tmp_path / "out", RECIPE, calibration=asked)
    assert job.windows is not None
    result = run(job)
    assert result.report.calibration["held_out"] == 1
    dense, ours = losparse_cli.load(source)[0].float(), losparse_cli.load(result.output)[0].float()
    fed: dict[str, Tensor] = {}
    for name, module in dense.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: args and fed.setdefault(name, args[0]))
    with torch.no_grad():
        dense(input_ids=hold_out(job.windows)[1].ids)
        for layer in result.report.layers:
            if layer.name.startswith("model.layers.0."):  # what the next one is fed comes from the compressed one
                X = fed[layer.name].reshape(-1, layer.shape[1])
                expected = dense.get_submodule(layer.name)(X)
                error = float((ours.get_submodule(layer.name)(X) - expected).norm() / expected.norm())
                assert layer.held_out_error == pytest.approx(error, rel=1e-3), layer.name
            assert layer.held_out_error is not None
            assert layer.output_error is not None
    assert result.report.held_out_error == pytest.approx(
        sum(layer.held_out_error or 0.0 for layer in result.report.layers) / len(result.report.layers)
    )


def test_what_is_held_out_changes_no_weight(toy: Any, asked: Calibration, tmp_path: Path) -> None:
    """Matching asks it whether a block is kept, and nothing else does."""
    source = toy("llama", tokenizer=True)
    results = []
    for number in range(2):
        job = plan(source, tmp_path / str(number) / "out", RECIPE, calibration=asked)
        assert job.windows is not None
        out = [k for k, row in enumerate(job.windows.ids) if (row == hold_out(job.windows)[1].ids[0]).all()]
        if number:  # the same tokens in another order
            job.windows.ids[out] = job.windows.ids[out].flip(1)
        results.append(run(job))
    first, second = (toys.digests(result.output) for result in results)
    weights = [file for file in first if file.endswith(".safetensors")]
    assert weights
    assert all(first[file] == second[file] for file in weights)
    errors = [[layer.held_out_error for layer in result.report.layers] for result in results]
    assert all(a != b for a, b in zip(*errors, strict=True))


def test_a_text_that_repeats_itself_shows_no_error_as_if_it_were_of_other_text(
    toy: Any, asked: Calibration, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over it. " * 60, encoding="utf-8")
    repeated = replace(asked, source=str(tmp_path / "text.txt"))
    found = {
        name: compress(toy("llama", tokenizer=True), tmp_path / name, RECIPE, calibration=given).report
        for name, given in (("repeated", repeated), ("real", asked))
    }
    assert all(layer.output_error is not None for layer in found["repeated"].layers)  # which is in-sample
    assert found["repeated"].held_out_error is None
    assert found["real"].held_out_error is not None
    assert any("repeats itself" in sentence for sentence in found["repeated"].calibration["warnings"])


# --- what comes out ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral", "bert", "t5", "bart", "opt"])
def test_the_result_is_sound_loads_and_is_the_same_when_activations_are_in_files(
    name: str, toy: Any, asked: Calibration, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = toy(name, tokenizer=True)
    first = compress(source, tmp_path / "a" / "out", RECIPE, calibration=asked)
    assert losparse_cli.verify(first.output).sound
    assert not list(first.output.glob("*.jsonl"))
    model, tokenizer = losparse_cli.load(first.output)
    assert type(model).__name__ == TOYS[name][0]
    assert tokenizer is not None
    assert far(first.output, source, held_out(text)) < 1
    assert all(layer.output_errors for layer in first.report.layers)  # every layer was reached by the text
    kept: list[assembly.Activations] = []

    class Watched(assembly.Activations):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            kept.append(self)

    monkeypatch.setattr(assembly, "Activations", Watched)
    second = compress(source, tmp_path / "b" / "out", RECIPE, calibration=asked, memory_limit="1MB")
    assert kept[0].spilled > 0
    assert toys.digests(second.output) == toys.digests(first.output)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("pattern", ["unstructured", "columns", "2:4"])
def test_it_is_closer_to_the_dense_model_than_without_data(
    name: str, pattern: str, toy: Any, asked: Calibration, text: Path, tmp_path: Path
) -> None:
    source = toy(name, tokenizer=True)
    sizes: dict[str, Any] = {"rank": 4} if pattern == "2:4" else {"keep": 0.6, "rank_ratio": 0.2}
    recipe = Recipe(**sizes, pattern=pattern, threshold_scope="row", iterations=30)
    free = compress(source, tmp_path / "free", recipe)
    told = compress(source, tmp_path / "told", recipe, calibration=asked)
    assert [(p.spec.rank, p.spec.nnz) for p in free.report.layers] == [
        (p.spec.rank, p.spec.nnz) for p in told.report.layers
    ]
    ids = held_out(text)
    assert far(told.output, source, ids) < 0.8 * far(free.output, source, ids)


@pytest.mark.slow
def test_matching_blocks_comes_closer_still(toy: Any, asked: Calibration, text: Path, tmp_path: Path) -> None:
    source = toy("llama", tokenizer=True)
    recipe = replace(RECIPE, keep=0.4)
    plain = compress(source, tmp_path / "plain", recipe, calibration=asked)
    matched = compress(source, tmp_path / "matched", recipe, calibration=asked, refinement=Refinement(steps=60))
    assert [match["name"] for match in matched.report.blocks] == ["model.layers.0", "model.layers.1"]
    assert all(match["loss_after"] < match["loss_before"] for match in matched.report.blocks)
    ids = held_out(text)
    assert far(matched.output, source, ids) < far(plain.output, source, ids)


def test_the_magnitude_solver_finds_what_it_finds_without_text(toy: Any, asked: Calibration, tmp_path: Path) -> None:
    source = toy("llama", tokenizer=True)
    recipe = replace(RECIPE, solver="magnitude", threshold_scope="row", iterations=3)
    with_text = compress(source, tmp_path / "with", recipe, calibration=asked)
    without = compress(source, tmp_path / "without", recipe)
    assert toys.tensor_bytes(with_text.output) == toys.tensor_bytes(without.output)


@pytest.mark.slow
def test_the_solvers_rank_as_they_should(toy: Any, asked: Calibration, text: Path, tmp_path: Path) -> None:
    source, ids = toy("llama", tokenizer=True), held_out(text)
    distance = {}
    for solver in ("magnitude", "oats", "admm"):
        recipe = replace(RECIPE, solver=solver, iterations=40, threshold_scope="row")
        result = compress(source, tmp_path / solver, recipe, calibration=asked)
        assert losparse_cli.verify(result.output).sound
        distance[solver] = far(result.output, source, ids)
    assert distance["admm"] < distance["oats"] < distance["magnitude"]


@pytest.mark.parametrize(("dtype", "stored"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_half_precision_stays_what_it_is(
    dtype: torch.dtype, stored: str, toy: Any, asked: Calibration, tmp_path: Path
) -> None:
    source = toy("llama", tokenizer=True, dtype=dtype)
    result = compress(source, tmp_path / "out", RECIPE, calibration=asked, refinement=Refinement(steps=3))
    floats = {kind for kind, _, _ in toys.tensor_bytes(result.output).values() if "F" in kind}
    assert floats == {stored}
    assert losparse_cli.verify(result.output).sound


@pytest.mark.slow
def test_a_model_without_repeated_blocks_is_one_block(
    toy: Any, asked: Calibration, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = toy("llama", tokenizer=True)
    recipe = replace(RECIPE, threshold_scope="row", iterations=30)
    free = compress(source, tmp_path / "free", recipe)
    monkeypatch.setattr(route, "find_blocks", lambda *_: ())
    whole = compress(source, tmp_path / "whole", recipe, calibration=asked)
    assert losparse_cli.verify(whole.output).sound
    assert far(whole.output, source, held_out(text)) < 0.8 * far(free.output, source, held_out(text))


@pytest.mark.parametrize("recipe", [RECIPE, Recipe(bits=4)])
@pytest.mark.parametrize("named", [(0,), (1, 2), (3,)])
def test_blocks_of_which_nothing_is_compressed_are_in_memory_one_at_a_time(
    named: tuple[int, ...], recipe: Recipe, asked: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_model("llama", num_hidden_layers=5)
    model.save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    most = 0
    load = Assembly.load

    def watched(assembly: Assembly, names: Any) -> None:
        nonlocal most
        load(assembly, names)
        held = {
            name.split(".")[2] for name, p in assembly.model.named_parameters() if ".layers." in name if not p.is_meta
        }
        most = max(most, len(held))

    monkeypatch.setattr(Assembly, "load", watched)
    recipe = replace(recipe, targets=tuple(f"model.layers.{number}.*" for number in named))
    result = compress(tmp_path / "model", tmp_path / "out", recipe, calibration=asked)
    assert most == 1
    assert losparse_cli.verify(result.output).sound
    assert {layer.name.split(".")[2] for layer in result.report.layers if ".layers." in layer.name} == set(
        map(str, named)
    )
    before, after = (toys.tensor_bytes(folder) for folder in (tmp_path / "model", result.output))
    assert all(
        before[name] == after[name] for name in before if ".layers." in name and int(name.split(".")[2]) not in named
    )


@pytest.mark.slow
def test_matching_a_model_that_is_one_block(
    toy: Any, asked: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "find_blocks", lambda *_: ())
    options: dict[str, Any] = {"calibration": asked, "refinement": Refinement(steps=6)}
    result = compress(toy("llama", tokenizer=True), tmp_path / "out", RECIPE, **options)
    assert losparse_cli.verify(result.output).sound
    assert result.report.blocks[0]["loss_after"] <= result.report.blocks[0]["loss_before"]


@pytest.mark.slow
def test_a_layer_that_is_fed_nothing_but_zeros(asked: Calibration, tmp_path: Path) -> None:
    """After a norm of weight zero, as some models initialise the last one of a branch."""
    model = toy_model("llama")
    torch.nn.init.zeros_(model.model.layers[0].post_attention_layernorm.weight)
    model.save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    for solver in ("admm", "oats"):
        result = compress(tmp_path / "model", tmp_path / solver, replace(RECIPE, solver=solver), calibration=asked)
        assert losparse_cli.verify(result.output).sound
        assert far(result.output, tmp_path / "model", torch.arange(4, 68).view(2, 32)) < 1


@pytest.mark.slow
def test_layers_that_share_inputs_need_not_share_a_recipe(
    toy: Any, asked: Calibration, text: Path, tmp_path: Path
) -> None:
    """Those solved side by side are alike in pattern, scope and steps; the others are no worse for it."""
    source = toy("llama", tokenizer=True)
    overrides = (
        ("*.k_proj", (("pattern", "columns"),)),
        ("*.up_proj", (("iterations", 3), ("threshold_scope", "matrix"))),
        ("*.0.*.v_proj", (("keep", 0.8),)),
    )
    mixed = compress(source, tmp_path / "mixed", replace(RECIPE, overrides=overrides), calibration=asked)
    plain = compress(source, tmp_path / "plain", RECIPE, calibration=asked)
    assert losparse_cli.verify(mixed.output).sound
    layers = {layer.name.removeprefix("model.layers.0."): layer for layer in mixed.report.layers}
    assert layers["self_attn.k_proj"].spec.pattern == "columns"
    assert layers["self_attn.q_proj"].spec.pattern == "unstructured"
    before, after = toys.tensor_bytes(plain.output), toys.tensor_bytes(mixed.output)
    same = {name.split(".")[4] for name in before if ".layers.0." in name and before[name] == after.get(name)}
    assert same >= {"q_proj", "gate_proj", "o_proj", "down_proj"}  # in the first block, whose inputs are the same
    assert not same & {"k_proj", "v_proj", "up_proj"}


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 33, 9 * LENGTH])
def test_little_text_and_a_last_batch_that_is_not_full(
    tokens: int, toy: Any, asked: Calibration, tmp_path: Path
) -> None:
    few = replace(asked, tokens=tokens)
    for k, recipe in enumerate((RECIPE, Recipe(keep=0.5, iterations=2, allocate="error"))):
        result = compress(toy("llama", tokenizer=True), tmp_path / str(k), recipe, calibration=few)
        assert losparse_cli.verify(result.output).sound
        assert result.report.calibration["windows"] == max(1, round(tokens / LENGTH))


# --- killed, and resumed ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_killed_after_every_number_of_units(
    dtype: torch.dtype, toy: Any, asked: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = toy("llama", tokenizer=True, dtype=dtype)
    options: dict[str, Any] = {"calibration": replace(asked, tokens=256), "refinement": Refinement(steps=4, lr=1e-3)}
    recipe = replace(RECIPE, keep=0.3, iterations=2)
    whole = compress(source, tmp_path / "a" / "out", recipe, **options)
    written, read = toys.tensor_bytes(whole.output), toys.tensor_bytes(source)
    norm = "model.layers.0.input_layernorm.weight"
    assert written[norm][:2] == read[norm][:2]
    assert written[norm] != read[norm]  # matched along: to go on, a run must read it back from its own files
    assert all(match["loss_after"] < match["loss_before"] for match in whole.report.blocks)
    job = plan(source, tmp_path / "b" / "out", recipe, **options)

    def again() -> Result:
        return compress(source, tmp_path / "b" / "out", recipe, **options)

    stops = range(0, len(job.entries), 2 if dtype == torch.bfloat16 else 1)
    last = killed_then_resumed(monkeypatch, 0, again, stops=stops)
    assert last.resumed in {units.start for units in job.blocks.values()}
    assert toys.digests(last.output) == toys.digests(whole.output)


@pytest.mark.parametrize("refined", [False, True], ids=["solved", "matched"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "t5"])
def test_killed_in_the_last_block(
    name: str, refined: bool, toy: Any, asked: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks before it are run with what was written for them; GPT-2's weights lie transposed."""
    source = toy(name, tokenizer=True)
    options: dict[str, Any] = {"calibration": replace(asked, tokens=256), "max_shard_size": "200kB"}
    if refined:
        options["refinement"] = Refinement(steps=2)
    recipe = replace(RECIPE, iterations=2)
    whole = compress(source, tmp_path / "a" / "out", recipe, **options)
    assert len(list(whole.output.glob("*.safetensors"))) > 1
    blocks = list(plan(source, tmp_path / "b" / "out", recipe, **options).blocks.values())

    def again() -> Result:
        return compress(source, tmp_path / "b" / "out", recipe, **options)

    last = killed_then_resumed(monkeypatch, blocks[-1].start + 3, again)
    assert last.resumed == blocks[-1].start
    assert toys.digests(last.output) == toys.digests(whole.output)


def test_killed_after_its_last_unit_nothing_is_solved_again(
    toy: Any, asked: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = toy("llama", tokenizer=True)
    whole = compress(source, tmp_path / "a" / "out", RECIPE, calibration=asked)
    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "finish", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            compress(source, tmp_path / "b" / "out", RECIPE, calibration=asked)
    monkeypatch.setattr(block.Block, "solve", lambda *_: pytest.fail("solved again"))
    last = compress(source, tmp_path / "b" / "out", RECIPE, calibration=asked, resume="required")
    assert toys.digests(last.output) == toys.digests(whole.output)


def test_other_text_is_another_run(toy: Any, asked: Calibration, text: Path, tmp_path: Path) -> None:
    source = toy("llama", tokenizer=True)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    first = compress(source, tmp_path / "a" / "out", RECIPE, calibration=asked)
    second = compress(source, tmp_path / "b" / "out", RECIPE, calibration=replace(asked, source=str(other)))
    assert first.report.fingerprint != second.report.fingerprint
    assert toys.tensor_bytes(first.output) != toys.tensor_bytes(second.output)


# --- a budget by measured errors --------------------------------------------------------------------


@pytest.mark.parametrize("field", ["keep", "keep_parameters"])
def test_allocation_by_error_and_its_resume(
    field: str, toy: Any, asked: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = toy("llama", tokenizer=True)
    size: dict[str, Any] = {field: 0.5}
    recipe = Recipe(**size, allocate="error", iterations=3)
    whole = compress(source, tmp_path / "a" / "out", recipe, calibration=asked)
    uniform = compress(source, tmp_path / "uniform", replace(recipe, allocate="uniform"), calibration=asked)
    assert losparse_cli.verify(whole.output).sound
    assert not (whole.output / ALLOCATION).exists()
    stored = [sum(layer.bytes_after for layer in r.report.layers) for r in (whole, uniform)]
    assert stored[0] == pytest.approx(stored[1], rel=0.02)

    def again() -> Result:
        return compress(source, tmp_path / "b" / "out", recipe, calibration=asked)

    with monkeypatch.context() as patched:
        kill_at(patched, 12)
        with pytest.raises(Killed):
            again()
    assert "layers" in json.loads((tmp_path / "b" / "out.partial" / ALLOCATION).read_text())
    monkeypatch.setattr("losparse_cli.compression.decisions.allocate_by_error", lambda *_: pytest.fail("decided again"))
    assert toys.digests(again().output) == toys.digests(whole.output)


@pytest.mark.parametrize(("name", "units", "torn"), [("gpt2", 0, True), ("llama", 12, False), ("llama", 12, True)])
def test_without_its_allocation_nothing_that_was_done_counts(
    name: str, units: int, torn: bool, toy: Any, asked: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that is decided again may be another, and half a model of either is of no size that was asked for."""
    source = toy(name, tokenizer=True)
    recipe = Recipe(keep=0.5, allocate="error", iterations=3)
    whole = compress(source, tmp_path / "a" / "out", recipe, calibration=asked)
    with monkeypatch.context() as patched:
        kill_at(patched, units)
        with pytest.raises(Killed):
            compress(source, tmp_path / "b" / "out", recipe, calibration=asked)
    kept = tmp_path / "b" / "out.partial" / ALLOCATION
    content = kept.read_bytes()[:-9]
    kept.unlink()
    if torn:
        kept.write_bytes(content)
    last = compress(source, tmp_path / "b" / "out", recipe, calibration=asked)
    assert last.resumed == 0
    assert toys.digests(last.output) == toys.digests(whole.output)


@pytest.mark.parametrize(("windows", "parts"), [(30, (16, 4, 4)), (9, (3, 3, 3)), (5, (3, 1, 1)), (2, (2, 2, 0))])
def test_allocation_is_checked_on_text_that_nothing_else_saw(
    windows: int, parts: tuple[int, int, int], toy: Any, asked: Calibration, tmp_path: Path
) -> None:
    job = plan(
        toy("llama", tokenizer=True), tmp_path / "out", Recipe(keep=0.5, allocate="error", iterations=2),
        calibration=asked,
    )  # fmt: skip
    assert job.windows is not None
    text = replace(job.windows, ids=torch.arange(3 * windows).view(windows, 3) % 90)
    survey = allocation._Survey(job, text, "keep", 0.5, lambda text: None)
    found = [part.ids for part in (survey._measured, survey._weighing, survey._checking)]
    assert tuple(map(len, found)) == parts
    seen = [set(map(tuple, part.tolist())) for part in found]
    assert not seen[2] & (seen[0] | seen[1])
    decided = allocation.allocate_by_error(job, text)
    assert (decided.gain is None) == (windows < 3)


@pytest.mark.parametrize("keep", [0.05, 0.1])
def test_allocation_of_little(keep: float, toy: Any, asked: Calibration, tmp_path: Path) -> None:
    """Where a smaller share would leave nothing of a layer, it is not tried."""
    recipe = Recipe(keep=keep, allocate="error", iterations=2)
    result = compress(toy("llama", tokenizer=True), tmp_path / "out", recipe, calibration=asked)
    assert losparse_cli.verify(result.output).sound


def test_allocation_with_nothing_left_to_allocate(toy: Any, asked: Calibration, tmp_path: Path) -> None:
    recipe = Recipe(keep=0.7, allocate="error", iterations=2, overrides=(("*", (("keep", 0.5),)),))
    result = compress(toy("llama", tokenizer=True), tmp_path / "out", recipe, calibration=asked)
    assert losparse_cli.verify(result.output).sound


@pytest.mark.parametrize("name", ["bert", "bert-qa", "t5", "mixtral"])
def test_allocation_without_room_for_the_whole_model(
    name: str, toy: Any, asked: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room its gain is measured on the model's output, whatever that is; without it all blocks weigh alike."""
    recipe = Recipe(keep=0.5, allocate="error", iterations=2)
    job = plan(toy(name, tokenizer=True), tmp_path / "out", recipe, calibration=asked)
    assert job.windows is not None
    roomy = allocation.allocate_by_error(job, job.windows)
    assert roomy.gain is not None
    assert roomy.gain > 0
    assert bool(roomy.layers) == (roomy.gain < 1)
    monkeypatch.setattr(allocation, "available", lambda _: 0)
    tight = allocation.allocate_by_error(job, job.windows)
    assert tight.gain is None
    assert tight.layers.keys() == {plan.layer.name for plan in job.plan.layers}
    sizes = {plan.layer.name: plan.layer.dense_bytes for plan in job.plan.layers}
    kept = sum(sizes[layer] * fields["keep"] for layer, fields in tight.layers.items()) / sum(sizes.values())
    assert kept == pytest.approx(0.5, abs=0.001)
    assert all(0.4 - 1e-4 <= fields["keep"] <= 0.6 + 1e-4 for fields in tight.layers.values())
    assert len({fields["keep"] for fields in tight.layers.values()}) > 1
    monkeypatch.setattr(decisions, "allocate_by_error", lambda *_: tight)
    with WorkFolder(job.output, {}) as work:
        decided = decisions.allocated_plan(job, job.windows, Team(Alone(), work), Progress())
    assert [entry for entry, _ in schedule(job.entries, decided, job.max_shard_bytes).units] == list(job.entries)
    assert decided.expected_bytes == pytest.approx(job.plan.expected_bytes, rel=0.02)


@pytest.mark.parametrize(
    "fields",
    [{"keep": 0.9}, {"rank": 3}, {"sparsity": 0.5}, {"pattern": "2:4", "keep": 0.8}],
    ids=lambda fields: "-".join(fields),
)
def test_allocation_leaves_layers_that_the_recipe_names(
    fields: dict[str, Any], toy: Any, asked: Calibration, tmp_path: Path
) -> None:
    recipe = Recipe(keep=0.5, iterations=2, overrides=(("*.q_proj", tuple(fields.items())),))
    source = toy("llama", tokenizer=True)
    uniform = compress(source, tmp_path / "uniform", recipe, calibration=asked)
    decided = compress(source, tmp_path / "out", replace(recipe, allocate="error"), calibration=asked)
    named = [
        {
            layer.name: (layer.spec.rank, layer.spec.nnz, layer.spec.pattern)
            for layer in result.report.layers
            if "q_proj" in layer.name
        }
        for result in (uniform, decided)
    ]
    assert named[0] == named[1]


def test_allocation_where_everything_is_kept(toy: Any, asked: Calibration, tmp_path: Path) -> None:
    recipe = Recipe(keep=1.0, allocate="error", iterations=2)
    result = compress(toy("llama", tokenizer=True), tmp_path / "out", recipe, calibration=asked)
    assert losparse_cli.verify(result.output).sound


# --- what contradicts itself ------------------------------------------------------------------------


def test_what_needs_text_says_so(toy: Any, asked: Calibration, tmp_path: Path) -> None:
    source = toy("llama", tokenizer=True)
    for recipe, options in (
        (Recipe(solver="admm"), {}),
        (Recipe(solver="oats"), {}),
        (None, {"refinement": Refinement(steps=2)}),
    ):
        with pytest.raises(UsageError, match="--calibration"):
            compress(source, tmp_path / "out", recipe, **options)


@pytest.mark.parametrize(
    "recipe",
    [
        {"rank": 4, "keep": 0.5},
        {"rank": 4, "sparsity": 0.5},
        {"sparsity": 0.5},
        {"pattern": "2:4"},
    ],
    ids=lambda recipe: "-".join(recipe),
)
def test_allocation_by_error_needs_something_to_allocate(
    recipe: dict[str, Any], toy: Any, asked: Calibration, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--allocate error"):
        compress(toy("llama", tokenizer=True), tmp_path / "out", Recipe(**recipe, allocate="error"), calibration=asked)


def test_allocation_by_error_without_text(toy: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--calibration"):
        compress(toy("llama"), tmp_path / "out", Recipe(keep=0.5, allocate="error"))


# --- estimates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_estimate_grows_with_what_is_asked_for(
    name: str, toy: Any, asked: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("losparse_cli.compression.estimate._speeds", lambda _: [1e9] * 9)

    def planned(tokens: int, **options: Any) -> Job:
        calibration = replace(asked, tokens=tokens)
        return plan(toy(name, tokenizer=True), tmp_path / "out", RECIPE, calibration=calibration, **options)

    def expected(tokens: int, **options: Any) -> Any:
        job = planned(tokens, **options)
        return estimate(job, job.windows)

    few, many, matched = expected(128), expected(1024), expected(1024, refinement=Refinement(steps=50))
    job = planned(1024)
    assert job.windows is not None
    # Of every pair of positions in each batch, which encoder and decoder hand from block to block.
    biases = 4 * job.bias_heads * job.windows.length**2 * -(-len(job.windows.ids) // asked.batch)
    assert job.bias_heads == (6 if name == "t5" else 0)
    assert many.activation_bytes - estimate(replace(job, bias_heads=0), job.windows).activation_bytes == biases
    assert few.fixed_bytes > 0
    assert few.activation_bytes > 0
    assert 0 < few.seconds < many.seconds < matched.seconds
    assert few.activation_bytes < many.activation_bytes < matched.activation_bytes
    assert few.peak_bytes < many.peak_bytes < matched.peak_bytes
