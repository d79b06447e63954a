"""Rows that name image files: whether a file has them, what each says, and the images themselves."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, SourceError, UsageError
from .files import LIMIT, open_file
from .rows import JSON_SUFFIXES, read_file, text_of

FIELD = "image"
NOTHING: tuple[Any, ...] = (None, "", [])
MESSAGES = "messages"
PIXELS = 64 << 20
"""Of a row's images together: no model sees as many, and a small file may claim any number."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""That are read: of those that Pillow knows, some start other programs."""


@dataclass(frozen=True)
class ImageRow:
    """where: it lies. images: paths, () of a row of text alone. text: or messages, of which one is None."""

    where: str
    images: tuple[Path, ...]
    text: str | None = None
    messages: list[dict[str, Any]] | None = None


def takes(model: Any, *names: str) -> bool:
    """Whether the model's forward pass has an argument of one of these names."""
    return not inspect.signature(model.forward).parameters.keys().isdisjoint(names)


def takes_images(model: Any) -> bool:
    """Whether rows with images can be given to the model."""
    return takes(model, "pixel_values", "image_patches") and not model.config.is_encoder_decoder


def first_image(path: Path, field: str = FIELD) -> str | None:
    """Where the first row of JSON that has an image lies; None if none has, or if the file holds no JSON.

    Of a file the first 64 MiB are looked at, as no more of it is read.
    """
    if path.suffix.lower() not in JSON_SUFFIXES:
        return None
    with open_file(path) as file:  # a file of text alone is not parsed for this
        if f'"{field}"'.encode() not in file.read(LIMIT):
            return None
    size = 0
    for where, _, row in read_file(path):
        if row.get(field) not in NOTHING:
            return where
        size += sum(len(value) for value in row.values() if isinstance(value, str))
        if size >= LIMIT:
            break
    return None


def read_image_rows(path: Path, *, image_field: str, field: str, wants_text: bool) -> list[ImageRow]:
    """The rows of a file, of the first 64 MiB of their text; blank ones without an image are left out.

    field: with the text; where a row lacks it, `messages` will do. wants_text: whether the model reads any.
    UsageError for a row that has no text where there must be one, or whose image lies outside the file's folder.
    """
    found, size = [], 0
    for where, _, row in read_file(path):
        images = tuple(_inside(path.parent, name, where) for name in _names(row.get(image_field), image_field, where))
        if not wants_text:
            if images:
                found.append(ImageRow(where, images))
            continue
        messages = row.get(MESSAGES) if row.get(field) is None else None
        if messages is not None:
            found.append(ImageRow(where, images, messages=_messages(messages, where, len(images))))
            size += len(str(messages))
        else:
            text = text_of(row, field, "--calibration-field", where)
            if images and not text.strip():
                raise UsageError(f"{where} has an image and no text in {field!r}. Say what goes with it.")
            if text.strip():
                found.append(ImageRow(where, images, text))
                size += len(text)
        if size >= LIMIT:
            break
    if not any(row.images for row in found):
        raise UsageError(
            f"{path} holds no row with an image in {image_field!r}. Complete it, or name another column with "
            "--calibration-image-field."
        )
    return found


def _names(value: Any, field: str, where: str) -> Sequence[str]:
    names = value if isinstance(value, list) else [] if value in NOTHING else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise UsageError(f"{where} has in {field!r} something else than the path of an image, or a list of paths.")
    return names


def _inside(folder: Path, name: str, where: str) -> Path:
    try:
        path = (folder / name).resolve()
        path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, links in a circle, a NUL
        shown = name if len(name) < 80 else f"{name[:40]}..."
        raise UsageError(f"{where} names the image {shown!r}, which is no path. Give a path relative to it.") from error
    if not path.is_relative_to(folder.resolve()):
        raise UsageError(
            f"{where} names the image {name}, outside the folder of the rows. Give a path within it, relative to it."
        )
    return path


def _messages(value: Any, where: str, images: int) -> list[dict[str, Any]]:
    """With contents in parts, as processors' chat templates take them, and a place for each of the images."""
    if not isinstance(value, list) or not all(isinstance(one, dict) and "role" in one for one in value):
        raise UsageError(f"{where} has in {MESSAGES!r} something else than a list of messages with role and content.")
    made = [one | {"content": list(_parts(one.get("content"), where))} for one in value]
    places = sum(part["type"] == "image" for one in made for part in one["content"])
    if images and not places:
        first = next((one for one in made if one["role"] == "user"), made[0] if made else None)
        if first is not None:
            first["content"][:0] = [{"type": "image"}] * images
            places = images
    if places != images:
        raise UsageError(
            f"{where} has {places} places for images in its messages, and {images} images. Make them agree."
        )
    return made


def _parts(content: Any, where: str) -> Iterator[dict[str, Any]]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    for part in content if isinstance(content, list) else [None]:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind not in ("text", "image"):
            raise UsageError(f"{where} has a message whose content is neither text nor parts of type text and image.")
        yield {"type": "image"} if kind == "image" else {"type": "text", "text": str(part.get("text", ""))}


def require_pillow(source: str) -> None:
    """MissingExtraError without the package that reads images."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("pillow", "images", f"Reading the images of {source}") from error


def open_images(row: ImageRow) -> list[Any]:
    """The images of a row, RGB; UsageError for those that are not there or too large, SourceError for what is none."""
    from PIL import Image, ImageOps

    found, pixels = [], 0
    for path in row.images:
        if not path.is_file():
            raise UsageError(f"{row.where} names the image {path}, and there is no such file. Check its path.")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of metadata that nobody reads, and of sizes, which are looked at here
                with Image.open(path, formats=FORMATS) as image:
                    pixels += math.prod(image.size)
                    if pixels > PIXELS:
                        raise UsageError(
                            f"{row.where} has images of more than {PIXELS:,} pixels, up to {path}. Give smaller ones."
                        )
                    found.append(ImageOps.exif_transpose(image).convert("RGB"))
        except UsageError:
            raise
        except Image.DecompressionBombError as error:
            raise UsageError(f"{row.where} names {path}, which has too many pixels. Give a smaller one.") from error
        except Exception as error:  # whatever a file can make Pillow raise
            raise SourceError(
                f"{row.where} names {path}, which cannot be read as an image. Give a file of the kind "
                f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}."
            ) from error
    return found
