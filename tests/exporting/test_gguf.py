"""A GGUF file holds what the checkpoint holds: read back by tensors, by transformers' reader, by llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
import transformers
from llama_cpp import AVAILABLE, LlamaCpp
from safetensors.torch import load_file, save_file
from terminal import done, losparse
from torch import Tensor

from losparse_cli.budget.recipe import Recipe
from losparse_cli.compress import compress
from losparse_cli.errors import CheckpointError, UsageError
from losparse_cli.export import export, export_gguf
from losparse_cli.exporting.gguf_blocks import narrowest, packed
from losparse_cli.exporting.gguf_vocabulary import PROBE
from losparse_cli.linalg.integers import short
from losparse_cli.load import load

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 16,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 32}),
    "gemma3": ("Gemma3Text", {"query_pre_attn_scalar": 16, "sliding_window": 32}),
}
UNREAD = ("llama 3", "qwen3", "gemma2", "gemma3")
"""What transformers reads from GGUF otherwise than llama.cpp: scaled positions, the width of heads, soft caps."""


def bpe(text: str, size: int = 400) -> Any:
    """A tokenizer of bytes and pairs learnt from `text`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    made.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator([text], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )  # fmt: skip


TEXT = (Path(__file__).parents[2] / "docs" / "method.md").read_text()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = bpe(TEXT)
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind in made:
            return made[kind]
        name, settings = KINDS[kind]
        config = getattr(transformers, f"{name}Config")(
            **SIZES | settings, vocab_size=len(tokenizer) + 5, initializer_range=0.1, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms and biases that matter
                    parameter.add_(0.3 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("dense") / kind.replace(" ", "")
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[kind] = folder
        return folder

    return make


def on_grid(dense: Path, folder: Path, grid: str = "int4", **more: Any) -> Path:
    """Compressed with text."""
    text = folder.with_name(f"{folder.name}.txt")
    text.write_text(TEXT)
    calibration = {"source": str(text), "tokens": 1024, "length": 64}
    return compress(dense, folder, Recipe(grid=grid, **more), calibration=calibration).output


def tensors_in(path: Path) -> dict[str, Tensor]:
    import gguf

    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = torch.from_numpy(np.array(values, dtype=np.float32))
    return found


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits[0].float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("grid", ["int4", "int8"])
def test_every_tensor_is_the_layers_own(grid: str, rank: int, dense: Any, tmp_path: Path) -> None:
    """Of a Qwen2, whose rows stay where they are."""
    out = on_grid(dense("qwen2"), tmp_path / "out", grid, rank=rank)
    made = export_gguf(out, tmp_path / "model.gguf")
    assert (made.exact, made.nearly, made.rounded, made.floats) == (7 * 7, 0, 0, 2)
    assert (made.adapter is not None) == (rank > 0)
    model, _ = load(out, dtype=torch.float32)
    found = tensors_in(made.path)
    beside = {} if made.adapter is None else tensors_in(made.adapter)
    assert len(beside) == (2 * 7 * 7 if rank else 0)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for k, block in enumerate(model.model.layers):
        for ours, theirs in names.items():
            layer, name = block.get_submodule(ours), f"blk.{k}.{theirs}"
            assert torch.equal(found[f"{name}.weight"], layer.sparse())
            assert len(found[f"{name}.weight"].unique(dim=0)) > 1
            if rank:
                assert torch.equal(beside[f"{name}.weight.lora_a"], layer.V)
                assert torch.equal(beside[f"{name}.weight.lora_b"], layer.U)
            if layer.bias is not None:
                assert torch.equal(found[f"{name}.bias"], layer.bias)
        assert torch.equal(found[f"blk.{k}.attn_norm.weight"], block.input_layernorm.weight)
    assert torch.equal(found["token_embd.weight"], model.model.embed_tokens.weight)
    assert torch.equal(found["output.weight"], model.lm_head.weight)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNREAD])
