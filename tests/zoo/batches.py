"""What a tiny model is called with: found from the names that its forward pass takes, and tried until one is taken."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .tiny import VOCABULARY

Batch = dict[str, Tensor]
ROWS, LENGTH = 2, 16
TEXT = ("input_ids", "attention_mask", "decoder_input_ids")


def find_batch(model: Any) -> tuple[Batch, str]:
    """The first batch that `model` takes, and "" or the reason why it takes none."""
    reason = ""
    for batch in candidates(model):
        try:
            with torch.no_grad():
                torch.manual_seed(0)
                model(**batch)
            return batch, ""
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {(str(error).strip() or ' ').splitlines()[0]}"
    return {}, reason or "no way to call it was found"


def candidates(model: Any) -> Iterator[Batch]:
    """Batches worth trying, the fullest kind of text first."""
    takes = inspect.signature(model.forward).parameters
    needs = {n for n, p in takes.items() if p.default is inspect.Parameter.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    main = getattr(model, "main_input_name", "input_ids")
    text = {name: _text(model, name) for name in TEXT if name in takes}
    if "decoder_input_ids" in text and not getattr(model.config, "is_encoder_decoder", False):
        del text["decoder_input_ids"]
    kinds = [name for name in PICTURES if name in takes]
    first = [name for name in takes if name in (main, *needs) and name not in text]
    for names in ([n for n in first if n in needs], first, [main], kinds[:1], kinds, [*kinds, *first]):
        for base in (text, {n: t for n, t in text.items() if n == "decoder_input_ids"}, {}):
            for shapes in range(6):
                extra = {name: _other(model, name, shapes) for name in names if name not in base}
                if all(value is not None for value in extra.values()) and (base or extra):
                    yield base | {name: value for name, value in extra.items() if value is not None}
                if not extra:
                    break


PICTURES = ("pixel_values", "pixel_values_videos", "input_features", "input_values", "audio_values", "image")


def _text(model: Any, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(len(name))
    if name == "attention_mask":
        return torch.ones(ROWS, LENGTH, dtype=torch.long)
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings > 40]
    tokens = torch.randint(3, min([VOCABULARY - 45, *sizes]), (ROWS, LENGTH), generator=generator)
    if name == "input_ids":
        tokens[:, -1] = 2  # some classify what stands at the end of the text
    return tokens


def _sizes(config: Any, *names: str) -> Iterator[int]:
    """Values of the fields `names`, of the configuration and of those inside it."""
    for part in (config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, list | tuple) and value:
                value = value[0]
            if type(value) is int:
                yield value


def _other(model: Any, name: str, shapes: int) -> Tensor | None:
    """A tensor for the argument `name`, in one of several shapes; None if there is no more of them."""
    config = model.config
    generator = torch.Generator().manual_seed(len(name))
    image = next(_sizes(config, "image_size", "img_size", "pretrain_image_size"), 64)
    channels = next(_sizes(config, "num_channels", "in_channels"), 3)
    frames = next(_sizes(config, "num_frames", "frames_per_clip"), 4)
    mel = next(_sizes(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "mel_dim"), 16)
    width = next(_sizes(config, "hidden_size", "d_model", "embed_dim", "hidden_dim"), 64)
    steps = 2 * next(_sizes(config, "max_source_positions"), 32)
    ways: list[tuple[int, ...]]
    if "pixel" in name or name in ("image", "images"):
        video = (ROWS, frames, channels, image, image)
        ways = [(ROWS, channels, image, image), video, (ROWS, 1, channels, image, image), (ROWS, channels, 128, 128)]
        ways = [video, *ways] if "video" in name else ways
    elif name in ("input_features", "audio_features"):
        ways = [(ROWS, mel, steps), (ROWS, steps, mel), (ROWS, mel, 3000), (ROWS, 1, 1001, 64)]
    elif name in ("input_values", "audio_values", "waveform"):
        ways = [(ROWS, 4000), (ROWS, 1, 4000), (ROWS, 64, mel), (ROWS, mel, 64)]
    elif name in ("hidden_states", "inputs_embeds", "encoder_hidden_states", "x", "features"):
        ways = [(ROWS, LENGTH, width), (LENGTH, width), (ROWS, width, 8, 8)]
    elif name in ("past_values", "past_time_features", "past_observed_mask", "future_values"):
        ways = [(ROWS, next(_sizes(config, "context_length"), 16), next(_sizes(config, "num_input_channels"), 1))]
    elif "ids" in name or name in ("labels", "tokens", "audio_codes"):
        return _text(model, name) if shapes == 0 else None
    elif "mask" in name:
        return torch.ones(ROWS, LENGTH, dtype=torch.long) if shapes == 0 else None
    elif name == "bbox":
        return torch.zeros(ROWS, LENGTH, 4, dtype=torch.long) if shapes == 0 else None
    else:
        return None
    return torch.randn(ways[shapes], generator=generator) if shapes < len(ways) else None
