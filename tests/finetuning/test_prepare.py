"""What a fine-tuning refuses before it trains, and how sizes are chosen; each complaint says what to do."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys

import losparse_cli
from losparse_cli.budget.recipe import Recipe
from losparse_cli.errors import LosparseError, MissingExtraError, SourceError, UsageError
from losparse_cli.finetuning import prepare as finetuning
from losparse_cli.finetuning.conversion import trained_layers
from losparse_cli.finetuning.prepare import Training, prepare_finetuning
from losparse_cli.finetuning.pruner import Pruning
from losparse_cli.finetuning.request import Finetuning
from losparse_cli.tasks.request import TaskRequest
from tests.finetuning.learners import VOCABULARY, request_for, rows_of, words_tokenizer, write_learner, write_rows


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_learner(tmp_path_factory.mktemp("models") / "bert", "bert")


@pytest.fixture(scope="module")
def small_bert(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compressed") / "bert"
    return losparse_cli.compress(bert, place, Recipe(rank=4, sparsity=0.5, pattern="rows")).output


def prepare(place: Path, source: Path, kind: str = "bert", **options: Any) -> Training:
    how = {"precision": "float32", "max_steps": 10} | {
        k: options.pop(k) for k in list(options) if k in Finetuning.__dataclass_fields__
    }
    task = options.pop("task", None) or request_for(place, kind, train=16, validation=4)
    return prepare_finetuning(source, place / "out", task=task, how=Finetuning(**how), device="cpu", **options)


def refused(error: type[LosparseError], said: str, place: Path, *args: Any, **options: Any) -> None:
    with pytest.raises(error, match=said) as caught:
        prepare(place, *args, **options)
    assert "\n" not in str(caught.value)
    assert not (place / "out").exists()
    assert not (place / "out.partial").exists()


def test_sizes_of_a_dense_model(bert: Path, tmp_path: Path) -> None:
    plan = prepare(tmp_path, bert).plan
    assert {p.pattern for p in plan.layers} == {"rows"}
    share = sum(p.parameters for p in plan.layers) / sum(p.layer.shape[0] * p.layer.shape[1] for p in plan.layers)
    assert 0.14 < share <= 0.2  # whole neurons and whole ranks, within the fifth of the paper
    for pattern in ("rows", "columns", "unstructured"):
        made = prepare(tmp_path, bert, recipe=Recipe(pattern=pattern, rank=3, sparsity=0.75)).plan
        assert {(p.pattern, p.rank) for p in made.layers} == {(pattern, 3)}
        assert all(p.nnz == p.layer.shape[0] * p.layer.shape[1] // 4 for p in made.layers)
    ratio = prepare(tmp_path, bert, recipe=Recipe(rank_ratio=0.8, keep_parameters=0.5)).plan
    for p in ratio.layers:
        assert p.rank * sum(p.layer.shape) / p.parameters == pytest.approx(0.8, abs=0.1)
        assert p.parameters <= 0.5 * p.layer.shape[0] * p.layer.shape[1]


def test_sizes_of_a_compressed_model(small_bert: Path, tmp_path: Path) -> None:
    present = prepare(tmp_path, small_bert)
    assert {(p.pattern, p.rank) for p in present.plan.layers} == {("rows", 4)}
    assert present.pruner.schedule is None
    less = prepare(tmp_path, small_bert, recipe=Recipe(sparsity=0.75, pattern="columns"))  # its pattern stays
    assert {p.pattern for p in less.plan.layers} == {"rows"}
    assert all(a.nnz * 2 == b.nnz for a, b in zip(less.plan.layers, present.plan.layers, strict=True))
    refused(UsageError, r"S has 18,432 entries now, and \d.* are asked for: .* can only prune",
            tmp_path, small_bert, recipe=Recipe(sparsity=0.25))  # fmt: skip
    for recipe in (Recipe(rank=2), Recipe(rank_ratio=0.5), Recipe(targets=("*",)), Recipe(ignore=("*",))):
        refused(UsageError, "of a compressed model stay as they are", tmp_path, small_bert, recipe=recipe)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe(pattern="2:4"), "--pattern 2:4"),
        (Recipe(sparsity=1.0), "would have nothing left"),
        (Recipe(rank=40), "No layer would shrink"),
        (Recipe(targets=("nothing.*",)), "matches no layer"),
        (Recipe(rank=20, keep_parameters=0.1), "does not fit the budget"),
    ],
)
def test_sizes_that_cannot_be(recipe: Recipe, said: str, bert: Path, tmp_path: Path) -> None:
    refused(UsageError, said, tmp_path, bert, recipe=recipe)


def test_phases_longer_than_the_run(bert: Path, tmp_path: Path) -> None:
    pruning = Pruning(initial_warmup=675, final_warmup=3375)
    refused(UsageError, "Of 10 steps, 675 and 3375 are to be before", tmp_path, bert, pruning=pruning)


def test_steps_of_epochs(bert: Path, tmp_path: Path) -> None:
    task = request_for(tmp_path, "bert", train=33)
    options = {"task": task, "max_steps": None, "batch_size": 8}
    assert prepare(tmp_path, bert, epochs=2.0, **options).steps == 10
    assert prepare(tmp_path, bert, epochs=0.1, **options).steps == 1
    assert prepare(tmp_path, bert, epochs=2.0, gradient_accumulation_steps=2, **options).steps == 6  # as Trainer counts


@pytest.mark.parametrize(("classes", "said"), [(2, "into 3 labels, and the training data has 2"), (4, "has 4")])
def test_labels_that_do_not_fit_the_head(classes: int, said: str, bert: Path, tmp_path: Path) -> None:
    rows = [row | {"label": k % classes} for k, row in enumerate(rows_of("text-classification", 16))]
    task = request_for(tmp_path, "bert", validation=0)
    write_rows(Path(str(task.train_file)), rows)
    refused(UsageError, said, tmp_path, bert, task=task)


def test_a_new_head_is_made_for_the_labels(tmp_path: Path) -> None:
    base = write_learner(tmp_path / "base", "bert-base")
    first, second = (prepare(tmp_path, base, "bert-base").model for _ in range(2))
    assert first.config.num_labels == 3
    assert torch.equal(first.classifier.weight, second.classifier.weight)  # drawn by the seed
    other = prepare(tmp_path, base, "bert-base", seed=1).model
    assert not torch.equal(first.classifier.weight, other.classifier.weight)


def test_a_quantized_source(bert: Path, tmp_path: Path) -> None:
    folder = write_learner(tmp_path / "model", "bert")
    toys.change_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(UsageError, "is quantized already .*Start from the unquantized", tmp_path, folder)


def test_no_tokenizer(tmp_path: Path) -> None:
    folder = write_learner(tmp_path / "model", "bert", tokenizer=False)
    refused(SourceError, "has no tokenizer. Copy the tokenizer files", tmp_path, folder)


def test_without_accelerate(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "accelerate" else find(name, *a))
    refused(MissingExtraError, r"needs the package 'accelerate'. Install it with: pip install 'losparse\[train\]'",
            tmp_path, bert)  # fmt: skip


def test_the_output_is_checked_first(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        prepare(tmp_path, bert)
    with pytest.raises(UsageError, match="holds no checkpoint, so --overwrite leaves it alone"):
        prepare(tmp_path, bert, overwrite=True)
    with pytest.raises(UsageError, match="is no size"):
        prepare_finetuning(bert, tmp_path / "new", task=request_for(tmp_path, "bert"), max_shard_size="much")


@pytest.mark.parametrize("recipe", [Recipe(rank_ratio=0.25, pattern="rows"), Recipe(rank_ratio=1.0)])
def test_how_low_rank_begins(recipe: Recipe, bert: Path, tmp_path: Path) -> None:
    begun = {
        init: trained_layers(prepare(tmp_path, bert, recipe=recipe, low_rank_init=init).model)
        for init in ("outputs", "weights")
    }
    for name, layer in begun["outputs"].items():
        other = begun["weights"][name]
        assert not torch.allclose(layer.U @ layer.V, other.U @ other.V, atol=1e-3), name
        assert layer.S is None or torch.allclose(layer.weight, other.weight, atol=1e-5), name


def test_without_low_rank_nothing_is_looked_at(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning, "input_moments", None)
    prepare(tmp_path, bert, recipe=Recipe(rank=0, pattern="rows"))
    with pytest.raises(TypeError):
        prepare(tmp_path, bert)


# --- teachers ---------------------------------------------------------------------------------------


def test_a_teacher_of_another_vocabulary(bert: Path, tmp_path: Path) -> None:
    other = write_learner(tmp_path / "other", "bert", vocab_size=len(VOCABULARY) + 3)
    refused(UsageError, "has a vocabulary of 29, .* of 32. Give the dense model", tmp_path, bert, teacher=str(other))


def test_a_compressed_model_of_a_folder_names_no_teacher(small_bert: Path, tmp_path: Path) -> None:
    refused(UsageError, "does not say where its dense model is. Give it with --teacher", tmp_path, small_bert,
            objective="distill")  # fmt: skip
    assert prepare(tmp_path, small_bert).teacher is None


def test_a_teacher_without_the_head(bert: Path, tmp_path: Path) -> None:
    """Its head would be drawn at random, and there is nothing to learn from that."""
    base = write_learner(tmp_path / "base", "bert-base")
    refused(UsageError, "has no head for text-classification", tmp_path, bert, teacher=str(base))
    refused(UsageError, "has no head for text-classification", tmp_path, base, "bert-base", objective="distill")


def test_a_teacher_of_other_classes(bert: Path, tmp_path: Path) -> None:
    other = write_learner(tmp_path / "other", "bert", num_labels=5)
    refused(UsageError, "5 labels, .* 3", tmp_path, bert, teacher=str(other))


def test_a_teacher_with_its_classes_in_another_order(bert: Path, tmp_path: Path) -> None:
    """Its predictions are put in ours; names that say no more than a number are taken as they come."""

    def named(folder: Path, names: str) -> Path:
        config = json.loads((folder / "config.json").read_text())
        config |= {"id2label": dict(enumerate(names.split())), "label2id": {n: k for k, n in enumerate(names.split())}}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    words = [{"text": row["text"], "label": "abc"[row["label"]]} for row in rows_of("text-classification", 16)]
    task = TaskRequest("text-classification", train_file=write_rows(tmp_path / "named.jsonl", words))
    ours = named(write_learner(tmp_path / "ours", "bert"), "a b c")
    ids = torch.arange(4, 12)[None]
    plain = losparse_cli.load(bert)[0](input_ids=ids).logits

    def says(names: str) -> Any:
        teacher: Any = prepare(tmp_path, ours, task=task, teacher=str(named(theirs, names))).teacher
        return teacher(input_ids=ids).logits

    theirs = shutil.copytree(bert, tmp_path / "theirs")
    torch.testing.assert_close(says("C a B"), plain[:, [1, 2, 0]])
    torch.testing.assert_close(says("A b c"), plain)
    torch.testing.assert_close(says("LABEL_2 LABEL_1 LABEL_0"), plain)
    said = "knows the classes a, b, d, and the model that is to learn a, b, c. Give a teacher of the same classes"
    refused(UsageError, said, tmp_path, ours, task=task, teacher=str(named(theirs, "a b d")))


def test_a_teacher_that_reads_less(bert: Path, tmp_path: Path) -> None:
    other = write_learner(tmp_path / "other", "bert", max_position_embeddings=8)
    refused(UsageError, "reads 8 tokens at most, and the longest input has 10. Lower --max-length", tmp_path, bert,
            teacher=str(other))  # fmt: skip
    short = replace(request_for(tmp_path, "bert", train=16, validation=4), max_length=8)
    assert prepare(tmp_path, bert, task=short, teacher=str(other)).teacher is not None


def test_a_teacher_of_another_depth(bert: Path, tmp_path: Path) -> None:
    """Its predictions are as good as any; its hidden states have no counterpart."""
    other = write_learner(tmp_path / "other", "bert", num_hidden_layers=3)
    assert prepare(tmp_path, bert, teacher=str(other)).teacher is not None
    refused(UsageError, "--hidden-weight", tmp_path, bert, teacher=str(other), hidden_weight=1.0)


def test_a_model_without_gradient_checkpointing(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers.BertForSequenceClassification, "supports_gradient_checkpointing", False)
    refused(UsageError, "has no gradient checkpointing. Leave out --gradient-checkpointing", tmp_path, bert,
            gradient_checkpointing=True)  # fmt: skip


def test_a_model_that_refuses_its_rows_leaves_nothing(tmp_path: Path) -> None:
    """An encoder-decoder that classifies by an end token, and a tokenizer that closes no text with it."""
    model = write_learner(tmp_path / "model", "bart-classifier")
    words_tokenizer("<s> $A").save_pretrained(model)
    refused(UsageError, "row 1 has 0 of it", tmp_path, model, "bart-classifier")


# --- settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"objective": "both"}, "--objective"), ({"precision": "int8"}, "--precision"),
        ({"low_rank_init": "noise"}, "--low-rank-init"),
        ({"lr_scheduler": "step"}, "--lr-scheduler"), ({"batch_size": 0}, "--batch-size"),
        ({"max_steps": 0}, "--max-steps"), ({"save_steps": 0}, "--save-steps"), ({"epochs": 0.0}, "--epochs"),
        ({"learning_rate": float("nan")}, "--learning-rate"), ({"learning_rate": -1.0}, "--learning-rate"),
        ({"temperature": 0.0}, "--temperature"), ({"distill_weight": -1.0}, "--distill-weight"),
        ({"warmup_steps": -0.1}, "--warmup-steps"), ({"max_grad_norm": float("inf")}, "--max-grad-norm"),
        ({"objective": "distill", "distill_weight": 0.0}, "nothing to learn from"),
    ],
)  # fmt: skip
def test_values_that_are_none(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Finetuning(**wrong)


def test_settings_are_json() -> None:
    assert json.loads(json.dumps(Finetuning().to_dict()))["pruning"]["beta"] == 0.85
