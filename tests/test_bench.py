"""Speed and memory in use: what is measured, of which models, and what is refused. How fast is nobody's test."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from printed import printed
from terminal import losparse

from losparse_cli import Recipe, compress
from losparse_cli.bench import bench
from losparse_cli.benchmark import layers as layer_timing
from losparse_cli.benchmark import peer, timing
from losparse_cli.benchmark.generation import Runner
from losparse_cli.benchmark.layers import by_shape, compressed_layers, layer_speeds
from losparse_cli.benchmark.report import BenchReport, LayerSpeed, ModelSpeed
from losparse_cli.benchmark.resident import resident, tensor_bytes, token_bytes
from losparse_cli.cli import app
from losparse_cli.cli.speed_tables import show_speed
from losparse_cli.errors import CheckpointError, LosparseError, MissingExtraError, SourceError, UsageError
from losparse_cli.load import load
from tests.hearing import Hearing

MODULE = sys.modules["losparse_cli.bench"]  # the name stands for the function
SMALL: dict[str, Any] = {"prompt": 8, "new_tokens": 2, "rounds": 1, "rows": (1, 3), "device": "cpu"}
RECIPE = {"rank": 4, "sparsity": 0.5}


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies as large as a server's caches would be most of the time here."""
    monkeypatch.setattr(timing, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(layer_timing, "COLD_BYTES", 1 << 16)


@pytest.fixture
def without_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fresh process, which takes seconds to import torch."""
    monkeypatch.setattr(MODULE, "resident", lambda *_: 1000)


def consistent(report: BenchReport) -> None:
    """What holds for every report."""
    assert report.copy_bandwidth > 0
    assert report.compressed is not None
    for x in report.layers:
        assert x.milliseconds > 0
        assert x.dense_milliseconds > 0
        assert x.speedup == pytest.approx(x.dense_milliseconds / x.milliseconds)
        assert x.bandwidth == pytest.approx(x.nbytes / x.milliseconds * 1000)
        assert 0 < x.density < 1
        assert x.nbytes > 0
    for model in (report.compressed, report.dense):
        if model is not None:
            assert min(model.prefill, model.disk, model.tensors) > 0
    shown = json.loads(json.dumps(report.to_dict()))
    assert shown["layers"][0]["speedup"] == report.layers[0].speedup
    assert shown["layers"][0]["share_of_copy"] > 0
    assert set(report.ratios) <= set(shown)


# --- what is measured -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("without_process")
@pytest.mark.parametrize("name", ["llama", "t5", "mamba", "gpt2", "bart"])
@pytest.mark.parametrize("comparing", [True, False])
def test_a_model_that_writes(
    name: str, comparing: bool, compressed: Callable[..., Path], toy: Callable[..., Path]
) -> None:
    heard = Hearing()
    report = bench(
        compressed(name, **RECIPE),
        against=toy(name) if comparing else None,
        progress=heard,
        **SMALL,
    )
    consistent(report)
    assert report.compressed is not None
    assert report.compressed.decode is not None
    assert report.compressed.decode > 0
    assert heard.totals == heard.done == {"measurements": len(heard.names)}
    assert [x.rows for x in report.layers] == [1, 3] * len(report.shapes)
    layers = compressed_layers(load(compressed(name, **RECIPE))[0])
    assert sum(cases[0].count for cases in report.shapes) == len(layers) > 0
    if comparing:
        assert report.dense is not None
        assert report.against == str(toy(name))
        assert report.ratios["prefill_speedup"] == report.compressed.prefill / report.dense.prefill
        assert report.ratios["resident_share"] == 1
        assert report.ratios["disk_share"] == pytest.approx(report.compressed.disk / report.dense.disk)
        assert None not in report.ratios.values()
    else:
        assert report.dense is None
        assert set(report.ratios.values()) == {None}


@pytest.mark.usefixtures("without_process")
@pytest.mark.parametrize("name", ["bert", "deberta-v2"])
def test_a_model_that_only_reads(name: str, compressed: Callable[..., Path], toy: Callable[..., Path]) -> None:
    report = bench(compressed(name, **RECIPE), against=toy(name), **SMALL)
    consistent(report)
    assert report.compressed is not None
    assert report.compressed.decode is report.ratios["decode_speedup"] is None
    assert report.new_tokens == 0


@pytest.mark.usefixtures("without_process")
def test_heads_that_look_for_the_end_of_a_text(tmp_path: Path) -> None:
    from conftest import toy_model
    from transformers import BartForSequenceClassification

    BartForSequenceClassification(toy_model("bart").config).save_pretrained(tmp_path / "dense")
    compress(tmp_path / "dense", tmp_path / "small", Recipe(**RECIPE))
    report = bench(tmp_path / "small", **SMALL)
    assert report.compressed is not None
    assert report.compressed.decode is None


@pytest.mark.usefixtures("without_process")
def test_no_new_tokens_is_reading_only(compressed: Callable[..., Path]) -> None:
    report = bench(compressed("llama", **RECIPE), **{**SMALL, "new_tokens": 0}, batch=3)
    assert report.compressed is not None
    assert report.compressed.decode is None
    assert (report.batch, report.new_tokens) == (3, 0)


def test_every_token_asked_for_is_timed(toy: Callable[..., Path]) -> None:
    model, _ = load(toy("llama"))
    # Habits of a checkpoint that would change what is measured.
    model.generation_config.num_beams, model.generation_config.max_length = 4, 3
    model.generation_config.eos_token_id = list(range(101))
    runner = Runner(model, 2, 8, 5)
    runner.once(kept=False)
    assert runner.steps == runner.prefills == []
    runner.once()
    runner.once()
    assert len(runner.prefills) == 2
    assert len(runner.steps) == 10
    assert runner.prefill == 2 * 8 / statistics.median(runner.prefills)
    assert runner.decode == 2 / statistics.median(runner.steps)


def test_prompts_have_no_special_tokens(toy: Callable[..., Path]) -> None:
    model, _ = load(toy("llama"))
    model.config.image_token_id = 50
    tokens = Runner(model, 4, 40, 1).tokens
    assert tokens.min() >= 10
    assert not (tokens == 50).any()
    assert torch.equal(tokens, Runner(model, 4, 40, 1).tokens)


def test_layers_of_one_shape_are_one_case(compressed: Callable[..., Path]) -> None:
    model, _ = load(compressed("llama", **RECIPE))
    layers = list(compressed_layers(model).values())
    groups = by_shape(layers)
    assert sorted(map(id, layers)) == sorted(id(layer) for group in groups for layer in group)
    works = [len(group) * group[0].in_features * group[0].out_features for group in groups]
    assert works == sorted(works, reverse=True)
    found = list(layer_speeds(layers, (2,), 1))
    for group, case in zip(groups, found, strict=True):
        assert case.count == len(group)
        assert case.dense_nbytes == group[0].in_features * group[0].out_features * 4
        assert case.rank == 4
        assert case.density == pytest.approx(0.5, abs=0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("without_process")
def test_memory_in_use_is_about_that_on_disk(tmp_path: Path) -> None:
    toys.llama(tmp_path / "dense", hidden=256, intermediate=704, layers=2)
    compress(tmp_path / "dense", tmp_path / "small", Recipe(rank=0, sparsity=0.9))
    report = bench(tmp_path / "small", against=tmp_path / "dense", **SMALL)
    assert report.compressed is not None
    assert report.dense is not None
    assert report.dtype == "bfloat16"
    assert report.compressed.tensors <= 1.3 * report.compressed.disk
    assert report.dense.disk <= report.dense.tensors <= 1.01 * report.dense.disk  # a tied head counts once
    for case in report.layers:
        assert case.nbytes < 0.3 * case.dense_nbytes
        assert case.rank == 0


@pytest.mark.usefixtures("without_process")
def test_dtype_and_threads(compressed: Callable[..., Path]) -> None:
    before = torch.get_num_threads()
    report = bench(compressed("llama", **RECIPE), dtype="bfloat16", threads=2, **SMALL)
    assert (report.dtype, report.threads, torch.get_num_threads()) == ("bfloat16", 2, before)
    assert report.device == "cpu"
    assert report.processor


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say")
def test_a_fresh_process_grows_by_about_the_model(tmp_path: Path) -> None:
    toys.llama(tmp_path / "dense", hidden=1024, intermediate=4096, layers=2)
    stored = sum(path.stat().st_size for path in (tmp_path / "dense").glob("*.safetensors"))
    grown = resident(tmp_path / "dense", "auto")
    assert grown is not None
    assert 0.8 * stored < grown < 2 * stored + (30 << 20)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say")
def test_memory_of_a_compressed_encoder_in_a_fresh_process(compressed: Callable[..., Path]) -> None:
    report = bench(compressed("bert", **RECIPE), **SMALL)
    assert report.compressed is not None
    assert report.compressed.resident is not None
    assert 0 < report.compressed.resident < 100 << 20


def test_where_nobody_says_memory_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("losparse_cli.benchmark.resident.STATUS", tmp_path / "absent")
    assert resident(tmp_path, "auto") is None


# --- the report -----------------------------------------------------------------------------------


def test_ratios_of_a_report() -> None:
    layer = LayerSpeed((4, 6), 2, 1, 0.1, "unstructured", "bits", 1, 2.0, 3.0, 100, 400)
    report = BenchReport("a", "cpu", "float32", 1, "x", 1e6, 1, 8, 2, layers=(layer,))
    assert (layer.speedup, layer.bandwidth, layer.dense_bandwidth) == (1.5, 50_000, pytest.approx(400 / 3 * 1000))
    assert set(report.ratios.values()) == {None}
    both = report.with_(compressed=ModelSpeed(8.0, None, 10, 20, 0), dense=ModelSpeed(10.0, 5.0, 40, 40, None))
    assert both.ratios == {
        "prefill_speedup": 0.8, "decode_speedup": None, "disk_share": 0.25, "tensors_share": 0.5,
        "resident_share": None, "token_share": None,
    }  # fmt: skip
    assert both.to_dict()["layers"][0]["share_of_copy"] == 0.05


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch": 0}, "--batch"),
        ({"prompt": 0}, "--prompt"),
        ({"new_tokens": -1}, "--new-tokens"),
        ({"rounds": 0}, "--rounds"),
        ({"rows": (1, 0)}, "--rows"),
        ({"rows": ()}, "--rows"),
        ({"threads": 0}, "--threads"),
        ({"dtype": "int8"}, "--dtype"),
        ({"device": "tpu"}, "--device"),
        ({"prompt": 48}, "--prompt"),
        ({"prompt": 46, "new_tokens": 3}, "--new-tokens"),
    ],
)
def test_wrong_values_are_named(options: dict[str, Any], named: str, compressed: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=named):
        bench(compressed("llama", **RECIPE), **{**SMALL, **options})


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_a_prompt_beyond_what_a_model_takes(name: str, compressed: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"takes at most 48 tokens\. Give --prompt 48 or less"):
        bench(compressed(name, **RECIPE), **{**SMALL, "prompt": 49})


def test_models_that_hold_nothing_to_compare(compressed: Callable[..., Path], toy: Callable[..., Path]) -> None:
    small = compressed("llama", **RECIPE)
    with pytest.raises(UsageError, match=r"is not compressed\. Name a result of losparse compress"):
        bench(toy("llama"), **SMALL)
    with pytest.raises(UsageError, match=r"is compressed itself\. Name the dense model"):
        bench(small, against=small, **SMALL)
    with pytest.raises(UsageError, match=r"has a vocabulary of 101, .* of 96\. Give the dense model"):
        bench(small, against=toy("llama", vocab_size=96), **SMALL)
    with pytest.raises(LosparseError, match="There is no folder"):
        bench(small, against="./absent", **SMALL)


def test_a_model_that_reads_no_text(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    compress(tmp_path / "vit", tmp_path / "small", Recipe(**RECIPE))
    with pytest.raises(UsageError, match="reads pixel_values, not text"):
        bench(tmp_path / "small", **SMALL)


def test_memory_that_runs_out_says_what_to_lower(compressed: Callable[..., Path], monkeypatch: Any) -> None:
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MODULE, "copy_bandwidth", full)
    with pytest.raises(LosparseError, match=r"Memory ran out\. Take fewer --rows"):
        bench(compressed("llama", **RECIPE), **SMALL)


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["1,x", "", "1,,2", "1.5"])
def test_rows_that_are_no_numbers(rows: str) -> None:
    ended = losparse("bench", "no-such-model", "--rows", rows)
    assert ended.code == 2
    assert ended.complaint == f"--rows lists whole numbers, such as 1,16,256, not {rows!r}."


def test_a_plot_is_checked_before_any_work(tmp_path: Path) -> None:
    ended = losparse("bench", "./no-such-model", "--plot", "x.pdf", cwd=tmp_path)
    assert ended.code == 2
    assert ".png, .svg and .html" in ended.complaint


@pytest.mark.parametrize(
    ("arguments", "policy"),
    [
        (("inspect", "--help"), "PASSIVE"),
        (("bench", "--help"), None),
        (("generate", "--help"), None),
        (("--help", "bench"), None),
        (("inspect", "bench", "--help"), "PASSIVE"),
        (("--version",), "PASSIVE"),
    ],
)
@pytest.mark.usefixtures("capsys")
def test_only_what_writes_lets_threads_spin(
    arguments: tuple[str, ...], policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that what main() sets is undone
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(sys, "argv", ["losparse", *arguments])
    with pytest.raises(SystemExit):
        app.main()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # a person's own choice stays
    with pytest.raises(SystemExit):
        app.main()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


# --- beside llama.cpp ------------------------------------------------------------------------------


FAKE = """
import json, sys
print("{}", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    found = {"prompt_per_second": 10.0 * len(asked["prompt"]), "predicted_per_second": float(asked["n_predict"])}
    print(json.dumps(found), flush=True)
"""


def in_place_of_llama_cpp(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """The process that would run it runs `script`."""

    def start(command: list[str], **options: Any) -> Any:
        return subprocess.Popen([sys.executable, "-c", script], **options)

    monkeypatch.setattr(peer, "subprocess", SimpleNamespace(Popen=start, PIPE=subprocess.PIPE))
    monkeypatch.setattr(peer, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=str)))


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    return path


@pytest.mark.usefixtures("without_process")
def test_llama_cpp_beside_it(
    compressed: Callable[..., Path], toy: Callable[..., Path], gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a process in its place that answers as it does: what it says is what is shown."""
    in_place_of_llama_cpp(monkeypatch, FAKE)
    heard = Hearing()
    report = bench(compressed("llama", **RECIPE), against=toy("llama"), peer=gguf, progress=heard, **SMALL)
    consistent(report)
    assert heard.totals == heard.done
    assert report.peer is not None
    assert report.compressed is not None
    assert (report.peer.prefill, report.peer.decode, report.peer.disk) == (80.0, 3.0, 64)
    assert report.peer_ratios["prefill_speedup"] == report.compressed.prefill / 80
    assert report.peer_ratios["tensors_share"] is None
    shown = printed(lambda out: show_speed(out, report), 100)
    assert shown.count("llama.cpp") == 2  # its own figures, and ours over them
    assert json.loads(json.dumps(report.to_dict()))["peer"]["decode"] == 3.0


def test_llama_cpp_is_refused(
    compressed: Callable[..., Path], gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = compressed("llama", **RECIPE)
    with pytest.raises(SourceError, match=r"no file .*other\.gguf"):
        bench(folder, peer=tmp_path / "other.gguf", **SMALL)
    with pytest.raises(UsageError, match="one prompt at a time"):
        bench(folder, peer=gguf, batch=2, **SMALL)
    monkeypatch.setattr(peer, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    with pytest.raises(MissingExtraError, match=r"pip install 'losparse\[bench\]'"):
        bench(folder, peer=gguf, **SMALL)
    gguf.write_bytes(b"GGML" + bytes(60))
    with pytest.raises(CheckpointError, match="is no GGUF file"):
        bench(folder, peer=gguf, **SMALL)


def test_a_file_that_llama_cpp_cannot_run(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of_llama_cpp(monkeypatch, "")
    found = peer.Peer(gguf, 8, 2, 1)
    with pytest.raises(CheckpointError, match=r"llama.cpp cannot run"):
        found.start()
    found.close()


def test_bytes_that_a_token_reads(compressed: Callable[..., Path], toy: Callable[..., Path]) -> None:
    tied, _ = load(toy("qwen2"))
    assert token_bytes(tied) == tensor_bytes(tied)
    untied, _ = load(toy("llama"))
    rows = untied.get_input_embeddings().weight
    assert token_bytes(untied) == tensor_bytes(untied) - rows.numel() * rows.element_size()
    coded, _ = load(compressed("qwen2", bits=4.0, vocab_size=1100))
    assert token_bytes(coded) == tensor_bytes(coded)
    assert token_bytes(load(toy("mixtral"))[0]) is None


def test_a_head_that_computes_with_the_embeddings_codes_weighs_what_they_do(compressed: Callable[..., Path]) -> None:
    model, _ = load(compressed("qwen2", bits=4.0, vocab_size=1100))
    layers = compressed_layers(model)
    assert "lm_head" in layers
    (head,) = (x for x in layer_speeds([layers["lm_head"]], (1,), 1))
    assert head.bits > 2
