"""Models with a head for a task: loaded, or refused in a sentence, as is what they refuse themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError

_LONGEST = 240  # characters of a model's own words


@dataclass(frozen=True)
class Head:
    """The Auto class of a task, for `load`: UsageError for a model that transformers gives no head for it.

    address: of the model, for the message. trained: also for one whose head is not in the checkpoint's files, and
    would be drawn at random.
    """

    auto_class: Any
    task: str
    address: str
    trained: bool

    def from_pretrained(self, name: str, **options: Any) -> Any:
        import transformers

        try:
            model, report = self.auto_class.from_pretrained(name, output_loading_info=True, **options)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            remote = {"trust_remote_code": True} if options.get("trust_remote_code") else {}
            kind = transformers.AutoConfig.from_pretrained(name, **remote).model_type
            raise UsageError(
                f"{self.address} is a {kind}, for which transformers has no head for {self.task}. Give another model, "
                "or another --task."
            ) from error
        missing = sorted(report["missing_keys"])
        if missing and self.trained:
            raise UsageError(
                f"{self.address} has no head for {self.task} ({missing[0]} is not in its files); train it with: "
                f"losparse finetune {self.address} --task {self.task}"
            )
        return model


@contextmanager
def refusals(model: Any) -> Iterator[None]:
    """UsageError, in the model's own words, where it refuses its input: a token that it looks for and does not find,
    an id that its config does not name, an input beside the text, a length that is no multiple of its chunks."""
    try:
        yield
    except (ValueError, AssertionError, TypeError, IndexError, AttributeError) as error:
        said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if isinstance(error, AttributeError):
            if error.obj is not model.config:
                raise
            said = f"its config.json does not name {error.name}"
        said = said if len(said) <= _LONGEST else said[:_LONGEST].rsplit(" ", 1)[0] + " …"
        raise UsageError(
            f"The {model.config.model_type} model refuses what it is given: {said}. Correct its config.json or its "
            "tokenizer, or give another model."
        ) from error
