"""Hub id or folder -> a folder of files, checked before they are trusted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, SourceError
from .reader import PickleFile, SafetensorsFile, TensorEntry

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
REPORT = "losparse_report.json"
TIMING = "losparse_timing.json"

# Weights in other forms, and folders that hold nothing but them.
OTHER_WEIGHTS = ("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ot", "*.tflite", "*.pt", "*.pth", "*.ckpt")
OTHER_FOLDERS = ("original/*", "onnx/*", "openvino/*", "coreml/*", "gguf/*")


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: where it is, what it is called, its config and its tensors.

    files: weight files in the order in which they are read. entries: tensor name -> where it lies.
    commit: the Hub's commit hash, or None for a folder.
    """

    folder: Path
    name: str
    commit: str | None
    config: dict[str, Any]
    files: tuple[SafetensorsFile | PickleFile, ...]
    entries: dict[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The `quantization_config` of config.json, if there is one."""
        found = self.config.get("quantization_config")
        return found if isinstance(found, dict) else None

    @property
    def is_compressed(self) -> bool:
        return (self.quantization or {}).get("quant_method") == "losparse"

    def report(self) -> dict[str, Any]:
        """losparse_report.json, or {} if the checkpoint has none."""
        path = self.folder / REPORT
        return read_json(path) if path.is_file() else {}


def open_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    headers_only: bool = False,
) -> Checkpoint:
    """The checkpoint named by a folder or a Hub id, with every header and index checked.

    With `headers_only` a Hub model's weights are not downloaded: its entries say what there is, but
    cannot be read. SourceError if it cannot be found or reached, CheckpointError if a file is wrong.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _open_folder(folder, folder.resolve().name, None)
    if folder.is_file():
        raise SourceError(f"{folder} is a file; give the folder that holds it and its config.json.")
    identifier = str(model)
    if identifier.startswith((".", "/", "~")) or identifier.count("/") > 1 or not re.fullmatch(r"[\w.\-/]+", identifier):
        raise SourceError(f"There is no folder {identifier}. Check the path, or give a Hub id such as user/name.")
    if headers_only:
        return _open_remote_headers(identifier, revision, cache_dir)
    local = _download(identifier, revision, cache_dir)
    commit = local.name if re.fullmatch(r"[0-9a-f]{40}", local.name) else None
    return _open_folder(local, identifier, commit)


def _open_folder(folder: Path, name: str, commit: str | None) -> Checkpoint:
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    if config is None:
        raise SourceError(
            f"{folder} has no config.json, so it is no transformers checkpoint. Give the folder that "
            "`save_pretrained` wrote."
        )
    index, kind = _index_of(folder)
    if index is None:
        single = folder / (WEIGHTS if kind is SafetensorsFile else PICKLE)
        names = [single.name] if single.is_file() else []
    else:
        names = sorted(set(index.values()))
    if not names:
        raise SourceError(
            f"{folder} has no {WEIGHTS}, {INDEX} or {PICKLE}: there are no weights to read. If they are in "
            "another form, load the model in transformers and save it with save_pretrained first."
        )
    files = []
    for file_name in names:
        path = folder / file_name
        if not path.is_file():
            raise CheckpointError(
                f"The index of {folder} names the shard {file_name}, which is not there. Download it again or "
                "copy it into the folder."
            )
        files.append(kind(path))
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for tensor, entry in file.entries.items():
            if index is not None and index.get(tensor) != entry.path.name:
                if tensor not in index:
                    raise CheckpointError(
                        f"{entry.path} holds the tensor {tensor}, which the index does not list. Save the "
                        "checkpoint again to make index and shards agree."
                    )
                continue  # a stale copy: the index says which file counts
            entries[tensor] = entry
    missing = sorted(set(index or ()) - set(entries))
    if missing:
        raise CheckpointError(
            f"The tensor {missing[0]} is missing from {(index or {})[missing[0]]}, where the index of {folder} "
            f"says it is ({len(missing)} such in all). Download the checkpoint again."
        )
    return Checkpoint(folder, name, commit, config, tuple(files), entries)


def _index_of(folder: Path) -> tuple[dict[str, str] | None, type[SafetensorsFile] | type[PickleFile]]:
    """The checked weight map of the folder's index, None if it has a single file, and the files' kind."""
    if (folder / WEIGHTS).is_file():
        return None, SafetensorsFile
    for name, kind in ((INDEX, SafetensorsFile), (PICKLE_INDEX, PickleFile)):
        if (folder / name).is_file() and not (kind is PickleFile and (folder / PICKLE).is_file()):
            return check_index(folder / name, read_json(folder / name)), kind
    return None, SafetensorsFile if not (folder / PICKLE).is_file() else PickleFile


def check_index(path: Path, index: dict[str, Any]) -> dict[str, str]:
    """`weight_map` of an index file; CheckpointError if it is malformed or names a file outside its folder."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path} has no 'weight_map' from tensor to file. Save the checkpoint again.")
    for tensor, file in weight_map.items():
        if not file or "/" in file or "\\" in file or file in (".", "..") or "\0" in file:
            raise CheckpointError(
                f"{path} says that the tensor {tensor} lies in {file!r}, outside its own folder. Do not use this "
                "checkpoint unless you know who made it; shards must lie beside the index."
            )
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Download or save the checkpoint again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content


# --- the Hub --------------------------------------------------------------------------------------


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Turns what huggingface_hub raises about `repository` into a SourceError with a remedy."""
    import huggingface_hub.errors as hub

    try:
        yield
    except hub.GatedRepoError as error:
        raise SourceError(
            f"{repository} is gated. Accept its terms on its Hub page, then log in with: hf auth login"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise SourceError(
            f"The Hub has no model {repository!r} that you can see. Check the spelling; if it is private, log in "
            "with: hf auth login"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise SourceError(f"{repository} has no such revision. Leave out --revision, or name a branch or tag.") from error
    except hub.HFValidationError as error:
        raise SourceError(f"{repository!r} is neither a folder nor a Hub id such as user/name.") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        raise SourceError(
            f"Cannot reach the Hub to fetch {repository}, and it is not in the cache. Check the network, unset "
            "HF_HUB_OFFLINE, or give a local folder."
        ) from error
    except hub.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "unknown")
        if status in (401, 403):
            raise SourceError(f"The Hub refused access to {repository}. Log in with: hf auth login") from error
        raise SourceError(f"The Hub answered with status {status} for {repository}. Try again later.") from error
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
            raise  # the disk, not the network
        raise SourceError(f"Cannot reach the Hub to fetch {repository}: {error}. Check the network.") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("httpx", "httpcore", "httpx2", "httpcore2", "requests"):
            raise SourceError(f"Cannot reach the Hub to fetch {repository}: check the network.") from error
        raise


def _download(repository: str, revision: str | None, cache_dir: Path | None) -> Path:
    from huggingface_hub import snapshot_download

    ignore = [*OTHER_WEIGHTS, *OTHER_FOLDERS]
    with hub_errors(repository):
        options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
        local = Path(snapshot_download(repository, ignore_patterns=[*ignore, "*.bin"], **options))
        if not list(local.glob("*.safetensors")):
            local = Path(snapshot_download(repository, ignore_patterns=ignore, **options))
    return local


def _open_remote_headers(repository: str, revision: str | None, cache_dir: Path | None) -> Checkpoint:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    with hub_errors(repository):
        local = Path(
            snapshot_download(
                repository, revision=revision, cache_dir=cache_dir, allow_patterns=["*.json", "*.py"]
            )
        )
        try:
            metadata = HfApi().get_safetensors_metadata(repository, revision=revision)
        except NotASafetensorsRepoError as error:
            raise SourceError(
                f"{repository} has no safetensors weights, so its headers cannot be read alone. Download it and "
                "give the folder."
            ) from error
        except SafetensorsParsingError as error:
            raise CheckpointError(f"A weight file of {repository} has a corrupt header ({error}).") from error
    if not (local / "config.json").is_file():
        raise SourceError(f"{repository} has no config.json, so it is no transformers checkpoint.")
    entries: dict[str, TensorEntry] = {}
    for file, content in metadata.files_metadata.items():
        for tensor, info in content.tensors.items():
            begin, end = info.data_offsets
            entries[tensor] = TensorEntry(tensor, info.dtype, tuple(info.shape), local / file, begin, end - begin)
    return Checkpoint(local, repository, local.name, read_json(local / "config.json"), (), entries)
