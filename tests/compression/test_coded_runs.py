"""Whole numbers in S, from a request to a model: bytes as asked, the same every time, killed or not."""

from __future__ import annotations

import copy
import json
import pickle
import random
import re
from pathlib import Path
from typing import Any

import pytest
import terminal
import torch
import toys
from conftest import LENGTH, TOYS, VOCABULARY, answer, character_tokenizer, toy_model
from safetensors.torch import load_file, save_file

import losparse_cli
from losparse_cli.budget.recipe import CALIBRATED_BITS, DEFAULT_BITS
from losparse_cli.budget.units import parse_size
from losparse_cli.checkpoint.output import SENSITIVITY
from losparse_cli.checkpoint.report import Report
from losparse_cli.compress import compress, plan, run
from losparse_cli.compression import foreseen
from losparse_cli.compression.estimate import forecast
from losparse_cli.errors import CheckpointError, UsageError
from losparse_cli.export import export
from losparse_cli.shim.loader import loader_bytes
from losparse_cli.text import sample
from losparse_cli.text.windows import Calibration
from losparse_cli.verify import verify
from tests.hearing import Hearing
from tests.killing import Killed, kill_at

LAYERS = 14  # of the toy llama


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    chance = random.Random(0)
    words = ["".join(chance.choice("abcdefghijklmnop") for _ in range(chance.randint(2, 7))) for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(chance.choice(words) for _ in range(900)), encoding="utf-8")
    return Calibration(source=str(path), tokens=512, length=32)


