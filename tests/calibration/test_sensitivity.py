"""Fisher information, a block at a time: what all of the model in memory gives, whatever its architecture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peculiar
import pytest
import sighted
import torch
import transformers
from conftest import TOYS, token_batch, toy_model
from experts import split
from torch import Tensor, nn
from torch.nn import functional as F

from losparse_cli.calibration import sensitivity
from losparse_cli.calibration.activations import Activations
from losparse_cli.calibration.likelihood import categorical, drawn_loss, uniform
from losparse_cli.calibration.moments import Fed
from losparse_cli.calibration.sensitivity import Sensitivity, SensitivityRun
from losparse_cli.errors import CheckpointError, UsageError
from losparse_cli.models.blocks import block_of
from losparse_cli.models.route import find_route
from losparse_cli.models.skeleton import classify

OTHERS: dict[str, tuple[str, str, str]] = {
    "bert-mlm": ("BertForMaskedLM", "BertConfig", "bert"),
    "bert-bare": ("BertModel", "BertConfig", "bert"),
    "bert-tokens": ("BertForTokenClassification", "BertConfig", "bert"),
    "bert-pretraining": ("BertForPreTraining", "BertConfig", "bert"),
    "llama-bare": ("LlamaModel", "LlamaConfig", "llama"),
    "t5-encoder": ("T5EncoderModel", "T5Config", "t5"),
    "bart-bare": ("BartModel", "BartConfig", "bart"),
}
"""Name -> (model class, config class, the toy whose config it takes)."""


def made(name: str, **changes: Any) -> Any:
    if name in TOYS:
        model = toy_model(name, **changes)
    else:
        model_class, config_class, like = OTHERS[name]
        config = getattr(transformers, config_class)(**{**TOYS[like][2], **changes})
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return prepared(model)


def prepared(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False
    return model.requires_grad_(False)


def batches_of(model: Any) -> list[dict[str, Tensor]]:
    """Of different lengths, the last padded."""
    found = [token_batch(model, length=length, seed=length) for length in (11, 5, 17)]
    for batch in found[:2]:
        del batch["attention_mask"]
    return found


def layers_of(model: Any, kinds: Sequence[dict[str, Tensor]] = ()) -> dict[str, list[str]]:
    names = list(classify(model)[0])
    blocks = find_route(model, names, [(batch, 1.0, 1.0) for batch in kinds]).blocks
    return {
        block: [n.removeprefix(f"{block}.") if block else n for n in names if block_of(n, [block]) == block]
        for block in blocks
    }


def in_core(
    model: Any, batches: list[dict[str, Tensor]], seed: int, labels: Sequence[Tensor] | None = None
) -> dict[str, Sensitivity]:
    """By hooks on all of the model in memory. labels: of each batch, places where one is drawn; None for all."""
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    masks: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def backward(grad: Tensor) -> None:
            sums[name] = sums.get(name, 0) + grad.double().square().reshape(-1, grad.shape[-1]).sum(0)
            mask = masks.get("attention_mask")
            count = mask.sum() if mask is not None and mask.shape == grad.shape[:-1] else grad.shape[:-1].numel()
            tokens[name] = tokens.get(name, 0) + int(count)

        def forward(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()  # of a view that is written over hooks are not told
            output.register_hook(backward)
            return output

        return forward

    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in classify(model)[0]]
    model.requires_grad_(True)  # so that the first layers' outputs need gradients, too
    several = getattr(model.config, "problem_type", None) == "multi_label_classification"
    for number, batch in enumerate(batches):
        masks = {name: value for name, value in batch.items() if name.endswith("attention_mask")}
        generator = torch.Generator().manual_seed(seed + number)
        drawn = masks if labels is None else {"attention_mask": labels[number]}
        drawn_loss(model(**batch), drawn, generator, several=several).backward()
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)
    return {name: Sensitivity((sums[name] / tokens[name]).float(), tokens[name]) for name in sums}


class Weights:
    """Gives and takes a plain model's weights block by block; counts how many blocks have theirs."""

    def __init__(self, model: Any) -> None:
        self.model, self.most = model, 0
        self._away: dict[str, dict[str, Tensor]] = {}
        self.loads: list[str] = []

    def take(self, blocks: Any) -> Weights:
        for block in blocks:
            self.drop(block)
        return self

    def load(self, block: str) -> None:
        held = self._away.pop(block)
        for name, parameter in self.model.get_submodule(block).named_parameters():
            parameter.data = held[name]
        self.loads.append(block)
        self.most = max(self.most, sum(b not in self._away for b in set(self.loads)))

    def drop(self, block: str) -> None:
        held = self._away[block] = {}
        for name, parameter in self.model.get_submodule(block).named_parameters():
            held[name] = parameter.data
            parameter.data = torch.full((), float("nan")).expand(parameter.shape)


