"""What whole numbers cost mixtures of experts, beside a dense model of the same kind, all trained here for minutes.

No mixture of experts comes in a package, and random ones say nothing: all their experts are alike. These read letters.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from losparse_cli.compress import compress
from losparse_cli.demo import encyclopedia_text
from losparse_cli.evaluate import evaluate
from losparse_cli.text.windows import Calibration

from ..characters import character_tokenizer
from .results import Options, add_result, results_of

MINUTES = 10
WINDOW, BATCH = 256, 4
RATE, WARMUP = 2e-3, 0.05
BITS = (3.25, 2.0)
_COMMON: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3,
    "max_position_embeddings": WINDOW, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DEEPSEEK: dict[str, Any] = {
    **_COMMON, "num_key_value_heads": 6, "intermediate_size": 512, "moe_intermediate_size": 96, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 64, "q_lora_rank": 96,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "n_group": 1, "topk_group": 1,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("Llama", {**_COMMON, "intermediate_size": 512}),
    "Mixtral": ("Mixtral", {**_COMMON, "intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "Qwen3-MoE": ("Qwen3Moe", {
        **_COMMON, "intermediate_size": 512, "moe_intermediate_size": 96, "num_experts": 16, "num_experts_per_tok": 4,
        "head_dim": 32}),
    "DeepSeek": ("DeepseekV3", _DEEPSEEK),
}  # fmt: skip
"""Name -> the class in transformers, and its configuration."""


def experts(options: Options, rows: Sequence[str] = ()) -> None:
    """Divergence at BITS with much text, with one window of it and with none, of each of KINDS or those named."""
    text, held_out = encyclopedia_text()
    (options.folder / "letters.txt").write_text(text, encoding="utf-8")
    for row in list(rows) or [kind for kind in KINDS if kind not in results_of(options, "experts")]:
        dense = _trained(options.folder / f"experts-{row}", row, text, 0.2 if options.small else MINUTES)
        found: dict[str, Any] = {}
        for name, tokens in (("much", 65536), ("little", WINDOW), ("none", 0)):
            asked = Calibration(str(options.folder / "letters.txt"), tokens, WINDOW) if tokens else None
            for bits in BITS:
                output = options.folder / f"experts-{row}-{name}-{bits}"
                made = compress(dense, output, bits=bits, calibration=asked, overwrite=True)
                held = held_out[:200_000]
                measured = evaluate(output, held, against=dense, length=WINDOW, windows=64, dtype="float32")
                found[f"{name}@{bits}"] = measured.to_dict()
        specs = [layer.spec for layer in made.report.layers if layer.spec.kind not in ("embedding", "head")]
        found["share"] = sum(spec.shape[0] * spec.shape[1] for spec in specs) / _outside_embeddings(dense)
        add_result(options, "experts", row, found)
    _print_table(results_of(options, "experts"))


def _trained(folder: Path, kind: str, text: str, minutes: float) -> Path:
    """A model of this kind that has read text for so many minutes."""
    if (folder / "config.json").is_file():
        return folder
    name, settings = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings)).train()
    tokenizer = character_tokenizer()
    ids = torch.tensor(tokenizer(text[:4_000_000], add_special_tokens=False).input_ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    begin, end = time.monotonic(), time.monotonic() + 60 * minutes
    while (now := time.monotonic()) < end:
        done = (now - begin) / (end - begin)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (done + 1e-3) / WARMUP) * (1 - done)
        at = torch.randint(len(ids) - WINDOW, (BATCH,))
        batch = torch.stack([ids[k : k + WINDOW] for k in at])
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "trained.json").write_text(json.dumps({"loss": float(loss.detach())}))
    return folder


def _outside_embeddings(folder: Path) -> int:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    return sum(p.numel() for p in model.parameters()) - sum(m.weight.numel() for m in embeddings)


def _print_table(found: dict[str, dict[str, Any]]) -> None:
    print("in thousandths of a nat a letter\n")
    print("| model | compressed | bits | gap, 65,536 letters | divergence | one window of text | without text |")
    print("|---|---|---|---|---|---|---|")
    for row, line in found.items():
        for bits in BITS:
            much, little, none = (1e3 * line[f"{name}@{bits}"]["kl"]["value"] for name in ("much", "little", "none"))
            gap, error = (1e3 * line[f"much@{bits}"]["log_difference"][key] for key in ("value", "error"))
            shown = f"{gap:.2f} ± {error:.2f} | {much:.4f} | {little:.4f} | {none:.3f}"
            print(f"| {row} | {line['share']:.1%} | {bits} | {shown} |")
