"""One class of one model type, all the way; every step compared with the dense export of what was compressed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .batches import Batch, find_batch
from .corrections import GIVEN
from .tiny import shrink

LARGEST = {0: 40_000_000, 1: 40_000_000, 2: 12_000_000}  # parameters, by how much stays as it is
TOLERANCE = 1e-3  # of the largest entry of an output; a tensor that is read wrong is off by 1e-1 and more
ROUNDING, LARGEST_ROUNDING = 4.0, 1e-2  # some models make that much of float32's own errors
TEXT = "The cat sat on the mat, and 17 dogs (or were they foxes?) ran past it as quickly as they could. "


class Stop(Exception):
    """The class is not tried further; its text is the reason."""


def build(model_type: str, model_class: type[Any]) -> tuple[Any, Batch]:
    """A tiny model, every parameter random, and what it is called with. Stop if there is no such thing."""
    reasons = []
    for level in LARGEST:
        try:
            model, batch = _built(model_type, model_class, level)
        except Stop as stop:
            reasons.append(str(stop))
            if level == 1 and "parameters" in reasons[0]:
                break  # what the rules leave wide gets only wider
        else:
            randomize(model)
            return model, batch
    raise Stop(reasons[0])


def _built(model_type: str, model_class: type[Any], level: int) -> tuple[Any, Batch]:
    import transformers

    def configured() -> Any:
        whole = shrink(transformers.CONFIG_MAPPING[model_type](**GIVEN.get(model_type, {})), model_type, level)
        parts = [part for part in vars(whole).values() if type(part) is model_class.config_class]
        return parts[0] if parts and type(whole) is not model_class.config_class else whole

    try:
        config = configured()
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class._from_config(config).parameters())
    except (NotImplementedError, RuntimeError):
        size = 0  # the constructor looks at values
    except Exception as error:
        raise Stop(f"no tiny configuration: {sentence(error)}") from error
    if size > LARGEST[level]:
        raise Stop(f"no tiny configuration: {size:,} parameters")
    torch.manual_seed(0)
    try:
        model = model_class._from_config(configured()).eval()
    except Exception as error:
        raise Stop(f"no tiny configuration: {sentence(error)}") from error
    batch, reason = find_batch(model)
    if reason:
        raise Stop(f"no input was found: {reason}")
    return model, batch


@torch.no_grad()
def randomize(model: Any) -> None:
    """Every parameter and every buffer that is saved random, around what it was if that was one constant."""
    generator = torch.Generator().manual_seed(1)
    stored = set(model.state_dict())
    buffers = {name: b for name, b in model.named_buffers() if name in stored}
    for name, tensor in [*model.named_parameters(), *buffers.items()]:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        first = tensor.flatten()[0]
        constant = bool((tensor == first).all())
        if name in buffers and not constant:
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32) * 0.1
        if constant and name in buffers:
            noise = noise.abs()  # a variance stays positive
        tensor.copy_(noise + (first.float() if constant else 0.0))


def sentence(error: BaseException) -> str:
    """The error as one line."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {' '.join(lines)}"[:300]


