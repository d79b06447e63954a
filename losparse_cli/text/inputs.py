"""Rows of images and text -> what the model's own processor makes of them, row by row."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LosparseError, SourceError, UsageError, reason_of
from .images import ImageRow, open_images, read_image_rows, require_pillow, takes
from .request import Calibration
from .tokenizer import check_tokens

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
PATCH = 16  # pixels of a side, where config.json does not say
Row = dict[str, Tensor]


@dataclass(frozen=True)
class Inputs:
    """What a model is given for rows, each a batch of one: its keyword arguments as its processor makes them.

    counts: tokens of each row; of a row without text, patches of its images. image_tokens: that stand for images.
    """

    rows: tuple[Row, ...]
    counts: tuple[int, ...]
    image_tokens: tuple[int, ...] = ()
    name = "rows"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.counts, default=0)

    @property
    def tokens(self) -> int:
        """Of all rows, those that stand for images too."""
        return sum(self.counts)

    seen = tokens

    @property
    def nbytes(self) -> int:
        """In memory."""
        return sum(tensor.numel() * tensor.itemsize for row in self.rows for tensor in row.values())

    def digest(self) -> str:
        """SHA-256 of all tensors."""
        found = hashlib.sha256()
        for row in self.rows:
            found.update(_digest(row))
        return found.hexdigest()

    def take(self, numbers: Sequence[int]) -> Inputs:
        """Those of these numbers, in this order; there may be none."""
        rows, counts = (tuple(values[k] for k in numbers) for values in (self.rows, self.counts))
        return Inputs(rows, counts, self.image_tokens)  # type: ignore[arg-type]

    def batches(self, size: int, device: torch.device | None = None) -> list[Row]:
        """Keyword arguments for the model, of the rows that go `together`."""
        made = ([self.rows[k] for k in numbers] for numbers in self.together(size))
        return [{name: torch.cat([row[name] for row in rows]).to(device) for name in rows[0]} for rows in made]

    def said(self, size: int) -> list[Tensor | None]:
        """Of each batch, which tokens are none of an image."""
        ids = (batch.get("input_ids") for batch in self.batches(size))
        images = torch.tensor(self.image_tokens, dtype=torch.long)
        return [None if one is None else ~torch.isin(one, images) for one in ids]

    def kinds(self) -> list[tuple[Row, float, float]]:
        """The shortest row with each set of arguments, those with most of them first; and for each token of all, how
        many of its length those with the same would be, and how many they are."""
        alike: dict[tuple[str, ...], list[int]] = {}
        for k in sorted(range(len(self)), key=lambda k: self.counts[k]):
            alike.setdefault(tuple(sorted(self.rows[k])), []).append(k)
        found = []
        for of in sorted(alike.values(), key=lambda of: -len(self.rows[of[0]])):
            tokens = sum(self.counts[k] for k in of)
            found.append((self.rows[of[0]], tokens / self.counts[of[0]] / self.tokens, len(of) / self.tokens))
        return found

    def pieces(self) -> Tensor:
        """A number for each row; equal ones have the same."""
        numbers = [int.from_bytes(_digest(row)[:8], "little", signed=True) for row in self.rows]
        return torch.tensor(numbers, dtype=torch.long)

    def together(self, size: int) -> list[range]:
        """Neighbours whose tensors have the same shapes, up to `size`."""
        shapes = [{name: tensor.shape for name, tensor in row.items()} for row in self.rows]
        starts = [0] if shapes else []
        for k in range(1, len(shapes)):
            if shapes[k] != shapes[k - 1] or k - starts[-1] == size:
                starts.append(k)
        return [range(begin, end) for begin, end in pairwise([*starts, len(shapes)])]


def _digest(row: Row) -> bytes:
    found = hashlib.sha256()
    for name in sorted(row):
        tensor = row[name].contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.digest()


# --- the rows ---------------------------------------------------------------------------------------


def read_inputs(
    calibration: Calibration, model: Any, folder: Path, seed: int, *, trust_remote_code: bool = False
) -> Inputs:
    """Rows drawn by `seed` from a settled `calibration` with images, until there are as many tokens as it asks for.

    model: without weights. folder: that has its processor. Text behind the last image is cut at the settled length.
    UsageError for a row that cannot be used, SourceError for what cannot be read, MissingExtraError without Pillow.
    """
    assert calibration.image_field is not None
    assert calibration.length is not None
    path = Path(calibration.source).expanduser()
    require_pillow(calibration.source)
    processor = load_processor(folder, trust_remote_code=trust_remote_code)
    maker = _Maker(processor, model, folder, calibration.length)
    found = read_image_rows(
        path,
        image_field=calibration.image_field,
        field=calibration.field or "text",
        wants_text=takes(model, "input_ids"),
    )
    rows: list[Row] = []
    counts: list[int] = []
    for k in torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist():
        row = maker.make(found[k])
        rows.append(row)
        counts.append(maker.count(row))
        if sum(counts) >= calibration.tokens:
            break
    largest = max((int(row["input_ids"].max()) for row in rows if "input_ids" in row), default=0)
    check_tokens(largest, model, folder)
    return Inputs(tuple(rows), tuple(counts), maker.image_tokens)


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """What makes a model's inputs of images, as it lies in the folder; SourceError if it is not there, or not whole."""
    import transformers

    none = SourceError(
        f"{folder} has no processor for images. Copy {' and '.join(PROCESSOR_FILES)} of the original model into it."
    )
    if not any((folder / file).is_file() for file in PROCESSOR_FILES):
        raise none
    try:
        found = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a file can make a processor raise
        if isinstance(error, ImportError) and "torchvision" in str(error).lower():
            raise SourceError(
                f"The processor of {folder} needs the package 'torchvision'. Install the one that goes with your "
                "torch: pip install torchvision"
            ) from error
        raise SourceError(
            f"The processor of {folder} cannot be loaded: {reason_of(error)}. Download it again."
        ) from error
    if not hasattr(found, "image_processor") and not hasattr(found, "image_mean") and not hasattr(found, "resample"):
        raise none  # a tokenizer: transformers takes what is there
    return found


