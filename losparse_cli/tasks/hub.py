"""A dataset of the Hub, through the library of that name."""

from __future__ import annotations

from typing import Any

from ..errors import MissingExtraError, SourceError, UsageError


def read_dataset(name: str, config: str | None, split: str, option: str) -> Any:
    """A split of the dataset, a `datasets.Dataset`; `option` is the one that named the split, for messages.

    UsageError for a split or configuration that is not there, SourceError for a dataset that cannot be reached or
    read, MissingExtraError without the package.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetNotFoundError
    except ImportError as error:
        raise MissingExtraError("datasets", "datasets", f"Reading the dataset {name}") from error
    try:
        return datasets.load_dataset(name, config, split=split)
    except DatasetNotFoundError as error:
        raise SourceError(
            f"There is no dataset {name} on the Hub that you can see. Check --dataset-name; if it is private or gated, "
            "log in with: hf auth login"
        ) from error
    except ValueError as error:  # the split or the configuration, and which there are
        raise UsageError(
            f"The dataset {name} cannot be read with the split {split!r}: {_reason(error)}. Choose with {option}, or a "
            "configuration with --dataset-config-name."
        ) from error
    except Exception as error:  # whatever a dataset's files can make the library raise
        kind = type(error).__module__.partition(".")[0]
        if isinstance(error, ConnectionError | TimeoutError) or kind in ("huggingface_hub", "httpx", "requests"):
            raise SourceError(
                f"The Hub cannot be reached to read the dataset {name}. Check the network, or unset HF_HUB_OFFLINE."
            ) from error
        raise SourceError(f"The dataset {name} cannot be read: {_reason(error)}. Give another, or a file.") from error


def class_names(dataset: Any) -> dict[str, tuple[str, ...]]:
    """Column -> names of its classes in order, for the columns that hold class numbers."""
    return {column: tuple(feature.names) for column, feature in dataset.features.items() if hasattr(feature, "int2str")}


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
