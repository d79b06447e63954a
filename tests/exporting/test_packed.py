"""pack-quantized folders hold what the checkpoint holds, as the library compressed-tensors and PEFT read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from terminal import done, losparse

from losparse_cli.budget.recipe import Recipe
from losparse_cli.compress import compress
from losparse_cli.errors import CheckpointError, UsageError
from losparse_cli.export import export, export_gguf, export_packed
from losparse_cli.exporting.packed import pack
from losparse_cli.load import load

WHOLE_RUNS = {"hidden_size": 64, "intermediate_size": 96}
"""Widths that are made of runs of 32 columns."""


@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_those_of_the_library(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 1 << bits - 1
    numbers = torch.randint(-half, half, (6, 40), generator=torch.Generator().manual_seed(0))
    numbers[0, :2] = torch.tensor([-half, half - 1])
    assert torch.equal(pack(numbers, bits), pack_to_int32(numbers.to(torch.int8), bits))


@pytest.mark.parametrize("grid", ["int4", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transformers_computes_the_same(
    grid: str, dtype: torch.dtype, toy: Callable[..., Path], tmp_path: Path
) -> None:
    """Without us: the difference is that of embeddings, which are rounded once to 16 bits."""
    out = compress(toy("llama", dtype=dtype, **WHOLE_RUNS), tmp_path / "out", Recipe(grid=grid)).output
    made = export_packed(out, tmp_path / "packed")
    assert made.adapter is None
    assert json.loads((made.output / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
    assert not list(made.output.glob("losparse_*"))
    read = transformers.AutoModelForCausalLM.from_pretrained(made.output, dtype=torch.float32)
    ids = torch.arange(5, 35)[None]
    with torch.no_grad():
        theirs, ours = read(ids).logits, load(out, dtype=torch.float32)[0](ids).logits
    torch.testing.assert_close(theirs, ours, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-4)


def test_u_and_v_are_an_adapter(toy: Callable[..., Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    recipe = Recipe(grid="int4", rank=4, overrides=(("*.k_proj", (("rank", 2),)),))
    out = compress(toy("llama", **WHOLE_RUNS), tmp_path / "out", recipe).output
    made = export_packed(out, tmp_path / "packed")
    assert made.adapter is not None
    base = transformers.AutoModelForCausalLM.from_pretrained(
        made.output, dtype=torch.float32,
        quantization_config=transformers.CompressedTensorsConfig(run_compressed=False),
    )  # fmt: skip
    read = peft.PeftModel.from_pretrained(base, made.adapter)
    ids = torch.arange(5, 35)[None]
    with torch.no_grad():
        theirs, ours = read(ids).logits, load(out, dtype=torch.float32)[0](ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="exists already"):
        export_packed(out, tmp_path / "packed")
    assert export_packed(out, tmp_path / "packed", overwrite=True).adapter == made.adapter


def test_layers_of_two_widths(toy: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe(grid="int4", overrides=(("*.down_proj", (("grid", "int8"),)),), ignore=("*.0.*.q_proj",))
    out = compress(toy("llama", **WHOLE_RUNS), tmp_path / "out", recipe).output
    made = export_packed(out, tmp_path / "packed")
    said = json.loads((made.output / "config.json").read_text())["quantization_config"]
    assert [group["weights"]["num_bits"] for group in said["config_groups"].values()] == [4, 8]
    assert len(made.doubts) == 2  # two widths, and q_proj dense beside k_proj and v_proj
    assert "model.layers.0.self_attn.q_proj" in said["ignore"]
    read = transformers.AutoModelForCausalLM.from_pretrained(made.output, dtype=torch.float32)
    ids = torch.arange(5, 35)[None]
    with torch.no_grad():
        theirs, ours = read(ids).logits, load(out, dtype=torch.float32)[0](ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--rank", "2", "--sparsity", "0.5"), "has floats in S, which compressed-tensors cannot hold. Compress"),
            (("--bits", "7.9"), "cannot hold. Compress the dense model with --grid int4 or --grid int8"),
        ],
    )
    def test_what_the_format_cannot_hold(
        self, options: tuple[str, ...], said: str, toy: Callable[..., Path], tmp_path: Path
    ) -> None:
        done("compress", toy("llama", **WHOLE_RUNS), "-o", tmp_path / "out", *options)
        complaint = losparse("export", tmp_path / "out", "--compressed-tensors", "-o", tmp_path / "packed").complaint
        assert said in complaint
        assert not (tmp_path / "packed").exists()

    @pytest.mark.parametrize("suffix", ["U", "weight"])
    def test_values_that_are_not_finite(self, suffix: str, toy: Callable[..., Path], tmp_path: Path) -> None:
        out = compress(toy("llama", **WHOLE_RUNS), tmp_path / "out", Recipe(grid="int4", rank=2)).output
        tensors, name = load_file(out / "model.safetensors"), f"model.layers.0.self_attn.q_proj.{suffix}"
        tensors[name].view(-1)[1] = float("nan")
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        for call, place in ((export, "dense"), (export_packed, "packed"), (export_gguf, "model.gguf")):
            with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
                call(out, tmp_path / place)  # type: ignore[operator]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_two_forms_at_once(self, tmp_path: Path) -> None:
        said = losparse("export", tmp_path, "--gguf", "--compressed-tensors", "-o", tmp_path / "x").complaint
        assert "--gguf and --compressed-tensors" in said
        said = losparse("export", tmp_path, "--gguf", "--dense", "-o", tmp_path / "x").complaint
        assert "--dense and --gguf are different forms" in said


def test_the_terminal_says_what_was_written(toy: Callable[..., Path], tmp_path: Path) -> None:
    done("compress", toy("llama", **WHOLE_RUNS), "-o", tmp_path / "out", "--grid", "int8", "--rank", "2")
    said = done("export", tmp_path / "out", "--compressed-tensors", "-o", tmp_path / "packed").out
    assert "as pack-quantized" in said
    assert "packed/adapter" in said
    tensors: dict[str, Any] = load_file(tmp_path / "packed" / "model.safetensors")
    assert sum(name.endswith(".weight_packed") for name in tensors) > 0
    export(tmp_path / "out", tmp_path / "dense")
