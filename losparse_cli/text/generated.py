"""Text that a language model writes itself, so that calibration needs no data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .request import Calibration
from .windows import Windows

PIECE = 128
"""Tokens that are written in one go. What a small model samples drifts away from what it was trained on the longer it
goes on, and short texts are more different texts: calibration lost less with them."""
BATCH = 64  # texts at a time: on a CPU as on a GPU nearly every doubling up to here pays
CACHE_BYTES = 1 << 30  # that the keys and values of a batch may take


def generate_text(
    calibration: Calibration,
    model: Any,
    tokenizer: Any,
    *,
    seed: int,
    device: torch.device,
    on_tokens: Callable[[int, int], None] | None = None,
) -> Windows:
    """The windows of a settled `calibration`, written by the model itself, which is moved to `device`.

    tokenizer: the model's, or None. `on_tokens` hears how many tokens there are, and how many there will be.
    UsageError if neither names a token to begin with.
    """
    assert calibration.length is not None
    start_token(model, tokenizer)  # before the model is moved
    ids = generate_windows(
        model.to(device),
        tokens=calibration.windows * calibration.length,
        length=calibration.length,
        seed=seed,
        batch=batch_that_fits(model, min(PIECE, calibration.length)),
        device=device,
        on_tokens=on_tokens,
        tokenizer=tokenizer,
    )
    return Windows(ids)


def generate_windows(
    model: Any,
    *,
    tokens: int,
    length: int,
    seed: int,
    batch: int,
    device: torch.device,
    on_tokens: Callable[[int, int], None] | None = None,
    tokenizer: Any = None,
) -> Tensor:
    """(windows, length), int64, on the CPU: about `tokens` in all, of texts of up to 128 tokens packed into windows.

    Each text is sampled from the start token on; every token is drawn from the model's own distribution: temperature 1,
    nothing cut off, whatever the model's generation_config says. The same `seed`, `batch` and `device` give the same
    windows; torch's own generators are left as they were. `on_tokens` hears how many tokens there are, and how many
    there will be. UsageError if neither model nor `tokenizer` names a token to begin with.
    """
    import transformers

    start = start_token(model, tokenizer)
    windows = max(1, round(tokens / length))
    piece = min(PIECE, length)
    count = -(-windows * length // piece)
    # No token ends a text, and none is forbidden. A model is trained on documents packed one after another, so that
    # after the end of one it begins the next by itself, as its own format wants it; to forbid the end would make it
    # ramble, and to force a start would break chat formats, where a line end comes before it.
    settings = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=piece - 1,
        pad_token_id=start,
        # Else the keys and values of all tokens are copied for each new one, which comes to take most of the time.
        cache_implementation="static" if getattr(model, "_can_compile_fullgraph", False) else None,
        disable_compile=True,  # compiling takes longer than the few thousand steps here
    )
    own, model.generation_config = model.generation_config, settings  # what it leaves open would be taken from there
    found: list[Tensor] = []

    class Watch(transformers.StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            if on_tokens is not None:
                written = sum(map(len, found)) * piece + input_ids.numel()
                on_tokens(min(written, windows * length), windows * length)
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            _seed(seed, device)
            for begin in range(0, count, batch):
                first = torch.full((min(batch, count - begin), 1), start, device=device)
                ids = model.generate(
                    first, attention_mask=torch.ones_like(first), stopping_criteria=[Watch()], use_cache=True
                )
                found.append(ids.cpu())
    finally:
        model.generation_config = own
    return torch.cat(found).flatten()[: windows * length].view(windows, length)


def start_token(model: Any, tokenizer: Any = None) -> int:
    """What the model's texts begin with; UsageError if neither its configs nor the tokenizer say."""
    places = [getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer]
    for name in ("bos_token_id", "eos_token_id", "decoder_start_token_id"):
        for place in places:
            token = getattr(place, name, None)
            token = token[0] if isinstance(token, list | tuple) and token else token
            if isinstance(token, int):
                return token
    raise UsageError(
        f"{type(model).__name__} names no token that a text begins with, so it cannot write its own. Add bos_token_id "
        "to config.json, or give --calibration a file."
    )


def batch_that_fits(model: Any, length: int) -> int:
    """Sequences of `length` tokens to write at a time, so that keys and values take a gibibyte at most."""
    settings = model.config.get_text_config()
    layers = getattr(settings, "num_hidden_layers", None) or 1
    heads = getattr(settings, "num_attention_heads", None) or 1
    width = getattr(settings, "head_dim", None) or (getattr(settings, "hidden_size", None) or 1) // heads
    grouped = getattr(settings, "num_key_value_heads", None) or heads
    each = 2 * layers * grouped * width * length * torch.empty((), dtype=model.dtype).itemsize
    return max(1, min(BATCH, CACHE_BYTES // max(1, each)))


def _seed(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


# --- kept for a run that goes on --------------------------------------------------------------------


def write_windows(windows: Windows, path: Path) -> None:
    """Write the tokens, with their digest, into a safetensors file."""
    from safetensors.torch import save_file

    save_file({"ids": windows.ids}, path, {"sha256": windows.digest()})


def kept_windows(calibration: Calibration, path: Path) -> Windows | None:
    """What `write_windows` kept; None if nothing is there, or not all of it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            windows, digest = Windows(file.get_tensor("ids")), (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    whole = windows.ids.shape == (calibration.windows, calibration.length) and windows.digest() == digest
    return windows if whole else None
