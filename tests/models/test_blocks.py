"""Blocks found, and the model's own forward pass halted at each of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from conftest import TOYS, token_batch, toy_model
from torch import Tensor, nn

from losparse_cli.checkpoint.source import open_checkpoint
from losparse_cli.compression.assembly import Assembly
from losparse_cli.errors import CheckpointError, UsageError
from losparse_cli.models.blocks import (
    Call,
    Relay,
    block_of,
    find_blocks,
    hidden_size,
    hidden_states,
    holding,
    run_block,
    with_hidden_states,
)
from losparse_cli.models.skeleton import Skeleton, build_skeleton


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def skeleton_of(folder: Path) -> tuple[Skeleton, Assembly, tuple[str, ...]]:
    checkpoint = open_checkpoint(folder)
    skeleton = build_skeleton(folder, checkpoint.config)
    return (
        skeleton,
        Assembly(skeleton.model, checkpoint, torch.device("cpu")),
        find_blocks(skeleton.model, skeleton.linears),
    )


def batches_of(model: Any) -> list[dict[str, Any]]:
    """Of different lengths, the last padded."""
    made = [{**token_batch(model, length=length, seed=length), "use_cache": False} for length in (11, 5, 17)]
    for batch in made[:2]:
        del batch["attention_mask"]
    return made


def captured(model: Any, blocks: tuple[str, ...], batches: list[dict[str, Any]]) -> dict[str, list[Call]]:
    """What each block is called with and returns in the model's undisturbed forward passes."""
    seen: dict[str, list[Call]] = {name: [] for name in blocks}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, output, name=name: seen[name].append(Call(args, kwargs, output)), with_kwargs=True
        )
        for name in blocks
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", TOYS)
def test_block_by_block_every_model_says_what_it_says_at_once(name: str, toy: Any) -> None:
    model = toy_model(name)
    skeleton, assembly, blocks = skeleton_of(toy(name))
    batches = batches_of(model)
    expected = captured(model, blocks, batches)
    assembly.load([n for n, _ in skeleton.model.named_parameters() if block_of(n, blocks) is None])
    order = []
    with Relay(skeleton.model, blocks, batches) as relay:
        for block, calls in relay:
            order.append(block)
            module = skeleton.model.get_submodule(block)
            names = [f"{block}.{n}" for n, _ in module.named_parameters()]
            assert names
            assembly.load(names)
            for call, theirs in zip(calls, expected[block], strict=True):
                with torch.no_grad():
                    call.output = run_block(module, call)
                ours, other = hidden_states(call.output), hidden_states(theirs.output)
                if name == "mamba":  # its scan runs over a state that lies elsewhere in memory
                    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-7)
                else:
                    assert torch.equal(ours, other)
            assembly.drop(names)
    assert tuple(order) == blocks
    assert len(blocks) == (4 if name in ("t5", "bart") else 2)


def test_encoder_comes_before_decoder(toy: Any) -> None:
    _, _, blocks = skeleton_of(toy("t5"))
    assert blocks == ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")
    _, _, blocks = skeleton_of(toy("bart"))
    assert [block.split(".")[-3] for block in blocks] == ["encoder", "encoder", "decoder", "decoder"]


def test_each_block_gets_its_own_mask_and_positions() -> None:
    """Gemma 3 alternates windows and rotary tables; nothing but the model knows which block gets which."""
    model = toy_model("gemma3", layer_types=["sliding_attention", "full_attention"])
    blocks = ("model.layers.0", "model.layers.1")
    given = {}
    tokens = token_batch(model, length=20)["input_ids"]
    with Relay(model, blocks, [{"input_ids": tokens, "use_cache": False}]) as relay, torch.no_grad():
        for name, (call,) in relay:
            given[name] = call.kwargs
            call.output = run_block(model.get_submodule(name), call)
    local, full = (given[name] for name in blocks)
    assert any(
        not torch.equal(a, b) for a, b in zip(local["position_embeddings"], full["position_embeddings"], strict=True)
    )
    seen = [
        mask if mask is None or mask.dtype == torch.bool else mask == 0
        for mask in (local["attention_mask"], full["attention_mask"])
    ]
    assert seen[0] is not None
    assert int(seen[0][0, 0, -1].sum()) == 8  # the window
    assert seen[1] is None or int(seen[1][0, 0, -1].sum()) == 20


# --- models of a few lines --------------------------------------------------------------------------


