"""Embeddings and output heads in whole numbers, end to end: compressed, loaded, saved, exported, in every family."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import transformers
from conftest import TOYS, answer, character_tokenizer, toy_model
from safetensors.torch import load_file, save_file
from test_load import WITHOUT_LOSPARSE

import losparse_cli
from losparse_cli.budget.recipe import EMBEDDING_BITS, Recipe
from losparse_cli.checkpoint.writer import ShardWriter
from losparse_cli.compress import compress, plan
from losparse_cli.errors import RecipeError, UsageError
from losparse_cli.export import export
from losparse_cli.shim.embedding import CodedEmbedding
from losparse_cli.shim.linear import LowRankSparseLinear
from losparse_cli.verify import verify

TOKENS = 1100
ENCODER = TOYS["bert"][2]
MODELS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": (*TOYS["llama"][:2], "model.embed_tokens lm_head", TOYS["llama"][2]),
    "llama-tied": (*TOYS["llama"][:2], "model.embed_tokens", {**TOYS["llama"][2], "tie_word_embeddings": True}),
    "llama-base": ("LlamaModel", "LlamaConfig", "embed_tokens", TOYS["llama"][2]),
    "gemma3": (*TOYS["gemma3"][:2], "model.embed_tokens", TOYS["gemma3"][2]),
    "gpt2": (*TOYS["gpt2"][:2], "transformer.wte", TOYS["gpt2"][2]),
    "t5": (*TOYS["t5"][:2], "shared", TOYS["t5"][2]),
    "bart": (*TOYS["bart"][:2], "model.shared", {**TOYS["bart"][2], "scale_embedding": True}),
    "bert": (*TOYS["bert"][:2], "bert.embeddings.word_embeddings", ENCODER),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", "bert.embeddings.word_embeddings", ENCODER),
    "bert-base": ("BertModel", "BertConfig", "embeddings.word_embeddings", ENCODER),
}
"""Name -> model class, config class, what is stored as rows of codes, config."""
AUTO = {"bart": "AutoModelForSeq2SeqLM", "bert-mlm": "AutoModelForMaskedLM"}
"""Where that is not AutoModelForCausalLM."""

SHIPPED = ("llama", "llama-tied", "gemma3", "bart", "bert-mlm")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """dense(name, dtype) -> a folder with a model of enough tokens. Read only."""
    made: dict[Any, Path] = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            model_class, config_class, _, settings = MODELS[name]
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(TOYS, name, (model_class, config_class, settings))
                model = toy_model(name, vocab_size=TOKENS).to(dtype)
            folder = tmp_path_factory.mktemp(name) / "dense"
            model.save_pretrained(folder)
            character_tokenizer().save_pretrained(folder)
            made[name, dtype] = folder
        return made[name, dtype]

    return make


@pytest.fixture(scope="module")
def coded(dense: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """coded(name, dtype) -> the folder compressed. Read only."""
    made: dict[Any, Path] = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = compress(
                dense(name, dtype), tmp_path_factory.mktemp(name) / "coded", bits=6.0, embedding_bits=6.5
            ).output
        return made[name, dtype]

    return make


def load(folder: Path, **options: Any) -> Any:
    return losparse_cli.load(folder, **options)[0]


def modules(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    return found


def rows(folder: Path, name: str) -> list[str]:
    """What is stored as rows of codes."""
    return [n for n in MODELS[name][2].split() if n in modules(folder)]


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_says_what_its_dense_export_says(name: str, dtype: torch.dtype, coded: Any, tmp_path: Path) -> None:
    folder = coded(name, dtype)
    assert rows(folder, name) == MODELS[name][2].split()
    kinds = {n: fields.get("kind", "") for n, fields in modules(folder).items()}
    assert [n for n, kind in kinds.items() if kind] == [n for n in rows(folder, name) if n != "lm_head"]
    assert verify(folder).sound
    report = losparse_cli.inspect(folder)
    for layer in report.layers:
        if layer.name in rows(folder, name):
            assert 6.4 < 8 * layer.bytes_after / layer.parameters <= 6.5
            assert layer.relative_error < 0.03
    model = load(folder)
    stock = type(model).from_pretrained(export(folder, tmp_path / "dense"))
    tolerance = 1e-5 if dtype == torch.float32 else 6e-2  # T5's own roundings come to 3e-2
    expected = answer(stock)
    torch.testing.assert_close(answer(model), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert torch.equal(model.get_input_embeddings().dense().to(dtype), stock.get_input_embeddings().weight.detach())
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert modules(folder) == modules(tmp_path / "again")
    assert torch.equal(answer(load(tmp_path / "again")), answer(model))


WITHOUT = """
from pathlib import Path
result = {}
for name in sys.argv[2:]:
    folder = Path(sys.argv[1]) / name
    case = torch.load(folder / "case.pt")
    model = getattr(transformers, case["class"]).from_pretrained(case["folder"], trust_remote_code=True).eval()
    with torch.no_grad():
        first = model(**case["tokens"])[0]
    model.save_pretrained(folder / "again")
    model = getattr(transformers, case["class"]).from_pretrained(folder / "again", trust_remote_code=True).eval()
    with torch.no_grad():
        result[name] = bool(torch.equal(model(**case["tokens"])[0], first) and torch.equal(first, case["said"]))
