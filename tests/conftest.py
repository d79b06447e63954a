"""Toy models, matrices of a prescribed spectrum, and compressed checkpoints made once for the whole session.

Nothing here touches a network or the user's own caches: the environment is set before any library reads it.
"""

# ruff: noqa: E402
from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HOME = tempfile.TemporaryDirectory(prefix="losparse-tests-")
os.environ |= {
    "HF_HOME": _HOME.name,
    "HF_MODULES_CACHE": f"{_HOME.name}/modules",
    "HF_HUB_OFFLINE": "1",  # a test that serves its own hub unsets this in a subprocess
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Toys are too small to share out: threads that wait for each other cost minutes on a busy machine.
    "OMP_NUM_THREADS": "1",
}

import arm
import hypothesis
import pytest
import torch
import transformers
from characters import character_tokenizer as character_tokenizer
from torch import Tensor

from losparse_cli.kernels import native

transformers.utils.logging.disable_progress_bar()

VOCABULARY = 101
LENGTH = 48  # tokens, the longest text that a toy takes

_SHARED: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER: dict[str, Any] = {
    **_SHARED,
    "num_hidden_layers": 2,
    "max_position_embeddings": LENGTH,
    "num_attention_heads": 2,
}
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 66, "intermediate_size": 131, "num_hidden_layers": 2,
    "num_attention_heads": 3, "max_position_embeddings": LENGTH, "num_labels": 3,
}  # fmt: skip

# Widths are no multiple of 8 wherever the architecture permits it, and no two of a model are alike.
TOYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {
        **_DECODER, "hidden_size": 68, "intermediate_size": 131, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {
        **_DECODER, "hidden_size": 68, "intermediate_size": 150, "num_key_value_heads": 2,
        "tie_word_embeddings": True}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {
        **_DECODER, "hidden_size": 70, "intermediate_size": 125, "num_key_value_heads": 1, "head_dim": 34,
        "sliding_window": 8}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {
        **_SHARED, "n_embd": 66, "n_layer": 2, "n_head": 3, "n_positions": LENGTH, "n_inner": 131}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_DECODER, "hidden_size": 66, "ffn_dim": 99, "word_embed_proj_dim": 40}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**_DECODER, "hidden_size": 68, "ffn_hidden_size": 131}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {
        **_SHARED, "hidden_size": 68, "num_hidden_layers": 2, "state_size": 5}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {
        **_DECODER, "hidden_size": 72, "intermediate_size": 80, "num_key_value_heads": 1, "num_local_experts": 5,
        "num_experts_per_tok": 2}),
    "bert": ("BertForSequenceClassification", "BertConfig", _ENCODER),
    "bert-qa": ("BertForQuestionAnswering", "BertConfig", {**_ENCODER, "num_labels": 2}),
    "deberta-v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config", {
        **_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
        "norm_rel_ebd": "layer_norm"}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {
        "vocab_size": VOCABULARY, "d_model": 66, "d_kv": 22, "d_ff": 131, "num_layers": 2, "num_heads": 3,
        "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", "BartConfig", {
        **_SHARED, "d_model": 66, "encoder_ffn_dim": 99, "decoder_ffn_dim": 131, "encoder_layers": 2,
        "decoder_layers": 2, "encoder_attention_heads": 3, "decoder_attention_heads": 3,
        "max_position_embeddings": LENGTH, "decoder_start_token_id": 2, "forced_eos_token_id": None}),
}  # fmt: skip
"""Name -> (model class, config class, config)."""


