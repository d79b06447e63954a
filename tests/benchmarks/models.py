"""Whole models in use, beside dense ones and, for codes, beside llama.cpp in the same run."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from losparse_cli import Recipe, compress
from losparse_cli.bench import bench
from losparse_cli.benchmark.report import BenchReport
from losparse_cli.demo import packaged_gguf, smollm2


def llama(folder: Path, vocabulary: int) -> Path:
    """A Llama of about a billion random parameters in bfloat16, hidden size 2048."""
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=vocabulary, max_position_embeddings=2048, dtype="bfloat16",
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _generated(folder / f"llama-{vocabulary}", transformers.LlamaForCausalLM, config)


def mixtral(folder: Path) -> Path:
    """A Mixtral of two billion random parameters in bfloat16, 8 experts of which a token is sent to 2."""
    config = transformers.MixtralConfig(
        hidden_size=2048, intermediate_size=4096, num_hidden_layers=9, num_attention_heads=32, num_key_value_heads=8,
        num_local_experts=8, num_experts_per_tok=2, vocab_size=32000, max_position_embeddings=2048, dtype="bfloat16",
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _generated(folder / "mixtral", transformers.MixtralForCausalLM, config)


def qwen3_moe(folder: Path) -> Path:
    """A Qwen3-MoE of two billion random parameters in bfloat16, 64 experts of which a token is sent to 8."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=64, num_experts_per_tok=8,
        norm_topk_prob=True, vocab_size=32000, max_position_embeddings=2048, dtype="bfloat16",
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _generated(folder / "qwen3-moe", transformers.Qwen3MoeForCausalLM, config)


