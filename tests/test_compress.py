"""Dense checkpoint -> U, V, S: the same bytes every time, all else untouched, in one layer's memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors import safe_open
from safetensors.torch import load_file
from terminal import bare_environment, done, losparse

SMALL = ("--rank", "4", "--sparsity", "0.8")
GATE = "model.layers.1.mlp.gate_proj"


def compress(model: Path, place: Path, *options: str, name: str = "out") -> Path:
    done("compress", model, "-o", place / name, *(options or SMALL), cwd=place)
    return place / name


def report_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "losparse_report.json").read_text()))


def factors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """The tensors of a compressed folder that were not there before."""
    return {
        name: tensor
        for name, tensor in toys.tensor_bytes(folder).items()
        if name.endswith((".U", ".V")) or ".S_" in name
    }


# --- the same bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), SMALL, ("--pattern", "2:4", "--rank", "4")])
def test_twice_the_same_is_the_same_bytes(options: tuple[str, ...], tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model", layers=2, hidden=256, intermediate=280)
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        done("compress", model, "-o", "out", *options, cwd=tmp_path / place)
    assert toys.digests(tmp_path / "a" / "out") == toys.digests(tmp_path / "b" / "out")


def test_a_seed_decides_the_randomized_svd_alone(tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model", layers=2, hidden=256, intermediate=280)  # large enough for a randomized SVD
    first = compress(model, tmp_path, *SMALL, name="first")
    second = compress(model, tmp_path, *SMALL, "--seed", "1", name="second")
    changed = {name for name, tensor in factors(first).items() if tensor != factors(second)[name]}
    assert f"{GATE}.U" in changed


def test_shards_change_no_factor(tmp_path: Path) -> None:
    whole = compress(toys.llama(tmp_path / "whole"), tmp_path, name="a")
    split = toys.llama(tmp_path / "split", shards=4)
    assert toys.tensor_bytes(compress(split, tmp_path, name="b")) == toys.tensor_bytes(whole)
    written_split = compress(tmp_path / "whole", tmp_path, *SMALL, "--max-shard-size", "30kB", name="c")
    assert len(list(written_split.glob("*.safetensors"))) > 3
    assert toys.tensor_bytes(written_split) == toys.tensor_bytes(whole)


def test_the_order_of_shards_changes_nothing(tmp_path: Path) -> None:
    split = toys.llama(tmp_path / "split", shards=3)
    turned = shutil.copytree(split, tmp_path / "turned")
    names = sorted(path.name for path in split.glob("*.safetensors"))
    index = json.loads((split / "model.safetensors.index.json").read_text())
    renamed = dict(zip(names, reversed(names), strict=True))
    for old, new in renamed.items():
        shutil.copyfile(split / old, turned / new)
    index["weight_map"] = {name: renamed[file] for name, file in reversed(index["weight_map"].items())}
    toys.write_json(turned / "model.safetensors.index.json", index)
    one, other = compress(split, tmp_path, name="a"), compress(turned, tmp_path, name="b")
    assert toys.tensor_bytes(one) == toys.tensor_bytes(other)
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
    assert report_of(one)["layers"] == report_of(other)["layers"]


# --- all else untouched ---------------------------------------------------------------------------


def test_every_dtype_is_copied_bit_for_bit(tmp_path: Path) -> None:
    """Tensors that the model does not know, of every kind, shape and alignment that the format has."""
    model = toys.llama(tmp_path / "model")
    source = dict(toys.tensor_bytes(model))
    bits = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
            "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64,
            "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # fmt: skip
    for number, (dtype, width) in enumerate(bits.items()):
        for label, shape in (("matrix", [3, 4]), ("empty", [0, 5]), ("scalar", []), ("cube", [1, 2, 4])):
            size = torch.Size(shape).numel()
            if size * width % 8 == 0:
                raw = os.urandom(size * width // 8)
                if dtype.startswith(("F", "BF", "C")):
                    raw = bytes(byte & 0x3F for byte in raw)  # neither infinite nor NaN, which is refused
                source[f"extra.{dtype}.{label}"] = (dtype, shape, raw)
        source[f"extra.{number}.odd"] = ("U8", [number + 1], os.urandom(number + 1))
    header, data = {}, b""
    for name, (dtype, shape, raw) in source.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    toys.raw_safetensors(model / "model.safetensors", header, data)
    out = compress(model, tmp_path)
    found = toys.tensor_bytes(out)
    copied = {name for name in source if not name.endswith("_proj.weight")}
    assert len(copied) > 90
    assert {name: found[name] for name in copied} == {name: source[name] for name in copied}
    done("verify", out)
    done("export", out, "--dense", "-o", tmp_path / "dense")
    dense = toys.tensor_bytes(tmp_path / "dense")
    assert dense.keys() == source.keys()
    assert {name: dense[name] for name in copied} == {name: source[name] for name in copied}


def test_the_safetensors_library_reads_the_result(tmp_path: Path) -> None:
    out = compress(toys.llama(tmp_path / "model"), tmp_path)
    expected = toys.tensor_bytes(out)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(expected)
        assert file.metadata() == {"format": "pt"}
        for name, (_, shape, raw) in expected.items():
            tensor = file.get_tensor(name)
            assert list(tensor.shape) == shape
            assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == raw


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_dtype_is_compressed_in_its_own(dtype: torch.dtype, tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model", dtype=dtype)
    out = compress(model, tmp_path)
    tensors = load_file(out / "model.safetensors")
    assert {tensors[f"{GATE}.{suffix}"].dtype for suffix in ("U", "V", "weight")} == {dtype}
    done("verify", out)
    report = report_of(out)
    assert len(report["layers"]) == 28
    before = sum(tensor.numel() * tensor.itemsize for tensor in load_file(model / "model.safetensors").values())
    assert report["model_bytes_before"] == before
    assert report["model_bytes_after"] == sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


@pytest.mark.parametrize("tied", [True, False])
def test_a_pickled_model_gives_the_same_factors(tied: bool, tmp_path: Path) -> None:
    plain = toys.llama(tmp_path / "plain", tied=tied)
    pickled = shutil.copytree(plain, tmp_path / "pickled")
    tensors = load_file(plain / "model.safetensors")
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # one storage under two names
    torch.save(tensors, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    one, other = compress(plain, tmp_path, name="a"), compress(pickled, tmp_path, name="b")
    assert toys.tensor_bytes(one) == toys.tensor_bytes(other)  # and the tied weight is stored once


def test_shared_memory_is_no_tie_where_the_config_says_so(tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model", tied=False)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    found = toys.tensor_bytes(compress(model, tmp_path))
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"]


def test_pickled_shards(tmp_path: Path) -> None:
    plain = toys.llama(tmp_path / "plain")
    pickled = shutil.copytree(plain, tmp_path / "pickled")
    tensors = load_file(plain / "model.safetensors")
    tensors["model.mask"] = torch.tensor([[True, False, True]])
    places = {name: f"pytorch_model-{k % 2 + 1:05d}-of-00002.bin" for k, name in enumerate(tensors)}
    for file in set(places.values()):
        torch.save({name: tensors[name] for name in tensors if places[name] == file}, pickled / file)
    toys.write_json(pickled / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": places})
    (pickled / "model.safetensors").unlink()
    one, other = compress(plain, tmp_path, name="a"), compress(pickled, tmp_path, name="b")
    found = toys.tensor_bytes(other)
    assert found.pop("model.mask") == ("BOOL", [1, 3], b"\1\0\1")
    assert found == toys.tensor_bytes(one)
    assert not list(other.glob("pytorch_model*"))


def test_companions_are_copied_and_strays_are_not(tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model")
    companions = ["tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE", "NOTICE.txt",
                  "USE_POLICY.md", "generation_config.json", "modeling_own.py", "1_Pooling/config.json",
                  "2_Dense/config.json", "2_Dense/model.safetensors", "additional_chat_templates/t.jinja"]  # fmt: skip
    strays = ["tf_model.h5", "model.onnx", "optimizer.pt", ".git/config", ".hidden.json", "tf_model.h5.index.json",
              "a/b/c.json", "checkpoint-500/config.json", "checkpoint-500/model.safetensors", "onnx/config.json",
              os.fsdecode(b"latin-\xe9.json")]  # fmt: skip
    for name in (*companions, *strays):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(os.urandom(20))
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../.."}, {"path": "."}, {}, 5]
    toys.write_json(model / "modules.json", modules)
    out = compress(model, tmp_path)
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert set(companions) <= found
    assert not set(strays) & found
    for name in companions:
        assert (out / name).read_bytes() == (model / name).read_bytes()


def test_a_link_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    """A copy that is pushed later would publish the reader's own files."""
    (tmp_path / "secret").write_text("of the reader")
    model = toys.llama(tmp_path / "model")
    (model / "notes.txt").symlink_to(tmp_path / "secret")
    complaint = losparse("compress", model, "-o", tmp_path / "out", *SMALL).complaint
    assert "notes.txt is a link to" in complaint
    assert "remove the link" in complaint
    assert {path.name for path in tmp_path.iterdir()} == {"secret", "model"}  # said before the work, not after it


