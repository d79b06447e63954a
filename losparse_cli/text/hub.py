"""A dataset of the Hub, through the library of that name; and why it cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import LosparseError, MissingExtraError, SourceError, UsageError


@contextmanager
def open_dataset(
    name: str, config: str | None, split: str, *, choose: str, streaming: bool = False, file_too: bool = False
) -> Iterator[Any]:
    """The split of the dataset `name`, as `datasets` has it, to be read within.

    choose: how a person gives another split or configuration. streaming: whether rows come over the network as they
    are asked for. file_too: whether `name` might have meant a file.
    UsageError for a split or configuration that is not there, SourceError for a dataset that cannot be reached or
    read, MissingExtraError without the package.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetNotFoundError
    except ImportError as error:
        purpose = f"There is no file {name}, and a Hub dataset" if file_too else f"Reading the dataset {name}"
        raise MissingExtraError("datasets", "datasets", purpose) from error
    try:
        options: dict[str, Any] = {"streaming": True} if streaming else {}
        # From version 4 on no dataset can bring code; before, one that does is refused without a question.
        if int(datasets.__version__.split(".")[0]) < 4:
            options["trust_remote_code"] = False
        yield datasets.load_dataset(name, config, split=split, **options)
    except LosparseError:
        raise
    except DatasetNotFoundError as error:
        what = f"no file {name}, and no dataset of that name" if file_too else f"no dataset {name}"
        raise SourceError(
            f"There is {what} on the Hub that you can see. Check the spelling; if it is private or gated, log in with: "
            "hf auth login"
        ) from error
    except ValueError as error:  # the split or the configuration, and which there are
        raise UsageError(
            f"The dataset {name} cannot be read with the split {split!r}: {_reason(error)}. {choose}"
        ) from error
    except Exception as error:  # whatever a dataset's files can make the library raise
        kind = type(error).__module__.partition(".")[0]
        if isinstance(error, ConnectionError | TimeoutError) or kind in ("huggingface_hub", "httpx", "requests"):
            what = f"There is no file {name}, and the Hub" if file_too else "The Hub"
            check = "the path and the network" if file_too else "the network"
            raise SourceError(
                f"{what} cannot be reached to read the dataset {name}. Check {check}, or unset HF_HUB_OFFLINE."
            ) from error
        raise SourceError(f"The dataset {name} cannot be read: {_reason(error)}. Give another, or a file.") from error


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
