"""The published methods of the quality benchmark do what they claim; and the text that it is measured on."""

from __future__ import annotations

import re

import pytest
import torch
from benchmarks.peers import PEERS, gptq, peer
from torch import Tensor

from losparse_cli.demo import encyclopedia_text
from losparse_cli.linalg.alternating import decompose_scaled
from losparse_cli.linalg.factors import Decomposition
from losparse_cli.linalg.patterns import Pattern

M, N, RANK, NNZ = 48, 36, 4, 48 * 9


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor]:
    """A weight and a second moment of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(M, 6, generator=generator) @ torch.randn(6, N, generator=generator)
    W += torch.randn(M, N, generator=generator)
    mixed = torch.randn(400, 8, generator=generator) @ torch.randn(8, N, generator=generator)
    X = (mixed + torch.randn(400, N, generator=generator)) * torch.linspace(0.2, 3, N)
    return W, X.T @ X / len(X)


def objective(W: Tensor, H: Tensor, found: Decomposition) -> float:
    E = W - found.factors.dense()
    return float(((E @ H) * E).sum())


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_keeps_what_it_may(problem: tuple[Tensor, Tensor], name: str) -> None:
    W, H = problem
    found = PEERS[name](W, H, RANK, NNZ)
    assert (found.factors.rank, found.factors.nnz) == (RANK, NNZ)
    assert found.factors.support.sum(1).tolist() == [NNZ // M] * M
    assert found.output_errors[-1] ** 2 == pytest.approx(objective(W, H, found) / float(((W @ H) * W).sum()), rel=1e-3)


def test_oats_lowers_its_own_objective(problem: tuple[Tensor, Tensor]) -> None:
    W, H = problem
    D = torch.diag(H.diagonal())
    once, often = (objective(W, D, PEERS["oats"](W, H, RANK, NNZ, iterations=k)) for k in (1, 80))
    assert often < 0.9 * once


def test_our_oats_is_as_good_as_the_exact_one(problem: tuple[Tensor, Tensor]) -> None:
    W, H = problem
    D = torch.diag(H.diagonal())
    exact = objective(W, D, PEERS["oats"](W, H, RANK, NNZ))
    ours = objective(W, D, decompose_scaled(W, H, RANK, NNZ, Pattern("unstructured")))
    assert ours == pytest.approx(exact, rel=0.015)


def test_the_full_second_moment_helps(problem: tuple[Tensor, Tensor]) -> None:
    W, H = problem
    error = {name: objective(W, H, solve(W, H, RANK, NNZ)) for name, solve in PEERS.items()}
    assert error["basil"] < 1.01 * error["hassle"] < 1.01 * error["oats"] < error["magnitude"]


def test_turns_lower_the_error(problem: tuple[Tensor, Tensor]) -> None:
    W, H = problem
    for name in ("hassle", "basil"):
        few, many = (objective(W, H, PEERS[name](W, H, RANK, NNZ, rounds=k)) for k in (1, 20))
        assert many < few


def test_inputs_that_never_come_cost_nothing(problem: tuple[Tensor, Tensor]) -> None:
    W, H = problem[0], problem[1].clone()
    H[:, 5] = H[5] = 0
    for name in ("oats", "hassle", "basil"):
        found = PEERS[name](W, H, RANK, NNZ)
        assert torch.isfinite(found.factors.dense()).all()
        assert found.output_errors[-1] < 0.5


def test_a_peer_that_was_never_asked_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="solved nothing"), peer("oats"):
        pass


@pytest.mark.real_model
def test_encyclopedia_text_is_prose() -> None:
    calibration, held_out = encyclopedia_text()
    assert len(calibration) > 1_000_000
    assert len(calibration) > 3 * len(held_out) > 600_000
    for text in (calibration, held_out):
        assert not re.search(r"\{\{|\}\}|\[\[|\]\]|<ref|&[a-z]+;|^[=*|]", text, re.M)
    assert calibration.startswith("Anarchism is a political philosophy")
    shared = set(calibration.split("\n\n")) & set(held_out.split("\n\n"))
    assert not shared


@pytest.mark.parametrize(("bits", "group"), [(4, 12), (3, 18)])
def test_gptq_rounds_to_the_grid_of_each_group_and_makes_up_for_it(
    problem: tuple[Tensor, Tensor], bits: int, group: int
) -> None:
    W, H = problem
    made = gptq(W, H, bits, group)
    for begin in range(0, N - group + 1, group):
        assert max(len(row.unique()) for row in made[:, begin : begin + group]) <= 2**bits

    def lost(rounded: Tensor) -> float:
        return float((((W - rounded) @ H) * (W - rounded)).sum())

    alone = gptq(W, torch.eye(N), bits, group)  # nothing to make up for: each group at its best range
    assert lost(made) < 0.7 * lost(alone)
    X = W.view(M, -1, group)
    low, high = X.amin(2, keepdim=True).clamp_max(0), X.amax(2, keepdim=True).clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero = (-low / scale).round()
    plain = (((X / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale).view(M, N)
    assert float((W - alone).square().sum()) <= float((W - plain).square().sum())
