"""Rows that name image files: whether a file has them, what each says, and the images themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, SourceError, UsageError
from .files import LIMIT, open_file
from .rows import JSON_SUFFIXES, read_file, text_of

FIELD = "image"
MESSAGES = "messages"
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
    """Where the first row of JSON that has an image lies; None if none has, or if the file holds no JSON."""
    if path.suffix.lower() not in JSON_SUFFIXES:
        return None
    with open_file(path) as file:  # a file of text alone is not parsed for this
        if not any(f'"{field}"'.encode() in raw for raw in iter(lambda: file.readline(LIMIT), b"")):
            return None
    return next((where for where, _, row in read_file(path) if row.get(field) not in (None, "")), None)


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
    if not found:
        raise UsageError(f"{path} holds no row that the model could read. Give rows with {image_field!r}.")
    return found


def _names(value: Any, field: str, where: str) -> Sequence[str]:
    names = value if isinstance(value, list) else [] if value in (None, "") else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise UsageError(f"{where} has in {field!r} something else than the path of an image, or a list of paths.")
    return names


def _inside(folder: Path, name: str, where: str) -> Path:
    path = (folder / name).resolve()
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
    """The images of a row, RGB; UsageError for a file that is not there, SourceError for one that is no image."""
    from PIL import Image, ImageOps

    found = []
    for path in row.images:
        if not path.is_file():
            raise UsageError(f"{row.where} names the image {path}, and there is no such file. Check its path.")
        try:
            with Image.open(path, formats=FORMATS) as image:
                found.append(ImageOps.exif_transpose(image).convert("RGB"))
        except Exception as error:  # whatever a file can make Pillow raise
            raise SourceError(
                f"{row.where} names {path}, which cannot be read as an image. Give a file of the kind "
                f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}."
            ) from error
    return found