def test_transformers_reads_the_same_model(kind: str, dense: Any, tmp_path: Path) -> None:
    """Another program's reader, which undoes names, the order of rows, and norms by itself."""
    out = on_grid(dense(kind), tmp_path / "out", rank=2)
    export_gguf(out, tmp_path / "model.gguf", kind="f32")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    model, tokenizer = load(out, dtype=torch.float32)
    ids = tokenizer(TEXT[:300], return_tensors="pt").input_ids[:, :100]
    torch.testing.assert_close(logits(read, ids), logits(model, ids), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not AVAILABLE, reason="xllamacpp is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same(kind: str, dense: Any, tmp_path: Path) -> None:
    """As whole numbers, where it rounds what goes into a product to 8 bits; as floats nearly exactly."""
    out = on_grid(dense(kind), tmp_path / "out", rank=2)
    model, tokenizer = load(out, dtype=torch.float32)
    ids = tokenizer(TEXT[:300], return_tensors="pt").input_ids[:, :100]
    ours = logits(model, ids)
    for asked, most in (("f32", 2e-3), ("auto", 0.15)):
        made = export_gguf(out, tmp_path / f"{asked}.gguf", kind=asked)
        with LlamaCpp(made.path, made.adapter) as engine:
            assert engine.tokens(PROBE) == tokenizer(PROBE).input_ids
            theirs = engine.logits(ids[0].tolist())
        assert float((theirs - ours).norm() / ours.norm()) < most


def test_free_codes_and_floats_become_16_bits(dense: Any, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    for recipe in (Recipe(bits=4.0), Recipe(rank=2, sparsity=0.5)):
        calibration = {"source": str(text), "tokens": 1024, "length": 64}
        out = compress(
            dense("qwen2"), tmp_path / "out", recipe, calibration=calibration, overwrite=True, resume="never"
        ).output
        made = export_gguf(out, tmp_path / "model.gguf", overwrite=True)
        assert (made.exact, made.floats, made.kind, made.adapter) == (0, 7 * 7 + 2, "bf16", None)
        export(out, tmp_path / "dense", overwrite=True)
        plain = load(tmp_path / "dense", dtype=torch.float32)[0].state_dict()
        found = tensors_in(made.path)
        for name, theirs in (("mlp.up_proj", "ffn_up"), ("self_attn.o_proj", "attn_output")):
            assert torch.equal(found[f"blk.3.{theirs}.weight"], plain[f"model.layers.3.{name}.weight"])


def test_every_matrix_may_be_rounded_again(dense: Any, tmp_path: Path) -> None:
    import gguf

    out = compress(dense("qwen2"), tmp_path / "out", Recipe(bits=6.0)).output
    made = export_gguf(out, tmp_path / "model.gguf", kind="q4_0")
    assert (made.exact, made.rounded, made.floats) == (0, 7 * 7 + 2, 0)
    said = gguf.GGUFReader(made.path).get_field("losparse.layers")
    assert said is not None
    assert said.contents() == "0 exact, 0 with factors rounded, 51 requantized, 0 in floats"


@pytest.mark.parametrize(("kind", "most"), [("Q4_0", 8), ("Q8_0", 128)])
def test_blocks_are_what_gguf_reads(kind: str, most: int) -> None:
    import gguf

    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-most, most, (5, 96), generator=generator)
    numbers[0, 0], numbers[0, 1] = -most, most - 1
    runs = torch.randint(1, 16, (5, 3), generator=generator) * torch.tensor([1, -1, 1])
    codes = (numbers.view(5, 3, 32) * runs[..., None]).view(5, 96).short()
    rows = short(torch.rand(5, generator=generator) + 0.01)
    assert narrowest(rows, codes, runs) == (kind, True)
    read = gguf.quants.dequantize(packed(rows, codes, runs, kind), gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(read), rows[:, None] * codes)


def test_what_no_block_holds() -> None:
    rows = torch.ones(2)
    assert narrowest(rows, torch.full((2, 33), 1)) is None  # no whole block
    assert narrowest(rows, torch.full((2, 64), 4), torch.full((2, 1), 4)) is None  # runs of other blocks
    assert narrowest(rows, torch.full((2, 32), 128).short()) is None
    assert narrowest(torch.full((2,), 1e-9), torch.ones(2, 32)) is None  # a factor that 16 bits do not hold
    assert narrowest(rows, torch.zeros(2, 32)) == ("Q4_0", True)
    assert narrowest(rows + 2**-12, torch.ones(2, 32)) == ("Q4_0", False)


def test_training_leaves_factors_that_are_rounded(dense: Any, tmp_path: Path) -> None:
    out = compress(dense("qwen2"), tmp_path / "out", Recipe(grid="int4")).output
    tensors = load_file(out / "model.safetensors")
    for name in list(tensors):
        if name.endswith("o_proj.weight"):
            tensors[name] = tensors[name] * 1.01
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    made = export_gguf(out, tmp_path / "model.gguf")
    assert (made.exact, made.nearly) == (6 * 7, 7)
    found = tensors_in(made.path)["blk.3.attn_output.weight"]
    ours = load(out, dtype=torch.float32)[0].model.layers[3].self_attn.o_proj.sparse()
    torch.testing.assert_close(found, ours, rtol=2**-11, atol=0)


class TestBadInput:
    def test_an_architecture_that_llama_cpp_does_not_know(self, compressed: Any, tmp_path: Path) -> None:
        said = losparse("export", compressed("opt"), "--gguf", "-o", tmp_path / "m.gguf").complaint
        assert "is a opt, and GGUF is written of llama, mistral" in said
        assert not list(tmp_path.iterdir())

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        done("compress", toys.llama(tmp_path / "model"), "--bits", "6", "-o", tmp_path / "out")
        said = losparse("export", tmp_path / "out", "--gguf", "-o", tmp_path / "m.gguf").complaint
        assert "holds no tokenizer.json, without which llama.cpp reads no text" in said
        assert not list(tmp_path.glob("m.gguf*"))

    def test_places(self, dense: Any, tmp_path: Path) -> None:
        out = compress(dense("qwen2"), tmp_path / "out", Recipe(grid="int8")).output
        assert "ends in .gguf" in losparse("export", out, "--gguf", "-o", tmp_path / "model").complaint
        (tmp_path / "m.gguf").write_text("mine")
        assert (
            "exists already. Add --overwrite" in losparse("export", out, "--gguf", "-o", tmp_path / "m.gguf").complaint
        )
        assert (tmp_path / "m.gguf").read_text() == "mine"
        assert "add --gguf" in losparse("export", out, "--gguf-type", "f16", "-o", tmp_path / "x").complaint
        assert (
            "--gguf-type is auto"
            in losparse("export", out, "--gguf", "--gguf-type", "q2", "-o", tmp_path / "n.gguf").complaint
        )

    def test_what_llama_cpp_would_compute_otherwise(self, dense: Any, tmp_path: Path) -> None:
        out = compress(dense("gemma3"), tmp_path / "out", Recipe(grid="int8")).output
        toys.change_json(out / "config.json", query_pre_attn_scalar=64)
        with pytest.raises(UsageError, match=r"query_pre_attn_scalar 64 and heads of 16"):
            export_gguf(out, tmp_path / "m.gguf")
        toys.change_json(out / "config.json", query_pre_attn_scalar=16, hidden_activation="silu")
        with pytest.raises(UsageError, match=r"the activation silu"):
            export_gguf(out, tmp_path / "m.gguf")

    def test_a_model_without_a_head(self, dense: Any, tmp_path: Path) -> None:
        out = compress(dense("qwen2"), tmp_path / "out", Recipe(grid="int8")).output
        toys.change_json(out / "config.json", architectures=["Qwen2Model"])
        with pytest.raises(UsageError, match=r"is a Qwen2Model, which has no output head"):
            export_gguf(out, tmp_path / "m.gguf")

    def test_what_a_type_cannot_hold(self, dense: Any, tmp_path: Path) -> None:
        out = compress(dense("qwen2"), tmp_path / "out", Recipe(grid="int8", ignore=("*.0.*.o_proj",))).output
        tensors = load_file(out / "model.safetensors")
        tensors["model.layers.0.self_attn.o_proj.weight"][0, 0] = 1e6
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        for kind in ("f16", "q4_0"):
            with pytest.raises(CheckpointError, match=rf"9.99e\+05 is beyond what {kind} holds"):
                export_gguf(out, tmp_path / "m.gguf", kind=kind)
            assert not list(tmp_path.glob("m.gguf*"))


def test_an_adapter_of_before_goes(dense: Any, tmp_path: Path) -> None:
    for rank in (2, 0):
        out = compress(dense("qwen2"), tmp_path / f"out{rank}", Recipe(grid="int8", rank=rank)).output
        made = export_gguf(out, tmp_path / "m.gguf", overwrite=True)
        assert (made.adapter is not None) == (tmp_path / "m-lora.gguf").exists() == (rank > 0)


def test_the_terminal_says_what_the_file_holds(dense: Any, tmp_path: Path) -> None:
    out = compress(dense("qwen2"), tmp_path / "out", Recipe(grid="int8", rank=2)).output
    said = done("export", out, "--gguf", "-o", tmp_path / "m.gguf").out
    assert "49 exactly as they are, 2 as bf16" in said
    assert "--lora" in said
