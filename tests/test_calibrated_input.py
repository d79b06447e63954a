"""Bad requests and bad models under --calibration: one sentence, the right exit code, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import character_tokenizer
from terminal import done, losparse
from toys import llama, weights

TEXT = " ".join(f"Sentence {k} says that {k * k % 89} is not {k}." for k in range(120))
FLAGS = ("--calibration-tokens", "256", "--calibration-length", "32")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--refine", "all"), "--refine is blocks, model, both or off"),
        (("--refine-steps", "5"), "--refine blocks"),
        (("--refine", "blocks", "--refine-steps", "0"), "--refine-steps"),
        (("--refine", "blocks", "--refine-lr", "2"), "--refine-lr"),
        (("--allocate", "fair"), "--allocate is uniform or error"),
        (("--allocate", "error", "--rank", "4"), "--allocate error"),
        (("--allocate", "error", "--pattern", "2:4"), "--allocate error"),
        (("--solver", "best"), "--solver is admm, oats, magnitude, feedback or rounding"),
        (("--memory-limit", "much"), "--memory-limit"),
    ],
)
def test_contradictions(
    toy: Callable[..., Path], text: Path, tmp_path: Path, flags: tuple[str, ...], named: str
) -> None:
    out = tmp_path / "out"
    run = losparse("compress", toy("llama", tokenizer=True), "--calibration", text, *FLAGS, *flags, "-o", out)
    assert run.code == 2
    assert named in run.complaint
    assert not out.exists()


@pytest.mark.parametrize(
    "flags", [("--refine", "blocks"), ("--solver", "admm"), ("--solver", "oats"), ("--allocate", "error")]
)
def test_what_needs_text_says_so(toy: Callable[..., Path], tmp_path: Path, flags: tuple[str, ...]) -> None:
    run = losparse("compress", toy("llama", tokenizer=True), *flags, "-o", tmp_path / "out")
    assert run.code == 2
    assert "--calibration" in run.complaint
    assert not (tmp_path / "out").exists()


def test_activations_that_are_not_finite_name_the_layer(text: Path, tmp_path: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"
    broken = weights()[name]
    broken[:] = 3e38  # overflows where it is multiplied with
    model = llama(tmp_path / "model", vocab_size=128, extra={name: broken, "model.embed_tokens.weight": table()})
    character_tokenizer().save_pretrained(model)
    run = losparse("compress", model, "--calibration", text, *FLAGS, "-o", tmp_path / "out")
    assert run.code == 1
    assert "model.layers.1.self_attn.q_proj" in run.complaint
    assert "not finite" in run.complaint
    assert not (tmp_path / "out").exists()


def table() -> torch.Tensor:
    """Embeddings for every token of the character tokenizer."""
    return (0.1 * torch.randn(128, 64, generator=torch.Generator().manual_seed(1))).to(torch.bfloat16)


def test_dry_run_tells_time_memory_and_text_and_writes_nothing(
    toy: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    model, out = toy("llama", tokenizer=True), tmp_path / "out"
    command = ("compress", model, "--calibration", text, *FLAGS, "--refine", "blocks", "-o", out, "--dry-run")
    run = done(*command)
    assert run.code == 0
    assert "256 tokens in 8 windows from" in " ".join(run.out.split())
    assert "warning: 256 tokens are few to calibrate with" in " ".join(run.err.split())
    assert "activations" in run.out
    shown = json.loads(done(*command, "--json").out)
    assert shown["seconds"] > 0
    assert shown["peak_memory_bytes"] > 0
    assert shown["blocks"] == ["model.layers.0", "model.layers.1"]
    assert 0 < shown["least_seconds"] <= shown["seconds"] <= shown["most_seconds"]
    text_there = {
        name: shown["calibration"][name] for name in ("length", "tokens", "tokens_used", "windows", "held_out")
    }
    assert text_there == {"length": 32, "tokens": 256, "tokens_used": 256, "windows": 8, "held_out": 1}
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


def test_a_result_says_what_it_was_calibrated_on(toy: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = ("--values", "float", "--keep", "0.7")
    run = done("compress", toy("llama", tokenizer=True), "--calibration", text, *FLAGS, *sizes, "-o", out)
    assert run.code == 0, run.err
    assert "without any data" not in run.err
    report = json.loads((out / "losparse_report.json").read_text())
    assert report["calibration"]["tokens_used"] == 256
    assert report["recipe"]["solver"] == "admm"
    assert report["recipe"]["threshold_scope"] == "row"
    assert all(0 < layer["output_errors"][-1] < 1 for layer in report["layers"])
    timing = json.loads((out / "losparse_timing.json").read_text())
    assert timing["predicted"]["seconds"] > 0
    assert timing["run"]["peak_memory_bytes"] > 0
