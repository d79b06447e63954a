"""Figures of a model on a text: by their definitions, by either way of holding two models, and as they are shown."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import Loads, character_tokenizer
from terminal import done, losparse
from torch import Tensor

from losparse_cli.budget.recipe import Recipe
from losparse_cli.compress import compress
from losparse_cli.errors import CheckpointError, OutputError, SourceError, UsageError
from losparse_cli.evaluate import Evaluation, evaluate, perplexity
from losparse_cli.evaluation import models
from losparse_cli.evaluation.scores import Scores, compare, exponential, mean
from losparse_cli.evaluation.windows import Window, cut, lines
from losparse_cli.export import export
from losparse_cli.load import load
from losparse_cli.models import device as room
from losparse_cli.tasks.paired import Estimate
from losparse_cli.verify import require_sound
from tests.hearing import Hearing

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 8
OPTIONS: dict[str, Any] = {"length": 24, "device": "cpu"}


class Uniform:
    """A model that gives every one of `size` tokens the same probability."""

    device = torch.device("cpu")

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.size))


class Letters:
    """One token a character."""

    def __call__(self, text: str, **options: object) -> SimpleNamespace:
        ids = [ord(c) % 13 for c in text]
        return SimpleNamespace(input_ids=torch.tensor([ids]) if "return_tensors" in options else ids)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


# --- windows --------------------------------------------------------------------------------------


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    measured = perplexity(Uniform(13), Letters(), "x" * 95, length=10, windows=4)
    assert measured.value == pytest.approx(13.0)
    assert measured.tokens == 4 * 9
    assert perplexity(Uniform(13), Letters(), "x" * 95, length=10, windows=99).tokens == 9 * 9


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(UsageError, match="fewer than one window"):
        perplexity(Uniform(13), Letters(), "short", length=10)
    with pytest.raises(UsageError, match="fewer than one window"):
        perplexity(Uniform(13), Letters(), "", length=10)
    assert math.isfinite(perplexity(Uniform(13), Letters(), "x" * 10, length=10).value)


def test_every_window_begins_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = character_tokenizer()
    found = cut(tokenizer, TEXT, length=10, count=3)
    assert found.before == (1,)
    assert found.stride == 9
    assert all(int(unit.ids[0]) == 1 and unit.ids.numel() == 10 and unit.scored == 9 for unit in found.units)
    shown = torch.cat([unit.ids[1:] for unit in found.units]).tolist()
    assert shown == tokenizer(TEXT, add_special_tokens=False).input_ids[:27]


@pytest.mark.parametrize("stride", [1, 3, 9, 10])
def test_every_token_is_predicted_once(stride: int) -> None:
    text = "".join(chr(97 + k % 26) for k in range(83))
    found = cut(Letters(), text, length=10, stride=stride)
    predicted: list[int] = []
    for k, window in enumerate(found.units):
        assert isinstance(window, Window)
        predicted += range(k * stride + window.first, k * stride + 10)
    if stride < 10:
        assert predicted == list(range(1, predicted[-1] + 1))
    else:  # disjoint: nothing stands before the first token of a window
        assert predicted == [k for k in range(80) if k % 10]


def test_a_long_text_is_not_read_to_its_end() -> None:
    read: list[int] = []

    class Counting(Letters):
        def __call__(self, text: str, **options: object) -> SimpleNamespace:
            read.append(len(text))
            return super().__call__(text, **options)

    long = "abc " * 100_000
    few = cut(Counting(), long, length=10, count=4)
    assert max(read) < 2000
    assert few.same(cut(Letters(), long[:400], length=10, count=4))


def test_tokens_that_are_many_characters_long_are_found_all_the_same() -> None:
    class Chapters:
        def __call__(self, text: str, **options: object) -> SimpleNamespace:
            ids = [len(part) for part in text.split("\n")]
            return SimpleNamespace(input_ids=torch.tensor([ids]) if "return_tensors" in options else ids)

    text = "\n".join("x" * (100 + k) for k in range(50))
    units = cut(Chapters(), text, length=10, count=3).units
    assert torch.cat([unit.ids for unit in units]).tolist() == [100 + k for k in range(30)]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"stride": 0}, "--stride"), ({"stride": 24}, "--stride"), ({"length": 2}, "no room"), ({"count": -1}, "0 for")],
)
def test_lengths_that_contradict_one_another(options: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        cut(character_tokenizer(), TEXT, **{"length": 24, **options})


# --- figures --------------------------------------------------------------------------------------


def test_figures_are_what_their_names_say(toy: Callable[..., Path], compressed: Callable[..., Path]) -> None:
    """Against a computation in float64, a token at a time, from transformers' own output."""
    folder, source = toy("llama", tokenizer=True), compressed("llama", tokenizer=True)
    found = evaluate(source, TEXT, against=folder, windows=5, **OPTIONS)
    (ours, tokenizer), (dense, _) = load(source), load(folder)
    stream = tokenizer(TEXT, add_special_tokens=False).input_ids
    losses, divergences, agreements = [], [], []
    for k in range(5):
        ids = torch.tensor([[1, *stream[23 * k : 23 * (k + 1)]]])
        with torch.no_grad():
            log_q, log_p = (model(ids).logits[0, :-1].double().log_softmax(-1) for model in (ours, dense))
        losses += [-float(log_q[t, ids[0, t + 1]]) for t in range(23)]
        divergences += [float((log_p[t].exp() * (log_p[t] - log_q[t])).sum()) for t in range(23)]
        agreements += [bool(log_p[t].argmax() == log_q[t].argmax()) for t in range(23)]
    assert found.protocol.tokens == len(losses) == 115
    assert found.log_perplexity is not None
    assert found.perplexity is not None
    assert found.kl is not None
    assert found.agreement is not None
    assert found.log_perplexity.value == pytest.approx(sum(losses) / 115, abs=1e-5)
    assert found.perplexity.value == pytest.approx(math.exp(sum(losses) / 115), rel=1e-5)
    assert found.kl.value == pytest.approx(sum(divergences) / 115, abs=1e-5)
    assert found.agreement.value == pytest.approx(sum(agreements) / 115)
    # Windows of one size: the error of the mean over windows.
    means = torch.tensor(losses, dtype=torch.float64).view(5, 23).mean(1)
    assert found.log_perplexity.error == pytest.approx(float(means.std()) / math.sqrt(5), rel=1e-3)
    assert found.perplexity.error == pytest.approx(found.perplexity.value * found.log_perplexity.error)


