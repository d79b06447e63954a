"""config.json gains two blocks and loses them again; the loader beside it is the package's own."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from losparse_cli.checkpoint import config as module
from losparse_cli.checkpoint.config import dense_config, layer_specs, layer_tensors, write_config
from losparse_cli.checkpoint.reader import TensorEntry
from losparse_cli.checkpoint.source import Checkpoint
from losparse_cli.errors import CheckpointError, FormatVersionError, UsageError
from losparse_cli.shim.layouts import LayerSpec
from losparse_cli.shim.loader import is_loader

SPEC = LayerSpec((6, 8), 2, 5, "unstructured", "csr")
DENSE: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "odd": {"kept": 1}}


def checkpoint(config: dict[str, Any], entries: dict[str, TensorEntry] | None = None) -> Checkpoint:
    return Checkpoint(Path("here"), "here", None, config, (), entries or {})


def written(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    write_config(folder, config, {"model.a": SPEC}, {"head": "output head"})
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("auto_map", [None, {"AutoModelForCausalLM": "modeling_own.Own"}])
def test_what_is_written_is_taken_away_again(auto_map: dict[str, str] | None, tmp_path: Path) -> None:
    before = DENSE | ({"auto_map": auto_map} if auto_map else {})
    found = written(tmp_path, before)
    assert found["auto_map"] == {**(auto_map or {}), "AutoConfig": "losparse_quantizer.LosparseConfig"}
    assert dense_config(found) == before
    assert layer_specs(checkpoint(found)) == {"model.a": SPEC}


def test_a_models_own_config_class_stays(tmp_path: Path) -> None:
    own = DENSE | {"auto_map": {"AutoConfig": "configuration_own.Own"}}
    assert write_config(tmp_path, DENSE, {}, {}) is True
    assert write_config(tmp_path, own, {}, {}) is False
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["auto_map"] == own["auto_map"]
    assert dense_config(found) == own


def test_the_loader_is_the_packages_own_code(tmp_path: Path) -> None:
    """Equal but for the names in its relative imports, which must lead to files that are there."""
    written(tmp_path, DENSE)
    files = sorted(tmp_path.glob("*.py"))
    assert [path.name for path in files] == [
        "losparse_codec.py",
        "losparse_embedding.py",
        "losparse_experts.py",
        "losparse_kept.py",
        "losparse_layouts.py",
        "losparse_linear.py",
        "losparse_loader.py",
        "losparse_operator.py",
        "losparse_packed.py",
        "losparse_quantizer.py",
        "losparse_stored.py",
        "losparse_streams.py",
        "losparse_tables.py",
    ]
    for path in files:
        assert is_loader(path.name)
        own = (Path(module.__file__).parent.parent / "shim" / path.name.removeprefix("losparse_")).read_text()
        assert re.sub(r"^from \.losparse_", "from .", path.read_text(), flags=re.MULTILINE) == own
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert (tmp_path / f"{node.module}.py").is_file()
                assert node.level == 1
    assert not is_loader("losparse_report.json")
    assert not is_loader("modeling_own.py")


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dense": ({}, UsageError, "here is no losparse checkpoint.*losparse compress here"),
    "another method": ({"quant_method": "gptq"}, UsageError, "no losparse checkpoint"),
    "newer": (
        {"quant_method": "losparse", "format_version": 5},
        FormatVersionError,
        "version 5.*pip install --upgrade",
    ),
    "no version": ({"quant_method": "losparse"}, FormatVersionError, "version None"),
    "no modules": ({"quant_method": "losparse", "format_version": 1}, CheckpointError, "lists no compressed modules"),
    "not a map": ({"quant_method": "losparse", "format_version": 1, "modules": {"a": 5}}, CheckpointError, "layer a"),
    "incomplete": (
        {"quant_method": "losparse", "format_version": 1, "modules": {"a": {"rank": 1}}},
        CheckpointError,
        "layer a",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_block_that_cannot_be_used(case: str) -> None:
    block, kind, says = WRONG[case]
    with pytest.raises(kind, match=says):
        layer_specs(checkpoint({"quantization_config": block} if block else {}))


def entries(prefix: str, **changes: tuple[str, tuple[int, ...]]) -> dict[str, TensorEntry]:
    kinds = {"U": ("BF16", (6, 2)), "V": ("BF16", (2, 8)), "weight": ("BF16", (5,)), "S_columns": ("U16", (5,)),
             "S_offsets": ("I32", (7,))} | changes  # fmt: skip
    return {
        f"{prefix}.{suffix}": TensorEntry(f"{prefix}.{suffix}", dtype, shape, Path("file"), 0, 0)
        for suffix, (dtype, shape) in kinds.items()
    }


@pytest.mark.parametrize("prefix", ["model.a", "a", "llama.model.a", "model.model.a"])
def test_tensors_are_found_under_another_heads_prefix(prefix: str) -> None:
    """As transformers writes them when the model is saved from another class."""
    found = layer_tensors(checkpoint(DENSE, entries(prefix)), "model.a", SPEC)
    assert {entry.name for entry in found.values()} == set(entries(prefix))


def test_a_recorded_name_on_disk_comes_first() -> None:
    spec = LayerSpec((6, 8), 2, 5, "unstructured", "csr", tensor="disk.a")
    both = entries("disk.a") | entries("model.a")
    assert layer_tensors(checkpoint(DENSE, both), "model.a", spec)["U"].name == "disk.a.U"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"U": ("BF16", (2, 6))}, r"model\.a\.U is BF16 \[2, 6\], but config\.json asks for bfloat16 \[6, 2\]"),
        ({"V": ("F16", (2, 8))}, r"model\.a\.V is F16"),
        ({"weight": ("I8", (5,))}, r"model\.a\.weight is I8, not floating"),
        ({"weight": ("BF16", (5, 1))}, r"model\.a\.weight is BF16 \[5, 1\]"),
        ({"S_offsets": ("I64", (7,))}, r"S_offsets is I64"),
        ({"S_columns": ("F4", (5,))}, r"S_columns is F4"),
    ],
)
def test_a_tensor_of_the_wrong_kind_is_named(changes: dict[str, tuple[str, tuple[int, ...]]], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        layer_tensors(checkpoint(DENSE, entries("model.a", **changes)), "model.a", SPEC)


@pytest.mark.parametrize("suffix", ["U", "V", "weight", "S_columns", "S_offsets"])
def test_a_tensor_that_is_missing_is_named(suffix: str) -> None:
    found = entries("model.a")
    del found[f"model.a.{suffix}"]
    with pytest.raises(CheckpointError, match=rf"here: .*model\.a\.{suffix}.*Compress it again"):
        layer_tensors(checkpoint(DENSE, found), "model.a", SPEC)