def test_config_keeps_what_it_had(tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model", rope_theta=1234.5, an_unknown_key={"kept": [1, 2]})
    config = json.loads((compress(model, tmp_path) / "config.json").read_text())
    before = json.loads((model / "config.json").read_text())
    assert {key: config[key] for key in before} == before
    block = config["quantization_config"]
    assert block["quant_method"] == "losparse"
    assert block["format_version"] == 1
    assert len(block["modules"]) == 28
    assert block["skipped"]["model.embed_tokens"] == "embedding"


# --- places ---------------------------------------------------------------------------------------


def test_a_linked_model_folder_and_relative_places(tmp_path: Path) -> None:
    toys.llama(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "work").mkdir()
    done("compress", "../link", "-o", "./deep/down/../er", *SMALL, cwd=tmp_path / "work")
    done("compress", "../real", *SMALL, cwd=tmp_path / "work")
    done("compress", "../real", "-o", "made/up/..", *SMALL, cwd=tmp_path / "work")
    assert (tmp_path / "work" / "made" / "config.json").is_file()
    assert toys.tensor_bytes(tmp_path / "work" / "deep" / "er") == toys.tensor_bytes(
        tmp_path / "work" / "real-losparse"
    )


def test_an_empty_folder_may_be_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    compress(toys.llama(tmp_path / "model"), tmp_path)
    done("verify", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_a_folder_of_the_users_is_not_taken_for_a_partial_result(tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    for resume in ("auto", "never"):
        complaint = losparse("compress", model, "-o", tmp_path / "out", *SMALL, "--resume", resume).complaint
        assert "out.partial is there, and losparse did not make it" in complaint
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "mine"


# --- what was asked -------------------------------------------------------------------------------


def realistic(folder: Path) -> Path:
    """A larger toy whose weights have heavy tails and columns of unlike size, as trained ones have."""
    sizes: dict[str, Any] = {"layers": 2, "hidden": 384, "intermediate": 1024}
    generator = torch.Generator().manual_seed(1)
    extra = {}
    for name, weight in toys.weights(**sizes).items():
        if name.endswith("_proj.weight"):
            scale = torch.exp(0.5 * torch.randn(weight.shape[1], generator=generator))
            extra[name] = (weight.float() * scale * torch.randn(weight.shape, generator=generator).abs()).bfloat16()
    return toys.llama(folder, extra=extra, **sizes)


@pytest.fixture(scope="module")
def real_ish(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return realistic(tmp_path_factory.mktemp("models") / "realistic")


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("more", [("--values", "float"), ("--rank", "16"), ("--rank-ratio", "0.3")])
def test_keep_is_kept_within_one_per_cent(keep: float, more: tuple[str, ...], real_ish: Path, tmp_path: Path) -> None:
    totals = report_of(compress(real_ish, tmp_path, "--keep", str(keep), *more, "--iterations", "1"))["totals"]
    assert totals["bytes_after"] == pytest.approx(keep * totals["bytes_before"], rel=0.01)


@pytest.mark.parametrize("keep", [0.3, 0.8])
def test_keep_parameters_is_kept_exactly(keep: float, real_ish: Path, tmp_path: Path) -> None:
    out = compress(real_ish, tmp_path, "--keep-parameters", str(keep), "--rank", "8", "--iterations", "1")
    assert report_of(out)["totals"]["kept_parameters"] == pytest.approx(keep, abs=1e-4)


def test_a_recipe_file_under_flags(tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(
        "rank: 4\nsparsity: 0.8\nseed: 7\nignore: '*.v_proj'\n"
        "layers:\n  '*.mlp.*': {rank: 6}\n  '*.down_proj': {pattern: 2:4}\n  '*.q_proj': {sparsity: 0.9, rank: 0}\n"
    )
    out = compress(model, tmp_path, "--recipe", str(tmp_path / "recipe.yaml"), "--threshold-scope", "row", name="a")
    report = report_of(out)
    assert report["recipe"]["seed"] == 7
    assert report["recipe"]["threshold_scope"] == "row"
    layers = {layer["name"].removeprefix("model.layers.0."): layer for layer in report["layers"][:6]}
    assert {name: layer["rank"] for name, layer in layers.items()} == {
        "self_attn.q_proj": 0, "self_attn.k_proj": 4, "self_attn.o_proj": 4,
        "mlp.gate_proj": 6, "mlp.up_proj": 6, "mlp.down_proj": 6,
    }  # fmt: skip
    assert layers["mlp.down_proj"]["pattern"] == "2:4"
    assert layers["mlp.down_proj"]["nnz"] == 64 * 136 // 2
    assert layers["self_attn.q_proj"]["nnz"] == 64 * round(0.1 * 64)
    assert report["skipped"]["model.layers.3.self_attn.v_proj"] == "named by --ignore"
    flagged = compress(model, tmp_path, "--recipe", str(tmp_path / "recipe.yaml"), "--rank", "3", name="b")
    assert {layer["rank"] for layer in report_of(flagged)["layers"]} == {3}


def test_errors_in_the_report_are_those_of_the_stored_tensors(tmp_path: Path) -> None:
    """Recomputed from the files by an independent route: the dense export."""
    model = toys.llama(tmp_path / "model", dtype=torch.float32)
    out = compress(model, tmp_path, "--rank", "4", "--sparsity", "0.8", "--iterations", "3")
    done("export", out, "--dense", "-o", tmp_path / "dense")
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    for layer in report_of(out)["layers"]:
        W, approximation = before[f"{layer['name']}.weight"].double(), after[f"{layer['name']}.weight"].double()
        error = float((W - approximation).norm() / W.norm())
        assert (layer["residual_squared"] / layer["weight_squared"]) ** 0.5 == pytest.approx(error, rel=1e-4)
        assert layer["errors"] == sorted(layer["errors"], reverse=True)
        assert layer["errors"][-1] == pytest.approx(error, rel=1e-4)


# --- memory ---------------------------------------------------------------------------------------

PEAK = """
import resource, sys
from losparse_cli.cli.app import main
try:
    main()
except SystemExit as ending:
    assert not ending.code
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
SIZES: dict[str, Any] = {"hidden": 768, "intermediate": 2048}  # 13 MB a layer


def one_large_shard(folder: Path, megabytes: int) -> Path:
    """A model of as many equal layers as fill `megabytes`, in a single file, written a tensor at a time."""
    folder.mkdir()
    block = toys.weights(layers=1, **SIZES)
    inside = {name: tensor for name, tensor in block.items() if ".layers." in name}
    layers = round(megabytes * 1e6 / sum(tensor.numel() * tensor.itemsize for tensor in inside.values()))
    tensors = {name: tensor for name, tensor in block.items() if ".layers." not in name}
    for k in range(layers):
        tensors |= {name.replace(".0.", f".{k}."): tensor for name, tensor in inside.items()}
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    toys.write_json(folder / "config.json", toys.config(layers=layers, **SIZES))
    toys.raw_safetensors(folder / "model.safetensors", header)
    with (folder / "model.safetensors").open("ab") as file:
        for tensor in tensors.values():
            file.write(tensor.view(torch.uint8).numpy().data)
    return folder


def peak_memory(model: Path, place: Path) -> int:
    """Peak resident bytes of a compression in a process of its own."""
    command = [sys.executable, "-c", PEAK, "compress", model, "-o", place / f"{model.name}-out", "--rank", "4",
               "--sparsity", "0.9", "--iterations", "1", "--quiet"]  # fmt: skip
    ended = subprocess.run(command, env=bare_environment(place), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    """LOSPARSE_TEST_SHARD_MB=4500 tries it on a shard of 4.5 GB."""
    megabytes = int(os.environ.get("LOSPARSE_TEST_SHARD_MB", "300"))
    small = peak_memory(one_large_shard(tmp_path / "small", megabytes // 4), tmp_path)
    large = peak_memory(one_large_shard(tmp_path / "large", megabytes), tmp_path)
    print(
        f"peak memory: {small / 1e6:.0f} MB for a shard of {megabytes // 4} MB, {large / 1e6:.0f} MB for {megabytes} MB"
    )
    shutil.rmtree(tmp_path / "large")
    assert abs(large - small) < 64 << 20
