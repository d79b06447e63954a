"""What text was asked for, and whether the model can do with it; no text is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError, is_number, is_whole, paths_as_text
from .documents import SELF, kind_of
from .images import FIELD, first_image, takes_images
from .tokenizer import SHORTEST, length_limit, named_length

LENGTH = 512  # tokens of a window, if nothing else is asked for and the model takes as many
ROW_LENGTH = 2048  # the same of a row with an image, which is hundreds of tokens itself


@dataclass(frozen=True)
class Calibration:
    """What text was asked for; UsageError for numbers that no text can meet.

    source: a file, a Hub dataset, or `self`. tokens: about how many to use. length: tokens of a window, None for 512
    or as many as the model takes. batch: windows at a time. split: of a Hub dataset, None for `train`. field: with the
    text, None for `text`. target_field: with what an encoder-decoder model is to say, None for the text itself.
    image_field: with the path of an image, None for `image` where rows of JSON have one; settled, None for text alone.
    """

    source: str
    tokens: int = 65536
    length: int | None = None
    batch: int = 4
    split: str | None = None
    field: str | None = None
    target_field: str | None = None
    image_field: str | None = None

    def __post_init__(self) -> None:
        paths_as_text(self, "source")
        if not isinstance(self.source, str):
            given = type(self.source).__name__
            raise UsageError(
                f"--calibration is a file, a Hub dataset such as user/name, or the word self, not {given}."
            )
        if not is_number(self.tokens) or not 0 < self.tokens < float("inf"):
            raise UsageError(f"--calibration-tokens is a positive number, not {self.tokens!r}.")
        if self.length is not None and (not is_whole(self.length) or self.length < SHORTEST):
            raise UsageError(f"--calibration-length is a whole number, {SHORTEST} or more, not {self.length!r}.")
        if not is_whole(self.batch) or self.batch < 1:
            raise UsageError(f"batch of the calibration is a whole number >= 1, not {self.batch!r}.")

    @property
    def windows(self) -> int:
        """How many windows are wanted; only of a settled one."""
        assert self.length is not None
        return max(1, round(self.tokens / self.length))


def settle(calibration: Calibration, model: Any, folder: Path) -> Calibration:
    """The request with length, split and field decided, for a `model` without weights; no text is read.

    A length that was left open becomes 512, or what the model and the tokenizer in `folder` take if that is less.
    UsageError if model and text do not go together, or if the source is neither file nor dataset.
    """
    name = type(model).__name__
    reads = model.main_input_name
    if reads != "input_ids" and not takes_images(model):
        raise UsageError(f"{name} reads {reads}, not text. Compress it without --calibration.")
    kind = kind_of(calibration.source)
    image_field = _image_field(calibration, kind, model)
    if reads != "input_ids" and image_field is None:
        raise UsageError(
            f"{name} reads {reads}, not text. Compress it without --calibration, or give it a file of JSON lines whose "
            f"field {FIELD!r} names images."
        )
    seq2seq = bool(model.config.is_encoder_decoder)
    if kind == SELF and (seq2seq or not model.can_generate()):
        raise UsageError(
            f"{name} writes no text of its own, so --calibration self has nothing to offer. Give a file or a Hub "
            "dataset."
        )
    _check_options(calibration, kind, name, seq2seq)
    usual = LENGTH if image_field is None else ROW_LENGTH
    limit = length_limit(model, named_length(folder))
    if limit is not None and calibration.length is not None and calibration.length > limit:
        raise UsageError(
            f"{name} takes at most {limit} tokens, fewer than --calibration-length {calibration.length}. Give {limit} "
            "or less."
        )
    return replace(
        calibration,
        length=calibration.length or min(usual, limit or usual),
        split=(calibration.split or "train") if kind == "hub" else None,
        field=(calibration.field or "text") if kind in ("hub", "rows") else None,
        image_field=image_field,
    )


def _image_field(calibration: Calibration, kind: str, model: Any) -> str | None:
    """The field with images, None for text alone; UsageError if the model has no use for them."""
    name, asked = type(model).__name__, calibration.image_field
    if kind != "rows":
        if asked is not None:
            raise UsageError(
                f"{calibration.source} is no file of rows that could name images. Leave out --calibration-image-field "
                f"{asked}."
            )
        return None
    where = first_image(Path(calibration.source).expanduser(), asked or FIELD)
    if asked is None and where is None:
        return None
    if not takes_images(model):
        what = "has a decoder beside its encoder" if model.config.is_encoder_decoder else "reads no images"
        raise UsageError(
            f"{name} {what}, and {where or calibration.source} has one in {asked or FIELD!r}. Give rows of text alone."
        )
    return asked or FIELD


def _check_options(calibration: Calibration, kind: str, name: str, seq2seq: bool) -> None:
    what = {"text": "a text file", "rows": "a file of rows", SELF: "text that the model writes"}
    for option, given, has in (
        ("--calibration-split", calibration.split, ("hub",)),
        ("--calibration-field", calibration.field, ("hub", "rows")),
        ("--calibration-target-field", calibration.target_field, ("hub", "rows")),
    ):
        if given is not None and kind not in has:
            part = "splits" if option == "--calibration-split" else "fields"
            raise UsageError(f"{calibration.source} is {what[kind]}, which has no {part}. Leave out {option} {given}.")
    if calibration.target_field is not None and not seq2seq:
        raise UsageError(f"{name} has no decoder beside an encoder. Leave out --calibration-target-field.")
