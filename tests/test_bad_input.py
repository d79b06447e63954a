"""Every bad input gives one sentence that names what is wrong and what to do, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from terminal import Ended, bare_environment, done, losparse

from losparse_cli.shim.layouts import FORMAT_VERSION

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
SMALL = ("--rank", "4", "--sparsity", "0.8")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return toys.llama(tmp_path / "model")


def refused(folder: Path, *arguments: object, says: tuple[str, ...], code: int = 1, **options: Any) -> Ended:
    """Run `losparse ARGUMENTS` in `folder`; it must complain in one line, and change no file there."""
    before = sorted(folder.rglob("*"))
    ended = losparse(*arguments, cwd=folder, **options)
    complaint = ended.complaint
    assert all(text in complaint for text in says), complaint
    assert ended.code == code, complaint
    assert ended.out == ""
    assert sorted(folder.rglob("*")) == before
    return ended


# --- the request ----------------------------------------------------------------------------------

WRONG_REQUESTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rank negative": (("--rank", "-1"), ("--rank", "-1")),
    "rank as large as the matrix": (("--rank", "64"), ("rank 64", "64 x 136", "Lower --rank")),
    "rank beyond the matrix": (("--rank", "100000"), ("rank 100000", "Lower --rank")),
    "sparsity above 1": (("--sparsity", "1.5"), ("--sparsity", "between 0 and 1", "1.5")),
    "sparsity below 0": (("--sparsity", "-0.1"), ("--sparsity", "between 0 and 1", "-0.1")),
    "sparsity not a number": (("--sparsity", "nan"), ("--sparsity", "between 0 and 1", "nan")),
    "sparsity infinite": (("--sparsity", "inf"), ("--sparsity", "between 0 and 1")),
    "keep 0": (("--keep", "0"), ("cannot be stored in 0 bits a weight", "--bits")),
    "keep 0 of floats": (
        ("--keep", "0", "--values", "float"),
        ("model.layers.0.", "would have nothing left", "--keep"),
    ),
    "keep above 1": (("--keep", "1.01"), ("--keep", "between 0 and 1", "1.01")),
    "keep not a number": (("--keep", "nan"), ("--keep", "between 0 and 1")),
    "keep that cannot hold the rank": (("--keep", "0.1", "--rank", "30"), ("does not fit the budget", "Lower --rank")),
    "all of S zero and no rank": (("--sparsity", "1"), ("would have nothing left", "lower --sparsity")),
    "rank 0 and S empty": (("--sparsity", "1", "--rank", "0"), ("would have nothing left", "Raise --rank")),
    "no S and no rank by ratio": (("--sparsity", "1", "--rank-ratio", "1"), ("would have nothing left",)),
    "nothing shrinks": (("--sparsity", "0", "--rank", "4"), ("No layer would shrink", "raise --sparsity")),
    "rank and ratio": (("--rank", "4", "--rank-ratio", "0.1"), ("--rank and --rank-ratio contradict",)),
    "sparsity and keep": (("--sparsity", "0.9", "--keep", "0.5"), ("--sparsity and --keep contradict",)),
    "two budgets": (("--keep", "0.5", "--keep-parameters", "0.5"), ("--keep and --keep-parameters contradict",)),
    "ratio 1 with S": (("--rank-ratio", "1", "--sparsity", "0.5"), ("--rank-ratio 1", "--sparsity")),
    "2:4 with another sparsity": (
        ("--pattern", "2:4", "--sparsity", "0.9"),
        ("--pattern 2:4", "leave out --sparsity 0.9"),
    ),
    "2:4 with rank and keep": (
        ("--pattern", "2:4", "--rank", "4", "--keep", "0.5"),
        ("--pattern 2:4", "--rank", "--keep"),
    ),
    "pattern unknown": (("--pattern", "diagonal"), ("--pattern", "2:4", "'diagonal'")),
    "pattern 4:2": (("--pattern", "4:2"), ("--pattern", "N < M")),
    "pattern 0:4": (("--pattern", "0:4"), ("--pattern", "'0:4'")),
    "scope unknown": (("--threshold-scope", "block"), ("--threshold-scope is row or matrix",)),
    "no iterations": (("--iterations", "0"), ("--iterations", ">= 1")),
    "target misspelt": (("--targets", "*.q_prj"), ("--targets '*.q_prj' matches no layer", "q_proj")),
    "ignore misspelt": (("--ignore", "model.layer.0.*"), ("--ignore", "matches no layer", "model.layers.")),
    "target with markup": (("--targets", "[/red]"), ("--targets '[/red]' matches no layer",)),
    "target is not compressed": (("--targets", "model.embed_tokens"), ("losparse inspect",)),
    "device unknown": (("--device", "tpu"), ("--device", "cpu", "'tpu'")),
    "shard size nonsense": (("--max-shard-size", "many"), ("--max-shard-size", "'many'", "5GB")),
    "shard size zero": (("--max-shard-size", "0"), ("--max-shard-size", "5GB")),
    "shard size negative": (("--max-shard-size", "-5GB"), ("--max-shard-size", "5GB")),
    "shard size endless": (("--max-shard-size", "9" * 400), ("--max-shard-size",)),
    "resume nonsense": (("--resume", "maybe"), ("--resume", "auto, required or never", "'maybe'")),
    "private but not pushed": (("--private",), ("--private", "--push-to-hub")),
    "recipe file missing": (("--recipe", "absent.yaml"), ("absent.yaml", "--recipe")),
}


@pytest.mark.parametrize("case", WRONG_REQUESTS)
def test_a_wrong_request_is_refused(case: str, model: Path, tmp_path: Path) -> None:
    options, says = WRONG_REQUESTS[case]
    refused(tmp_path, "compress", model, "-o", "out", *options, says=says, code=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(model: Path, tmp_path: Path) -> None:
    refused(
        tmp_path, "compress", model, "-o", "out", "--device", "cuda", says=("0 CUDA devices", "--device cpu"), code=2
    )


def test_a_value_that_is_no_number_is_wrong_usage(model: Path, tmp_path: Path) -> None:
    ended = losparse("compress", model, "-o", "out", "--rank", "eight", cwd=tmp_path)
    assert ended.code == 2
    assert "--rank" in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


def test_resume_required_without_a_journal(model: Path, tmp_path: Path) -> None:
    says = ("nothing to resume", "out.partial", "Leave out --resume required")
    refused(tmp_path, "compress", model, "-o", "out", *SMALL, "--resume", "required", says=says)


def test_inspect_in_an_unknown_order(model: Path, tmp_path: Path) -> None:
    refused(tmp_path, "inspect", model, "--sort", "beauty", says=("--sort is one of name, error", "'beauty'"), code=2)


# --- recipe files ---------------------------------------------------------------------------------

WRONG_RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "not YAML": ("rank: [8", ("not valid YAML", "line")),
    "not text": ("rank: \x00", ("not valid YAML",)),
    "a list": ("- rank", ("must be a mapping", "list")),
    "unknown setting": ("rnak: 8", ("unknown setting 'rnak'", "known are rank,")),
    "unknown setting under a glob": ("layers: {'*': {seed: 1}}", ("unknown setting 'seed'", "layers: *")),
    "rank as text": ("rank: eight", ("yaml: rank must", "'eight'")),
    "sparsity as text": ("sparsity: high", ("yaml: sparsity is", "'high'")),
    "targets as a number": ("targets: 5", ("yaml: targets", "5")),
    "targets empty text": ("targets: ['']", ("yaml: targets",)),
    "target misspelt": ("targets: q_prj", ("yaml: targets 'q_prj' matches no layer",)),
    "device unknown": ("device: tpu", ("yaml: device", "'tpu'")),
    "contradiction": ("sparsity: 0.9\nkeep: 0.5", ("sparsity and keep contradict",)),
    "contradiction under a glob": (
        "layers: {'*.mlp.*': {rank: 4, rank_ratio: 0.1}}", ("layers: *.mlp.*", "contradict")),
    "given twice": ("rank: 8\nrank: 16", ("'rank' is given twice", "line 2")),
    "glob that matches nothing": (
        "layers: {'*.attention.*': {rank: 4}}", ("layers: '*.attention.*' matches no layer", "Close names")),
    "layers as a list": ("layers: [1]", ("'layers'", "must map each glob")),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_RECIPES)
def test_a_wrong_recipe_is_refused_by_name(case: str, model: Path, tmp_path: Path) -> None:
    text, says = WRONG_RECIPES[case]
    (tmp_path / "recipe.yaml").write_text(text)
    refused(tmp_path, "compress", model, "-o", "out", "--recipe", "recipe.yaml", says=(*says, "recipe.yaml"), code=2)


def test_a_recipe_that_is_a_folder(model: Path, tmp_path: Path) -> None:
    refused(tmp_path, "compress", model, "--recipe", model, says=(str(model), "--recipe"), code=2)


# --- the place to read ----------------------------------------------------------------------------


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path, "compress", "./absent", says=("There is no folder", "./absent", "user/name"))
    refused(tmp_path, "generate", "/absent/model", "Hello", says=("There is no folder", "/absent/model", "user/name"))


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "a b", "-", "~nobody-here/x", "ünï/cödé", "x" * 5000, "a--b/..c", "user/"]
)
def test_a_weird_name_is_no_model(name: str, tmp_path: Path) -> None:
    refused(tmp_path, "compress", "--", name, says=("user/name",))


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "compress", "empty", says=("empty has no config.json", "save_pretrained"))


def test_a_file_instead_of_a_folder(model: Path, tmp_path: Path) -> None:
    says = ("model.safetensors is a file", "give the folder")
    refused(tmp_path, "compress", model / "model.safetensors", says=says)


def test_no_weights(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    refused(tmp_path, "compress", model, says=("no model.safetensors", "save_pretrained"))


def test_weights_that_are_a_dead_link(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("gone")
    refused(tmp_path, "compress", model, says=("model.safetensors is a link to gone", "Download"))


@pytest.mark.slow
def test_a_hub_name_without_a_network(tmp_path: Path) -> None:
    environment = bare_environment(tmp_path) | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "losparse_cli", "compress", "user/model"]
    found = subprocess.run(command, env=environment, cwd=tmp_path, text=True, capture_output=True, check=False)
    complaint = Ended(found.returncode, found.stdout, found.stderr).complaint
    assert found.returncode == 1
    assert "user/model" in complaint
    assert "network" in complaint


def test_a_hub_name_while_offline(tmp_path: Path) -> None:
    refused(
        tmp_path, "compress", "user/model", says=("no folder user/model", "Hub is not asked", "unset HF_HUB_OFFLINE")
    )


# --- config.json ----------------------------------------------------------------------------------

WRONG_CONFIGS: dict[str, tuple[str | dict[str, Any], tuple[str, ...]]] = {
    "not JSON": ("{", ("config.json is not valid JSON", "again")),
    "empty": ("", ("config.json is not valid JSON",)),
    "not text": ("\udcff", ("config.json is not valid JSON",)),
    "too deep": ("[" * 100_000, ("config.json is not valid JSON",)),
    "a list": ("[]", ("config.json must hold a JSON object, not list",)),
    "unknown model type": ({"model_type": "mystery", "architectures": ["MysteryModel"]}, ("MysteryModel", "mystery")),
    "unknown architecture": (
        {"architectures": ["LlamaForWeather"]},
        ("'LlamaForWeather'", "config.json", "transformers"),
    ),
    "architecture not in a list": ({"architectures": "LlamaForCausalLM"}, ("'architectures'", "list of class names")),
    "architecture not text": ({"architectures": [5]}, ("'architectures'", "list of class names")),
    "auto_map a list": ({"auto_map": ["x"]}, ("'auto_map'", "JSON object")),
    "quantization a text": ({"quantization_config": "int8"}, ("'quantization_config'", "JSON object")),
    "no model type": ({"model_type": None}, ("config.json", "Check the file")),
    "sizes of another model": ({"hidden_size": 32}, ("has shape [64, 64]", "config.json", "do not belong together")),
    "sizes impossible": ({"hidden_size": "wide"}, ("config.json", "Check the file")),
    "more layers than weights": ({"num_hidden_layers": 5}, ("model.layers.4.", "missing", "--ignore")),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_wrong_config_is_named(case: str, model: Path, tmp_path: Path) -> None:
    content, says = WRONG_CONFIGS[case]
    if isinstance(content, str):
        (model / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    else:
        toys.change_json(model / "config.json", **content)
    refused(tmp_path, "compress", model, "-o", "out", *SMALL, says=says)


def test_a_model_with_code_of_its_own_is_not_run_unasked(model: Path, tmp_path: Path) -> None:
    (model / "configuration_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    toys.change_json(model / "config.json", model_type="own", auto_map={"AutoConfig": "configuration_own.Own"})
    refused(tmp_path, "compress", model, says=("own code (AutoConfig)", "Read that code", "--trust-remote-code"))


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "compressed-tensors"])
def test_a_quantized_model_is_refused(method: str, model: Path, tmp_path: Path) -> None:
    toys.change_json(model / "config.json", quantization_config={"quant_method": method})
    says = ("quantized already", method, "unquantized checkpoint")
    refused(tmp_path, "compress", model, says=says, code=2)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_weight_of_eight_bits_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model", extra={Q_PROJ: torch.zeros(64, 64).to(dtype)})
    says = (Q_PROJ, "model.safetensors", "quantized already", "unquantized checkpoint")
    refused(tmp_path, "compress", model, says=says, code=2)


# --- weight files ---------------------------------------------------------------------------------


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


WRONG_HEADERS: dict[str, tuple[Any, bytes, int | None, str]] = {
    # name: header, data, the length it claims (None: the true one), what the message says
    "length past the end": ({"a": entry()}, bytes(8), 10_000, "its beginning is damaged"),
    "length enormous": ({"a": entry()}, bytes(8), 1 << 62, "its beginning is damaged"),
    "length zero": ({"a": entry()}, bytes(8), 0, "its beginning is damaged"),
    "not JSON": (b"{nonsense}", b"", None, "is corrupt"),
    "not text": (b'{"\xff": 1}', b"", None, "is corrupt"),
    "too deep": (b"[" * 100_000, b"", None, "is corrupt"),
    "a list": (b"[1, 2]", b"", None, "no JSON object"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), None, "b overlaps"),
    "hole": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), None, "b leaves a hole"),
    "hole at the start": ({"a": entry(offsets=(8, 16))}, bytes(16), None, "a leaves a hole"),
    "offset negative": ({"a": entry(offsets=(-8, 0))}, bytes(8), None, "impossible offsets"),
    "offsets reversed": ({"a": entry(offsets=(8, 0))}, bytes(8), None, "needs 8 bytes but has -8"),
    "offsets as text": ({"a": entry(offsets=("0", "8"))}, bytes(8), None, "impossible offsets"),
    "three offsets": ({"a": entry(offsets=(0, 8, 8))}, bytes(8), None, "impossible offsets"),
    "offset infinite": (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1e999]}}', bytes(8), None,
                        "impossible offsets"),
    "size wrong": ({"a": entry(shape=(3,))}, bytes(8), None, "needs 12 bytes but has 8"),
    "shape negative": ({"a": entry(shape=(-2,))}, bytes(8), None, "impossible shape"),
    "shape no list": ({"a": entry(shape="2")}, bytes(8), None, "impossible shape"),
    "shape of truths": ({"a": entry(shape=(True, 2))}, bytes(8), None, "impossible shape"),
    "shape endless": ({"a": entry(shape=(1,) * 1000 + (2,))}, bytes(8), None, "impossible shape"),
    "dtype unknown": ({"a": entry(dtype="F31")}, bytes(8), None, "unknown dtype F31"),
    "dtype a list": ({"a": entry(dtype=["F32"])}, bytes(8), None, "unknown dtype"),  # type: ignore[arg-type]
    "entry a number": ({"a": 5}, b"", None, "tensor a"),
    "name twice": (b'{"a": {}, "a": {}}', b"", None, "names 'a' twice"),
    "data cut off": ({"a": entry()}, bytes(7), None, "truncated"),
    "data left over": ({"a": entry()}, bytes(9), None, "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_HEADERS)
def test_a_corrupt_header_is_named(case: str, model: Path, tmp_path: Path) -> None:
    header, data, length, says = WRONG_HEADERS[case]
    toys.raw_safetensors(model / "model.safetensors", header, data, length=length)
    refused(tmp_path, "compress", model, says=("model.safetensors", says, "Download or copy"))


@pytest.mark.parametrize("size", [0, 3, 8, 100, 5000, -1])
def test_a_truncated_file(size: int, model: Path, tmp_path: Path) -> None:
    path = model / "model.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    refused(tmp_path, "compress", model, says=("model.safetensors", "Download or copy"))


def test_a_huge_header_is_not_read(model: Path, tmp_path: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 30))
    os.truncate(path, (1 << 30) + 8)  # sparse: it takes no disk
    refused(tmp_path, "compress", model, says=("model.safetensors", "damaged"))


def test_a_missing_tensor(tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors[Q_PROJ]
    save_file(tensors, model / "model.safetensors")
    refused(tmp_path, "compress", model, says=(Q_PROJ, "64 x 64", "missing", "--ignore"))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_value_that_is_not_finite_is_placed(value: str, tmp_path: Path) -> None:
    weight = toys.weights()[Q_PROJ]
    weight[5, 7] = float(value)
    model = toys.llama(tmp_path / "model", extra={Q_PROJ: weight})
    ended = losparse("compress", model, "-o", "out", *SMALL, cwd=tmp_path)
    for text in (Q_PROJ, value, "row 5, column 7", "--ignore 'model.layers.1.self_attn.q_proj'"):
        assert text in ended.complaint
    assert not (tmp_path / "out").exists()
    done("compress", model, "-o", "out", *SMALL, "--ignore", "*.1.*.q_proj", "--resume", "never", cwd=tmp_path)
    kept = toys.tensor_bytes(tmp_path / "out")[Q_PROJ][2]
    assert kept == toys.tensor_bytes(model)[Q_PROJ][2]


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("how", [(), SMALL, ("--targets", "q_proj")], ids=["codes", "floats", "one kind"])
@pytest.mark.parametrize("name", [NORM, "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"])
def test_what_is_only_copied_has_to_be_finite_too(how: tuple[str, ...], name: str, tmp_path: Path) -> None:
    tensor = toys.weights()[name]
    tensor.view(-1)[9] = float("nan")
    model = toys.llama(tmp_path / "model", extra={name: tensor})
    refused(tmp_path, "compress", model, "-o", "out", *how, says=(name, "holds nan at", "Repair the checkpoint"))
    if tensor.dim() == 2:  # on one's own responsibility
        done("compress", model, "-o", "out", *how, "--ignore", name.removesuffix(".weight"), cwd=tmp_path)
        assert toys.tensor_bytes(tmp_path / "out")[name] == toys.tensor_bytes(model)[name]


def test_what_is_no_parameter_may_hold_infinities_as_masks_do(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.mask"
    model = toys.llama(tmp_path / "model", extra={name: torch.full((4, 4), -float("inf")).triu(1)})
    done("compress", model, "-o", "out", cwd=tmp_path)
    model = toys.llama(tmp_path / "other", extra={name: torch.full((4, 4), float("nan"))})
    refused(tmp_path, "compress", model, "-o", "more", says=(name, "holds nan at [0, 0]"))


def test_text_is_not_read_by_a_model_with_a_norm_that_is_not_finite(toy: Any, tmp_path: Path) -> None:
    source = shutil.copytree(toy("llama", tokenizer=True), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors[NORM][9] = float("inf")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text("a text of its own " * 100)
    text = ("--calibration", "text.txt", "--calibration-tokens", 256, "--calibration-length", 32)
    for how in ((), ("--values", "float")):
        refused(tmp_path, "compress", source, "-o", "out", *text, *how, says=(f"{NORM} in", "holds inf at [9]"))


# --- shards and index -----------------------------------------------------------------------------


def change_index(model: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    toys.write_json(path, index)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return toys.llama(tmp_path / "model", shards=3)


def test_a_vanished_shard(sharded: Path, tmp_path: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, "compress", sharded, says=("model-00002-of-00003.safetensors", "not there", "Download"))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "\0"])
def test_a_shard_outside_the_folder(name: str, sharded: Path, tmp_path: Path) -> None:
    change_index(sharded, lambda places: places.update({Q_PROJ: name}))
    refused(tmp_path, "compress", sharded, says=(Q_PROJ, "outside its own folder", "who made it"))


def test_an_index_that_lists_too_little(sharded: Path, tmp_path: Path) -> None:
    change_index(sharded, lambda places: places.pop(Q_PROJ))
    refused(tmp_path, "compress", sharded, says=(Q_PROJ, "the index does not list", "Save"))


def test_an_index_that_lists_too_much(sharded: Path, tmp_path: Path) -> None:
    change_index(sharded, lambda places: places.update({"more.weight": "model-00001-of-00003.safetensors"}))
    says = ("more.weight is missing from model-00001-of-00003.safetensors", "Download")
    refused(tmp_path, "compress", sharded, says=says)


def test_weights_of_another_class(tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model")
    file = model / "model.safetensors"
    save_file({f"inner.{name}": tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    refused(
        tmp_path,
        "compress",
        model,
        says=("LlamaForCausalLM", "holds 0", "inner.model.embed_tokens.weight", "architectures"),
    )


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', "{"])
def test_an_index_of_the_wrong_kind(content: str, sharded: Path, tmp_path: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    refused(tmp_path, "compress", sharded, says=("model.safetensors.index.json", "again"))


def test_a_tensor_named_like_a_part_of_a_layer(tmp_path: Path) -> None:
    part = Q_PROJ.replace("weight", "U")
    model = toys.llama(tmp_path / "model", extra={part: torch.ones(3)})
    refused(tmp_path, "compress", model, "-o", "out", *SMALL, says=(part, "--ignore"))


VANISH = """
import os
from losparse_cli.checkpoint import writer
whole = writer.ShardWriter.append
def append(self, *arguments, **options):
    unit = whole(self, *arguments, **options)
    if unit.number == 6:
        {action}
    return unit
