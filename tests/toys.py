"""Tiny Llama checkpoints written tensor by tensor, so that a test decides every byte of them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY = 96
TIMING = "losparse_timing.json"


def config(
    *, layers: int = 4, hidden: int = 64, intermediate: int = 136, tied: bool = True, **changes: Any
) -> dict[str, Any]:
    """config.json of a Llama with two heads and one head of keys and values."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": VOCABULARY,
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tied, **changes,
    }  # fmt: skip


def weights(
    *, layers: int = 4, hidden: int = 64, intermediate: int = 136, tied: bool = True, seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:  # fmt: skip
    """Random tensors of that Llama by name; a low-rank part stands out of the noise, as in a trained model."""
    generator = torch.Generator().manual_seed(seed)

    def random(m: int, n: int) -> Tensor:
        low = torch.randn(m, 4, generator=generator) @ torch.randn(4, n, generator=generator)
        return (0.02 * low + 0.02 * torch.randn(m, n, generator=generator)).to(dtype)

    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden // 2, hidden),
        "self_attn.v_proj": (hidden // 2, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }  # fmt: skip
    found = {"model.embed_tokens.weight": random(VOCABULARY, hidden)}
    for k in range(layers):
        for name, (m, n) in shapes.items():
            found[f"model.layers.{k}.{name}.weight"] = random(m, n)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{k}.{name}.weight"] = torch.ones(hidden, dtype=dtype)
    found["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    if not tied:
        found["lm_head.weight"] = random(VOCABULARY, hidden)
    return found


def llama(
    folder: Path, *, shards: int = 1, seed: int = 0, dtype: torch.dtype = torch.bfloat16,
    extra: Mapping[str, Tensor] | None = None, **settings: Any,
) -> Path:  # fmt: skip
    """Write the checkpoint and return its folder. extra: tensors added to, or put in place of, the model's.

    With `shards` above 1 the tensors are dealt round, so that every layer is spread over all files.
    """
    sizes = {k: settings[k] for k in ("layers", "hidden", "intermediate", "tied") if k in settings}
    tensors = weights(seed=seed, dtype=dtype, **sizes) | dict(extra or {})
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config(**settings))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = [f"model-{k + 1:05d}-of-{shards:05d}.safetensors" for k in range(shards)]
    places = {tensor: names[k % shards] for k, tensor in enumerate(tensors)}
    for name in names:
        save_file({t: tensors[t] for t in tensors if places[t] == name}, folder / name, {"format": "pt"})
    total = sum(t.numel() * t.itemsize for t in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    return folder


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object in a file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json(path, {key: value for key, value in content.items() if value is not None})


def raw_safetensors(
    path: Path, header: Mapping[str, Any] | bytes, data: bytes = b"", *, length: int | None = None
) -> None:
    """A safetensors file with exactly this header and data; `length` is the header length it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """(header, where the data starts) of a safetensors file, by the specification alone."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), 8 + length


def tensor_bytes(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Tensor name -> (dtype, shape, bytes) over all weight files of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        header, start = read_header(path)
        raw = path.read_bytes()
        for name, info in header.items():
            if name != "__metadata__":
                begin, end = info["data_offsets"]
                found[name] = (info["dtype"], info["shape"], raw[start + begin : start + end])
    return found


def digests(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file, but for the one that holds times."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != TIMING
    }