def out_of_core(
    model: Any, batches: list[dict[str, Tensor]], folder: Path, *, limit: int = 1 << 30, seed: int = 0,
    kinds: Sequence[dict[str, Tensor]] = (), **more: Any,
) -> tuple[dict[str, Sensitivity], Activations, Weights]:  # fmt: skip
    layers = layers_of(model, kinds)
    weights = Weights(model).take(layers)
    activations = Activations(folder, limit)
    found = SensitivityRun(
        model, layers, batches, load=weights.load, drop=weights.drop, activations=activations, seed=seed, **more
    ).run()
    most = weights.most
    for block in layers:
        weights.load(block)
    weights.most = most
    return found, activations, weights


def assert_same(found: dict[str, Sensitivity], expected: dict[str, Sensitivity]) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert found[name].g.dtype == torch.float32
        assert found[name].tokens == one.tokens
        scale = float(one.g.max())
        torch.testing.assert_close(found[name].g, one.g, rtol=1e-4, atol=1e-6 * scale, msg=name)
    plain = {one.tokens / one.share for name, one in found.items() if ".experts." not in name}
    assert max(plain) == pytest.approx(min(plain))  # every token that a layer sees costs alike


@pytest.mark.parametrize("spilled", [False, True], ids=["resident", "in files"])
@pytest.mark.parametrize("name", [*TOYS, *OTHERS])
def test_block_by_block_it_is_what_it_is_in_memory(name: str, spilled: bool, tmp_path: Path) -> None:
    model = made(name)
    batches = batches_of(model)
    expected = in_core(model, batches, seed=3)
    assert expected
    assert all(bool((one.g > 0).any()) for one in expected.values())
    found, activations, weights = out_of_core(model, batches, tmp_path, limit=0 if spilled else 1 << 30, seed=3)
    assert_same(found, expected)
    assert (activations.spilled > 0) == (spilled and "" not in layers_of(model))
    assert weights.most <= 1


