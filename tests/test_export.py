"""U V + S -> dense: summed in float32, rounded once; nothing of ours is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import toys
import yaml
from safetensors.torch import load_file
from terminal import done

from losparse_cli.checkpoint.config import layer_specs, layer_tensors
from losparse_cli.checkpoint.source import open_checkpoint

LAYOUTS: dict[str, tuple[str, ...]] = {
    "bitmask": ("--rank", "4", "--sparsity", "0.4"),
    "gaps": ("--rank", "4", "--sparsity", "0.9"),
    "rows": ("--rank", "4", "--pattern", "rows", "--sparsity", "0.6"),
    "columns": ("--rank", "4", "--pattern", "columns", "--sparsity", "0.6"),
    "n:m": ("--rank", "4", "--pattern", "2:4"),
    "no S": ("--rank", "8", "--sparsity", "1"),
    "no U and V": ("--sparsity", "0.8"),
}


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_weight_is_u_v_plus_s_rounded_once(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Checked against the tensors on disk, with S decoded by the layer that transformers would run."""
    from losparse_cli.shim.linear import LowRankSparseLinear

    model = toys.llama(tmp_path / "model", dtype=dtype, layers=1)
    done("compress", model, "-o", tmp_path / "out", *LAYOUTS[case])
    done("export", tmp_path / "out", "--dense", "-o", tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "out")
    specs = layer_specs(checkpoint)
    assert len(specs) == 7
    for name, spec in specs.items():
        layer = LowRankSparseLinear(spec, bias=False, dtype=dtype)
        layer.load_state_dict({k: stored[entry.name] for k, entry in layer_tensors(checkpoint, name, spec).items()})
        with torch.no_grad():
            expected = layer.dense()
        exported = dense[f"{name}.weight"]
        assert exported.dtype == dtype
        assert torch.equal(exported, expected.to(dtype))
        assert not torch.equal(exported, load_file(model / "model.safetensors")[f"{name}.weight"])


def test_nothing_of_ours_is_left(tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    (model / "README.md").write_text("---\nlicense: mit\ntags: [toy]\n---\n# Toy\n")
    done("compress", model, "-o", tmp_path / "out", "--rank", "4", "--sparsity", "0.8")
    done("export", tmp_path / "out", "--dense", "-o", tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == json.loads(
        (model / "config.json").read_text()
    )
    found = {path.name for path in (tmp_path / "dense").iterdir()}
    assert found == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    shapes = {name: shape for name, (_, shape, _) in toys.tensor_bytes(tmp_path / "dense").items()}
    assert shapes == {name: shape for name, (_, shape, _) in toys.tensor_bytes(model).items()}
    card = yaml.safe_load((tmp_path / "dense" / "README.md").read_text().split("---")[1])
    assert card["license"] == "mit"
    assert "base_model_relation" not in card


def test_stock_transformers_loads_the_export(tmp_path: Path) -> None:
    import transformers

    model = toys.llama(tmp_path / "model", dtype=torch.float32)
    done("compress", model, "-o", tmp_path / "out", "--rank", "4", "--sparsity", "0.8")
    done("export", tmp_path / "out", "--dense", "-o", tmp_path / "dense", "--max-shard-size", "100kB")
    assert (tmp_path / "dense" / "model.safetensors.index.json").is_file()
    loaded, notes = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    assert torch.isfinite(loaded(torch.arange(9)[None]).logits).all()


def test_compressing_the_export_again_finds_the_same_size(tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model")
    options = ("--rank", "4", "--sparsity", "0.8")
    done("compress", model, "-o", tmp_path / "one", *options)
    done("export", tmp_path / "one", "--dense", "-o", tmp_path / "dense")
    done("compress", tmp_path / "dense", "-o", tmp_path / "two", *options)
    one, two = (json.loads((tmp_path / k / "losparse_report.json").read_text()) for k in ("one", "two"))
    assert [(x["rank"], x["nnz"]) for x in one["layers"]] == [(x["rank"], x["nnz"]) for x in two["layers"]]
    assert two["totals"]["relative_error"] < one["totals"]["relative_error"]


def test_overwrite_replaces_an_export(tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model", layers=1)
    done("compress", model, "-o", tmp_path / "out", "--rank", "4", "--sparsity", "0.8")
    export = ("export", tmp_path / "out", "--dense", "-o", tmp_path / "dense")
    done(*export, "--max-shard-size", "20kB")
    done(*export, "--overwrite")
    assert [path.name for path in (tmp_path / "dense").glob("*.safetensors*")] == ["model.safetensors"]


def test_an_export_is_dense_without_being_asked_and_speaks_json(tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model", layers=1)
    done("compress", model, "-o", tmp_path / "out", "--rank", "4", "--sparsity", "0.8")
    ended = done("export", tmp_path / "out", "-o", tmp_path / "dense", "--json")
    assert json.loads(ended.out) == {"output": str(tmp_path / "dense")}
    assert ended.err == ""
    done("export", tmp_path / "out", "--dense", "-o", tmp_path / "asked")
    assert toys.tensor_bytes(tmp_path / "asked") == toys.tensor_bytes(tmp_path / "dense")
