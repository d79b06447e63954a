"""Loading: by the package, by the shim that travels with the checkpoint, and not at all by chance."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TOYS, answer, token_batch

import losparse_cli
from losparse_cli.errors import CheckpointError, SourceError, UsageError

# --- losparse_cli.load ------------------------------------------------------------------------------


def test_model_and_tokenizer(compressed: Any) -> None:
    model, tokenizer = losparse_cli.load(compressed("llama", tokenizer=True))
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert not model.training
    tokens = tokenizer("Hello, world!", return_tensors="pt")
    assert tokenizer.decode(tokens["input_ids"][0], skip_special_tokens=True) == "Hello, world!"
    text = model.generate(**tokens, max_new_tokens=3, min_new_tokens=3)
    assert text.shape == (1, tokens["input_ids"].shape[1] + 3)


def test_without_a_tokenizer_it_is_none(compressed: Any) -> None:
    assert losparse_cli.load(compressed("bert"))[1] is None


def test_a_dense_checkpoint_loads_too(toy: Any) -> None:
    model, _ = losparse_cli.load(toy("gpt2"))
    assert torch.equal(answer(model), answer(transformers.GPT2LMHeadModel.from_pretrained(toy("gpt2"))))


def test_another_class_and_dtype(compressed: Any) -> None:
    model, _ = losparse_cli.load(compressed("bert"), model_class=transformers.AutoModel, dtype=torch.bfloat16)
    assert isinstance(model, transformers.BertModel)
    assert model.dtype == torch.bfloat16


def test_a_class_that_lacks_every_layer_is_refused(compressed: Any) -> None:
    with pytest.raises(CheckpointError, match=r"None of the 14 compressed layers.*model\.layers\.0"):
        losparse_cli.load(compressed("llama"), model_class=transformers.GPT2LMHeadModel)


@pytest.mark.parametrize("name", ["no/such-model", "nowhere"])
def test_what_is_not_there_is_a_source_error(name: str) -> None:
    with pytest.raises(SourceError):
        losparse_cli.load(name)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        losparse_cli.load(tmp_path)


def test_compressing_what_is_compressed_is_refused(compressed: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="losparse export"):
        losparse_cli.compress(compressed("llama"), tmp_path / "twice")


# --- keywords -----------------------------------------------------------------------------------------


def test_config_model_and_tokenizer_come_from_the_same_place(compressed: Any, tmp_path: Path) -> None:
    """huggingface/transformers#20108 and #13895: subfolder reached one of them only."""
    shutil.copytree(compressed("llama", tokenizer=True), tmp_path / "repo" / "inner")
    asked: list[tuple[str, dict[str, Any]]] = []
    where = {
        "subfolder": "inner", "revision": "main", "force_download": False, "local_files_only": True, "proxies": {},
        "token": False, "cache_dir": str(tmp_path), "trust_remote_code": False, "code_revision": "main",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for owner in (transformers.AutoConfig, transformers.AutoTokenizer, transformers.LlamaForCausalLM):
            inner = owner.from_pretrained

            def heard(*args: Any, inner: Any = inner, name: str = owner.__name__, **options: Any) -> Any:
                asked.append((name, options))
                return inner(*args, **options)

            patch.setattr(owner, "from_pretrained", heard)
        model, tokenizer = losparse_cli.load(tmp_path / "repo", dtype=torch.bfloat16, **where)
    assert (type(model).__name__, model.dtype) == ("LlamaForCausalLM", torch.bfloat16)
    assert tokenizer is not None
    assert [name for name, _ in asked][:3] == ["AutoConfig", "LlamaForCausalLM", "AutoTokenizer"]
    for name, options in asked[:3]:
        missing = where.items() - options.items() if "proxies" not in options else set()
        assert not missing or name == "LlamaForCausalLM", missing
        for key, value in where.items():
            assert options.get(key, value if key == "code_revision" else None) == value, (name, key)


def test_a_subfolder_that_is_not_there(compressed: Any) -> None:
    with pytest.raises(SourceError, match="There is no folder"):
        losparse_cli.load(compressed("llama"), subfolder="nowhere")


def test_a_configuration_given_is_taken(compressed: Any) -> None:
    config = transformers.AutoConfig.from_pretrained(compressed("bert"))
    config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    model, _ = losparse_cli.load(compressed("bert"), config=config)
    assert model.config.id2label[2] == "yes"


def test_loading_info_has_no_place_in_a_pair(compressed: Any) -> None:
    with pytest.raises(UsageError, match="output_loading_info"):
        losparse_cli.load(compressed("bert"), output_loading_info=True)


@pytest.mark.parametrize("kind", ["Wav2Vec2CTCTokenizer", "PreTrainedTokenizerFast"])
def test_half_a_tokenizer_gives_the_model_and_a_sentence(kind: str, compressed: Any, tmp_path: Path) -> None:
    """VinAIResearch/PhoBERT#25: a tokenizer's settings without its vocabulary."""
    folder = shutil.copytree(compressed("llama"), tmp_path / "model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    sentence = r"tokenizer of .*model cannot be loaded: files that belong to it are not there\."
    with pytest.warns(UserWarning, match=sentence):
        model, tokenizer = losparse_cli.load(folder)
    assert tokenizer is None
    assert isinstance(model, transformers.LlamaForCausalLM)
    with pytest.raises(SourceError, match=sentence):
        losparse_cli.load(folder, need_tokenizer=True)
    with pytest.raises(SourceError, match="has no tokenizer"):
        losparse_cli.load(compressed("llama"), need_tokenizer=True)


def test_a_variant_is_read_by_all_and_several_are_refused(compressed: Any, tmp_path: Path) -> None:
    model, _ = losparse_cli.load(compressed("llama"))
    model.save_pretrained(tmp_path / "again", variant="fp16")
    assert (tmp_path / "again" / "model.fp16.safetensors").is_file()
    for options in ({}, {"variant": "fp16"}):
        assert torch.equal(answer(losparse_cli.load(tmp_path / "again", **options)[0]), answer(model))
    assert losparse_cli.verify(tmp_path / "again").sound
    dense, _ = losparse_cli.load(losparse_cli.export(tmp_path / "again", tmp_path / "dense"))
    dense.save_pretrained(tmp_path / "shards", variant="fp16", max_shard_size="60KB")
    assert (tmp_path / "shards" / "model.safetensors.index.fp16.json").is_file()
    losparse_cli.compress(tmp_path / "shards", tmp_path / "small", losparse_cli.Recipe(rank=4, sparsity=0.5))
    assert losparse_cli.verify(tmp_path / "small").sound
    (tmp_path / "again" / "model.bf16.safetensors").touch()
    with pytest.raises(SourceError, match=r"several variants \(bf16, fp16\)"):
        losparse_cli.load(tmp_path / "again")


# --- where losparse is not installed ----------------------------------------------------------------

WITHOUT_LOSPARSE = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "losparse_cli":
            raise ModuleNotFoundError("losparse is not installed here", name=name)

absent = Absent()
sys.meta_path.insert(0, absent)
import torch, transformers
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
transformers.utils.logging.set_verbosity_error()

def logits(model, tokens):
    with torch.no_grad():
        output = model(**tokens)
    return torch.stack((output.start_logits, output.end_logits)) if hasattr(output, "start_logits") else output.logits
"""


def run(script: str, *arguments: object) -> Any:
    """The JSON that a fresh interpreter prints last, running `script` where losparse is not installed."""
    command = [sys.executable, "-c", WITHOUT_LOSPARSE + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


SHIPPED = """
cases = torch.load(sys.argv[1])
result = {}
for key, case in cases.items():
    auto = getattr(transformers, case["auto"])
    try:
        auto.from_pretrained(case["folder"])
        result[key] = "loaded without anyone to read it"
    except RuntimeError as error:
        documented = "You set `ignore_mismatched_sizes` to `False`, thus raising an error." in str(error)
        result[key] = "" if documented else f"raised for another reason: {error}"
assert "losparse" not in AUTO_QUANTIZER_MAPPING
for key, case in cases.items():
    model, info = getattr(transformers, case["auto"]).from_pretrained(
        case["folder"], trust_remote_code=True, output_loading_info=True)
    scope = {}
    exec(case["snippet"], scope)  # of the card
    if type(scope["model"]) is not type(model):
        result[key] += f" the card loads {type(scope['model']).__name__}"
    if any(info.values()):
        result[key] += f" {info}"
    if not torch.equal(logits(model.eval(), case["tokens"]), case["logits"]):
        result[key] += " other logits"
    model.save_pretrained(f"{sys.argv[2]}/{key}")
assert not any(name.partition(".")[0] == "losparse_cli" for name in sys.modules)
print(json.dumps(result))
"""

SHIPPED_FIRST = """
folder, package_first = sys.argv[1], sys.argv[2] == "package"
tokens, expected = torch.load(sys.argv[3]).values()
steps = ["package", "shipped"] if package_first else ["shipped", "package"]
owners, equal, kinds, operators = [], [], [], []
for step in steps * 2:
    if step == "shipped":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    else:
        if absent in sys.meta_path:
            sys.meta_path.remove(absent)
        import losparse_cli
        losparse_cli.register()
        model, _ = losparse_cli.load(folder)
    owners.append(AUTO_QUANTIZER_MAPPING["losparse"].__module__.partition(".")[0])
    if "losparse_cli" in owners[-1]:
        equal.append(torch.allclose(logits(model, tokens), expected, rtol=1e-4, atol=1e-5))
    else:
        equal.append(torch.equal(logits(model, tokens), expected))
    operators.append(sorted(name for name in vars(torch.ops) if name.startswith("losparse")))
    kinds.append(sum(type(m).__name__ == "LowRankSparseLinear" for m in model.modules()))
print(json.dumps([owners, equal, kinds, operators]))
"""

SAVED_AGAIN = """
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens, expected = torch.load(sys.argv[2]).values()
print(json.dumps(torch.equal(logits(model, tokens), expected)))
"""


@pytest.fixture(scope="module")
def shipped(compressed: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path, Path]:
    """What a machine without losparse makes of every toy, a folder of models that it saved, and one toy's logits."""
    from checkpoint.test_card import snippets
    from test_architectures import AUTO

    place = tmp_path_factory.mktemp("shipped")
    recipes: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in TOYS}
    recipes |= {f"{name}-empty-S": (name, {"rank": 4, "sparsity": 1.0}) for name in ("llama", "gpt2", "bert", "t5")}
    recipes |= {f"{name}-rank-0": (name, {"rank": 0, "sparsity": 0.6}) for name in ("llama", "gpt2", "bert", "bart")}
    recipes |= {
        "llama-bfloat16": ("llama", {"dtype": torch.bfloat16}),
        "bert-rows": ("bert", {"rank": 4, "sparsity": 0.7, "pattern": "rows"}),
    }
    cases = {}
    for key, (name, options) in recipes.items():
        folder = compressed(name, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOSPARSE_KERNEL", "reference")  # what a loader computes that travels alone
            model, _ = losparse_cli.load(folder)
            tokens = token_batch(model)
            with torch.no_grad():
                output = model(**tokens)
        both = hasattr(output, "start_logits")
        logits = torch.stack((output.start_logits, output.end_logits)) if both else output.logits
        auto = AUTO[next(suffix for suffix in AUTO if TOYS[name][0].endswith(suffix))]
        with_package, snippet = (text.replace(f'"{folder.name}"', repr(str(folder))) for text in snippets(folder))
        scope: dict[str, Any] = {}
        exec(with_package, scope)
        assert type(scope["model"]) is type(model)
        cases[key] = {"folder": str(folder), "auto": auto, "snippet": snippet, "tokens": tokens, "logits": logits}
    torch.save(cases, place / "cases.pt")
    torch.save({k: cases["llama"][k] for k in ("tokens", "logits")}, place / "llama.pt")
    return run(SHIPPED, place / "cases.pt", place / "saved"), place / "saved", place / "llama.pt"


@pytest.mark.slow
def test_the_shipped_loader_is_exact_and_without_it_nothing_loads(shipped: Any) -> None:
    result, _, _ = shipped
    assert len(result) > len(TOYS)
    assert result == dict.fromkeys(result, "")


@pytest.mark.slow
def test_what_the_shipped_loader_saved_carries_the_loader_on(shipped: Any) -> None:
    _, saved, expected = shipped
    assert run(SAVED_AGAIN, saved / "llama", expected) is True
    for name in ("layouts", "linear", "quantizer"):
        assert (saved / "llama" / f"losparse_{name}.py").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["package", "shipped"])
def test_package_and_shipped_loader_live_together(first: str, shipped: Any, compressed: Any) -> None:
    owners, equal, layers, operators = run(SHIPPED_FIRST, compressed("llama"), first, shipped[2])
    # Once it is there, the package stays, because it has the kernels.
    assert owners == ["losparse_cli" if first == "package" else "transformers_modules", *["losparse_cli"] * 3]
    copies = operators[-1]  # each copy has operators of its own
    assert "losparse" in copies
    assert len(copies) == 2
    assert equal == [True] * 4
    assert layers == [14] * 4


def test_the_shim_needs_nothing_of_ours() -> None:
    import ast

    allowed = {"torch", "transformers", "safetensors", *sys.stdlib_module_names}
    for path in (Path(losparse_cli.__file__).parent / "shim").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom):
                # Only siblings by a plain `from .name import`, the form that is renamed in a checkpoint.
                assert (node.level == 1 and node.module) or (node.module or "").partition(".")[0] in allowed, path


def test_a_class_may_be_given_by_its_name(toy: Any) -> None:
    assert isinstance(losparse_cli.load(toy("bert"), model_class="BertModel")[0], transformers.BertModel)
    with pytest.raises(UsageError, match="no class BrainModel"):
        losparse_cli.load(toy("bert"), model_class="BrainModel")
