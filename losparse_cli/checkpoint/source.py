"""Hub id or folder -> a folder of files, checked before they are trusted."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, SourceError, UsageError
from . import foreign
from .hub import download, remote_headers
from .reader import PickleFile, SafetensorsFile, TensorEntry

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
REPORT = "losparse_report.json"
TIMING = "losparse_timing.json"
EVALUATION = "losparse_evaluation.json"  # what eval measured of a result, later

HUB_ID = re.compile(r"(?![.\-])[A-Za-z0-9_.\-]{1,96}(/[A-Za-z0-9_.\-]{1,96})?")


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
    def address(self) -> str:
        """What a person types to name it: the Hub id, or the folder."""
        return self.name if self.commit is not None else str(self.folder)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def elements(self) -> int:
        """Elements of all tensors."""
        return sum(entry.elements for entry in self.entries.values())

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The `quantization_config` of config.json, if there is one."""
        return self.config.get("quantization_config")

    @property
    def packing(self) -> str | None:
        """How another tool has packed the weights, None if they are plain or ours."""
        return foreign.packing(self.config, self.entries, self.folder)

    def require_floats(self) -> None:
        """UsageError if another tool has packed the weights, with what makes them floats again."""
        if self.packing is not None:
            remedy = foreign.floats_again(self.packing, self.config, self.address)
            raise UsageError(f"{self.name} is quantized already ({self.packing}). {remedy}")

    @property
    def is_compressed(self) -> bool:
        return (self.quantization or {}).get("quant_method") == "losparse"

    @property
    def vocabulary(self) -> int | None:
        """Tokens that the model knows, of its text part where it has several; None if config.json does not say."""
        inner = self.config.get("text_config")
        for part in (self.config, inner if isinstance(inner, dict) else {}):
            if isinstance(part.get("vocab_size"), int):
                return int(part["vocab_size"])
        return None

    def check_vocabulary(self, dense: Checkpoint) -> None:
        """UsageError if `dense` cannot be what this one was made from, as the sizes of their vocabularies differ."""
        if None not in (self.vocabulary, dense.vocabulary) and self.vocabulary != dense.vocabulary:
            raise UsageError(
                f"{self.address} has a vocabulary of {self.vocabulary}, {dense.address} of {dense.vocabulary}. Give "
                "the dense model that the first was made from."
            )

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

    With `headers_only` a Hub model's weights are not downloaded: its entries say what there is, but cannot be read.
    UsageError for what names no place, SourceError if it cannot be found or reached, CheckpointError if a file is
    wrong.
    """
    identifier = identifier_of(model)
    folder = Path(os.path.expanduser(identifier))  # unlike Path.expanduser, leaves an unknown ~user as it is
    if os.path.isdir(folder) and identifier:
        # As it was given, not as what a link leads to: it is written into the card.
        name = os.fsencode(os.path.basename(os.path.abspath(folder))).decode(errors="replace")
        return _open_folder(folder, name, None)
    if os.path.isfile(folder):
        if folder.suffix.lower() == ".gguf":
            raise foreign.no_weights(folder.parent, WEIGHTS)
        raise SourceError(f"{folder} is a file; give the folder that holds it and its config.json.")
    if not HUB_ID.fullmatch(identifier):
        raise SourceError(f"There is no folder {identifier!r}. Check the path, or give a Hub id such as user/name.")
    if headers_only:
        return _open_remote_headers(identifier, revision, cache_dir)
    local = download(identifier, revision, cache_dir)
    commit = local.name if re.fullmatch(r"[0-9a-f]{40}", local.name) else None
    return _open_folder(local, identifier, commit)


def identifier_of(model: object) -> str:
    """What names a model's place, as text; UsageError for what names none, such as the model itself."""
    if not isinstance(model, str | Path):
        raise UsageError(
            f"Models are read from a folder or the Hub, and this is a {type(model).__name__}. Save it with "
            "save_pretrained, its tokenizer too, and give the folder."
        )
    return str(model)


def _open_remote_headers(repository: str, revision: str | None, cache_dir: Path | None) -> Checkpoint:
    wanted = ["config.json", foreign.ADAPTER, *foreign.PACKED_FILES, REPORT, "*.py"]
    local, entries = remote_headers(repository, wanted, revision, cache_dir)
    if not (local / "config.json").is_file():
        raise SourceError(f"{repository} has no config.json, so it is no transformers checkpoint. Check its name.")
    foreign.check_adapter(local)
    foreign.check_names(repository, entries)
    return Checkpoint(local, repository, local.name, read_config(local / "config.json"), (), entries)


def _open_folder(folder: Path, name: str, commit: str | None) -> Checkpoint:
    if not (folder / "config.json").is_file():
        raise foreign.no_model(folder)
    foreign.check_adapter(folder)
    config = read_config(folder / "config.json")
    index, single, pickled = _index_of(folder)
    names = [single] if index is None else sorted(set(index.values()))
    files: list[SafetensorsFile | PickleFile] = []
    for file_name in names:
        path = folder / file_name
        if path.is_file():
            files.append(PickleFile(path, drop_shared=_ties(config)) if pickled else SafetensorsFile(path))
        elif index is not None:
            raise CheckpointError(
                f"The index of {folder} names the shard {file_name}, which is not there. Download it again or "
                "copy it into the folder."
            )
        elif path.is_symlink():
            raise CheckpointError(
                f"{path} is a link to {path.readlink()}, which is not there. Download the model again."
            )
    if not files:
        raise foreign.no_weights(folder, f"{WEIGHTS}, {INDEX} or {PICKLE}")
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
    foreign.check_names(str(folder), entries)
    return Checkpoint(folder, name, commit, config, tuple(files), entries)


def _index_of(folder: Path) -> tuple[dict[str, str] | None, str, bool]:
    """The checked weight map of the folder's index, None if it has a single file; that file; whether files are pickled.

    Files of a variant (model.fp16.safetensors) count where there are no others.
    """
    variant = foreign.only_variant(str(folder), os.listdir(folder))
    for single, index, pickled in ((WEIGHTS, INDEX, False), (PICKLE, PICKLE_INDEX, True)):
        if variant is not None:
            single, index = _of_variant(single, variant), _of_variant(index, variant)
        if (folder / single).is_file():
            return None, single, pickled
        if (folder / index).is_file():
            return check_index(folder / index, read_json(folder / index)), single, pickled
    return None, WEIGHTS, False


def _of_variant(file: str, variant: str) -> str:
    stem, _, ending = file.rpartition(".")
    return f"{stem}.{variant}.{ending}"


def _ties(config: dict[str, Any]) -> bool:
    """False if transformers would load tensors that share memory one by one."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return all(part.get("tie_word_embeddings", True) is True for part in parts)


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
    again = "Download or save the checkpoint again."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}. {again}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). {again}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}. {again}")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """config.json, with the entries that losparse reads itself of the right kind; CheckpointError otherwise."""
    config = read_json(path)
    architectures = config.get("architectures")
    if not isinstance(architectures, list | None) or not all(isinstance(name, str) for name in architectures or ()):
        raise CheckpointError(f"'architectures' in {path} must be a list of class names. Correct the file.")
    for key in ("auto_map", "quantization_config"):
        if not isinstance(config.get(key), dict | None):
            raise CheckpointError(f"{key!r} in {path} must be a JSON object. Correct the file.")
    return config