@pytest.fixture(scope="module")
def coded(toy: Any, asked: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("coded") / "out"
    return compress(toy("llama", tokenizer=True), output, bits=5, calibration=asked).output


def bits_of(report: Report) -> float:
    return 8 * sum(layer.bytes_after for layer in report.layers) / sum(layer.parameters for layer in report.layers)


def stored_bytes(folder: Path, report: Report) -> int:
    """Of the compressed layers, read from the files."""
    tensors = toys.tensor_bytes(folder)
    names = {layer.name for layer in report.layers}
    return sum(len(t[2]) for name, t in tensors.items() if name.rpartition(".")[0] in names)


@pytest.mark.parametrize(
    ("bits", "how"),
    [(3.5, {}), (6, {}), (4, {"sensitivity": "off"}), (4, {"solver": "rounding"}), (6.5, {"rank": 1})],
    ids=["3.5", "6", "off", "rounding", "rank"],
)
def test_the_bytes_are_those_asked_for_and_hardly_less(
    bits: float, how: dict[str, Any], toy: Any, asked: Calibration, tmp_path: Path
) -> None:
    made = compress(toy("llama", tokenizer=True), tmp_path / "out", {"bits": bits, **how}, calibration=asked)
    report = made.report
    assert report.coded
    assert len(report.layers) == LAYERS
    assert 0.99 * bits <= bits_of(report) <= bits  # layers of 4,000 weights: a byte is a five-hundredth of a bit
    assert stored_bytes(made.output, report) == sum(layer.bytes_after for layer in report.layers)


def test_without_a_size_s_is_whole_numbers(toy: Any, asked: Calibration, tmp_path: Path) -> None:
    plain = compress(toy("llama", tokenizer=True), tmp_path / "plain").report
    calibrated = compress(toy("llama", tokenizer=True), tmp_path / "calibrated", calibration=asked).report
    assert 0.99 * DEFAULT_BITS < bits_of(plain) <= DEFAULT_BITS
    assert 0.99 * CALIBRATED_BITS < bits_of(calibrated) <= CALIBRATED_BITS
    assert calibrated.recipe["sensitivity"] == "on"


def test_of_more_bytes_whole_numbers_make_no_worse_a_model(toy: Any, tmp_path: Path) -> None:
    """The toy is stored in 32 bits, of which codes cannot use more than 8: a greater share is none of another kind."""
    source = toy("llama")
    made = [compress(source, tmp_path / str(keep), keep=keep).report for keep in (0.2, 0.4, 0.55, 0.9)]
    assert all(report.coded for report in made)
    errors = [report.relative_error or 1.0 for report in made]
    assert errors[0] > errors[1] == errors[2] == errors[3] > 0
    assert 8 * 0.98 < bits_of(made[1]) <= 8
    assert not compress(source, tmp_path / "float", keep=0.4, values="float").report.coded


def test_a_share_that_whole_numbers_cannot_use_is_told(toy: Any, tmp_path: Path) -> None:
    heard = Hearing()
    compress(toy("llama"), tmp_path / "out", keep=0.4, progress=heard)
    [line] = [line for line in (*heard.warned, *heard.told) if line.startswith("keep 0.4 is 12.8 bits a weight, and")]
    assert "whole numbers take 8 at most, in which they lose less than floats in all of it" in line
    recipe = {"bits": 4, "layers": {"q_proj": {"keep": 0.6}}}
    [note] = plan(toy("llama"), tmp_path / "other", recipe).plan.notes
    assert "19.2 bits" in note
    assert "model.layers.0.self_attn.q_proj (68 x 68) and 1 more layer stay at 25% of the bytes" in note
    assert not plan(toy("llama"), tmp_path / "other", {"keep": 0.25}).plan.notes


def test_settings_of_single_layers(toy: Any, asked: Calibration, tmp_path: Path) -> None:
    recipe = {"bits": 4, "layers": {"*.mlp.*": {"bits": 6}, "*.q_proj": {"rank": 1}}}
    report = compress(toy("llama", tokenizer=True), tmp_path / "out", recipe, calibration=asked).report
    for inside, bits in ((True, 6), (False, 4)):
        group = [layer for layer in report.layers if (".mlp." in layer.name) == inside]
        used = 8 * sum(layer.bytes_after for layer in group) / sum(layer.parameters for layer in group)
        assert 0.985 * bits < used <= bits
    assert {layer.spec.rank for layer in report.layers if "q_proj" in layer.name} == {1}


@pytest.mark.parametrize("limit", [sample.STRANGE, 10_000])
def test_text_that_is_strange_to_the_model_is_warned_of(
    limit: int, toy: Any, asked: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any is to random weights."""
    monkeypatch.setattr(sample, "STRANGE", limit)
    heard = Hearing()
    made = compress(toy("llama", tokenizer=True), tmp_path / "out", bits=4, calibration=asked, progress=heard)
    begin, strange = "The text is strange to the model: its perplexity is", limit == 100
    assert sum(line.startswith(begin) for line in heard.warned) == strange
    assert sum(line.startswith(begin) for line in made.report.calibration["warnings"]) == strange
    assert (begin in (made.output / "README.md").read_text(encoding="utf-8")) == strange


# --- a size of everything ----------------------------------------------------------------------------


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("beside", "how"),
    [
        (128, {}),
        (141, {"max_shard_size": "30kB"}),
        (128, {"recipe": {"layers": {"*.mlp.*": {"bits": 6}}}}),
        (205, {"values": "float"}),
    ],
    ids=["codes", "shards", "layers", "floats"],
)
def test_the_folder_is_never_larger_than_asked_for(
    beside: int, how: dict[str, Any], toy: Any, asked: Calibration, tmp_path: Path
) -> None:
    """beside: thousands of bytes besides the loader's files."""
    source = toy("llama", tokenizer=True)
    size = f"{-(-loader_bytes() // 1000) + beside}kB"
    job = plan(source, tmp_path / "out", size=size, calibration=asked, **how)
    made = run(job)
    whole, bound = folder_bytes(made.output), forecast(job).disk_bytes
    assert whole <= bound <= parse_size(size)
    assert bound > 0.98 * parse_size(size)  # of floats a layer has whole ranks
    if made.report.coded:
        assert bound - whole < 24_000, "what is said beside the weights is bounded, not known"
    assert verify(made.output).sound
    assert made.report.recipe["size"] == size


def test_a_dry_run_says_what_a_size_comes_to(toy: Any, tmp_path: Path) -> None:
    size = f"{-(-loader_bytes() // 1000) + 135}kB"
    planned = terminal.done("compress", toy("llama"), "-o", tmp_path / "out", "--size", size, "--dry-run")
    bits = re.search(r"with (\d\.\d+) bits each on average", planned.err + planned.out)
    assert bits is not None
    found = json.loads(terminal.done("compress", toy("llama"), "--size", size, "--dry-run", "--json").out)
    assert found["disk_bytes"] <= parse_size(size)
    [asked] = {layer["bits"] for layer in found["layers"] if "embed" not in layer["name"]}
    assert asked == pytest.approx(float(bits[1]), abs=0.01)


# --- zeros by a pattern ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"bits": 5, "sparsity": 0.5},
        {"value_bits": 5, "sparsity": 0.75, "threshold_scope": "row", "rank": 1},
        {"value_bits": 6, "pattern": "2:4"},
        {"bits": 4, "pattern": "rows", "sparsity": 0.5},
        {"bits": 4, "pattern": "columns", "sparsity": 0.5, "solver": "rounding"},
    ],
    ids=["unstructured", "row", "2:4", "rows", "columns"],
)
def test_zeros_by_a_pattern(how: dict[str, Any], toy: Any, asked: Calibration, tmp_path: Path) -> None:
    source = toy("llama", tokenizer=True)
    job = plan(source, tmp_path / "out", how, calibration=asked)
    made = run(job)
    report = made.report
    assert report.coded
    expected = sum(p.expected_bytes for p in job.plan.layers)
    assert 0.985 * expected <= sum(layer.bytes_after for layer in report.layers) <= expected
    kept = {p.layer.name: p.nnz for p in job.plan.layers}
    for layer in report.layers:
        assert 0.7 * kept[layer.name] <= layer.spec.nnz <= kept[layer.name]
        assert layer.spec.pattern == how.get("pattern", "unstructured")
    assert report.zeros >= 0.5
    assert verify(made.output).sound
    model, _ = losparse_cli.load(made.output, dtype=torch.float32)
    dense, _ = losparse_cli.load(export(made.output, tmp_path / "dense"), dtype=torch.float32)
    torch.testing.assert_close(answer(model), answer(dense), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (made.output, tmp_path / "again"))
    assert all(torch.equal(tensor, second[name].to(tensor.dtype)) for name, tensor in first.items())