def gpt_oss(folder: Path) -> Path:
    """A gpt-oss of half a billion random parameters in bfloat16, 16 experts of which a token is sent to 4."""
    config = transformers.GptOssConfig(
        hidden_size=1024, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=4,
        head_dim=64, num_local_experts=16, num_experts_per_tok=4, vocab_size=32000, max_position_embeddings=2048,
        dtype="bfloat16", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _generated(folder / "gpt-oss", transformers.GptOssForCausalLM, config)


def _generated(path: Path, kind: Any, config: Any) -> Path:
    if not (path / "config.json").is_file():
        torch.manual_seed(0)
        with torch.device("meta"):
            model = kind(config).to(torch.bfloat16)
        model = model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
        model.save_pretrained(path)
    return path


@contextmanager
def _folder() -> Iterator[Path]:
    """That of LOSPARSE_BENCH_DIR, where models are kept for the next time, or one that goes: some 8 GB."""
    with tempfile.TemporaryDirectory(prefix="losparse-bench-") as scratch:
        yield Path(os.environ.get("LOSPARSE_BENCH_DIR") or scratch)


def _compressed(dense: Path, folder: Path, recipe: Recipe) -> Path:
    size = recipe.bits or f"{recipe.pattern}-{recipe.sparsity or recipe.keep_parameters}"
    output = folder / f"{dense.name}-{size}"
    if not output.is_dir():
        compress(dense, output, recipe=recipe)
    return output


def models() -> None:
    """Whole models: tokens a second and bytes, dense beside compressed."""
    with _folder() as folder:
        _models(folder)


def _models(folder: Path) -> None:
    heads = "prefill, tok/s (dense) | times faster | floor | decode, tok/s (dense) | times faster | floor"
    print(f"{torch.get_num_threads()} threads, prompt of 128 tokens, 32 new ones\n")
    print(f"| model | batch | {heads} | disk | tensors | resident (dense) |")
    print(f"|{'---|' * 11}")
    structured = Recipe(rank=8, sparsity=0.9, pattern="columns")
    unstructured, half = Recipe(rank=8, sparsity=0.9), Recipe(keep_parameters=0.5, rank_ratio=0.2)
    for vocabulary in (32000, 128256):
        dense = llama(folder, vocabulary)
        for recipe in (unstructured, structured):
            path = _compressed(dense, folder, recipe)
            decoding = (4.0 if recipe is structured else 2.0) if vocabulary == 32000 else None
            report = bench(path, against=dense, rows=(1,), rounds=5)
            _show(f"Llama, {vocabulary} tokens, {recipe.pattern}", report, decode=decoding)
    for name, recipe in (("rank 8, sparsity 0.9", unstructured), ("columns", structured), ("half, κ 0.2", half)):
        path = _compressed(smollm2(), folder, recipe)
        for batch in (1, 4, 8):
            report = bench(path, against=smollm2(), batch=batch, rows=(1,), rounds=3)
            _show(f"SmolLM2-135M, {name}", report, prefill=0.8, decode=1.0)


def _show(name: str, report: BenchReport, *, prefill: float | None = None, decode: float | None = None) -> None:
    """prefill, decode: floors, times faster than dense."""
    ours, dense = report.compressed, report.dense
    assert ours is not None
    assert dense is not None
    first, then = report.ratios["prefill_speedup"], report.ratios["decode_speedup"]
    cells = (
        name, report.batch, f"{ours.prefill:.0f} ({dense.prefill:.0f})", f"{first:.2f}", prefill or "",
        f"{ours.decode:.1f} ({dense.decode:.1f})", f"{then:.2f}", decode or "", f"{ours.disk / 1e6:.0f} MB",
        f"{ours.tensors / ours.disk:.2f} x disk",
        f"{(ours.resident or 0) / 1e6:.0f} ({(dense.resident or 0) / 1e6:.0f}) MB",
    )  # fmt: skip
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


# --- whole numbers ----------------------------------------------------------------------------------


def models_codes() -> None:
    """At 3.25 bits without text: a Llama of a billion, and SmolLM2 for several prompts at once."""
    with _folder() as folder:
        _models_codes(folder)


def _models_codes(folder: Path) -> None:
    found = [name for name in ("xllamacpp", "gguf") if importlib.util.find_spec(name) is None]
    if found:
        print(f"llama.cpp is left out, for {' and '.join(found)} is not installed\n")
    heads = "prefill, times dense | times llama.cpp | decode, times dense | floor | times llama.cpp | floor"
    print(f"{torch.get_num_threads()} threads, prompt of 128 tokens, 32 new ones; tokens a second in brackets\n")
    print(f"| model | batch | {heads} | disk | in memory | resident, of dense | at most | of llama.cpp's |")
    print(f"|{'---|' * 13}")
    dense = llama(folder, 32000)
    other = None if found else _gguf(dense, folder / "llama-32000.gguf")
    report = bench(_compressed(dense, folder, Recipe(bits=3.25)), against=dense, peer=other, rows=(1,), rounds=3)
    _show_codes("Llama, 1.1 billion", report, decode=3.0, peer=1.0, resident=0.3)
    small = _compressed(smollm2(), folder, Recipe(bits=3.25))
    other = None if found else packaged_gguf()
    _show_codes("SmolLM2-135M", bench(small, against=smollm2(), peer=other, rows=(1,), rounds=5), decode=None, peer=0.9)
    for batch in (4, 8):
        report = bench(small, against=smollm2(), batch=batch, rows=(1,), rounds=3)
        _show_codes("SmolLM2-135M", report, decode=1.0)


def models_experts() -> None:
    """Mixtures of experts at 3.25 bits without text, beside transformers' fused experts."""
    with _folder() as folder:
        print(f"{torch.get_num_threads()} threads, prompt of 128 tokens, 32 new ones; tokens a second in brackets\n")
        print("| model | prefill, times dense | decode, times dense | floor | disk | in memory | resident, of dense |")
        print(f"|{'---|' * 7}")
        for name, dense in (
            ("Mixtral, 2.0 billion, 8 experts", mixtral(folder)),
            ("Qwen3-MoE, 2.0 billion, 64 experts", qwen3_moe(folder)),
            ("gpt-oss, 0.5 billion, 16 experts", gpt_oss(folder)),
        ):
            _show_experts(name, dense, folder)


def _show_experts(name: str, dense: Path, folder: Path) -> None:
    report = bench(_compressed(dense, folder, Recipe(bits=3.25)), against=dense, rows=(1,), rounds=3)
    ours, over = report.compressed, report.ratios
    assert ours is not None
    shares = " | ".join(f"{over[f'{part}_share']:.1%}" for part in ("disk", "tensors", "resident"))
    print(f"| {name} | {over['prefill_speedup']:.2f} ({ours.prefill:.1f}) "
          f"| {over['decode_speedup']:.2f} ({ours.decode:.1f}) | 2.5 | {shares} |")  # fmt: skip


def _show_codes(
    name: str, report: BenchReport, *, decode: float | None, peer: float | None = None, resident: float | None = None
) -> None:
    """decode, peer: floors of times faster than dense and than llama.cpp. resident: the most of dense's memory."""
    ours, over, beside = report.compressed, report.ratios, report.peer_ratios
    assert ours is not None

    def times(ratio: Any, rate: Any) -> str:
        return "" if ratio is None else f"{ratio:.2f} ({rate:.1f})"

    llama_cpp = report.peer
    cells = (
        name, report.batch, times(over["prefill_speedup"], ours.prefill),
        times(beside["prefill_speedup"], llama_cpp and llama_cpp.prefill),
        times(over["decode_speedup"], ours.decode), decode or "",
        times(beside["decode_speedup"], llama_cpp and llama_cpp.decode), peer or "",
        *(f"{over[f'{part}_share']:.1%}" for part in ("disk", "tensors", "resident")), resident or "",
        "" if beside["resident_share"] is None else f"{beside['resident_share']:.1%}",
    )  # fmt: skip
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def _gguf(dense: Path, path: Path) -> Path:
    """The generated Llama as llama.cpp's Q4_0, with a head and embeddings of 8 bits and a vocabulary of no meaning."""
    if path.is_file():
        return path
    import gguf
    from safetensors import safe_open

    kinds = gguf.GGMLQuantizationType
    config = transformers.AutoConfig.from_pretrained(dense)
    writer = gguf.GGUFWriter(path.with_suffix(".part"), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    special, single = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    others = [f"t{k}" for k in range(config.vocab_size - len(special) - len(single))]
    writer.add_token_list([*special, *single, *others])
    writer.add_token_scores([0.0] * config.vocab_size)
    types = gguf.TokenType
    writer.add_token_types([types.UNKNOWN, *[types.CONTROL] * 2, *[types.BYTE] * 256, *[types.NORMAL] * len(others)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with safe_open(dense / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name).float().numpy()
            kind = kinds.F32 if tensor.ndim == 1 else kinds.Q4_0 if ".layers." in name else kinds.Q8_0
            stored = tensor if kind == kinds.F32 else gguf.quants.quantize(tensor, kind)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_suffix(".part").rename(path)
