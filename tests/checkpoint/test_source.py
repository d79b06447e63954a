"""Folders are opened in transformers' own order, and the index decides which copy of a tensor counts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file

from losparse_cli.checkpoint.source import HUB_ID, open_checkpoint
from losparse_cli.errors import CheckpointError, SourceError


def test_a_folder(tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model", shards=2)
    found = open_checkpoint(model)
    tensors = toys.tensor_bytes(model)
    assert (found.name, found.commit, found.folder, found.address) == ("model", None, model, str(model))
    assert found.entries.keys() == tensors.keys()
    assert found.nbytes == sum(len(raw) for _, _, raw in tensors.values())
    assert found.quantization is None
    assert not found.is_compressed
    assert found.report() == {}
    assert [file.path.name for file in found.files] == sorted(path.name for path in model.glob("*.safetensors"))


def test_a_home_folder_and_a_link_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toys.llama(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("~/model").folder == tmp_path / "model"
    assert open_checkpoint("~/link").entries.keys() == open_checkpoint("~/model").entries.keys()
    assert open_checkpoint("~/link").name == "link"  # as it was given


def test_a_single_file_counts_before_an_index_and_safetensors_before_pickles(tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model", shards=2)
    torch.save({"pickled": torch.ones(1)}, model / "pytorch_model.bin")
    assert len(open_checkpoint(model).files) == 2
    save_file({"single": torch.ones(1)}, model / "model.safetensors")
    assert list(open_checkpoint(model).entries) == ["single"]
    for path in model.glob("*.safetensors*"):
        path.unlink()
    assert list(open_checkpoint(model).entries) == ["pickled"]


def test_the_index_says_which_copy_of_a_tensor_counts(tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model", shards=2)
    first, second = sorted(model.glob("*.safetensors"))
    name = next(iter(toys.read_header(second)[0].keys() - {"__metadata__"}))
    save_file(load_file(first) | {name: torch.zeros(3)}, first)
    assert open_checkpoint(model).entries[name].path == second


def test_links_of_the_hubs_cache_are_read(tmp_path: Path) -> None:
    """A snapshot is a folder of links to blobs beside it."""
    model = toys.llama(tmp_path / "model", shards=2)
    snapshot = tmp_path / "models--user--toy" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--user--toy" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    found = open_checkpoint(snapshot)
    for file in found.files:
        for entry in file.entries.values():
            assert b"".join(file.chunks(entry)) == toys.tensor_bytes(model)[entry.name][2]


@pytest.mark.parametrize("name", ["user/model", "gpt2", "a.b/c_d-e", "0/1", "x" * 96])
def test_names_that_may_be_on_the_hub(name: str) -> None:
    assert HUB_ID.fullmatch(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "./x", "/x", "~x", "a/b/c", "a//b", "a/", "/", "a b", "ä/b", "a\nb", "-x", "http://x"]
)
def test_names_that_may_not(name: str) -> None:
    assert not HUB_ID.fullmatch(name)
    with pytest.raises(SourceError):
        open_checkpoint(name or "\0" * 0)


@pytest.mark.parametrize(
    ("changes", "keeps"),
    [({}, 1), ({"tie_word_embeddings": True}, 1), ({"tie_word_embeddings": False}, 2),
     ({"text_config": {"tie_word_embeddings": False}}, 2), ({"text_config": {"tie_word_embeddings": True}}, 1)],
)  # fmt: skip
def test_shared_memory_is_dropped_only_where_transformers_ties_it(
    changes: dict[str, Any], keeps: int, tmp_path: Path
) -> None:
    weight = torch.ones(2, 2)
    torch.save({"a.weight": weight, "b.weight": weight}, tmp_path / "pytorch_model.bin")
    toys.write_json(tmp_path / "config.json", changes)
    assert len(open_checkpoint(tmp_path).entries) == keeps


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", "\0"])
def test_a_pickled_index_may_name_nothing_outside_either(name: str, tmp_path: Path) -> None:
    toys.write_json(tmp_path / "config.json", {})
    toys.write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": {"a": name}})
    with pytest.raises(CheckpointError, match="outside its own folder"):
        open_checkpoint(tmp_path)
