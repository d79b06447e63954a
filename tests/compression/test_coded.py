"""Layers coded within bytes, and one step for all layers that follows what those before took."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from losparse_cli.budget.plan import Layer, LayerPlan, code_overhead, plan_layer
from losparse_cli.budget.recipe import Recipe
from losparse_cli.checkpoint.layers import unpack_layer
from losparse_cli.checkpoint.report import LayerReport
from losparse_cli.compression.coded import Coder, Ledger, code_alone, coded_at, coded_within
from losparse_cli.compression.steps import Foreseen, Steps
from losparse_cli.errors import CheckpointError, UnfitError
from losparse_cli.linalg.error import output_squared
from losparse_cli.linalg.integers import code, column_metric, fit_rows, row_steps
from losparse_cli.linalg.patterns import parse_pattern, select
from losparse_cli.linalg.rates import curve
from losparse_cli.linalg.svd import output_factors
from losparse_cli.shim.layouts import COLUMN_FACTORS

CPU = torch.device("cpu")


def planned(m: int, n: int, bits: float | None, name: str = "a", rank: int = 0, **fields: Any) -> LayerPlan:
    layer = Layer(name, f"{name}.weight", name, (m, n), 2)
    return plan_layer(layer, Recipe(bits=bits, rank=rank or None, **fields).settled())


def weight(m: int, n: int, seed: int = 0) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return (torch.randn(m, n, generator=chance) * torch.rand(m, 1, generator=chance) * 0.05).bfloat16()


def moment(n: int) -> Tensor:
    X = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(5)) * torch.logspace(-1, 1, n)
    return X.T @ X / (4 * n)


@pytest.mark.parametrize("bits", [1.0, 2.5, 4.25, 8.0])
@pytest.mark.parametrize("H", [None, moment(256)], ids=["rounding", "feedback"])
def test_a_layer_takes_what_it_was_given_and_hardly_less(bits: float, H: Tensor | None) -> None:
    plan, W = planned(192, 256, bits), weight(192, 256)
    [one] = code_alone(Coder([plan], [W], H, [None], 0, CPU))
    assert 0.99 * bits <= 8 * one.report.bytes_after / W.numel() <= bits  # a lane more is half a hundredth here
    factors = unpack_layer(one.report.spec, one.tensors)
    assert torch.equal(factors.dense(), one.solved.factors.dense())  # what is read is what was solved
    residual = float((W.float() - factors.dense()).square().sum())
    assert one.solved.residual_squared == pytest.approx(residual, rel=1e-4)


@pytest.mark.parametrize(
    "W",
    [
        torch.zeros(64, 64),
        torch.full((64, 64), 0.25),
        torch.cat((torch.randn(1, 64), torch.zeros(63, 64))),
        torch.randn(64, 64).index_fill(0, torch.tensor([3]), 1e4),
        torch.randn(64, 64) * 6e-8,
        torch.randn(64, 64).clamp(-2, 2) * 30000,
    ],
    ids=["zeros", "one value", "one row", "an outlier", "tiny", "huge"],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_strange_layers(W: Tensor, dtype: torch.dtype) -> None:
    plan, W = planned(64, 64, 4.5), W.to(dtype)
    for H in (None, moment(64), torch.zeros(64, 64), torch.ones(64, 64)):
        [one] = code_alone(Coder([plan], [W], H, [None], 0, CPU))
        assert 8 * one.report.bytes_after <= 4.5 * W.numel()
        dense = one.solved.factors.dense()
        assert bool(torch.isfinite(dense).all())
        felt = torch.eye(64) if H is None or not bool(H.any()) else H
        assert output_squared(dense - W.float(), felt) <= 0.1 * output_squared(W.float(), felt) + 1e-9


def test_low_rank_beside_codes_counts() -> None:
    plan, W = planned(192, 256, 4.0, rank=4), weight(192, 256)
    [one] = code_alone(Coder([plan], [W], moment(256), [None], 0, CPU))
    assert one.report.spec.rank == 4
    assert 8 * one.report.bytes_after <= 4 * W.numel()
    assert set(one.tensors) == {"U", "V", "weight", "S_codes", "S_scale"}


def test_fewer_bits_than_the_factors_alone_take() -> None:
    with pytest.raises(UnfitError, match=r"a \(32 x 32\) cannot be stored in 1 bits.*Raise --bits to 1\.\d\d at least"):
        planned(32, 32, 1.0)


@pytest.mark.parametrize(
    ("fields", "says"), [({"rank": 20}, "Lower --rank"), ({"rank": 4}, r"Raise --bits to \d\.\d\d")]
)
def test_what_is_proposed_can_be_asked_for(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UnfitError, match=rf"\. {says}") as error:
        planned(64, 64, 2.0, **fields)
    for asked in re.findall(r"--bits to (\S+)", str(error.value)):
        planned(64, 64, float(asked), **fields)


def test_a_bit_budget_that_only_zeros_keep_within_is_an_error() -> None:
    plan = planned(64, 64, 4.0)
    tight = replace(plan, expected_bytes=code_overhead(plan.layer, 0) // 4)
    with pytest.raises(CheckpointError, match="does not fit"):
        code_alone(Coder([tight], [weight(64, 64)], None, [None], 0, CPU))


# --- zeros by a pattern ------------------------------------------------------------------------------

PATTERNS: list[dict[str, Any]] = [
    {"sparsity": 0.5},
    {"sparsity": 0.9},
    {"sparsity": 0.75, "threshold_scope": "row"},
    {"pattern": "2:4"},
    {"pattern": "1:4"},
    {"pattern": "3:16"},
    {"pattern": "rows", "sparsity": 0.5},
    {"pattern": "columns", "sparsity": 0.75},
]


@pytest.mark.parametrize("fields", PATTERNS, ids=[" ".join(map(str, fields.values())) for fields in PATTERNS])
@pytest.mark.parametrize("H", [None, moment(256)], ids=["rounding", "feedback"])
def test_zeros_lie_where_the_pattern_says_and_the_bytes_are_those_asked_for(
    fields: dict[str, Any], H: Tensor | None
) -> None:
    plan, W = planned(192, 256, None, value_bits=4.0, **fields), weight(192, 256)
    [one] = code_alone(Coder([plan], [W], H, [None], 0, CPU))
    q = unpack_layer(one.report.spec, one.tensors).codes
    assert torch.equal(q, one.solved.factors.codes)
    where = q != 0
    assert int(where.sum()) == one.report.spec.nnz <= plan.nnz
    assert int(where.sum()) > 0.8 * plan.nnz, "a kept value is seldom rounded to zero"
    match plan.pattern:
        case "rows":
            assert int(where.any(1).sum()) == 96
        case "columns":
            assert int(where.any(0).sum()) == 64
        case "unstructured" if plan.scope == "row":
            assert int(where.sum(1).max()) <= 64
        case pattern if ":" in pattern:
            keep, group = map(int, pattern.split(":"))
            assert int(where.view(192, -1, group).sum(2).max()) == keep
    assert 0.985 * plan.bits <= 8 * one.report.bytes_after / W.numel() <= plan.bits


def test_bits_of_a_kept_value_are_those_of_the_codes_alone() -> None:
    """Without its pattern a layer of as many values would take as many bits for each."""
    for fields in PATTERNS[:1] + PATTERNS[3:]:
        plan = planned(512, 512, None, value_bits=3.0, rank=4, **fields)
        mask = plan.bits * 512 * 512 - 3 * plan.nnz - 8 * code_overhead(plan.layer, 4)
        assert plan.value_bits == pytest.approx(3.0)
        assert 0 <= mask <= 512 * 512
    assert planned(512, 512, None, value_bits=3.0, sparsity=0.0).value_bits == pytest.approx(3.0)


def test_the_support_is_what_is_largest_in_units_of_the_step() -> None:
    plan, W, H = planned(192, 256, None, value_bits=6.0, sparsity=0.5), weight(192, 256), moment(256)
    g = torch.logspace(0, 4, 192)
    [one] = code_alone(Coder([plan], [W], H, [g], 0, CPU))
    metric = column_metric(H, COLUMN_FACTORS)
    cost = (W.float() / metric.columns * g.sqrt()[:, None]).abs()
    kept = one.solved.factors.codes != 0
    assert float(cost[kept].min()) >= float(cost[~kept].median())
    assert int(kept[-64:].sum()) > 2 * int(kept[:64].sum()), "rows that the loss minds keep more"


def test_what_is_sparse_is_solved_before_it_is_rounded() -> None:
    """Support, values and U V together: rounding as it goes cannot mend what zeros of later columns cost."""
    plan, W, H = planned(192, 256, None, value_bits=5.0, sparsity=0.9, rank=4), weight(192, 256), moment(256)
    [one] = code_alone(Coder([plan], [W], H, [None], 0, CPU))
    metric = column_metric(H, COLUMN_FACTORS)
    U, V = output_factors(W.float(), H, 4)
    rest = W.float() - U @ V
    support = select(rest / metric.columns, parse_pattern("unstructured"), plan.nnz, "matrix")
    a = torch.full((192,), metric.scale * 2.0**one.solved.log_step)
    q = code(rest, metric, a, support)
    alone = rest - q * metric.columns * fit_rows(rest, q, metric.columns, H, a, torch.float32)[:, None]
    assert one.solved.output_errors[-1] < 0.9 * output_squared(alone, H) ** 0.5 / output_squared(W.float(), H) ** 0.5


def test_rows_that_the_loss_minds_get_more_of_what_is_shared() -> None:
    plan, W, H = planned(96, 128, None, value_bits=5.0, sparsity=0.95, rank=2), weight(96, 128), moment(128)
    errors = []
    for g in (None, torch.logspace(0, 4, 96)):
        [one] = code_alone(Coder([plan], [W], H, [g], 0, CPU))
        E = W.float() - one.solved.factors.dense()
        errors.append(float(torch.linalg.vecdot(E @ H, E)[-16:].sum()))
    assert errors[1] < 0.9 * errors[0]


def test_bits_that_kept_values_cannot_use_are_left_over() -> None:
    plan, W = planned(64, 256, 8.0, sparsity=0.9), weight(64, 256)
    assert plan.value_bits > 15
    assert 8 * plan.expected_bytes < 3 * W.numel()
    [one] = code_alone(Coder([plan], [W], moment(256), [None], 0, CPU))
    codes = one.solved.factors.codes
    assert one.report.bytes_after <= plan.expected_bytes
    assert 2**14 <= int(codes.abs().max()) <= 2**17
    assert one.solved.output_errors[-1] < 0.6


@pytest.mark.parametrize("fields", PATTERNS, ids=[" ".join(map(str, fields.values())) for fields in PATTERNS])
def test_what_is_foreseen_is_what_codes_with_a_pattern_take(fields: dict[str, Any]) -> None:
    plan, W = planned(384, 384, None, value_bits=4.0, **fields), weight(384, 384)
    coder = Coder([plan], [W], None, [None], 0, CPU)
    [found] = coder.curves()
    [one] = code_alone(coder)
    bits = 8 * (one.report.bytes_after - code_overhead(plan.layer, 0)) / W.numel()
    assert found.at(one.solved.log_step) == pytest.approx(bits, rel=0.06)


# --- one step for many ------------------------------------------------------------------------------


def many(bits: float = 3.0) -> tuple[list[LayerPlan], list[Tensor], list[Tensor], Steps]:
    plans = [planned(96 + 32 * k, 128, bits, f"layer{k}") for k in range(6)]
    weights = [weight(96 + 32 * k, 128, k) for k in range(6)]
    g = [torch.rand(len(W), generator=torch.Generator().manual_seed(k)) * 10.0**k for k, W in enumerate(weights)]
    metric = column_metric(moment(128), COLUMN_FACTORS)
    foreseen = {
        plan.layer.name: Foreseen(one, curve(W.float() / metric.columns / (metric.scale * row_steps(one))[:, None]))
        for plan, W, one in zip(plans, weights, g, strict=True)
    }
    return plans, weights, g, Steps(plans, foreseen)


def run(bits: float = 3.0, kill_after: int | None = None) -> tuple[list[float], list[bytes]]:
    """Bits of each layer, and its stream; with what was written before handed on to another Steps."""
    plans, weights, g, steps = many(bits)
    sizes, streams = [], []
    done: list[LayerReport] = []
    for k, (plan, W, one) in enumerate(zip(plans, weights, g, strict=True)):
        if k == kill_after:
            before = steps
            *_, steps = many(bits)
            for report in done:
                steps.spend(report)
            assert steps.log_step(plan.layer.name) == before.log_step(plan.layer.name)
        coder = Coder([plan], [W], moment(128), [one], 0, CPU)
        step = steps.log_step(plan.layer.name)
        assert step is not None
        [coded] = coded_within(coder, steps.pots([plan]), [step])
        steps.spend(coded.report)
        done.append(coded.report)
        sizes.append(8 * coded.report.bytes_after / plan.nnz)
        streams.append(bytes(coded.tensors["S_codes"].tolist()))
    return sizes, streams


def test_layers_share_bytes_and_the_last_one_makes_them_come_out() -> None:
    plans, *_ = many()
    sizes, _ = run()
    total = sum(size * plan.nnz for size, plan in zip(sizes, plans, strict=True)) / sum(p.nnz for p in plans)
    assert 0.995 * 3.0 <= total <= 3.0
    assert sizes == sorted(sizes), "the loss minds each of them ten times more than the one before"
    assert sizes[-1] > sizes[0] + 4


@pytest.mark.parametrize("strange", [0, 1])
@pytest.mark.parametrize("outlier", [0.0, 1e4])
def test_one_strange_layer_costs_those_beside_it_nothing(strange: int, outlier: float) -> None:
    """The last layers of a run, fed the same inputs, of which one is zeros but for an entry: it takes hardly a byte,
    and no step that serves it alone keeps the others from theirs."""
    bits, plans = 4.0, [planned(64, 64, 4.0, f"layer{k}") for k in range(2)]
    weights, g = [weight(64, 64, k) * 0.01 for k in range(2)], torch.ones(64)
    weights[strange] = (
        torch.zeros(64, 64).bfloat16().index_put((torch.tensor(5), torch.tensor(6)), torch.tensor(outlier).bfloat16())
    )
    metric = column_metric(moment(64), COLUMN_FACTORS)
    foreseen = {
        plan.layer.name: Foreseen(g, curve(W.float() / metric.columns / metric.scale))
        for plan, W in zip(plans, weights, strict=True)
    }
    steps = Steps(plans, foreseen)
    asked = [step for step in steps.log_steps(foreseen).values() if step is not None]
    made = coded_within(Coder(plans, weights, moment(64), [g] * 2, 0, CPU), steps.pots(plans), asked)
    total = 8 * sum(one.report.bytes_after for one in made) / sum(plan.nnz for plan in plans)
    assert 0.99 * bits <= total <= bits
    assert all(one.solved.errors[-1] < 0.06 for k, one in enumerate(made) if k != strange)


def test_layers_that_take_more_than_was_foreseen_leave_the_last_one_its_bytes() -> None:
    plans, weights, g, steps = many()
    ceilings = steps.ceilings(plan.layer.name for plan in plans[:-1])
    step, sizes = steps.log_step("layer0"), []
    assert step is not None
    for plan, W, one in zip(plans, weights, g, strict=True):
        coder = Coder([plan], [W], moment(128), [one], 0, CPU)
        [coded] = coded_within(coder, steps.pots([plan], ceilings), [step - 3])  # three bits more a code
        steps.spend(coded.report)
        sizes.append(coded.report.bytes_after)
    allowed = sum(plan.expected_bytes for plan in plans)
    assert 0.99 * allowed <= sum(sizes) <= allowed
    assert sizes[-1] > code_overhead(plans[-1].layer, 0)
    assert all(size <= ceilings.get(plan.layer.name, allowed) for plan, size in zip(plans, sizes, strict=True))


def test_a_run_that_goes_on_takes_the_same_steps() -> None:
    assert run() == run(kill_after=4)


@pytest.mark.parametrize("empty", [None, 0, 3])
def test_what_a_layer_of_zeros_leaves_is_for_all_that_follow(empty: int | None) -> None:
    bits, plans = 3.0, [planned(128 if k == 0 else 64, 128, 3.0, f"layer{k}") for k in range(6)]
    ledger, sizes = Ledger(plans), []
    for k, plan in enumerate(plans):
        W = torch.zeros(plan.layer.shape).half() if k == empty else weight(*plan.layer.shape, k).half()
        one = ledger.code(Coder([plan], [W], None, [None], 0, CPU))
        sizes.append(8 * one.report.bytes_after / plan.nnz)
    total = sum(size * plan.nnz for size, plan in zip(sizes, plans, strict=True)) / sum(plan.nnz for plan in plans)
    assert 0.99 * bits <= total <= bits
    after = sizes if empty is None else sizes[empty + 1 :]
    assert max(after) - min(after) < 0.35


def test_layers_that_no_text_reaches_have_bytes_of_their_own() -> None:
    plans, *_ = many()
    steps = Steps(plans, {})
    assert steps.log_step("layer0") is None
    assert steps.g("layer0") is None
    [pot] = steps.pots(plans[:1])
    assert pot.allowed == 3.0 * plans[0].nnz / 8


def test_the_last_tenth_of_the_bytes_heeds_what_those_before_took() -> None:
    plans = [planned(64, 64, 3.0, f"layer{k}") for k in range(40)]
    known = Foreseen(torch.ones(64), curve(torch.randn(64, 64)))
    names = [plan.layer.name for plan in plans]
    steps = Steps(plans, dict.fromkeys(names, known))
    of_all = [steps.are_last(names[k : k + 1], {*names[:k]}, {*names}) for k in range(40)]
    assert of_all == [False] * 36 + [True] * 4
    assert steps.are_last(names[20:], {*names[:20]}, {*names})  # nothing is left for others
    assert not steps.are_last(names[38:39], {*names[:38]}, {*names[20:]})  # others wait, before this block


def test_layers_of_other_bits_have_another_step() -> None:
    plans, weights, g, steps = many()
    foreseen = {p.layer.name: Foreseen(one, curve(W.float())) for p, W, one in zip(plans, weights, g, strict=True)}
    finer = [planned(*p.layer.shape, 5.0, p.layer.name) if k % 2 else p for k, p in enumerate(plans)]
    steps = Steps(finer, foreseen)
    coarse, fine = steps.log_step("layer0"), steps.log_step("layer1")
    assert coarse is not None
    assert fine is not None
    assert fine < coarse - 1
    assert math.isinf(steps.pots(finer[:1])[0].allowed)


def test_the_same_request_gives_the_same_streams() -> None:
    plan, W = planned(96, 128, 3.5), weight(96, 128)
    made = [coded_at(Coder([plan], [W], moment(128), [None], 0, CPU), [-6.0])[0].tensors["S_codes"] for _ in range(2)]
    assert torch.equal(*made)