def test_perplexity_is_that_of_evaluate(toy: Callable[..., Path]) -> None:
    folder = toy("llama", tokenizer=True)
    model, tokenizer = load(folder)
    found = evaluate(folder, TEXT, windows=4, **OPTIONS)
    measured = perplexity(model, tokenizer, TEXT, length=24, windows=4)
    assert found.perplexity is not None
    assert found.perplexity.value == pytest.approx(measured.value)
    assert found.protocol.tokens == measured.tokens
    assert found.kl is found.dense is found.log_difference is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "t5", "bart"])
def test_a_model_does_not_differ_from_itself(name: str, toy: Callable[..., Path]) -> None:
    folder = toy(name, tokenizer=True)
    found = evaluate(folder, TEXT, against=folder, windows=3, **OPTIONS)
    assert found.kind == ("seq2seq" if name in ("t5", "bart") else "causal")
    assert found.kl is not None
    assert abs(found.kl.value) < 1e-6
    assert found.log_difference == Estimate(0.0, 0.0)
    assert found.agreement == Estimate(1.0, 0.0)
    assert found.perplexity == found.dense_perplexity


def test_the_paired_error_is_less_than_those_of_the_two(
    toy: Callable[..., Path], compressed: Callable[..., Path]
) -> None:
    found = evaluate(
        compressed("llama", tokenizer=True, keep=0.9, values="float"),
        TEXT,
        against=toy("llama", tokenizer=True),
        windows=0,
        **OPTIONS,
    )
    assert found.protocol.units == len(TEXT) // 23
    assert found.log_difference is not None
    assert found.log_perplexity is not None
    assert found.dense_log_perplexity is not None
    assert found.log_difference.value == pytest.approx(
        found.log_perplexity.value - found.dense_log_perplexity.value, abs=1e-9
    )
    assert found.log_difference.error is not None
    assert found.log_perplexity.error is not None
    assert found.log_difference.error < found.log_perplexity.error