def test_a_killed_run_with_zeros_ends_with_the_same_bytes(
    toy: Any, asked: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(folder: Path) -> dict[str, str]:
        how = {"value_bits": 5, "pattern": "2:4"}
        return toys.digests(compress(toy("llama", tokenizer=True), folder / "out", how, calibration=asked).output)

    with monkeypatch.context() as patched:
        kill_at(patched, 9)
        with pytest.raises(Killed):
            made(tmp_path / "killed")
    assert made(tmp_path / "killed") == made(tmp_path / "whole")


def test_sparsity_alone_is_of_floats_and_bits_make_it_of_whole_numbers(toy: Any, tmp_path: Path) -> None:
    source = toy("llama")
    of = {
        name: plan(source, tmp_path / "out", how).recipe
        for name, how in {
            "floats": {"rank": 2, "sparsity": 0.9},
            "pattern": {"pattern": "2:4"},
            "bits": {"rank": 1, "sparsity": 0.9, "bits": 3},
            "values": {"sparsity": 0.5, "values": "codes"},
            "value bits": {"pattern": "2:4", "value_bits": 4},
        }.items()
    }
    assert [of[name].values for name in of] == ["float", "float", "codes", "codes", "codes"]
    assert (of["bits"].bits, of["bits"].value_bits) == (3, None)
    assert (of["values"].bits, of["values"].value_bits) == (None, DEFAULT_BITS)


def test_bits_that_kept_values_cannot_use_are_told(toy: Any, tmp_path: Path) -> None:
    heard = Hearing()
    report = compress(toy("llama"), tmp_path / "out", bits=8, sparsity=0.9, progress=heard).report
    [said] = heard.warned
    assert said.startswith("8 bits a weight are ")
    assert "13 more layers stay smaller than was asked for." in said
    assert bits_of(Report(report.layers[1:], {}, 0, 0, 0)) < 4


def test_the_dense_model_is_what_is_computed(coded: Path, tmp_path: Path) -> None:
    model, _ = losparse_cli.load(coded, dtype=torch.float32)
    dense, _ = losparse_cli.load(export(coded, tmp_path / "dense"), dtype=torch.float32)
    torch.testing.assert_close(answer(model), answer(dense), rtol=1e-4, atol=1e-4)
    for name, layer in model.named_modules():
        if hasattr(layer, "spec"):
            weight = dense.get_submodule(name).weight
            torch.testing.assert_close(layer.dense(), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_again_it_is_the_same(dtype: torch.dtype, coded: Path, tmp_path: Path) -> None:
    model, _ = losparse_cli.load(coded, dtype=dtype)
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (coded, tmp_path / "again"))
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert torch.equal(tensor.to(second[name].dtype), second[name]), name
    again, _ = losparse_cli.load(tmp_path / "again", dtype=dtype)
    assert torch.equal(answer(model), answer(again))


def test_copies_and_pickles_compute_the_same(coded: Path) -> None:
    model, _ = losparse_cli.load(coded)
    expected = answer(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(answer(other), expected)


def test_row_factors_have_gradients(coded: Path) -> None:
    model, _ = losparse_cli.load(coded, dtype=torch.float32)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features)
    layer(x).square().sum().backward()
    S = (layer.dense() / layer.weight.detach()[:, None]).detach()
    rows = layer.weight.detach().clone().requires_grad_()
    (x @ (S * rows[:, None]).T).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, rows.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "gpt2", "mixtral", "bert", "t5", "bart", "opt", "mamba"])