class Chain(nn.Module):
    """Blocks called in the given order."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2), count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))
        self.order = order

    def forward(
        self,
        x: Tensor,
        fail_after: int | None = None,
        error: BaseException | None = None,
        order: tuple[int, ...] | None = None,
    ) -> Tensor:
        for place, k in enumerate(order or self.order):
            if place == fail_after:
                assert error is not None
                raise error
            x = self.layers[k](x) + 1
        return x


BLOCKS = ("layers.0", "layers.1", "layers.2")


def drive(
    model: nn.Module, batches: list[dict[str, Any]], blocks: tuple[str, ...] = BLOCKS, optional: tuple[str, ...] = ()
) -> list[str]:
    reached = []
    with Relay(model, blocks, batches, optional) as relay, torch.no_grad():
        for name, calls in relay:
            reached.append(name)
            for call in calls:
                call.output = None if call.absent else run_block(model.get_submodule(name), call)
    return reached


def raise_at(step: int, model: nn.Module, batches: list[dict[str, Any]]) -> None:
    with Relay(model, BLOCKS, batches) as relay:
        for number, (_, calls) in enumerate(relay):
            if number == step:
                raise KeyError
            for call in calls:
                call.output = call.args[0]


def inputs(**more: Any) -> dict[str, Any]:
    return {"x": torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), **more}


def is_restored(model: nn.Module) -> bool:
    return not any("forward" in vars(module) for module in model.modules())


def test_what_a_block_returns_is_what_the_next_is_fed() -> None:
    model = Chain()
    x = inputs()["x"]
    with Relay(model, BLOCKS, [{"x": x}, {"x": x[:1]}]) as relay, torch.no_grad():
        for number, (_, calls) in enumerate(relay):
            for call in calls:
                if number:
                    assert torch.equal(call.args[0], torch.full_like(call.args[0], number * 10.0 + 1))
                call.output = torch.full_like(call.args[0], (number + 1) * 10.0)
    assert [len(x), len(x[:1])] == [2, 1]


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (0, 0, 1, 2), (0, 1), (0, 1, 1, 2), ()])
def test_blocks_in_another_order_are_refused(order: tuple[int, ...]) -> None:
    model = Chain(order)
    with pytest.raises(UsageError, match="block by block"):
        drive(model, [inputs()])
    assert is_restored(model)


def test_batches_that_take_different_ways_are_refused() -> None:
    model = Chain()
    with pytest.raises(UsageError, match=r"layers\.2 where layers\.1"):
        drive(model, [inputs(), inputs(order=(0, 2, 1))])
    assert is_restored(model)


def test_batches_may_go_past_blocks_that_are_optional() -> None:
    model, reached = Chain(), []
    batches = [inputs(), inputs(order=(2,)), inputs(order=(1, 2))]
    with torch.no_grad():
        expected = [model(**batch) for batch in batches]
        with Relay(model, BLOCKS, batches, optional=BLOCKS[:2]) as relay:
            for name, calls in relay:
                reached.append([not call.absent for call in calls])
                for call in calls:
                    if not call.absent:
                        call.output = run_block(model.get_submodule(name), call)
            assert all(torch.equal(relay.result(k), expected[k]) for k in range(3))
    assert reached == [[True, False, False], [True, False, True], [True, True, True]]
    for order in ((1, 0, 2), (0, 1)):
        with pytest.raises(UsageError, match="block by block"):
            drive(model, [inputs(order=order)], optional=BLOCKS[:2])
    assert is_restored(model)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    ("error", "expected", "match"),
    [
        (ArithmeticError("no image"), UsageError, "Chain cannot be run on text alone .no image."),
        (ArithmeticError(), UsageError, "ArithmeticError"),
        (MemoryError("of ours"), MemoryError, "of ours"),
        (torch.OutOfMemoryError("of the device"), torch.OutOfMemoryError, "of the device"),
        (CheckpointError("of a file"), CheckpointError, "of a file"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_inside_the_model_reaches_the_caller(
    error: BaseException, expected: type[BaseException], match: str, place: int
) -> None:
    model = Chain()
    with pytest.raises(expected, match=match) as raised:
        drive(model, [inputs(), inputs(fail_after=place, error=error), inputs()])
    assert error in (raised.value, raised.value.__cause__)
    assert is_restored(model)


def test_a_consumer_that_breaks_off_or_raises_leaves_nothing_behind() -> None:
    model = Chain()
    batches = [inputs() for _ in range(5)]
    with Relay(model, BLOCKS, batches) as relay:
        assert len(threading.enumerate()) > 5
        for _, calls in relay:
            for call in calls:
                call.output = call.args[0]
            break
    assert is_restored(model)
    for step in range(3):
        with pytest.raises(KeyError):
            raise_at(step, model, batches)
        assert is_restored(model)
    with Relay(model, BLOCKS, batches):
        pass  # not even begun
    assert drive(model, batches) == list(BLOCKS)  # and the model is as good as new


def test_the_models_code_runs_without_gradients() -> None:
    """Autograd's switch belongs to a thread: that of the caller says nothing about the model's."""
    model = Chain()
    modes = []
    model.layers[0].register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    with Relay(model, BLOCKS, [inputs()]) as relay:
        for name, (call,) in relay:
            assert torch.is_grad_enabled()  # ours is left alone
            with torch.no_grad():
                call.output = run_block(model.get_submodule(name), call)
    assert modes[0] is False


def test_a_block_is_run_by_its_own_method_while_it_is_halted() -> None:
    model = Chain()
    x = inputs()["x"]
    with Relay(model, BLOCKS, [{"x": x}]) as relay, torch.no_grad():
        for name, (call,) in relay:
            block = model.get_submodule(name)
            assert torch.equal(run_block(block, call), nn.functional.linear(call.args[0], block.weight, block.bias))
            assert "forward" in vars(block)
            block.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run_block(block, call)
            assert "forward" in vars(block)  # put back after an error, too
            break
    assert is_restored(model)


@pytest.mark.parametrize("inside", [False, True], ids=["a cache", "a cache in a cache"])
def test_a_block_that_runs_again_finds_the_cache_as_it_was(inside: bool) -> None:
    """XLM and Flaubert keep one whatever their config says, and would attend to their own earlier runs."""

    class Keeping(nn.Module):
        def forward(self, x: Tensor, cache: Any) -> Tensor:
            held = cache.self_attention_cache if inside else cache
            held.layers[0].seen["sum"] += 1.0
            return held.update(x, x, 1)[0]

    cache = transformers.DynamicCache()
    cache.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0)
    cache.layers[0].seen = {"sum": torch.zeros(1)}  # a state that is written over, as those of linear attention
    given = transformers.EncoderDecoderCache(cache, transformers.DynamicCache()) if inside else cache
    call, block = Call((torch.ones(1, 1, 5, 4),), {"cache": given}), Keeping()
    for _ in range(3):
        assert run_block(block, call).shape == (1, 1, 5, 4)
        assert cache.layers[0].keys.shape[2] == 3
        assert cache.layers[0].seen["sum"] == 1
        assert len(cache.layers) == 2  # what the last run added stays for the blocks that follow


def test_no_batches_is_no_work() -> None:
    assert drive(Chain(), []) == list(BLOCKS)


# --- names ------------------------------------------------------------------------------------------


def test_blocks_are_the_entries_of_the_outermost_lists() -> None:
    model = nn.ModuleDict(
        {
            "stem": nn.Linear(3, 3),
            "layers": nn.ModuleList(nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(3, 3)])}) for _ in range(11)),
        }
    )
    all_of_them = tuple(f"layers.{number}" for number in range(11))
    assert find_blocks(model, ["layers.1.heads.0", "stem"]) == all_of_them
    assert holding(all_of_them, ["layers.1.heads.0", "layers.10.heads.0"]) == ("layers.1", "layers.10")
    assert find_blocks(nn.ModuleList([nn.Linear(3, 3)]), ["0"]) == ()  # a layer is no block
    assert find_blocks(model, []) == ()
    assert find_blocks(nn.Sequential(nn.Linear(3, 3)), ["0"]) == ()


def test_a_name_lies_in_the_block_whose_whole_name_it_begins_with() -> None:
    blocks = ("layers.1", "layers.10")
    assert block_of("layers.10.q.weight", blocks) == "layers.10"
    assert block_of("layers.1.q.weight", blocks) == "layers.1"
    assert block_of("layers.2.q.weight", blocks) is None
    assert block_of("layers.1", blocks) is None
    assert block_of("anything", ("",)) == ""


@pytest.mark.parametrize("name", TOYS)
def test_hidden_size_is_the_width_between_blocks(name: str) -> None:
    model = toy_model(name)
    blocks = find_blocks(
        model, [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and ".1." in n]
    )
    batch = {**token_batch(model), "use_cache": False}
    for calls in captured(model, blocks, [batch]).values():
        assert hidden_states(calls[0].output).shape[-1] == hidden_size(model)


def test_embeddings_without_a_weight_of_their_own_say_no_width() -> None:
    """Those of SAM 3's video model are a module of patches."""
    model = toy_model("bert")
    model.get_input_embeddings = lambda: nn.Sequential()
    vars(model.config)["hidden_size"] = None
    assert hidden_size(model) == 0


