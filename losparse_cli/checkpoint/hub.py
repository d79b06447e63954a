"""Files and headers of a model on the Hub, and why they cannot be had."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, SourceError
from .reader import BITS, TensorEntry

# Weights in other forms, and folders that hold nothing but them.
OTHER_WEIGHTS = ("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ot", "*.tflite", "*.pt", "*.pth", "*.ckpt")
OTHER_FOLDERS = ("original/*", "onnx/*", "openvino/*", "coreml/*", "gguf/*")


@contextmanager
def hub_errors(repository: str, *, local_only: bool = False) -> Iterator[None]:
    """Turns what huggingface_hub raises about `repository` into a SourceError with a remedy.

    local_only: the caller asked for what is in the cache alone. What huggingface_hub logs of each further try is not
    shown: the error says the same once.
    """
    import huggingface_hub.errors as hub

    log = logging.getLogger("huggingface_hub.utils._http")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    except hub.GatedRepoError as error:
        raise SourceError(
            f"{repository} is gated. Accept its terms on its Hub page, then log in with: hf auth login"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise SourceError(
            f"There is no folder {repository}, and no such model on the Hub that you can see. Check the spelling; if "
            "it is private, log in with: hf auth login"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise SourceError(
            f"{repository} has no such revision. Leave out --revision, or name a branch or tag."
        ) from error
    except hub.HFValidationError as error:
        raise SourceError(
            f"There is no folder {repository!r}. Check the path, or give a Hub id such as user/name."
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        raise SourceError(f"There is no folder {repository}, and {_why_not_fetched(local_only)}") from error
    except hub.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "unknown")
        if status in (401, 403):
            raise SourceError(f"The Hub refused access to {repository}. Log in with: hf auth login") from error
        raise SourceError(f"The Hub answered with status {status} for {repository}. Try again later.") from error
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
            raise SourceError(  # the disk, not the network
                f"Cannot read or store {error.filename or repository}: {error.strerror}. Free some space, or keep "
                "downloads in another place with --cache-dir."
            ) from error
        raise SourceError(f"The Hub cannot be reached for {repository}: {error}. Check the network.") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("httpx", "httpcore", "httpx2", "httpcore2", "requests"):
            raise SourceError(f"The Hub cannot be reached for {repository}. Check the network.") from error
        raise
    finally:
        log.setLevel(level)


def _why_not_fetched(local_only: bool) -> str:
    from huggingface_hub import constants

    if local_only:
        return "the Hub's cache does not hold it, which is all that local_files_only asks. Leave that out."
    if constants.HF_HUB_OFFLINE:
        variable = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
        return f"the Hub is not asked while {variable} is set. Check the path, or unset {variable}."
    return "the Hub cannot be reached to fetch it. Check the path and the network."


def remote_files(repository: str, revision: str | None, token: str | bool | None) -> list[str]:
    """Names of all files of a model on the Hub; none if it cannot be asked."""
    from huggingface_hub import HfApi

    try:
        return list(HfApi().list_repo_files(repository, revision=revision, token=token))
    except Exception:  # the caller has an error of its own to show
        return []


def download(repository: str, revision: str | None, cache_dir: Path | None) -> Path:
    """The folder in the cache that holds a model's files, weights in safetensors where there are any."""
    from huggingface_hub import snapshot_download

    ignore = [*OTHER_WEIGHTS, *OTHER_FOLDERS, "consolidated*"]  # the last: a second copy of the same weights
    with hub_errors(repository):
        options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
        local = Path(snapshot_download(repository, ignore_patterns=[*ignore, "*.bin"], **options))
        if not list(local.glob("*.safetensors")):
            local = Path(snapshot_download(repository, ignore_patterns=ignore, **options))
    return local


def remote_headers(
    repository: str, files: list[str], revision: str | None, cache_dir: Path | None
) -> tuple[Path, dict[str, TensorEntry]]:
    """The folder in the cache that holds `files` (patterns), and all tensors by name, of which no byte is fetched.

    SourceError if the model cannot be reached or has no safetensors, CheckpointError if a header is wrong.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    with hub_errors(repository):
        local = Path(snapshot_download(repository, revision=revision, cache_dir=cache_dir, allow_patterns=files))
        try:
            metadata = HfApi().get_safetensors_metadata(repository, revision=local.name)
        except NotASafetensorsRepoError as error:
            raise SourceError(
                f"{repository} has no safetensors weights, so its headers cannot be read alone. Download it with "
                f"`hf download {repository} --local-dir FOLDER`, and give the folder."
            ) from error
        except SafetensorsParsingError as error:
            raise CheckpointError(f"A weight file of {repository} has a corrupt header ({error}).") from error
    entries: dict[str, TensorEntry] = {}
    for file, content in metadata.files_metadata.items():
        for tensor, info in content.tensors.items():
            if info.dtype not in BITS:
                raise CheckpointError(f"{tensor} of {repository} has the unknown dtype {info.dtype}. Upgrade losparse.")
            begin, end = info.data_offsets
            entries[tensor] = TensorEntry(tensor, info.dtype, tuple(info.shape), local / file, begin, end - begin)
    return local, entries