writer.ShardWriter.append = append
"""


@pytest.mark.parametrize("action", ["os.unlink({path!r})", "os.truncate({path!r}, 5000)"])
def test_a_shard_that_goes_while_it_is_read(action: str, tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "model", layers=12, shards=3)
    path = model / "model-00003-of-00003.safetensors"
    before = VANISH.format(action=action.format(path=str(path)))
    ended = losparse("compress", model, "-o", "out", *SMALL, cwd=tmp_path, before=before)
    assert path.name in ended.complaint
    assert ended.code == 1
    assert not (tmp_path / "out").exists()


# --- pickled weights ------------------------------------------------------------------------------


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize("protocol", ["zip", "legacy", "bare"])
def test_a_pickle_that_would_run_a_program(protocol: str, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    content = {"model.norm.weight": torch.ones(2), "evil": Evil(tmp_path / "ran")}
    if protocol == "bare":
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, model / "pytorch_model.bin", _use_new_zipfile_serialization=protocol == "zip")
    says = ("pytorch_model.bin cannot be read safely", "save_pretrained")
    refused(tmp_path, "compress", model, says=says)  # which also sees that nothing was touched


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}, {"state": {"a": torch.ones(1)}}, {1: torch.ones(1)}])
def test_a_pickle_of_something_else(content: Any, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save(content, model / "pytorch_model.bin")
    says = ("pytorch_model.bin does not hold a mapping from names to tensors", "save_pretrained")
    refused(tmp_path, "compress", model, says=says)


# --- the place to write ---------------------------------------------------------------------------


def test_an_output_that_is_there(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    says = ("out exists already", "--overwrite", "--output")
    refused(tmp_path, "compress", model, "-o", "out", *SMALL, says=says, code=2)


@pytest.mark.parametrize("report", ["{", "[]", "{}", '{"layers": [5]}', "\udcff"])
def test_an_output_with_a_report_that_cannot_be_read(report: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out" / "losparse_report.json").write_bytes(report.encode(errors="surrogateescape"))
    refused(tmp_path, "compress", model, "-o", "out", *SMALL, says=("out exists already", "--overwrite"), code=2)
    done("compress", model, "-o", "out", *SMALL, "--overwrite", cwd=tmp_path)
    done("verify", "out", cwd=tmp_path)


def test_overwrite_spares_what_is_no_checkpoint(model: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine.txt").write_text("mine")
    says = ("home holds no checkpoint", "--output")
    refused(tmp_path, "compress", model, "-o", "home", *SMALL, "--overwrite", says=says, code=2)


def test_an_output_that_is_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    says = ("out exists and is no folder", "--output")
    refused(tmp_path, "compress", model, "-o", "out", *SMALL, "--overwrite", says=says, code=2)


def test_an_output_that_is_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    refused(tmp_path, "compress", model, "-o", "out", *SMALL, says=("out is a link", "--output"), code=2)


@pytest.mark.parametrize("output", ["model", "model/out", "link/out", "model/../model/deep/out", "link"])
def test_an_output_inside_the_model(output: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("model")
    says = ("inside the", "folder", "outside")
    refused(tmp_path, "compress", model, "-o", output, *SMALL, "--overwrite", says=says, code=2)
    refused(tmp_path, "compress", "link", "-o", output, *SMALL, "--overwrite", says=says, code=2)


def test_an_output_that_holds_the_model(tmp_path: Path) -> None:
    model = toys.llama(tmp_path / "all" / "model")
    (tmp_path / "all" / "config.json").write_text("{}")
    says = ("all holds the folder that is read",)
    refused(tmp_path, "compress", model, "-o", "all", *SMALL, "--overwrite", says=says, code=2)


def test_an_output_under_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(tmp_path, "compress", model, "-o", "file/out", *SMALL, says=("is a file", "--output"))


def test_an_output_with_too_long_a_name(model: Path, tmp_path: Path) -> None:
    refused(tmp_path, "compress", model, "-o", "x" * 300, *SMALL, says=("name too long", "--output"))


def test_a_working_folder_that_is_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("mine")
    says = ("out.partial is there, and losparse did not make it", "--output")
    refused(tmp_path, "compress", model, "-o", "out", *SMALL, says=says)


FULL = """
import errno
from losparse_cli.checkpoint import writer
whole, calls = writer._write_all, []
def write_all(file, piece):
    calls.append(piece)
    if len(calls) > {after}:
        file.write(bytes(piece)[:10])
        raise OSError(errno.{code}, "told by the test")
    whole(file, piece)