def test_a_mean_over_clusters_and_its_error() -> None:
    assert mean([2.0, 4.0], [1, 1]) == Estimate(3.0, 1.0)
    assert mean([2.0, 8.0], [1, 4]) == Estimate(2.0, 0.0)  # the same in every cluster
    assert mean([3.0], [2]) == Estimate(1.5, None)
    assert exponential(Estimate(math.log(5), 0.1)).error == pytest.approx(0.5)
    assert exponential(Estimate(800.0, None)).value == math.inf


def test_the_stated_error_is_the_spread_of_repeated_measurements() -> None:
    """Tokens of a window share most of their noise; errors that took them as independent would be 4 times smaller."""
    generator = torch.Generator().manual_seed(0)
    values, errors = [], []
    for _ in range(300):
        shared = torch.randn(24, 1, generator=generator)
        losses = 3 + shared + 0.5 * torch.randn(24, 20, generator=generator)
        found = mean(losses.sum(1).tolist(), [20] * 24)
        values.append(found.value)
        errors.append(found.error or 0.0)
    spread = float(torch.tensor(values).std())
    assert sum(errors) / 300 == pytest.approx(spread, rel=0.1)


# --- two models together or apart -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_apart_and_together_agree(name: str, toy: Callable[..., Path], compressed: Callable[..., Path]) -> None:
    heard = {"together": Hearing(), "apart": Hearing()}
    found: dict[str, dict[str, Any]] = {}
    for way in ("together", "apart"):
        figures = evaluate(
            compressed(name, tokenizer=True), TEXT, against=toy(name, tokenizer=True), windows=4, memory=way,
            progress=heard[way], **OPTIONS,
        )  # fmt: skip
        found[way] = figures.to_dict()
        assert figures.protocol.memory == way
    assert heard["together"].totals == heard["together"].done == {"windows": 4}
    assert heard["apart"].totals == heard["apart"].done == {"windows": 8}
    for key in ("perplexity", "dense_perplexity", "log_difference", "agreement", "cosine"):
        assert found["apart"][key] == found["together"][key], key
    if name != "bert":
        assert found["apart"]["kl"]["value"] > 1e-3
        assert found["apart"]["kl"]["value"] == pytest.approx(found["together"]["kl"]["value"], abs=1e-5)
        assert found["apart"]["kl"]["error"] == pytest.approx(found["together"]["kl"]["error"], abs=1e-5)