def test_other_models(name: str, toy: Any, asked: Calibration, tmp_path: Path) -> None:
    source = toy(name, tokenizer=True)
    made = compress(source, tmp_path / "out", bits=6, calibration=asked)
    assert verify(made.output).sound
    assert 0.98 * 6 <= bits_of(made.report) <= 6
    model, _ = losparse_cli.load(made.output, dtype=torch.float32)
    dense, _ = losparse_cli.load(source, dtype=torch.float32)
    ours, theirs = answer(model), answer(dense)
    assert float((ours - theirs).norm()) < 0.3 * float(theirs.norm())


SWITCH = ("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", {
    "vocab_size": VOCABULARY, "d_model": 66, "d_kv": 22, "d_ff": 131, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 3, "num_experts": 4, "expert_capacity": 64, "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2, "decoder_start_token_id": 0})  # fmt: skip


def test_experts_that_no_token_is_sent_to_have_bytes_of_their_own(asked: Calibration, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TOYS, "switch", SWITCH)
        model = toy_model("switch")
    for name, parameter in model.named_parameters():
        if name.endswith("router.classifier.weight"):  # of the first two one is always above zero, as the last is
            parameter.data[1], parameter.data[3] = -parameter.data[0], 0
    model.save_pretrained(tmp_path / "dense")
    character_tokenizer().save_pretrained(tmp_path / "dense")
    made = compress(tmp_path / "dense", tmp_path / "out", bits=5, calibration=asked)
    idle = [layer for layer in made.report.layers if "expert_3." in layer.name]
    busy = [layer for layer in made.report.layers if ".expert_" in layer.name and layer not in idle]
    assert idle
    assert all(layer.held_out_error is None and 4.9 < layer.bits <= 5 for layer in idle)
    assert sum(layer.held_out_error is not None for layer in busy) >= len(busy) // 2
    assert 0.98 * 5 <= bits_of(made.report) <= 5
    assert verify(made.output).sound
    ours, theirs = (answer(losparse_cli.load(folder, dtype=torch.float32)[0]) for folder in
                    (made.output, export(made.output, tmp_path / "plain")))  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


GATED = ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {
    "vocab_size": VOCABULARY, "hidden_size": 68, "intermediate_size": 131, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 60, "max_position_embeddings": LENGTH,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})  # fmt: skip


def test_a_gate_of_one_row_stays_dense_and_that_is_said(asked: Calibration, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TOYS, "gated", GATED)
        toy_model("gated").save_pretrained(tmp_path / "dense")
    character_tokenizer().save_pretrained(tmp_path / "dense")
    for name, text in (("plain", None), ("calibrated", asked)):
        heard = Hearing()
        made = compress(tmp_path / "dense", tmp_path / name, bits=6, calibration=text, progress=heard)
        gate = "model.layers.0.mlp.shared_expert_gate"
        assert made.report.skipped[gate].startswith("cannot be stored in 6 bits a weight")
        assert [line for line in heard.warned if line.startswith(f"{gate} (1 x 68) and 1 more layer stay dense")]
        assert torch.isfinite(answer(losparse_cli.load(made.output)[0])).all()


def test_figures_of_whole_numbers_beside_the_dense_model(coded: Path, toy: Any, asked: Calibration) -> None:
    found = losparse_cli.evaluate(coded, Path(asked.source), against=toy("llama", tokenizer=True), length=32, windows=4)
    assert 0 < found.kl.value < 0.5
    assert found.agreement.value > 0.5
    assert found.nbytes < 0.5 * found.dense_nbytes


# --- killed ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_bytes(
    toy: Any, asked: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: Path) -> dict[str, str]:
        made = compress(toy("llama", tokenizer=True), folder / "out", bits=4, calibration=asked)
        assert not (made.output / SENSITIVITY).exists()
        return toys.digests(made.output)

    whole = run(tmp_path / "whole")
    measured = foreseen.measure_sensitivity
    count = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return measured(*args, **options)

    for stop in (0, 5, 9, 15, 20):
        with monkeypatch.context() as patched:
            kill_at(patched, stop)
            patched.setattr(foreseen, "measure_sensitivity", counted)
            with pytest.raises(Killed):
                run(tmp_path / "killed")
    assert count == 1, "what the loss minds is measured once"
    assert run(tmp_path / "killed") == whole