@pytest.mark.parametrize("chunk", [1 << 26, 4 * 112 * 5], ids=["at once", "in chunks"])
def test_images_and_labels_where_text_comes_next(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some batches go past the tower, and none is asked what an image goes on with."""
    monkeypatch.setattr(sensitivity, "LOGITS", chunk)

    def fresh() -> Any:
        torch.manual_seed(0)
        model = prepared(sighted.llava()[0].eval())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        return model

    model = fresh()
    batches: list[dict[str, Tensor]] = []
    for length, images in ((9, True), (12, False), (14, True)):
        ids = torch.randint(4, 99, (2, length))
        if images:
            ids[:, 3:7] = sighted.IMAGE
        batches.append({"input_ids": ids} | ({"pixel_values": torch.randn(2, 3, 16, 16)} if images else {}))
    said = [batch["input_ids"] != sighted.IMAGE for batch in batches]
    labels = [torch.cat((text[:, 1:], text[:, -1:]), dim=1) for text in said]
    kinds = batches[:2]
    optional = find_route(model, list(classify(model)[0]), [(batch, 1.0, 1.0) for batch in kinds]).optional
    assert len(optional) == 3
    expected = in_core(model, batches, 5, labels)
    state = tmp_path / "state"

    def kill(block: str, found: Any) -> None:
        if block == optional[-1]:
            raise Killed

    options: dict[str, Any] = {"kinds": kinds, "optional": optional, "said": said, "seed": 5, "state": state}
    with pytest.raises(Killed):
        out_of_core(fresh(), batches, tmp_path, on_backward=kill, **options)
    found, _, _ = out_of_core(fresh(), batches, tmp_path, limit=0, **options)
    last = optional[-1]  # its outputs are asked of by nobody
    assert_same(found, {name: one for name, one in expected.items() if not name.startswith(last)})


def test_experts_count_for_what_one_of_them_sees_on_average(tmp_path: Path) -> None:
    """Other text is sent to others; all of them together count for what they see."""
    model = prepared(split(toy_model("mixtral")))
    found = out_of_core(model, batches_of(model)[:2], tmp_path)[0]  # without padding
    tokens = found["model.layers.1.self_attn.q_proj"].tokens
    assert all(one.share == 1 for name, one in found.items() if ".experts." not in name)
    for block in range(2):
        for matrix in ("w1", "w3", "w2"):
            experts = [found[f"model.layers.{block}.mlp.experts.{k}.{matrix}"] for k in range(5)]
            assert len({one.tokens for one in experts}) > 1
            assert all(one.share == sum(one.tokens for one in experts) / 5 / tokens for one in experts)
            assert experts[0].share == pytest.approx(2 / 5)


class Killed(BaseException):
    """Nothing in between may catch it."""


RESUMED = ["llama", "gpt2", "bert-mlm", "t5", "bart", "gemma3", "mixtral"]


@pytest.mark.parametrize("make", [*RESUMED, peculiar.gemma3n], ids=lambda make: getattr(make, "__name__", make))
def test_it_goes_on_after_the_last_block_that_was_run_backwards(make: Any, tmp_path: Path) -> None:
    def fresh() -> Any:
        torch.manual_seed(0)
        return made(make) if isinstance(make, str) else prepared(make().eval())

    batches = batches_of(fresh())
    texts: list[tuple[float, int]] = []
    whole, _, weights = out_of_core(fresh(), batches, tmp_path, on_text=lambda *text: texts.append(text))
    state = tmp_path / "state"
    blocks = [block for block, layers in layers_of(fresh()).items() if layers]
    for last in blocks[:0:-1]:  # each run is killed one block further

        def kill(block: str, found: Any, last: str = last) -> None:
            if block == last:
                raise Killed

        with pytest.raises(Killed):
            out_of_core(fresh(), batches, tmp_path, state=state, on_backward=kill)
    heard: list[tuple[float, int]] = []
    told: list[str] = []
    found, _, again = out_of_core(
        fresh(), batches, tmp_path, state=state, limit=0, on_text=lambda *text: heard.append(text),
        on_backward=lambda block, found: told.append(block),
    )  # fmt: skip
    assert heard == texts
    assert told == blocks[::-1]
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name].g, one.g) and found[name].tokens == one.tokens for name, one in whole.items())
    assert len(again.loads) == len(weights.loads) - (len(blocks) - 2)


def test_where_a_torn_state_says_nothing_all_is_run_backwards(tmp_path: Path) -> None:
    batches = batches_of(made("llama"))
    state = tmp_path / "state"
    whole, _, weights = out_of_core(made("llama"), batches, tmp_path, state=state)
    state.write_bytes(state.read_bytes()[:-9])
    found, _, again = out_of_core(made("llama"), batches, tmp_path, state=state)
    assert again.loads == weights.loads
    assert all(torch.equal(found[name].g, one.g) for name, one in whole.items())


@pytest.mark.parametrize("make", [peculiar.gemma3n, peculiar.gemma3, peculiar.t5gemma], ids=lambda make: make.__name__)
def test_models_of_unusual_make(make: Any, tmp_path: Path) -> None:
    """Blocks of Gemma 3n find keys and values in a dict, where others of them have put them."""
    torch.manual_seed(0)
    model = prepared(make().eval())
    batches = batches_of(model)[:2]
    blocks = list(layers_of(model))
    expected = {
        name: one for name, one in in_core(model, batches, seed=0).items() if block_of(name, blocks) is not None
    }
    found, _, _ = out_of_core(model, batches, tmp_path)
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["llama", "bert-mlm", "bert-pretraining", "t5", "gemma3"])
def test_logits_are_computed_some_tokens_at_a_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"final_logit_softcapping": 2.0} if name == "gemma3" else {}
    model = made(name, **changes)
    batches = batches_of(model)
    expected = in_core(model, batches, seed=0)
    monkeypatch.setattr(sensitivity, "LOGITS", 4 * 101 * 2 * 3)  # three tokens of two windows
    sizes = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    found, _, _ = out_of_core(model, batches, tmp_path)
    assert_same(found, expected)
    if name != "bert-pretraining":  # which says two things at once
        assert 3 in sizes


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-mlm", "t5", "llama-bare"])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_loss_of_the_text_itself(name: str, chunked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its next tokens, where the model predicts such; what a mask hides counts nothing."""
    model = made(name)
    batches = batches_of(model)
    if chunked:
        monkeypatch.setattr(sensitivity, "LOGITS", 4 * 101 * 2 * 3)
    heard: list[tuple[float, int]] = []
    out_of_core(model, batches, tmp_path, on_text=lambda nats, tokens: heard.append((nats, tokens)))
    if name not in ("llama", "gpt2"):
        assert not heard
        return
    expected, count = 0.0, 0
    for batch in batches:
        labels = batch["input_ids"].clone()
        labels[batch.get("attention_mask", torch.ones_like(labels)) == 0] = -100
        tokens = int((labels[:, 1:] != -100).sum())
        expected, count = expected + tokens * float(model(**batch, labels=labels).loss), count + tokens
    assert sum(tokens for _, tokens in heard) == count
    assert sum(nats for nats, _ in heard) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_heads_that_say_no_classes(problem: str, tmp_path: Path) -> None:
    model = made("bert", num_labels=1 if problem == "regression" else 3, problem_type=problem)
    batches = batches_of(model)
    expected = in_core(model, batches, seed=0)
    found, _, _ = out_of_core(model, batches, tmp_path)
    assert_same(found, expected)
    assert all(bool((one.g > 0).any()) for one in found.values())


def test_labels_are_as_frequent_as_the_model_says() -> None:
    logits = torch.tensor([0.0, 2.0, float("-inf"), 1.0]).expand(200_000, 4).clone().requires_grad_()
    chance = uniform(logits.shape[:1], logits.device, torch.Generator().manual_seed(0))
    categorical(logits, {}, chance).backward()  # softmax minus the label
    probabilities = torch.softmax(logits[0].detach(), 0)
    drawn = (probabilities - logits.grad).round().mean(0)
    torch.testing.assert_close(drawn, probabilities, atol=4e-3, rtol=0)
    assert drawn[2] == 0


def test_the_mean_over_drawn_labels_is_the_information_itself(tmp_path: Path) -> None:
    """Of one token all labels can be summed up: E (dL/dy)^2 over the model's own distribution."""
    model = made("llama")
    batch = {"input_ids": torch.tensor([[5]])}
    layer = model.model.layers[1].mlp.down_proj
    outputs: list[Tensor] = []
    model.requires_grad_(True)
    hook = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    log_p = F.log_softmax(model(**batch).logits[0, 0], -1)
    hook.remove()
    exact = sum(
        log_p[label].exp().detach() * torch.autograd.grad(log_p[label], outputs[0], retain_graph=True)[0][0, 0] ** 2
        for label in range(len(log_p))
    )
    model.requires_grad_(False)
    rows = {"input_ids": torch.full((1000, 1), 5)}
    found = out_of_core(model, [rows, rows, rows], tmp_path)[0]["model.layers.1.mlp.down_proj"].g
    torch.testing.assert_close(found, exact, rtol=0.3, atol=0.05 * float(exact.max()))
    assert abs(float(found.sum() / exact.sum()) - 1) < 0.05


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    model = made("llama")
    batches = batches_of(model)
    (first, _, _), (again, _, _), (other, _, _) = (out_of_core(model, batches, tmp_path, seed=k) for k in (1, 1, 2))
    assert all(torch.equal(first[name].g, again[name].g) for name in first)
    assert not any(torch.equal(first[name].g, other[name].g) for name in first)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_one_pass_gives_the_second_moments_too(name: str, tmp_path: Path) -> None:
    model = made(name)
    batches = batches_of(model)
    expected: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            expected[name] = expected.get(name, 0) + rows.T @ rows
            count[name] = count.get(name, 0) + len(rows)

        return hook

    hooks = [model.get_submodule(n).register_forward_pre_hook(watch(n)) for n in classify(model)[0]]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    heard: list[tuple[str, str]] = []
    moments: dict[str, Tensor] = {}

    def forward(block: str, found: list[Fed]) -> None:
        heard.append(("forward", block))
        for one in (fed.moments() for fed in found):
            moments.update({f"{block}.{layer}": one.H for layer in one.layers})

    def backward(block: str, found: dict[str, Sensitivity]) -> None:
        heard.append(("backward", block))
        assert found

    out_of_core(model, batches, tmp_path, on_forward=forward, on_backward=backward)
    assert moments.keys() == expected.keys()
    for layer, H in moments.items():
        torch.testing.assert_close(H, expected[layer] / count[layer], rtol=1e-4, atol=1e-5)
    blocks = list(layers_of(model))
    assert heard == [("forward", b) for b in blocks] + [("backward", b) for b in reversed(blocks)]


# --- models of a few lines --------------------------------------------------------------------------


class Block(nn.Module):
    """What goes wrong, if anything, is said by `fault`."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.up, self.down, self.idle = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 4)
        self.fault = fault

    def forward(self, x: Tensor, tables: tuple[Tensor, dict[str, Tensor]]) -> dict[str, Any]:
        scale = tables[1]["scale"]
        y = self.up(x)
        if self.fault == "no gradients":
            y = y.exp()
            y.detach_()
        if self.fault == "written over":
            y = y.sigmoid()
            y *= 2
            y = y.exp().mul_(y.square_())
        if self.fault == "overflow":
            y = (y.abs() * 0).sqrt()
        x += self.down(self.down(y).repeat(1, 1, 2)[..., :6]) * scale  # in place, and twice
        return {"states": x, "number": 3, "tables": tables}


class Settings:
    is_encoder_decoder, problem_type = False, None


class Model(nn.Module):
    config = Settings()

    def __init__(self, fault: str = "", at: int = 1) -> None:
        super().__init__()
        self.words = nn.Embedding(101, 4)
        self.layers = nn.ModuleList(Block(fault if k == at else "") for k in range(3))
        self.fault = fault

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        tables, around = (torch.ones(3), {"scale": x.mean() + 1}), x * 0
        for layer in self.layers:
            output = layer(x, tables=tables)
            x, tables = output["states"] * 1.5, output["tables"]
            around = around + x.sin()  # past all the blocks that follow
            x = x + around.cos()
            if self.fault == "between":
                with torch.no_grad():
                    x = x + 1
            tables = (tables[0], {"scale": tables[1]["scale"] + x.mean()})  # from block to block beside the states
        return x


LAYERS = {f"layers.{k}": ["up", "down", "idle"] for k in range(3)}


def few_lines(model: nn.Module, folder: Path) -> dict[str, Sensitivity]:
    batches = [{"input_ids": torch.arange(12).view(2, 6) + k} for k in range(3)]
    nothing: Any = lambda block: None  # noqa: E731
    return SensitivityRun(
        model.requires_grad_(False), LAYERS, batches, load=nothing, drop=nothing, activations=Activations(folder, 0)
    ).run()


def test_containers_writing_in_place_layers_called_twice_or_never(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    found = few_lines(model, tmp_path)
    sums: dict[str, Any] = {}
    for name in found:
        model.get_submodule(name).register_forward_hook(
            lambda m, a, y, name=name: (
                y.register_hook(
                    lambda g: sums.update({name: sums.get(name, 0) + g.square().reshape(-1, g.shape[-1]).sum(0)})
                )
                and None
            )
        )
    model.words.requires_grad_(True)  # nothing else: what the blocks write over is what its gradient is made of
    for k in range(3):
        loss = drawn_loss(model(torch.arange(12).view(2, 6) + k), {}, torch.Generator().manual_seed(k))
        loss.backward()
    assert set(found) == {f"{block}.{layer}" for block in LAYERS for layer in ("up", "down")}
    for name, one in found.items():
        tokens = 72 if name.endswith("down") else 36
        assert one.tokens == tokens
        torch.testing.assert_close(one.g, sums[name] / tokens, rtol=1e-4, atol=1e-8)


def test_what_takes_no_gradients_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Model takes no gradients at layers\.1 .*--sensitivity off"):
        few_lines(Model("written over"), tmp_path)


def test_gradients_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"layers\.1\.up are not finite.*--sensitivity off"):
        few_lines(Model("overflow"), tmp_path)


def test_a_loss_that_depends_on_no_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Model takes no gradients.*--sensitivity off"):
        few_lines(Model("between"), tmp_path)


def test_layers_behind_a_cut_are_left_out(tmp_path: Path) -> None:
    found = few_lines(Model("no gradients"), tmp_path)
    assert "layers.1.up" not in found
    assert "layers.1.down" in found
    assert "layers.0.up" in found
