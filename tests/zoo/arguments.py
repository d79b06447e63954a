"""Values for one argument of a model's forward pass, in every shape that models want it in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .tiny import VOCABULARY

ROWS, LENGTH = 2, 16
GRID = (1, 8, 8)  # patches of a picture: times, down, across
TEXT = ("input_ids", "attention_mask", "decoder_input_ids")
MEL = ("num_mel_bins", "feature_size", "input_feat_per_channel", "mel_dim", "n_mels", "input_feat_size",
       "feature_projection_input_dim", "input_size")  # fmt: skip

Way = Callable[[], Any]


def ways(model: Any, name: str, names: frozenset[str]) -> list[Way]:
    """Makers of values for the argument `name` beside others; none if nothing is known of it."""
    config = model.config
    size = _Sizes(config)
    generator = torch.Generator().manual_seed(len(name))

    def noise(*shapes: tuple[int, ...]) -> list[Way]:
        return [lambda shape=shape: torch.randn(shape, generator=generator) for shape in shapes]

    def ones(*shapes: tuple[int, ...], kind: torch.dtype = torch.long) -> list[Way]:
        return [lambda shape=shape: torch.ones(shape, dtype=kind) for shape in shapes]

    if name in TEXT or re.fullmatch(r".*(input_ids|tokens)|labels|codes|audio_codes", name):
        books = size.of("num_codebooks", "n_codebooks", default=0)
        return [lambda: text(model, name), *((lambda: _codes(generator, books),) if books and name != "labels" else ())]
    if re.fullmatch(
        r".*grid_thw|image_sizes|spatial_shapes|.*grid_hw|tgt_sizes|target_sizes|.*grid_sizes|.*grids?", name
    ):
        grids = [GRID] * ROWS if "thw" in name else [GRID[1:]] * ROWS
        return [lambda: torch.tensor(grids)]
    if "pixel_position_ids" in names and name in ("pixel_values", "pixel_position_ids"):
        places = torch.cartesian_prod(torch.arange(6), torch.arange(6)).expand(ROWS, 36, 2)
        patch = size.of("num_channels", default=3) * size.of("patch_size", default=8) ** 2
        return [lambda: places] if name == "pixel_position_ids" else noise((ROWS, 36, patch))
    if flat := _flat_patches(name, names, size):
        return noise(*flat)

    image, channels = size.of("image_size", "img_size", "pretrain_image_size", default=64), size.of(
        "num_channels", "in_channels", "in_chans", default=3
    )  # fmt: skip
    frames = size.of("num_frames", "frames_per_clip", default=4)
    mel = size.of(*MEL, default=16)
    width = size.of("hidden_size", "d_model", "embed_dim", "hidden_dim", "n_embd", default=64)
    steps = 2 * size.of("max_source_positions", default=32)
    video = (ROWS, frames, channels, image, image)
    if name in ("pixel_mask", "bool_masked_pos"):
        return ones((ROWS, image, image))
    if re.fullmatch(r"(.*_)?(input_features|input_values|feature|features|audio)_(attention_)?mask", name):
        return ones((ROWS, steps), (ROWS, 4000), kind=torch.long)
    pictures = getattr(model, "main_input_name", "") == "pixel_values" and name == "hidden_states"
    if "pixel" in name or name in ("image", "images", "prompt_masks") or pictures:
        still = [(ROWS, channels, image, image), video, (ROWS, 1, channels, image, image), (ROWS, channels, 128, 128)]
        still.append((ROWS, 2, channels, image, image))
        patch, tiles = size.of("patch_size", default=8), size.of("max_num_tiles", default=1)
        still.append((ROWS, (image // patch) ** 2, channels * patch**2))
        still += [(ROWS, 1, tiles, channels, image, image), (ROWS, 2, channels, 128, 128)]
        still.append((ROWS, 2, image, image, channels))
        still += [(ROWS, channels, *pair) for pair in [size.list_of("image_size")] if len(pair) == 2]
        return noise(*([video, (ROWS, channels, frames, image, image), *still] if "video" in name else still))
    if name == "task_inputs":
        return noise((ROWS, size.of("task_seq_len", default=LENGTH)))
    if name == "merge_sizes":
        return [lambda: torch.tensor([2] * ROWS)]
    if name == "flattened_patches":
        shape = (ROWS, size.of("seq_len", default=LENGTH), 2 + size.of("patch_embed_hidden_size", default=width))
        return [lambda: torch.rand(shape, generator=generator)]  # each begins with its row and column
    if name == "mel_spectrogram":
        return noise((ROWS, mel, LENGTH))
    if name == "spectrogram":
        return noise((ROWS, LENGTH, size.of("model_in_dim", "num_mel_bins", default=mel)))
    if name == "audio_mel_mask":
        return [lambda: torch.zeros(ROWS, steps, dtype=torch.bool)]
    if name in ("input_features", "audio_features", "audio_mel"):
        wide, stacked = size.of("max_length", default=1024), size.of("num_stacked_frames", default=4) * mel
        lengths = [(ROWS, mel, steps), (ROWS, steps, mel), (ROWS, mel, 3000), (ROWS, 1, 1001, mel), (ROWS, wide, mel)]
        return noise(*lengths, (ROWS, steps, 128), (ROWS, steps, stacked))
    if name in ("input_values", "audio_values", "waveform", "audio"):
        wide = size.of("max_length", default=64)
        return noise((ROWS, 4000), (ROWS, 1, 4000), (ROWS, 64, mel), (ROWS, mel, 64), (ROWS, wide, mel))
    if name == "encoder_hidden_states":
        width = size.of("encoder_hidden_size", "cross_attention_hidden_size", default=width)
        return noise((ROWS, LENGTH, width))
    if re.fullmatch(r"(hidden_states|inputs?_embeds|x|features|.*_embeds|.*embeddings|encoder_outputs)", name):
        return noise(
            (ROWS, LENGTH, width),
            (LENGTH, width),
            (ROWS, width, 8, 8),
            (ROWS, width),
            (ROWS, 1, 3200),
            (ROWS, LENGTH, mel),
        )
    if re.fullmatch(r"(past|future)_(values|observed_mask|time_features)", name):
        return _series(name, size, generator)
    if name == "visual_feats":
        return noise((ROWS, 9, size.of("visual_feat_dim", default=width)))
    if name == "visual_pos":
        return noise((ROWS, 9, size.of("visual_pos_dim", default=4)))
    if name in ("states", "actions"):
        return noise((ROWS, LENGTH, size.of("state_dim" if name == "states" else "act_dim", default=width)))
    if name in ("rewards", "returns_to_go"):
        return noise((ROWS, LENGTH, 1))
    if name == "timesteps":
        return [lambda: torch.arange(LENGTH).expand(ROWS, LENGTH)]
    if name == "bbox":
        box = torch.tensor([0, 0, 9, 9])
        return [lambda: box.expand(ROWS, LENGTH, 4), lambda: box.expand(ROWS, LENGTH, 4).float() / 10]
    if name == "position_ids":
        return [lambda: torch.arange(LENGTH).expand(ROWS, LENGTH)]
    if name == "use_cache":
        return [lambda: False]
    if name in ("aspect_ratio_ids", "aspect_ratio_mask"):
        return ones((ROWS, 1) if "ids" in name else (ROWS, 1, size.of("max_num_tiles", default=1)))
    if name == "latents":
        return noise(*[(ROWS, latent, LENGTH) for latent in (size.of("latent_dim", default=width), width)])
    if name in ("marks", "num_options", "question_type_ids"):
        return [lambda: torch.tensor({"marks": [[5, 9]], "num_options": [[2, 2]]}.get(name, [[0, 0]]))]
    if name == "image_attention_mask":
        return ones((ROWS, LENGTH, 1))
    if name == "context_hidden_states":
        return noise((ROWS, LENGTH, width * len(size.list_of("target_layer_ids"))))
    if name == "is_longer":
        return [lambda: torch.zeros(ROWS, 1, dtype=torch.bool)]
    if "mask" in name:
        return ones((ROWS, LENGTH))
    if "ids" in name:
        return [lambda: torch.zeros(ROWS, LENGTH, dtype=torch.long)]
    return []


def text(model: Any, name: str) -> Tensor:
    """Random tokens, or ones for a mask."""
    generator = torch.Generator().manual_seed(len(name))
    if name == "attention_mask":
        return torch.ones(ROWS, LENGTH, dtype=torch.long)
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings > 40]
    tokens = torch.randint(3, min([VOCABULARY - 45, *sizes]), (ROWS, LENGTH), generator=generator)
    if name == "input_ids":
        tokens[:, -1] = 2  # some classify what stands at the end of the text
    return tokens


def _codes(generator: torch.Generator, books: int) -> Tensor:
    return torch.randint(3, 30, (ROWS, LENGTH, books), generator=generator)


def _flat_patches(name: str, names: frozenset[str], size: _Sizes) -> list[tuple[int, ...]]:
    """Shapes of the patches of pictures, one after another, of models that are told the grid beside them."""
    if not any("grid" in other or other.endswith("t_sizes") for other in names) or not re.fullmatch(
        r"hidden_states|pixel_values\w*|x", name
    ):
        return []
    patch = size.of("patch_size", "spatial_patch_size", default=8)
    channels = size.of("in_channels", "num_channels", "in_chans", default=3)
    times = size.of("temporal_patch_size", "patch_temporal", default=1)
    count = ROWS * prod(GRID)
    wide = channels * times * patch * patch
    pictures = (count, channels, patch, patch)
    merged = (2 * patch, 2 * patch, channels)
    row = (1, channels, patch, count * patch)
    return [(count, wide), (1, count, wide), pictures, (1, *pictures), (count // 4, *merged), (count, *merged), row]


def _series(name: str, size: _Sizes, generator: torch.Generator) -> list[Way]:
    length = size.of("context_length", default=16) + max(size.list_of("lags_sequence"), default=0)
    if name.startswith("future"):
        length = size.of("prediction_length", default=4)
    inputs, times = size.of("num_input_channels", "input_size", default=1), size.of("num_time_features", default=1)
    if "time" in name:
        return [lambda: torch.randn(ROWS, length, times, generator=generator)]
    make = torch.ones if "mask" in name else lambda *shape: torch.randn(*shape, generator=generator)
    return [lambda: make(ROWS, length, inputs), lambda: make(ROWS, length)]


class _Sizes:
    """Sizes that a configuration, or one inside it, gives."""

    def __init__(self, config: Any) -> None:
        self._parts = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]

    def _values(self, name: str) -> Iterator[Any]:
        for part in self._parts:
            value = getattr(part, name, None)
            if isinstance(value, list | tuple) and value:
                value = value[0]
            if type(value) is int:
                yield value

    def of(self, *names: str, default: int) -> int:
        """The first of `names` that is a whole number, of the configuration and of those inside it."""
        return next((value for part in names for value in self._values(part)), default)

    def list_of(self, name: str) -> list[int]:
        """The list called `name`, empty if there is none."""
        return next((list(v) for part in self._parts if isinstance(v := getattr(part, name, None), list | tuple)), [])
