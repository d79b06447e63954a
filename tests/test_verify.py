"""A sound checkpoint has no problem; every kind of damage is one, named by file and tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys

from losparse_cli.budget.recipe import Recipe
from losparse_cli.compress import compress
from losparse_cli.errors import CheckpointError, SourceError, UsageError
from losparse_cli.export import export
from losparse_cli.inspection import inspect
from losparse_cli.verify import require_sound, verify
from tests.hearing import Hearing

Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("verify")
    model = toys.llama(place / "model")
    compress(model, place / "out", Recipe(rank=4, sparsity=0.8), max_shard_size="60kB")
    return place / "out"


@pytest.fixture
def sound(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "out")


def test_a_sound_checkpoint(sound: Path) -> None:
    heard = Hearing()
    found = verify(sound, progress=heard)
    assert found.sound
    assert found.problems == ()
    assert found.layers == 28
    assert found.tensors == len(toys.tensor_bytes(sound))
    assert heard.totals == heard.done == {"layers": 28}
    decisive = {path for kind in ("*.safetensors", "*.json", "losparse_*.py") for path in sound.glob(kind)}
    assert found.hashed == len(decisive) - 2  # of the report and of the times there is no hash
    require_sound(sound)


def shard_of(folder: Path, tensor: str) -> tuple[Path, int, int]:
    """The file that holds a tensor, and where its bytes begin and end there."""
    for path in folder.glob("*.safetensors"):
        header, start = toys.read_header(path)
        if tensor in header:
            begin, end = header[tensor]["data_offsets"]
            return path, start + begin, start + end
    raise AssertionError(tensor)


def overwrite(folder: Path, tensor: str, raw: bytes, offset: int = 0) -> Path:
    path, begin, end = shard_of(folder, tensor)
    assert begin + offset + len(raw) <= end
    with path.open("r+b") as file:
        file.seek(begin + offset)
        file.write(raw)
    return path


def without_report(folder: Path) -> None:
    """As transformers saves it again: no report, so only headers, config and indices can be checked."""
    (folder / "losparse_report.json").unlink()


@pytest.mark.parametrize("suffix", ["U", "V", "weight"])
@pytest.mark.parametrize("bits", [b"\x80\x7f", b"\xc0\x7f", b"\x80\xff"], ids=["inf", "nan", "-inf"])
def test_values_that_are_not_finite(suffix: str, bits: bytes, sound: Path) -> None:
    without_report(sound)
    path = overwrite(sound, f"{Q_PROJ}.{suffix}", bits, offset=20)
    (problem,) = verify(sound).problems
    assert str(path) in problem
    assert f"{Q_PROJ}.{suffix} holds NaN or infinity" in problem
    with pytest.raises(CheckpointError, match=f"{Q_PROJ}.{suffix} holds NaN"):
        export(sound, sound.parent / "dense")
    assert [path.name for path in sound.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("suffix", ["S_gaps", "S_offsets"])
def test_an_index_that_is_damaged(suffix: str, sound: Path) -> None:
    without_report(sound)
    path = overwrite(sound, f"{Q_PROJ}.{suffix}", b"\x77\x77\x77\x77", offset=4)
    (problem,) = verify(sound).problems
    assert str(path) in problem
    assert f"layer {Q_PROJ} has a damaged index" in problem
    with pytest.raises(CheckpointError, match="damaged index"):
        require_sound(sound)


def test_one_bit_is_enough_where_hashes_are_recorded(sound: Path) -> None:
    path, begin, _ = shard_of(sound, "model.norm.weight")
    raw = bytearray(path.read_bytes())
    raw[begin] ^= 1
    path.write_bytes(raw)
    (problem,) = verify(sound).problems
    assert str(path) in problem
    assert "SHA-256 differs" in problem


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"]["modules"])
    toys.write_json(folder / "config.json", config)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a layer less": (lambda modules: modules.pop(Q_PROJ), f"{Q_PROJ}.weight belongs to no layer"),
    "a layer more": (lambda modules: modules.update({"model.more": modules[Q_PROJ]}), "model.more has no tensor"),
    "another rank": (lambda modules: modules[Q_PROJ].update(rank=3), f"{Q_PROJ}.U is BF16 [64, 4]"),
    "another count": (lambda modules: modules[Q_PROJ].update(nnz=5), f"{Q_PROJ}.weight is BF16"),
    "another shape": (lambda modules: modules[Q_PROJ].update(shape=[64, 32]), f"{Q_PROJ}.V is BF16 [4, 64]"),
    "another layout": (lambda modules: modules[Q_PROJ].update(layout="bitmask"), f"{Q_PROJ}.S_mask is missing"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_disagrees_with_the_weights(case: str, sound: Path) -> None:
    change, says = CONFIGS[case]
    without_report(sound)
    edit_config(sound, change)
    problems = verify(sound).problems
    assert len(problems) == 1
    assert says in problems[0]


@pytest.mark.parametrize("wrong", [["lm_head"], {"lm_head": ["output head"]}, 5])
def test_reasons_that_are_none(wrong: Any, sound: Path) -> None:
    config = json.loads((sound / "config.json").read_text())
    config["quantization_config"]["skipped"] = wrong
    without_report(sound)
    toys.write_json(sound / "config.json", config)
    (problem,) = verify(sound).problems
    assert "damaged list 'skipped'" in problem
    with pytest.raises(CheckpointError, match="damaged list 'skipped'"):
        inspect(sound)


def test_every_problem_is_listed_and_the_first_one_raised(sound: Path) -> None:
    (sound / "losparse_linear.py").unlink()
    overwrite(sound, f"{Q_PROJ}.U", b"\xc0\x7f")
    found = verify(sound)
    assert len(found.problems) == 3  # the value, the hash of its shard, and the missing file
    assert not found.sound
    with pytest.raises(CheckpointError, match=r"NaN or infinity.*2 more; losparse verify"):
        require_sound(sound)


def test_a_file_that_losparse_did_not_write(sound: Path) -> None:
    """transformers would read model.safetensors before any shard of the index."""
    tensors = toys.tensor_bytes(sound)
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    toys.raw_safetensors(sound / "model.safetensors", header, data)
    (problem,) = verify(sound).problems
    assert "model.safetensors is not among the files that losparse wrote" in problem


@pytest.mark.parametrize("name", ["../out/config.json", "/etc/passwd", ""])
def test_a_report_that_names_files_outside(name: str, sound: Path) -> None:
    report = json.loads((sound / "losparse_report.json").read_text())
    report["files"][name] = {"size": 0, "sha256": ""}
    toys.write_json(sound / "losparse_report.json", report)
    (problem,) = verify(sound).problems
    assert "outside the folder" in problem


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"layers": 5}', '{"layers": [], "files": 3}', '{"layers": [{}]}']
)
def test_a_report_that_cannot_be_read(content: str, sound: Path) -> None:
    (sound / "losparse_report.json").write_text(content)
    if content == "{}":  # nothing recorded, nothing to compare with
        assert verify(sound).hashed == 0
        return
    with pytest.raises(CheckpointError, match=r"losparse_report\.json"):
        verify(sound)


def test_extra_tensors_with_names_like_ours_are_no_problem(tmp_path: Path) -> None:
    import torch

    extra = {"more.U": torch.ones(2), "more.S_mask": torch.ones(2), "norms.weight": torch.ones(3)}
    model = toys.llama(tmp_path / "model", extra=extra)
    compress(model, tmp_path / "out", Recipe(rank=4, sparsity=0.8))
    assert verify(tmp_path / "out").problems == ()


def test_what_cannot_be_opened_is_raised(sound: Path, tmp_path: Path) -> None:
    path = max(sound.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=path.name):
        verify(sound)
    with pytest.raises(SourceError, match="no folder"):
        verify(tmp_path / "absent")
    with pytest.raises(UsageError, match="no losparse checkpoint"):
        verify(toys.llama(tmp_path / "dense"))