# --- what cannot be ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asks", "says"),
    [
        ({"bits": 0}, "the recipe: bits is how many bits a weight takes, above 0 and at most 8, not 0"),
        ({"bits": 20}, "not 20"),
        ({"bits": float("nan")}, "not nan"),
        ({"bits": "4"}, "not '4'"),
        ({"bits": 4, "keep": 0.5}, "keep and bits contradict each other"),
        ({"bits": 4, "values": "float"}, "bits is for whole numbers in S, and 'values: float' for floats"),
        ({"bits": 4, "value_bits": 3, "sparsity": 0.5}, "bits and value_bits contradict each other"),
        ({"keep": 0.2, "sparsity": 0.5}, "sparsity and keep contradict each other"),
        ({"bits": 4, "pattern": "2:4", "sparsity": 0.7}, "'pattern: 2:4' has sparsity 0.5 by itself"),
        ({"bits": 4, "pattern": "rows"}, "'pattern: rows' says where zeros are, and not how many there are: add"),
        ({"bits": 4, "threshold_scope": "row"}, "threshold_scope says where zeros are"),
        ({"value_bits": 3}, "value_bits is of the values that zeros leave, and not how many there are"),
        ({"value_bits": 9, "sparsity": 0.5}, "value_bits is how many bits a kept value takes, above 0 and at most 8"),
        ({"bits": 4, "sparsity": 1}, "would have nothing left of S"),
        ({"size": "10kB"}, r"'size: 10kB' is too little: with these settings \d+\.\dkB is the smallest result"),
        ({"size": "1GB"}, r"'size: 1GB' is no less than the \d+\.\dkB of the dense model"),
        ({"size": 1e5, "keep": 0.5}, "size and keep contradict each other"),
        ({"bits": 4, "rank_ratio": 0.2}, "rank_ratio is for floats in S"),
        ({"bits": 4, "solver": "admm"}, "'solver: admm' is for floats in S"),
        ({"values": "float", "solver": "feedback"}, "'solver: feedback' is for whole numbers"),
        ({"values": "ints"}, "values is codes or float, not 'ints'"),
        ({"sensitivity": "maybe"}, "sensitivity is on or off"),
        ({"sensitivity": "on"}, "'sensitivity: on' needs text"),
        ({"bits": 4, "solver": "feedback"}, "'solver: feedback' needs text"),
        ({"bits": 0.01}, r"cannot be stored in 0.01 bits a weight.*Raise bits to \d"),
    ],
)
def test_requests_that_cannot_be_met(asks: dict[str, Any], says: str, toy: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        compress(toy("llama"), tmp_path / "out", asks)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["S_codes", "weight", "S_scale"])
def test_damage_is_found(suffix: str, coded: Path, tmp_path: Path) -> None:
    for file in coded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()) if file.is_file() else None
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.1.mlp.up_proj.{suffix}"
    damaged = tensors[name].clone()
    damaged[len(damaged) // 2] = 3 if suffix != "weight" else float("nan")
    tensors[name] = damaged
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = verify(tmp_path)
    assert any("SHA-256" in problem for problem in found.problems)
    if suffix == "S_codes":
        assert any("layer model.layers.1.mlp.up_proj has damaged codes (codes" in line for line in found.problems)
        with pytest.raises((CheckpointError, ValueError), match=r"model\.layers\.1\.mlp\.up_proj"):
            losparse_cli.load(tmp_path)
    if suffix == "weight":
        assert any("NaN" in problem for problem in found.problems)


# --- in the terminal ---------------------------------------------------------------------------------


def test_the_terminal_says_bits(toy: Any, asked: Calibration, tmp_path: Path) -> None:
    source = toy("llama", tokenizer=True)
    options = ("--calibration", asked.source, "--calibration-tokens", 512, "--calibration-length", 32, "--bits", 4)
    planned = terminal.done("compress", source, "-o", tmp_path / "out", *options, "--dry-run")
    assert "with 4 bits each on average" in planned.out
    made = terminal.done("compress", source, "-o", tmp_path / "out", *options)
    assert "bits a weight" in made.out
    shown = terminal.done("inspect", tmp_path / "out", "--layers")
    assert "bits" in shown.out