def test_what_a_file_costs_in_accuracy(tmp_path: Path) -> None:
    """Sharp and flat predictions over a vocabulary of usual size, at distances from 0.0001 to 10 nats."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 4.0):
        logits = scale * torch.randn(8, 50_000, generator=generator)
        for noise in (0.01, 0.3, 2.0):
            other = logits + noise * torch.randn(logits.shape, generator=generator)
            dense, ours = (Scores(x.log_softmax(-1), x.log_softmax(-1)[:, 0], x.argmax(-1)) for x in (logits, other))
            dense.save(tmp_path / "0")
            kept = Scores.read(tmp_path / "0", torch.device("cpu"))
            assert kept.rows.dtype == torch.float16
            exact, rounded = compare(ours, dense), compare(ours, kept)
            assert (rounded.loss, rounded.dense_loss, rounded.agree) == (exact.loss, exact.dense_loss, exact.agree)
            assert rounded.kl / 8 == pytest.approx(exact.kl / 8, abs=1e-4)


def test_tokens_that_cannot_come_add_nothing() -> None:
    rows = torch.tensor([[0.0, -math.inf], [0.0, -math.inf]])
    same = Scores(rows, rows[:, 0], rows.argmax(-1))
    assert compare(same, same).kl == 0.0
    other = Scores(rows.flip(1), rows[:, 1], rows.flip(1).argmax(-1))
    assert compare(other, same).kl == math.inf


def test_auto_holds_models_apart_that_do_not_fit(
    toy: Callable[..., Path], compressed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, dense = compressed("llama", tokenizer=True), toy("llama", tokenizer=True)
    for free, way in ((10**12, "together"), (10**4, "apart")):
        monkeypatch.setattr(models, "available", lambda device, free=free: free)
        assert evaluate(source, TEXT, against=dense, windows=1, **OPTIONS).protocol.memory == way


def test_available_memory_is_what_the_system_and_its_limits_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(room, "CONTROL_GROUP", tmp_path)
    assert room.available(torch.device("cpu")) > 0  # a system that has neither file
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert room.available(torch.device("cpu")) == 5000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert room.available(torch.device("cpu")) == 5000 * 1024
    (tmp_path / "memory.max").write_text("4000\n")
    assert room.available(torch.device("cpu")) == 3000


def test_apart_means_that_the_dense_model_has_gone(
    toy: Callable[..., Path], compressed: Callable[..., Path], watch_loads: Callable[[Any], Loads]
) -> None:
    loads = watch_loads(sys.modules["losparse_cli.evaluate"])
    source, dense = compressed("llama", tokenizer=True), toy("llama", tokenizer=True)
    for way in ("apart", "together"):
        loads.models.clear()
        evaluate(source, TEXT, against=dense, windows=1, memory=way, **OPTIONS)
    assert loads.alive == [0, 0, 0, 1]


def test_a_model_is_run_in_the_dtype_asked_for(toy: Callable[..., Path], compressed: Callable[..., Path]) -> None:
    stored = {"tokenizer": True, "dtype": torch.bfloat16}
    source, dense = compressed("llama", **stored), toy("llama", **stored)
    found = {
        dtype: evaluate(source, TEXT, against=dense, windows=2, dtype=dtype, **OPTIONS)
        for dtype in ("auto", "float32", "bfloat16")
    }
    assert [x.protocol.dtype for x in found.values()] == ["bfloat16", "float32", "bfloat16"]
    assert found["auto"].kl == found["bfloat16"].kl != found["float32"].kl


def test_a_temporary_folder_that_is_too_small(toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = toy("llama", tokenizer=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OutputError, match="Set TMPDIR"):
        evaluate(folder, TEXT, against=folder, windows=3, memory="apart", **OPTIONS)


# --- encoders -------------------------------------------------------------------------------------


def test_an_encoder_is_compared_by_its_vectors(toy: Callable[..., Path], compressed: Callable[..., Path]) -> None:
    folder, source = toy("bert", tokenizer=True), compressed("bert", tokenizer=True)
    text = "one line\n\n  another, longer line  \nthird\nnot read\n"
    found = evaluate(source, text, against=folder, windows=3, **OPTIONS)
    (ours, tokenizer), (dense, _) = load(source), load(folder)
    cosines = []
    for line in ("one line", "another, longer line", "third"):
        ids = tokenizer(line, return_tensors="pt").input_ids
        with torch.no_grad():
            u, v = (model.bert(ids).last_hidden_state[0].mean(0) for model in (ours, dense))
        cosines.append(float(torch.cosine_similarity(u, v, dim=0)))
    assert found.kind == "encoder"
    assert found.cosine is not None
    assert found.cosine.value == pytest.approx(sum(cosines) / 3, abs=1e-6)
    assert found.cosine.error == pytest.approx(float(torch.tensor(cosines).std()) / math.sqrt(3), abs=1e-6)
    assert found.perplexity is None
    assert (found.protocol.units, found.protocol.stride) == (3, 0)


def test_an_encoder_alone_has_no_figure(toy: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="Add --against"):
        evaluate(toy("bert", tokenizer=True), TEXT, **OPTIONS)
    with pytest.raises(UsageError, match="no --stride"):
        evaluate(toy("bert", tokenizer=True), TEXT, against=toy("bert", tokenizer=True), stride=4, **OPTIONS)
    with pytest.raises(UsageError, match="Give at least 2"):
        evaluate(toy("bert", tokenizer=True), TEXT, against=toy("bert", tokenizer=True), length=1)


# --- what is refused ------------------------------------------------------------------------------


def test_models_that_do_not_belong_together(toy: Callable[..., Path], tmp_path: Path) -> None:
    folder = toy("llama", tokenizer=True)
    with pytest.raises(UsageError, match=r"vocabulary of 101, .* of 103"):
        evaluate(folder, TEXT, against=toy("llama", tokenizer=True, vocab_size=103), **OPTIONS)
    with pytest.raises(UsageError, match="two kinds"):
        evaluate(folder, TEXT, against=toy("bert", tokenizer=True), **OPTIONS)
    other = shutil.copytree(folder, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    for way in ("together", "apart"):
        with pytest.raises(UsageError, match="different tokens"):
            evaluate(folder, TEXT, against=other, memory=way, windows=2, **OPTIONS)


def test_options_that_the_model_cannot_satisfy(toy: Callable[..., Path]) -> None:
    folder = toy("llama", tokenizer=True)
    with pytest.raises(UsageError, match=r"at most 48 tokens. Give --length 48 or less"):
        evaluate(folder, TEXT, length=49)
    for options in ({"memory": "near"}, {"memory": "apart"}, {"dtype": "int4"}, {"device": "tpu"}):
        with pytest.raises(UsageError, match=f"--{next(iter(options))}"):
            evaluate(folder, TEXT, **{**OPTIONS, **options})
    with pytest.raises(SourceError, match=r"no tokenizer\. Copy"):
        evaluate(toy("llama"), TEXT, **OPTIONS)


def test_positions_that_begin_after_padding(tmp_path: Path) -> None:
    """RoBERTa's table has more of them than a text may have tokens."""
    config = transformers.RobertaConfig(
        vocab_size=101, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=20, is_decoder=True, pad_token_id=1,
    )  # fmt: skip
    transformers.RobertaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer = character_tokenizer()
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match=r"at most 18 tokens. Give --length 18 or less"):
        evaluate(tmp_path / "model", TEXT, length=19, windows=2, device="cpu")
    assert evaluate(tmp_path / "model", TEXT, length=18, windows=2, device="cpu").protocol.length == 18