def answers(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Every tensor in what `model` returns, by its place."""
    torch.manual_seed(0)
    with torch.no_grad():
        return dict(_flat(model(**batch), ""))


def _flat(output: Any, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        return [(name, output)]
    if isinstance(output, dict):
        return [pair for key, value in output.items() for pair in _flat(value, f"{name}.{key}")]
    if isinstance(output, list | tuple):
        return [pair for key, value in enumerate(output) for pair in _flat(value, f"{name}.{key}")]
    return []


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of an entry, as a part of the largest entry of its tensor; infinite if shapes differ."""
    if found.keys() != expected.keys():
        return float("inf")
    worst = 0.0
    for name, right in expected.items():
        one = found[name]
        if one.shape != right.shape:
            return float("inf")
        if not right.is_floating_point() or not right.numel():
            continue
        known = torch.isfinite(right)
        if not torch.equal(known, torch.isfinite(one)):
            return float("inf")
        scale = right[known].abs().max().item() if bool(known.any()) else 0.0
        gap = (one[known] - right[known]).abs().max().item() if bool(known.any()) else 0.0
        worst = max(worst, gap / scale if scale else gap)
    return worst


def dense_state(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers by name, those of compressed layers as the dense weight that they stand for, and experts
    together as transformers has them."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, module in model.named_modules():
        if type(module).__name__ == "LowRankSparseLinear":
            for suffix in [key for key in state if key.rpartition(".")[0] == name and not key.endswith(".bias")]:
                del state[suffix]
            state[f"{name}.weight"] = module.dense()
        elif type(module).__name__ == "Conv1D":
            state[f"{name}.weight"] = module.weight.T
    for name, module in model.named_modules():
        if type(module).__name__ in ("SplitExperts", "SortedExperts"):
            gate, *others = (
                [state.pop(f"{name}.{e}.{matrix}.weight") for e in range(module.count)] if matrix else None
                for matrix in module.names
            )
            up, down = map(torch.stack, others)
            first = torch.cat((torch.stack(gate), up), 1) if gate else up
            for key, value in ((module.form.first, first), ("down_proj", down)):
                state[f"{name}.{key}"] = value.mT if module.form.turned else value
    return {name: tensor.detach() for name, tensor in state.items()}


def differing(found: Any, expected: Any) -> str:
    """The first tensor in which two models differ; "" if they are the same."""
    ours, theirs = dense_state(found), dense_state(expected)
    if ours.keys() != theirs.keys():
        return f"tensors {sorted(ours.keys() ^ theirs.keys())[:3]} are on one side only"
    for name, right in theirs.items():
        if ours[name].shape != right.shape:
            return f"{name} is {list(ours[name].shape)} and {list(right.shape)}"
        close = torch.allclose(ours[name].double(), right.double(), 1e-4, 1e-6, equal_nan=True)
        if right.is_floating_point() and not close:
            return name
    return ""


def same(what: str, model: Any, plain: Any, batch: Batch) -> str:
    """ "" if both hold the same tensors and answer alike, else what differs."""
    name = differing(model, plain)
    if name:
        return f"{what}: {name} differs from the dense export"
    expected = answers(plain, batch)
    gap = difference(answers(model, batch), expected)
    if gap <= TOLERANCE or gap <= ROUNDING * _rounding(plain, batch, expected):
        return ""
    return f"{what}: outputs differ from the dense export by {gap:.1e}"


def _rounding(model: Any, batch: Batch, answered: dict[str, Tensor]) -> float:
    """How far float32 alone takes a model's answers from those of float64; 0 if it takes no float64."""
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    try:
        exact = answers(deepcopy(model).double(), wide)
    except Exception:
        return 0.0
    gap = difference(answered, exact)
    return gap if gap < LARGEST_ROUNDING else 0.0


def with_losparse(model_type: str, model_class: type[Any], auto: str, folder: Path) -> dict[str, Any]:
    """Steps a to f but for loading without losparse. Keys: layers, skipped, moved, faults, calibrated, seconds."""
    import losparse_cli
    from losparse_cli.errors import CheckpointError
    from losparse_cli.models.skeleton import classify

    model, batch = build(model_type, model_class)
    found: dict[str, Any] = {"faults": [], "parameters": sum(p.numel() for p in model.parameters())}
    found["reads"] = sorted(batch)
    faults: list[str] = found["faults"]
    dense, small, plain = folder / "dense", folder / "small", folder / "plain"
    try:
        original = answers(model, batch)
    except Exception as error:
        raise Stop(f"with random weights it cannot be called: {sentence(error)}") from error
    if not original or not all(bool(torch.isfinite(t).any()) for t in original.values() if t.is_floating_point()):
        found["note"] = "outputs are not finite" if original else "returns no tensor"
    try:
        model.save_pretrained(dense)
        again = model_class.from_pretrained(dense).eval()
    except Exception as error:
        raise Stop(f"transformers cannot save or load it: {sentence(error)}") from error
    if differing(again, model) or difference(answers(again, batch), original) > TOLERANCE:
        found["note"] = f"transformers itself reads back another model ({differing(again, model) or 'other outputs'})"
    torch.save(batch, folder / "batch.pt")
    if "input_ids" in batch:
        byte_tokenizer().save_pretrained(dense)

    recipe = losparse_cli.Recipe(rank=4, sparsity=0.5, iterations=4)
    try:
        result = losparse_cli.compress(dense, small, recipe)
    except losparse_cli.LosparseError as error:
        if "note" in found and isinstance(error, CheckpointError):
            raise Stop(f"{found['note']}; losparse: {error}") from error
        if not str(error).startswith("No layer "):
            raise
        return {**found, "layers": 0, "skipped": _counted(classify(model)[1].values())}
    found["layers"] = len(result.report.layers)
    found["skipped"] = _reasons(small)
    losparse_cli.export(small, plain)
    stock = model_class.from_pretrained(plain).eval()
    loaded, _ = losparse_cli.load(small, **({} if auto else {"model_class": model_class}))
    if type(loaded) is not model_class:
        faults.append(f"load: gives {type(loaded).__name__}, not {model_class.__name__}")
        loaded, _ = losparse_cli.load(small, model_class=model_class)
    # Saved before it computes: RWKV writes over its weights when it does.
    loaded.save_pretrained(folder / "again")
    again, _ = losparse_cli.load(folder / "again", model_class=model_class)
    first, second = loaded.state_dict(), again.state_dict()
    if first.keys() != second.keys() or not all(torch.equal(first[k], second[k]) for k in first):
        unlike = [k for k in first if k not in second or not torch.equal(first[k], second[k])]
        if not all(bool(first[k].isnan().any()) for k in unlike):
            faults.append(f"save: {(unlike or sorted(second.keys() - first.keys()))[:2]} differ when loaded again")
    faults += filter(None, [same("load", loaded, stock, batch)])
    found["moved"] = difference(answers(stock, batch), original)
    if (
        not any(fault.startswith("save") for fault in faults)
        and (gap := difference(answers(again, batch), answers(loaded, batch))) > 1e-6
    ):
        faults.append(f"save: outputs differ by {gap:.1e} when loaded again")
    if not losparse_cli.verify(folder / "again").sound:
        faults.append("save: verify finds what is saved unsound")

    if "input_ids" in batch:
        found["calibrated"] = _calibrated(model_class, dense, folder, recipe, batch, faults)
    return found


def _calibrated(model_class: type[Any], dense: Path, folder: Path, recipe: Any, batch: Batch, faults: list[str]) -> str:
    """ "yes", or the reason why not."""
    import losparse_cli

    text = folder / "text.txt"
    text.write_text(TEXT * 40)
    calibration = losparse_cli.Calibration(str(text), tokens=64, length=16)
    try:
        losparse_cli.compress(dense, folder / "calibrated", replace(recipe, solver="oats"), calibration=calibration)
    except losparse_cli.LosparseError as error:
        return str(error)
    except Exception as error:
        faults.append(f"calibrate: {sentence(error)}")
        return "no"
    losparse_cli.export(folder / "calibrated", folder / "calibrated-plain")
    loaded, _ = losparse_cli.load(folder / "calibrated", model_class=model_class)
    stock = model_class.from_pretrained(folder / "calibrated-plain").eval()
    faults += filter(None, [same("calibrate", loaded, stock, batch)])
    return "yes"


def _reasons(folder: Path) -> dict[str, int]:
    """Why layers stayed dense -> how many did."""
    import json

    return _counted(json.loads((folder / "config.json").read_text())["quantization_config"]["skipped"].values())


def _counted(reasons: Iterable[str]) -> dict[str, int]:
    return dict(Counter(reasons).most_common())


def without_losparse(model_class: type[Any], auto: str, folder: Path) -> str:
    """Step c, in a process that never saw losparse: "" if the shipped loader gives what the dense export gives."""
    import transformers

    batch = torch.load(folder / "batch.pt", weights_only=True)
    stock = model_class.from_pretrained(folder / "plain").eval()
    model = getattr(transformers, auto).from_pretrained(folder / "small", trust_remote_code=True).eval()
    if type(model) is not model_class:
        return f"shipped loader: {auto} gives {type(model).__name__}"
    return same("shipped loader", model, stock, batch)


def byte_tokenizer() -> Any:
    """One token a byte; ids 0 to 2 are padding, start and end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