print(json.dumps(result))
"""


@pytest.mark.slow
def test_a_machine_without_losparse_loads_and_saves_them(
    coded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOSPARSE_KERNEL", "reference")
    from conftest import token_batch

    for name in SHIPPED:
        model = load(coded(name))
        tokens = token_batch(model)
        (tmp_path / name).mkdir()
        with torch.no_grad():
            said = model(**tokens)[0]
        case = {
            "class": AUTO.get(name, "AutoModelForCausalLM"),
            "folder": str(coded(name)),
            "tokens": tokens,
            "said": said,
        }
        torch.save(case, tmp_path / name / "case.pt")
    command = [sys.executable, "-c", WITHOUT_LOSPARSE + WITHOUT, str(tmp_path), *SHIPPED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(SHIPPED, True)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3", "t5"])
def test_embeddings_that_come_and_go(name: str, coded: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    whole = load(coded(name))
    for device_map in ("auto", {"": "cpu"}):
        assert torch.equal(answer(load(coded(name), device_map=device_map)), answer(whole))
    tied = {n for n, m in whole.named_modules() if getattr(m, "weight", None) is whole.get_input_embeddings().weight}
    places = {}
    for leaf, module in whole.named_modules():
        if not list(module.children()):
            places[leaf] = "disk" if leaf in tied else "cpu"
    places |= {
        n: "cpu" for n, _ in (*whole.named_parameters(), *whole.named_buffers()) if n.rpartition(".")[0] not in places
    }
    model = load(coded(name), device_map=places, offload_folder=tmp_path)
    assert model.get_input_embeddings().weight.is_meta
    # What comes and goes is never packed in few bits, and so multiplied by another kernel.
    torch.testing.assert_close(answer(model), answer(whole), rtol=1e-5, atol=1e-5)


def test_another_head_has_the_same_embeddings(coded: Any) -> None:
    for name, head in (("llama-tied", "LlamaModel"), ("t5", "T5EncoderModel"), ("bert", "BertForMaskedLM"),
                       ("gemma3", "Gemma3TextForSequenceClassification"), ("bart", "BartModel")):  # fmt: skip
        model = load(coded(name), model_class=head)
        embeddings = model.get_input_embeddings()
        assert isinstance(embeddings, CodedEmbedding), head
        assert torch.equal(embeddings.dense(), load(coded(name)).get_input_embeddings().dense()), head


def test_embeddings_of_codes_cannot_be_resized(coded: Any) -> None:
    model = load(coded("llama-tied"))
    assert model.resize_token_embeddings(TOKENS) is model.get_input_embeddings()
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    with pytest.raises(ValueError, match="cannot be resized"):
        model.resize_token_embeddings(TOKENS + 1)


def test_a_model_generates_and_is_trained(coded: Any) -> None:
    model = load(coded("llama-tied"))
    ids = torch.tensor([[5, 9, 11]])
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 7)
    model(input_ids=ids, labels=ids).loss.backward()
    assert float(model.get_input_embeddings().weight.grad.abs().sum()) > 0
    model.half().to(torch.float32)
    assert torch.isfinite(answer(model)).all()


# --- what is asked --------------------------------------------------------------------------------


def planned(folder: Path, place: Path, **options: Any) -> dict[str, float]:
    job = plan(folder, place / "out", **options)
    return {p.layer.name: p.bits for p in job.plan.layers if p.layer.rows}


BOTH = {"model.embed_tokens": EMBEDDING_BITS, "lm_head": EMBEDDING_BITS}


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"bits": 4.0}, BOTH),
        ({}, BOTH),
        ({"embedding_bits": "none"}, {}),
        ({"embedding_bits": 5.5}, dict.fromkeys(BOTH, 5.5)),
        ({"targets": "q_proj"}, {}),
        ({"targets": "q_proj", "embedding_bits": 6}, dict.fromkeys(BOTH, 6)),
        ({"targets": ["q_proj", "lm_head"]}, {"lm_head": EMBEDDING_BITS}),
        ({"targets": "Embedding"}, {"model.embed_tokens": EMBEDDING_BITS}),
        ({"ignore": "lm_head"}, {"model.embed_tokens": EMBEDDING_BITS}),
        ({"ignore": "lm_head", "embedding_bits": 6}, {"model.embed_tokens": 6}),
        ({"layers": {"lm_head": {"bits": 4}}}, BOTH | {"lm_head": 4}),
        ({"rank": 2, "bits": 5.0}, BOTH),
        ({"values": "float"}, {}),
        ({"sparsity": 0.5}, {}),
    ],
    ids=str,
)
def test_what_is_taken_along(recipe: dict[str, Any], expected: dict[str, float], dense: Any, tmp_path: Path) -> None:
    assert planned(dense("llama"), tmp_path, recipe=recipe) == expected


def test_bits_of_the_layers_are_told_apart_from_those_of_embeddings_and_head(coded: Any) -> None:
    report = losparse_cli.inspect(coded("llama"))
    assert [(layer.name, layer.head) for layer in report.layers if layer.aside] == [
        ("model.embed_tokens", False), ("lm_head", True)
    ]  # fmt: skip
    assert 5.9 < report.bits <= 6
    assert 6.4 < report.embedding_bits <= 6.5
    assert losparse_cli.inspect(coded("llama-tied")).embedding_bits is not None


@pytest.mark.parametrize("bits", [0, -1, 9, "all", True])
def test_bits_that_mean_nothing_are_refused(bits: Any) -> None:
    with pytest.raises(UsageError, match="--embedding-bits"):
        Recipe(embedding_bits=bits)


def test_floats_have_no_such_bits() -> None:
    for other in ({"values": "float"}, {"keep_parameters": 0.5}):
        with pytest.raises(UsageError, match="whole numbers"):
            Recipe(embedding_bits=6, **other)
    assert Recipe(values="float", embedding_bits="none").settled().embedding_bits == "none"
    with pytest.raises(RecipeError, match="embedding_bits"):
        losparse_cli.plan("nowhere", recipe={"layers": {"lm_head": {"embedding_bits": 4}}})


def test_what_stays_dense_says_why(dense: Any, tmp_path: Path) -> None:
    job = plan(dense("llama"), tmp_path / "out", recipe={"ignore": ["embed_tokens"]})
    assert job.plan.skipped == {"model.embed_tokens": "named by --ignore"}
    small = toys.llama(tmp_path / "small")
    assert not planned(small, tmp_path)
    assert plan(small, tmp_path / "out").plan.skipped["model.embed_tokens"].startswith("too small to matter")
    twice = tmp_path / "twice"
    model = load(dense("llama-tied"))
    model.save_pretrained(twice)
    tensors = load_file(twice / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, twice / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    job = plan(twice, tmp_path / "out")
    assert job.plan.skipped["model.embed_tokens"] == "stored twice, as lm_head.weight, too"
    assert job.plan.skipped["lm_head"] == "output head"


def test_bits_that_an_embedding_cannot_be_stored_in_are_told(dense: Any, tmp_path: Path) -> None:
    job = plan(dense("llama"), tmp_path / "out", recipe={"embedding_bits": 0.1})
    assert "cannot be stored in 0.1 bits a weight" in job.plan.skipped["model.embed_tokens"]
    [note] = job.plan.notes
    assert note.startswith(
        f"model.embed_tokens ({TOKENS} x 68) and 1 more layer stay dense (cannot be stored in 0.1 bits"
    )
    least = float(re.search(r"Raise --embedding-bits to (\d\.\d\d) at least\.$", note)[1])
    assert len(planned(dense("llama"), tmp_path, recipe={"embedding_bits": least})) == 2


def test_a_head_that_reads_the_weights_itself_keeps_them_dense(tmp_path: Path) -> None:
    settings = {"vocab_size": TOKENS, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 80, "legacy": False}  # fmt: skip
    model = transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(**settings))
    model.save_pretrained(tmp_path / "dense")
    job = plan(tmp_path / "dense", tmp_path / "out")
    assert "is read by DebertaV2LMPredictionHead itself" in job.plan.skipped["deberta.embeddings.word_embeddings"]
    output = compress(tmp_path / "dense", tmp_path / "out").output
    assert torch.isfinite(answer(load(output))).all()


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    chance = random.Random(0)
    path.write_text(" ".join("".join(chance.choices("abcdefgh", k=4)) for _ in range(300)), encoding="utf-8")
    return path


class Stopped(BaseException):
    """As a signal would."""


@pytest.mark.parametrize("calibrated", [False, True], ids=["alone", "calibrated"])
def test_a_run_that_is_stopped_goes_on(
    calibrated: bool, dense: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"bits": 5.0, "embedding_bits": 6.0}
    if calibrated:
        options["calibration"] = {"source": str(text), "tokens": 256, "length": 32}
    whole = compress(dense("llama"), tmp_path / "whole" / "out", **options)
    written = {line.name: line for line in whole.report.layers}
    assert {n for n in written if "layers" not in n} == {"model.embed_tokens", "lm_head"}
    append = ShardWriter.append
    for stop in (1, 3, 5):
        left = [stop]

        def until(self: Any, *arguments: Any, left: list[int] = left, **others: Any) -> Any:
            if not left[0]:
                raise Stopped
            left[0] -= 1
            return append(self, *arguments, **others)

        monkeypatch.setattr(ShardWriter, "append", until)
        with pytest.raises(Stopped):
            compress(dense("llama"), tmp_path / "out", **options)
    monkeypatch.setattr(ShardWriter, "append", append)
    again = compress(dense("llama"), tmp_path / "out", resume="required", **options)
    assert again.resumed > 0
    assert toys.tensor_bytes(again.output) == toys.tensor_bytes(whole.output)
    assert isinstance(load(again.output).lm_head, LowRankSparseLinear)


def test_blocks_are_calibrated_with_the_dense_embeddings(dense: Any, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": 5.0, "calibration": {"source": str(text), "tokens": 256, "length": 32}}
    with_rows = compress(dense("gemma3"), tmp_path / "with", **options).report
    without = compress(dense("gemma3"), tmp_path / "without", embedding_bits="none", **options).report
    inside = [layer for layer in with_rows.layers if layer.name != "model.embed_tokens"]
    assert inside == list(without.layers)


def test_a_head_is_one_after_training_too(coded: Any, dense: Any, text: Path, tmp_path: Path) -> None:
    """Fine-tuned, and refined from a checkpoint without a report, as transformers saves it."""
    bare = shutil.copytree(coded("llama"), tmp_path / "bare", ignore=shutil.ignore_patterns("losparse_report.json"))
    asked = {"source": str(text), "tokens": 256, "length": 32}
    how: dict[str, Any] = {"mode": "model", "steps": 1, "tokens": 64}
    refined = losparse_cli.refine(
        bare, tmp_path / "refined", against=dense("llama"), calibration=asked, refinement=how
    ).report
    tuned = losparse_cli.finetune(
        coded("llama"), tmp_path / "tuned", device="cpu",
        task=losparse_cli.TaskRequest("causal-lm", train_file=str(text), max_length=32),
        how=losparse_cli.Finetuning(max_steps=1, precision="float32"),
    ).report  # fmt: skip
    for report in (refined, tuned):
        assert [layer.name for layer in report.layers if layer.head] == ["lm_head"]
        assert 5.9 < report.bits < 6.1
