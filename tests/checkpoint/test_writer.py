"""Shards are cut by bounds, filled in order, and valid; a folder appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from losparse_cli.checkpoint.journal import Journal
from losparse_cli.checkpoint.output import check_output
from losparse_cli.checkpoint.writer import ShardWriter, Slot, plan_shards, tensor_part
from losparse_cli.errors import CheckpointError, UsageError

TENSORS = {f"t{k}": torch.arange(k * 7, dtype=torch.float32) for k in (1, 5, 0, 3, 2)}


def write(folder: Path, max_bytes: int) -> list[str]:
    """Write TENSORS into shards; returns their names."""
    folder.mkdir(exist_ok=True)
    slots = [Slot((name,), tensor.numel() * 4) for name, tensor in TENSORS.items()]
    shards = plan_shards(slots, max_bytes)
    journal = Journal(folder, {"run": 1})
    writer = ShardWriter(folder, shards, journal)
    for name, tensor in list(TENSORS.items())[writer.done :]:
        writer.append([tensor_part(name, tensor)])
    writer.finish()
    journal.close()
    return [shard.file for shard in shards]


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40), st.integers(1, 300))
def test_shards_hold_every_slot_in_order_and_stay_small(bounds: list[int], max_bytes: int) -> None:
    shards = plan_shards([Slot((f"t{k}",), bound) for k, bound in enumerate(bounds)], max_bytes)
    assert [number for shard in shards for number in shard.slots] == list(range(len(bounds)))
    for shard in shards:
        assert sum(bounds[k] for k in shard.slots) <= max_bytes or len([k for k in shard.slots if bounds[k]]) == 1
        assert shard.header % 8 == 0
    if len(shards) == 1:
        assert shards[0].file == "model.safetensors"
    else:
        count = len(shards)
        assert [s.file for s in shards] == [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]


def test_two_slots_may_not_write_one_name() -> None:
    with pytest.raises(CheckpointError, match=r"tensor layer\.U,"):
        plan_shards([Slot(("layer.U", "layer.V"), 1), Slot(("layer.U",), 1)], 100)


@pytest.mark.parametrize("max_bytes", [1, 30, 60, 10_000])
def test_the_library_reads_what_was_written(max_bytes: int, tmp_path: Path) -> None:
    files = write(tmp_path / "work", max_bytes)
    found = {name: tensor for file in files for name, tensor in load_file(tmp_path / "work" / file).items()}
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert (tmp_path / "work" / "model.safetensors.index.json").exists() == (len(files) > 1)


@pytest.mark.parametrize("max_bytes", [1, 30, 10_000])
@pytest.mark.parametrize("stop", range(6))
def test_a_writer_goes_on_after_any_unit(stop: int, max_bytes: int, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    write(whole, max_bytes)
    work = tmp_path / "work"
    work.mkdir()
    shards = plan_shards([Slot((name,), tensor.numel() * 4) for name, tensor in TENSORS.items()], max_bytes)
    journal = Journal(work, {"run": 1})
    writer = ShardWriter(work, shards, journal)
    for name, tensor in list(TENSORS.items())[:stop]:
        writer.append([tensor_part(name, tensor)])
    if stop == 5:
        writer.finish()  # and the crash comes after the headers
    journal.close()
    write(work, max_bytes)
    assert toys.digests(work) == toys.digests(whole)


def test_a_unit_that_fails_half_way_leaves_no_trace(tmp_path: Path) -> None:
    def broken() -> list[bytes]:
        raise CheckpointError("the source is gone")
        yield b""  # type: ignore[unreachable]

    tmp_path = tmp_path / "work"
    tmp_path.mkdir()
    shards = plan_shards([Slot(("a",), 8), Slot(("b",), 8)], 100)
    journal = Journal(tmp_path, {})
    writer = ShardWriter(tmp_path, shards, journal)
    writer.append([("a", "U8", [2], [b"xy"])])
    with pytest.raises(CheckpointError, match="source is gone"):
        writer.append([("b", "U8", [4], (piece for part in ([b"12"], broken()) for piece in part))])
    assert writer.done == 1
    writer.append([("b", "U8", [4], [b"1234"])])
    writer.finish()
    journal.close()
    found = load_file(tmp_path / "model.safetensors")
    assert bytes(found["a"]) == b"xy"
    assert bytes(found["b"]) == b"1234"


def test_names_of_any_kind_fit_their_header(tmp_path: Path) -> None:
    names = ["é" * 50, '"' * 30, "\\" * 30, "\x01\n" * 10, "𝕏" * 20, ""]
    shards = plan_shards([Slot((name,), 1) for name in names], 1000)
    journal = Journal(tmp_path, {})
    writer = ShardWriter(tmp_path, shards, journal)
    for name in names:
        writer.append([(name, "F8_E4M3FNUZ", [1_000_000, 0, 1_000_000, 0, 1_000_000, 0, 999_999], [])])
    writer.finish()
    journal.close()
    assert set(toys.read_header(tmp_path / "model.safetensors")[0]) == {*names, "__metadata__"}


# --- the output folder ----------------------------------------------------------------------------


def test_a_place_that_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "config.json").write_text("{}")
    (tmp_path / "model").mkdir()
    for output in (tmp_path / "new", tmp_path / "empty", tmp_path / "model-small"):
        check_output(output, overwrite=False, reads=[tmp_path / "model"])
    check_output(tmp_path / "result", overwrite=True, reads=[tmp_path / "model"])


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UsageError, match="is a link"):
        check_output(tmp_path / "a", overwrite=False)