def toy_model(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A toy in evaluation mode; `changes` go to its config.

    Every parameter is random, biases and norms too: a tensor that is read into the wrong place shows.
    """
    model_class, config_class, settings = TOYS[name]
    config = getattr(transformers, config_class)(**{**settings, **changes})
    return randomized(getattr(transformers, model_class)(config), seed).eval()


@torch.no_grad()
def randomized(model: Any, seed: int = 0) -> Any:
    """The model itself, every parameter random, those that were 1 around that."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        centre = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
        parameter.normal_(centre, 0.1, generator=generator)
    return model


def token_batch(model: Any, batch: int = 2, length: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments for one forward pass: random tokens, with the last row padded."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[-1, length - length // 3 :] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (batch, length // 2 + 1), generator=generator)
    return inputs


@torch.no_grad()
def answer(model: Any, **batch: Any) -> Tensor:
    """What the model's head says to `token_batch(model, **batch)`, as one float32 tensor."""
    output = model(**token_batch(model, **batch))
    if hasattr(output, "start_logits"):
        return torch.stack((output.start_logits, output.end_logits)).float()
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state).float()


def spectral_matrix(spectrum: Any, shape: tuple[int, int], seed: int = 0) -> Tensor:
    """A float64 matrix (m, n) with the given singular values, at most min(m, n) of them; the rest are zero."""
    values = torch.as_tensor(spectrum, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    U, V = (
        torch.linalg.qr(torch.randn(size, len(values), dtype=torch.float64, generator=generator)).Q for size in shape
    )
    return (U * values) @ V.T


FAST = "llama"
"""Of a test that every toy meets, the run that is in `make test-fast`."""
CASES = 4
"""Of a test's other cases, so many are in it, spread over all."""
SLOW = (
    "test_bad_input.py", "test_cli.py", "test_coded_runs.py", "test_embeddings.py", "test_finetune.py",
    "test_generate.py", "test_gguf.py", "test_grid.py", "test_harness.py", "test_loop.py", "test_matching_runs.py",
    "test_packed.py", "test_peers.py", "test_plot.py", "test_push.py", "test_recovery.py", "test_refining.py",
    "test_resume.py", "test_runs.py",
)  # fmt: skip
"""Files that are not in it: the command in processes of its own, for the first costs ten seconds; whole runs, refused,
killed and begun again; coded models that are compressed first, and written for other engines; pictures; a hub; the
harness; peers; runs of several processes."""


def pytest_configure(config: pytest.Config) -> None:
    """Examples of a property: 150, and a few where the run is to be fast."""
    fast = config.option.markexpr == "not slow"
    hypothesis.settings.register_profile("losparse", deadline=None, database=None, max_examples=10 if fast else 150)
    hypothesis.settings.load_profile("losparse")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is slow by its kind, and what was measured to be: slow.txt names tests of more than a third of a second,
    long.txt those of three to five seconds or more, each with all of its cases."""
    measured, longest = (set((Path(__file__).parent / name).read_text().split()) for name in ("slow.txt", "long.txt"))
    quick: dict[str, list[pytest.Item]] = {}
    for item in items:
        case = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        rare = item.path.name in SLOW or item.get_closest_marker("real_model") is not None
        test = item.nodeid.removeprefix("tests/").partition("[")[0]
        if rare or test in measured or case.get("name") in TOYS.keys() - {FAST}:
            item.add_marker("slow")
        else:
            quick.setdefault(test, []).append(item)
        if test in longest:
            item.add_marker("long")
    for cases in quick.values():
        chosen = {number * len(cases) // CASES for number in range(CASES)}
        for number, item in enumerate(cases):
            if len(cases) > CASES and number not in chosen:
                item.add_marker("slow")


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """toy(name, dtype=..., tokenizer=False, **config changes) -> a folder written by save_pretrained. Read only."""
    made: dict[str, Path] = {}

    def make(name: str, *, dtype: torch.dtype = torch.float32, tokenizer: bool = False, **changes: Any) -> Path:
        key = repr((name, dtype, tokenizer, sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(name) / name
            toy_model(name, **changes).to(dtype).save_pretrained(folder)
            if tokenizer:
                character_tokenizer().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def compressed(toy: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """compressed(name, toy options, rank=..., sparsity=..., ...) -> a compressed folder. Read only.

    Keywords that Recipe knows make the recipe (rank 4 and sparsity 0.5 if there are none); others go to `toy`.
    """
    from losparse_cli.budget.recipe import Recipe
    from losparse_cli.compress import compress

    made: dict[str, Path] = {}

    def make(name: str, **options: Any) -> Path:
        key = repr((name, sorted(options.items(), key=str)))
        if key not in made:
            recipe = {k: options.pop(k) for k in list(options) if k in Recipe.__dataclass_fields__}
            folder = tmp_path_factory.mktemp(f"{name}-compressed") / name
            made[key] = compress(
                toy(name, **options), folder, Recipe(**(recipe or {"rank": 4, "sparsity": 0.5}))
            ).output
        return made[key]

    return make


@dataclass
class Loads:
    """models: every one that was loaded. alive: how many of them still were there as each was."""

    models: list[weakref.ref[Any]] = field(default_factory=list)
    alive: list[int] = field(default_factory=list)

    def load(self, *arguments: Any, **options: Any) -> Any:
        from losparse_cli.load import load

        self.alive.append(sum(model() is not None for model in self.models))
        model, tokenizer = load(*arguments, **options)
        self.models.append(weakref.ref(model))
        return model, tokenizer


@pytest.fixture
def installed_kernels() -> Iterator[None]:
    """The package's kernels before a test and after it, whatever it installs; the same random numbers each time."""
    from losparse_cli import kernels

    torch.manual_seed(0)
    kernels.install()
    yield
    kernels.install()


@pytest.fixture(scope="session")
def arm_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C code for ARM."""
    pytest.importorskip("ziglang")
    pytest.importorskip("unicorn")
    return arm.compiled(tmp_path_factory.mktemp("arm"))


@pytest.fixture(params=[*native.LEVELS, *arm.LEVELS])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Those that the C code runs on, of ARM in an emulator; skips what this processor has not."""
    name: str = request.param
    if name in native.LEVELS:
        library, level = native.library(), native.LEVELS.index(name)
        if library is None:
            pytest.skip("needs a C compiler")
        if level > library.level:
            pytest.skip(f"this processor has no {name}")
        monkeypatch.setattr(library, "level", level)
        yield name
        return
    program = request.getfixturevalue("arm_program")
    emulated = arm.Emulated(program, arm.LEVELS.index(name))
    with monkeypatch.context() as patch:
        patch.setattr(native, "_compiled", lambda: program)
        patch.setattr(native, "Library", lambda path: emulated)
        native.library.cache_clear()
        yield name
    native.library.cache_clear()
    assert emulated.calls


@pytest.fixture
def watch_loads(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Loads]:
    """watch_loads(module) -> what comes of every `load` that the module calls from then on."""

    def watch(module: Any) -> Loads:
        loads = Loads()
        monkeypatch.setattr(module, "load", loads.load)
        return loads

    return watch


@pytest.fixture(scope="session")
def matrix() -> Callable[..., Tensor]:
    """matrix(spectrum, shape, seed=0) -> float64 matrix of those singular values."""
    return spectral_matrix


@pytest.fixture(scope="session", autouse=True)
def _temporary_home() -> Iterator[None]:
    yield
    _HOME.cleanup()
