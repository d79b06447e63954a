"""Tiny models that see, with processors built here, and rows of images; random weights, one token a character."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as t
from characters import character_tokenizer

IMAGE = 99  # the first token behind the characters
WORDS = ("<image>", "<fake_token_around_image>", "<global-img>")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}|{% endfor %}"
)
_TEXT: dict[str, Any] = {
    "vocab_size": 112, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_TOWER: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def tokenizer() -> Any:
    found = character_tokenizer()
    found.add_special_tokens({"additional_special_tokens": list(WORDS)})
    return found


def llava() -> tuple[Any, Any]:
    """Four tokens an image; the last block of its tower is called, and nothing asks for what it gives."""
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**_TOWER).to_dict(), text_config=t.LlamaConfig(**_TEXT).to_dict(),
        image_token_index=IMAGE,
    )  # fmt: skip
    images = t.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return t.LlavaForConditionalGeneration(config), t.LlavaProcessor(
        images, tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip


def idefics3() -> tuple[Any, Any]:
    """A token an image, between two that mark it."""
    config = t.Idefics3Config(
        vision_config={**_TOWER, "num_hidden_layers": 2}, text_config=t.LlamaConfig(**_TEXT), image_token_id=IMAGE,
        scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    images = t.Idefics3ImageProcessorPil(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    return t.Idefics3ForConditionalGeneration(config), t.Idefics3Processor(
        images, tokenizer(), image_seq_len=1, chat_template=TEMPLATE
    )


def qwen2_vl() -> tuple[Any, Any]:
    """As many tokens an image as it has patches of patches, and positions in three directions."""
    config = t.Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4},
        text_config={**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        image_token_id=IMAGE, vision_start_token_id=IMAGE + 1, vision_end_token_id=IMAGE + 2, video_token_id=111,
    )  # fmt: skip
    return t.Qwen2VLForConditionalGeneration(config), QwenProcessor()


class QwenProcessor:
    """What transformers' own makes of images and text; that needs torchvision for videos, which nobody gives it."""

    place = image_token = WORDS[1] + "<image>" + WORDS[2]
    image_token_id = IMAGE
    resample = None

    def __init__(self) -> None:
        self.tokenizer = tokenizer()
        self.image_processor = t.Qwen2VLImageProcessorPil(min_pixels=64, max_pixels=576, patch_size=4, merge_size=2)

    def save_pretrained(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def __call__(self, text: list[str], images: Any = None, **options: Any) -> Any:
        made: dict[str, Any] = {}
        if images is not None:
            made = dict(self.image_processor(images=images, return_tensors="pt"))
            counts = iter((made["image_grid_thw"].prod(-1) // 4).tolist())
            parts = text[0].split("<image>")
            text = [parts[0] + "".join("<image>" * next(counts) + part for part in parts[1:])]
        made |= dict(self.tokenizer(text, **options))
        return made | {"mm_token_type_ids": (made["input_ids"] == IMAGE).int()}


def clip() -> tuple[Any, Any]:
    """Compares images with texts, which have no place for them."""
    text = {name: value for name, value in _TEXT.items() if name not in ("head_dim", "num_key_value_heads")}
    sizes = {"height": 16, "width": 16}
    images = t.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=sizes)
    config = t.CLIPConfig(text_config=text, vision_config=_TOWER, projection_dim=32)
    return t.CLIPModel(config), t.CLIPProcessor(images, tokenizer())


def vit() -> tuple[Any, Any]:
    """Reads images alone, and sorts them into three classes."""
    sizes = {"height": 16, "width": 16}
    return t.ViTForImageClassification(t.ViTConfig(**_TOWER, num_labels=3)), t.ViTImageProcessorPil(size=sizes)


def write(make: Callable[[], tuple[Any, Any]], folder: Path) -> Path:
    torch.manual_seed(0)
    model, processor = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "position" not in name:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def rows(
    folder: Path, count: int = 12, *, text: bool = True, alone: Sequence[int] = (), seed: int = 0, pixels: int = 0
) -> Path:
    """A file of rows beside its images, of which those numbered `alone` are text; seed: of words. pixels: of images."""
    from PIL import Image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    drawn, seen = np.random.default_rng(seed), np.random.default_rng(pixels)
    lines = []
    for k in range(count):
        size = (20, 24, 3) if k % 2 else (24, 12, 3)
        Image.fromarray(seen.integers(0, 256, size, dtype=np.uint8)).save(folder / "images" / f"{k}.png")
        words = " ".join("".join(chr(97 + c) for c in drawn.integers(0, 26, 4)) for _ in range(6))
        row = {} if k in alone else {"image": f"images/{k}.png"}
        lines.append(json.dumps(row | ({"text": words} if text else {})))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
