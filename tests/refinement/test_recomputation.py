"""Blocks that run again on the way back: the same gradients, and less that is kept for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from terminal import done
from torch import Tensor

from losparse_cli import Recipe, compress, load, refine
from losparse_cli.compression.assembly import keeps_no_cache
from losparse_cli.compression.estimate import Estimate, estimate
from losparse_cli.compression.fingerprint import fingerprint
from losparse_cli.compression.request import ModelRefinement
from losparse_cli.errors import UsageError
from losparse_cli.models.blocks import find_blocks
from losparse_cli.models.head import Head
from losparse_cli.refine import prepare_refinement
from losparse_cli.refinement import run
from losparse_cli.refinement.recomputation import recompute
from losparse_cli.text.request import Calibration

HOW = ModelRefinement(steps=3, lr=3e-3, tokens=128)


@pytest.fixture(scope="module")
def small(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(dense, tmp_path_factory.mktemp("recomputation") / "small", Recipe(bits=2.5)).output


def gradients(model: Any, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor | None], int]:
    """Of all parameters, and the bytes that were kept for them; each tensor counts once."""
    head = Head(model, inputs)
    assert head.module is not None
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head.states(inputs).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}, sum(n for at, n in kept.items() if at not in own)


NAMES = ["llama", "qwen2", "gemma3", "gpt2", "opt", "falcon", "mamba", "mixtral", "t5", "bart"]


@pytest.mark.parametrize(("name", "cache"), [*((name, False) for name in NAMES), ("llama", True), ("t5", True)])
def test_the_same_gradients_with_less_that_is_kept(name: str, cache: bool, toy: Callable[..., Path]) -> None:
    """Also of a model that keeps a cache."""
    model, _ = load(toy(name), dtype=torch.float32)
    model.requires_grad_()
    if not cache:
        keeps_no_cache(model)
    ids = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :16]} if model.config.is_encoder_decoder else {})
    plain, kept = gradients(model, inputs)
    linears = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear) or "c_fc" in n]
    blocks = find_blocks(model, linears)
    recompute(model, blocks)
    again, less = gradients(model, inputs)
    assert plain.keys() == again.keys()
    for one, value in plain.items():
        assert (value is None) == (again[one] is None), one
        assert value is None or torch.equal(value, again[one]), one  # type: ignore[arg-type]
    assert less < (kept / 2 if not cache else kept)


def test_a_refinement_ends_with_the_same_bytes(
    small: Path, dense: Path, text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Any] = []
    plain = run.recompute
    monkeypatch.setattr(run, "recompute", lambda model, blocks: (used.append(list(blocks)), plain(model, blocks)))
    found = []
    for number, how in enumerate((HOW, replace(HOW, gradient_checkpointing=True))):
        output = tmp_path / str(number)
        refine(small, output, calibration=text, against=dense, refinement=how)
        found.append(load_file(output / "model.safetensors"))
    assert used == [["model.layers.0", "model.layers.1"]]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def needs(small: Path, dense: Path, text: Calibration, how: ModelRefinement = HOW, **options: Any) -> Estimate:
    job = prepare_refinement(small, calibration=text, against=dense, refinement=how, **options)
    return estimate(job, job.windows)


def test_it_is_done_where_memory_is_short_or_it_is_asked_for(small: Path, dense: Path, text: Calibration) -> None:
    plain = needs(small, dense, text, memory_limit="64GB")
    asked = needs(small, dense, text, replace(HOW, gradient_checkpointing=True), memory_limit="64GB")
    assert (plain.recomputes, asked.recomputes) == (False, True)
    assert plain.otherwise_bytes == asked.training_bytes < plain.training_bytes == asked.otherwise_bytes
    assert needs(small, dense, text, memory_limit=str(plain.training_bytes - 1)).recomputes
    assert not needs(small, dense, text, memory_limit=str(plain.training_bytes)).recomputes
    assert not needs(small, dense, text, memory_limit="1GB").recomputes


def test_a_run_goes_on_with_it_or_without(small: Path, dense: Path, text: Calibration) -> None:
    marks = [
        fingerprint(prepare_refinement(small, calibration=text, against=dense, refinement=how))
        for how in (HOW, replace(HOW, gradient_checkpointing=True), replace(HOW, steps=4))
    ]
    assert marks[0] == marks[1] != marks[2]


def test_settings_that_are_none() -> None:
    with pytest.raises(UsageError, match="gradient_checkpointing of a refinement is true or false"):
        ModelRefinement(gradient_checkpointing="yes")  # type: ignore[arg-type]


def test_the_dry_run_says_what_each_takes(small: Path, dense: Path, text: Calibration, tmp_path: Path) -> None:
    reads = ("--calibration", text.source, "--calibration-length", "32", "-o", tmp_path / "out", "--dry-run")
    commands = (
        ("refine", small, "--against", dense, *reads, "--gradient-checkpointing"),
        ("compress", dense, *reads, "--refine", "model", "--refine-gradient-checkpointing"),
    )
    for command in commands:
        found = [json.loads(done(*given, "--json").out)["training"] for given in (command[:-1], command)]
        assert [one.pop("gradient_checkpointing") for one in found] == [False, True]
        assert found[0] == found[1]
        assert found[0]["checkpointed_memory_bytes"] < found[0]["peak_memory_bytes"]
        assert "with gradient checkpointing" in done(*command[:-1]).out
        assert "blocks run again on the way back, else" in done(*command).out