writer._write_all = write_all
"""


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("ENOSPC", "The disk is full"),
        ("EDQUOT", "The disk is full"),
        ("EIO", "told by the test"),
        ("EFBIG", "--max-shard-size"),
    ],
)
def test_a_write_that_fails_half_way(code: str, says: str, model: Path, tmp_path: Path) -> None:
    before = FULL.format(after=40, code=code)
    ended = losparse("compress", model, "-o", "out", *SMALL, cwd=tmp_path, before=before)
    assert says in ended.complaint
    assert "out.partial" in ended.complaint
    assert ended.code == 1
    assert not (tmp_path / "out").exists()
    goes_on = done("compress", model, "-o", "out", *SMALL, "--resume", "required", cwd=tmp_path)
    assert "Going on after layer" in goes_on.err
    done("compress", model, "-o", "undisturbed", *SMALL, cwd=tmp_path)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "undisturbed")


def test_a_limit_on_file_sizes(model: Path, tmp_path: Path) -> None:
    before = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    ended = losparse("compress", model, "-o", "out", *SMALL, cwd=tmp_path, before=before)
    assert "out.partial" in ended.complaint
    assert "--max-shard-size" in ended.complaint
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 96 kB, where tests run as root."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", place], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting a disk needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_too_small(model: Path, small_disk: Path, tmp_path: Path) -> None:
    ended = losparse("compress", model, "-o", small_disk / "out", *SMALL, cwd=tmp_path)
    for text in (str(small_disk), "bytes free", "needs about", "--output"):
        assert text in ended.complaint
    assert not (small_disk / "out").exists()


def test_a_disk_that_fills_up(model: Path, small_disk: Path, tmp_path: Path) -> None:
    lie = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=10**12)"
    ended = losparse("compress", model, "-o", small_disk / "out", *SMALL, cwd=tmp_path, before=lie)
    assert "The disk is full" in ended.complaint
    assert not (small_disk / "out").exists()
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    goes_on = done("compress", model, "-o", small_disk / "out", *SMALL, cwd=tmp_path)
    assert "Going on after layer" in goes_on.err
    done("compress", model, "-o", "undisturbed", *SMALL, cwd=tmp_path)
    assert weights_of(small_disk / "out") == weights_of(tmp_path / "undisturbed")


def test_a_folder_that_may_only_be_read(model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    place = tmp_path / "frozen"
    if os.geteuid():
        place.mkdir(mode=0o555)
    else:  # root writes where it likes, but for a disk mounted to be read
        place = request.getfixturevalue("small_disk")
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    for options in ((), ("--dry-run",)):
        says = ("Nothing can be written in", place.name, "--output")
        refused(tmp_path, "compress", model, "-o", place / "out", *SMALL, *options, says=says)


def weights_of(folder: Path) -> dict[str, Any]:
    """Tensors, and the config that says what they are. (The card names its folder.)"""
    return {"config": (folder / "config.json").read_bytes(), **toys.tensor_bytes(folder)}


# --- compressed checkpoints -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compressed")
    done("compress", toys.llama(place / "model"), "-o", place / "out", *SMALL)
    return place / "out"


@pytest.fixture
def compressed(made_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made_once, tmp_path / "compressed")


def test_a_compressed_model_is_not_compressed_again(compressed: Path, tmp_path: Path) -> None:
    says = ("compressed by losparse already", f"losparse export {compressed} --dense")
    refused(tmp_path, "compress", compressed, says=says, code=2)


@pytest.mark.parametrize("command", ["verify", "push", "export"])
def test_a_dense_model_is_no_losparse_checkpoint(command: str, model: Path, tmp_path: Path) -> None:
    more = {"verify": (), "push": ("user/x",), "export": ("--dense", "-o", "out")}[command]
    says = ("model is no losparse checkpoint", "losparse compress")
    refused(tmp_path, command, "model", *more, says=says, code=2, HF_TOKEN="hf_test")


WRONG_BLOCKS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "newer format": (
        {"format_version": FORMAT_VERSION + 1},
        (f"format version {FORMAT_VERSION + 1}", "pip install --upgrade losparse"),
    ),
    "no modules": ({"modules": None}, ("lists no compressed modules",)),
    "rank not there": ({"rank": None}, ("layer model.layers.0.self_attn.q_proj", "Compress it again")),
    "rank impossible": ({"rank": 1000}, ("layer model.layers.0.self_attn.q_proj", "impossible")),
    "rank infinite": ({"rank": float("inf")}, ("layer model.layers.0.self_attn.q_proj",)),
    "rank of another layer": ({"rank": 5}, ("q_proj.U", "[64, 4]", "[64, 5]")),
    "layout unknown": ({"layout": "zip"}, ("unknown layout 'zip'",)),
    "layout of another pattern": ({"layout": "n:m"}, ("layer model.layers.0.self_attn.q_proj",)),
}


@pytest.mark.parametrize("case", WRONG_BLOCKS)
@pytest.mark.parametrize("command", ["verify", "inspect", "export"])
def test_a_wrong_block_in_config(case: str, command: str, compressed: Path, tmp_path: Path) -> None:
    change, says = WRONG_BLOCKS[case]
    config = json.loads((compressed / "config.json").read_text())
    block = config["quantization_config"]
    target = block if next(iter(change)) in block else block["modules"]["model.layers.0.self_attn.q_proj"]
    target.update(change)
    toys.write_json(compressed / "config.json", config)
    more = ("--dense", "-o", "out") if command == "export" else ()
    ended = losparse(command, "compressed", *more, cwd=tmp_path)
    assert ended.code == 1
    assert all(text in ended.err for text in says), ended.err
    assert "Traceback" not in ended.err
    assert "Unexpected" not in ended.err
    assert not (tmp_path / "out").exists()