def test_states_are_replaced_and_the_rest_is_kept() -> None:
    from transformers.modeling_outputs import CausalLMOutput

    a, b, c = torch.zeros(2), torch.ones(2), torch.full((2,), 2.0)
    assert with_hidden_states(a, b) is b
    assert with_hidden_states((a, c), b) == (b, c)
    output = with_hidden_states(CausalLMOutput(logits=a, hidden_states=(c,)), b)
    assert isinstance(output, CausalLMOutput)
    assert hidden_states(output) is b
    assert output.hidden_states == (c,)


@dataclass(frozen=True)
class Answer:
    """What a block of somebody's own may return."""

    position: int
    inner: Any


class Pair(NamedTuple):
    mask: Tensor
    states: Tensor


def test_states_are_found_and_replaced_in_whatever_a_block_returns() -> None:
    a, b, mask = torch.zeros(2), torch.ones(2), torch.ones(2, dtype=torch.bool)
    for output, expected in (
        ([a, mask], [b, mask]),
        (((a, mask), 3), ((b, mask), 3)),
        ({"mask": mask, "states": [a]}, {"mask": mask, "states": [b]}),
        (Pair(mask, a), Pair(mask, b)),
        (Answer(1, {"states": (a,)}), Answer(1, {"states": (b,)})),
    ):
        assert hidden_states(output) is a
        made = with_hidden_states(output, b)
        assert made == expected
        assert type(made) is type(expected)
        assert hidden_states(output) is a  # what the block returned stays as it was
    for nothing in (None, (), {"mask": mask}, [3]):
        with pytest.raises(UsageError, match="without activations"):
            hidden_states(nothing)