class _Maker:
    """Makes inputs by a `processor` for a `model`; length: tokens of a row, at most."""

    def __init__(self, processor: Any, model: Any, folder: Path, length: int) -> None:
        self._processor, self._model, self._folder, self._length = processor, model, folder, length
        self._tokenizer = getattr(processor, "tokenizer", None)
        self._template = next(
            (found for one in (processor, self._tokenizer) if (found := getattr(one, "chat_template", None))), None
        )
        parameters = inspect.signature(model.forward).parameters
        open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
        self._taken = None if open_ended else set(parameters)
        places = [(model.config, "image_token_id"), (model.config, "image_token_index"), (processor, "image_token_id")]
        tokens = {getattr(owner, name, None) for owner, name in places}
        self.image_tokens = tuple(sorted(token for token in tokens if isinstance(token, int)))

    def make(self, row: ImageRow) -> Row:
        """The model's keyword arguments; UsageError names the row that the processor cannot do with."""
        images = open_images(row)
        try:
            made = self._called(row, images)
        except LosparseError:
            raise
        except Exception as error:  # whatever a text or an image can make a processor raise
            raise UsageError(
                f"{row.where} cannot be read by {type(self._processor).__name__} ({reason_of(error)}). Give text and "
                "images as the model's processor takes them."
            ) from error
        kept = {
            name: value
            for name, value in made.items()
            if isinstance(value, Tensor) and (self._taken is None or name in self._taken)
        }
        return self._cut(kept, row.where) if "input_ids" in kept else kept

    def count(self, row: Row) -> int:
        """Tokens of a row, or patches of its images."""
        if "input_ids" in row:
            return row["input_ids"].numel()
        size = getattr(self._model.config, "patch_size", None)
        pixels = max(math.prod(value.shape[-2:]) for value in row.values())
        return max(1, pixels // (size if isinstance(size, int) else PATCH) ** 2)

    def _called(self, row: ImageRow, images: list[Any]) -> Any:
        pictures = {"images": images} if images else {}
        if row.text is None and row.messages is None:
            return self._processor(**pictures, return_tensors="pt")
        text, messages = row.text, row.messages
        if text is not None and images and not self._has_place(text):
            if self._template is not None:  # what the model says of the image
                places = [{"type": "image"}] * len(images)
                answer = [{"type": "text", "text": text}]
                messages = [{"role": "user", "content": places}, {"role": "assistant", "content": answer}]
            else:
                text = (self._place or "") * len(images) + text
        options = {}
        if messages is not None:
            if self._template is None:
                raise UsageError(f"{row.where} has messages, and {self._folder} no chat template. Give text instead.")
            text = self._processor.apply_chat_template(messages, chat_template=self._template)
            begin = getattr(self._tokenizer, "bos_token", None)
            options = {"add_special_tokens": False} if begin and text.startswith(begin) else {}
        return self._processor(text=[text], **pictures, **options, return_tensors="pt")

    @property
    def _place(self) -> str | None:
        """What stands for an image in a text."""
        for name in ("boi_token", "image_token"):
            found = getattr(self._processor, name, None)
            if found is not None:
                return str(found)
        return None

    def _has_place(self, text: str) -> bool:
        places = (getattr(self._processor, name, None) for name in ("boi_token", "image_token"))
        return any(str(place) in text for place in places if place)

    def _cut(self, row: Row, where: str) -> Row:
        """At the longest that is wanted, behind the last token of an image."""
        ids = row["input_ids"]
        count, length = ids.shape[1], self._length
        if count <= length:
            return row
        of_images = torch.isin(ids[0], torch.tensor(self.image_tokens, dtype=torch.long)).nonzero()
        needed = int(of_images[-1]) + 1 if len(of_images) else 0
        if needed > length:
            raise UsageError(
                f"{where} has {needed} tokens up to the end of its image, more than {length}. Give a smaller image, or "
                "raise --calibration-length."
            )
        return {name: value[:, :length] if value.shape[:2] == ids.shape else value for name, value in row.items()}