def test_a_tokenizer_of_more_tokens_than_the_model_has(toy: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"yields token \d+, and the model knows 50"):
        evaluate(toy("gpt2", tokenizer=True, vocab_size=50), "yzyz" * 20, **OPTIONS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"GIF89a\xff\xfe", "not UTF-8 text .at byte 6"),
        (b"text\0more", "NUL"),
        ("text".encode("utf-16-le"), "NUL"),
    ],
)
def test_a_file_that_is_no_text(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(UsageError if said == "is empty" else SourceError, match=said):
        evaluate("absent", tmp_path / "text")


def test_a_file_is_found_before_the_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--text .* is a folder\. Give a file in it\.$"):
        evaluate("absent", tmp_path)
    with pytest.raises(UsageError, match=r"^There is no file .*text\. Check --text\.$"):
        evaluate("absent", tmp_path / "text")


@pytest.mark.parametrize("count", [0, 4])
def test_a_file_is_cut_as_its_text_is(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"line {k} of \u00e9\r\n" + "\r\n" * (k % 3 == 0) for k in range(300))
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    whole = cut(Letters(), text.replace("\r\n", "\n"), length=10, stride=7, count=count)
    monkeypatch.setattr("losparse_cli.text.files.PIECE", 101)
    monkeypatch.setattr("losparse_cli.text.tokenizer.PIECE", 64)
    assert whole.same(cut(Letters(), path, length=10, stride=7, count=count))
    assert not whole.same(cut(Letters(), path, length=10, stride=8, count=count))
    tokenizer = character_tokenizer()
    by_line = [lines(tokenizer, source, length=10, count=count) for source in (path, text)]
    assert by_line[0].same(by_line[1])
    assert len(by_line[0].units) == (count or 300)


def test_of_a_long_file_only_the_beginning_is_read(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"abc " * (1 << 19) + b"\xff")  # what comes after is not looked at
    assert cut(Letters(), path, length=10, count=4).same(cut(Letters(), "abc " * 100, length=10, count=4))
    path.write_bytes(b"a line\n" * (1 << 18) + b"\xff")
    assert len(lines(character_tokenizer(), path, length=10, count=4).units) == 4


# --- the command ----------------------------------------------------------------------------------


def test_eval_shows_a_table(toy: Callable[..., Path], compressed: Callable[..., Path], file: Path) -> None:
    source, dense = compressed("llama", tokenizer=True), toy("llama", tokenizer=True)
    ended = done("eval", source, "--against", dense, "--text", file, "--length", 24, "--windows", 4, "--device", "cpu")
    assert ended.err == ""
    for words in ("perplexity, dense", "KL(dense || this)", "same likeliest token", "of dense)", "std. error",
                  "4 windows of 24 tokens, 1 special at the start of each, stride 23, 92 tokens predicted, float32 on",
                  "windows as independent"):  # fmt: skip
        assert words in ended.out, ended.out
    alone = done("eval", dense, "--text", file, "--length", 24, "--windows", 1, "--device", "cpu").out
    assert "perplexity" in alone
    assert "dense" not in alone.replace(str(dense), "")


def test_eval_as_json_is_what_the_function_returns(
    toy: Callable[..., Path], compressed: Callable[..., Path], file: Path
) -> None:
    source, dense = compressed("llama", tokenizer=True), toy("llama", tokenizer=True)
    shown = done(
        "eval", source, "--against", dense, "--text", file, "--length", 24, "--stride", 8, "--windows", 4, "--json",
        "--device", "cpu", "--memory", "apart",
    )  # fmt: skip
    assert shown.err == ""
    content = json.loads(shown.out)
    found = evaluate(source, TEXT, against=dense, stride=8, windows=4, memory="apart", **OPTIONS)
    assert content["protocol"] == json.loads(json.dumps(found.to_dict()["protocol"]))
    assert content["protocol"]["tokens"] == 23 + 3 * 8
    assert content["kl"]["value"] == pytest.approx(found.to_dict()["kl"]["value"], rel=1e-4)
    assert content["nbytes"] < content["dense_nbytes"]
    assert content.keys() == Evaluation.__dataclass_fields__.keys()


def test_eval_refuses_in_a_sentence(toy: Callable[..., Path], file: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    for path, said in (("absent.txt", "There is no file absent.txt"), ("short.txt", "fewer than one window")):
        ended = losparse("eval", toy("llama", tokenizer=True), "--text", path, "--length", 24, cwd=tmp_path)
        assert ended.code == 2
        assert said in ended.complaint
    assert losparse("eval", toy("llama"), "--text", file).code == 1
    quiet = done("eval", toy("llama", tokenizer=True), "--text", file, "--length", 24, "--quiet", "--device", "cpu")
    assert (quiet.out, quiet.err) == ("", "")


def test_a_figure_that_is_not_finite_is_valid_json(toy: Callable[..., Path]) -> None:
    from dataclasses import replace

    found = evaluate(toy("llama", tokenizer=True), TEXT, windows=1, **OPTIONS)
    assert found.perplexity is not None
    assert found.perplexity.error is None
    wild = replace(found, perplexity=Estimate(math.inf, math.nan)).to_dict()
    assert json.loads(json.dumps(wild, allow_nan=False))["perplexity"] == {"value": None, "error": None}


def test_recorded_figures_go_with_the_checkpoint_and_not_with_what_is_made_of_it(
    toy: Callable[..., Path], file: Path, tmp_path: Path
) -> None:
    dense = toy("llama", tokenizer=True)
    small = compress(dense, tmp_path / "small", Recipe(rank=4, sparsity=0.5)).output
    command = ("eval", small, "--against", dense, "--text", file, "--length", "24", "--windows", "2", "--record")
    run = done(*command)
    assert run.code == 0, run.err
    kept = (small / "losparse_evaluation.json").read_text()
    assert str(tmp_path) not in kept
    assert str(dense) not in kept
    assert f"| {file.name} | perplexity |" in (small / "README.md").read_text()
    require_sound(small)
    export(small, tmp_path / "dense")
    assert not (tmp_path / "dense" / "losparse_evaluation.json").exists()
    (small / "losparse_evaluation.json").write_text(kept.replace("report_sha256", "other"))
    with pytest.raises(CheckpointError, match=r"losparse_evaluation.json is damaged"):
        require_sound(small)
    assert "--record keeps figures in a folder that losparse wrote" in losparse("eval", dense, *command[2:]).complaint


def test_a_file_is_taken_by_its_name(toy: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    named, given = (evaluate(toy("llama", tokenizer=True), text, windows=2, **OPTIONS)
                    for text in (str(tmp_path / "text.txt"), TEXT))  # fmt: skip
    assert named.to_dict() == given.to_dict()
