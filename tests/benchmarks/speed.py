"""Data-free decomposition: time against exact SVD plus full sort, and energy against exact factors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from losparse_cli.checkpoint.source import open_checkpoint
from losparse_cli.demo import smollm2
from losparse_cli.linalg.alternating import decompose
from losparse_cli.linalg.patterns import Pattern
from losparse_cli.linalg.svd import truncated_svd

RANK, SPARSITY = 8, 0.9
UNSTRUCTURED = Pattern("unstructured")


def peer(W: Tensor, rank: int, nnz: int) -> tuple[Tensor, Tensor]:
    """The usual route: `torch.linalg.svd`, then a full sort of the residual's magnitudes. Returns (L, S)."""
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    L = (U[:, :rank] * s[:rank]) @ Vh[:rank]
    residual = W - L
    order = torch.argsort(residual.abs().view(-1), descending=True)[:nnz]
    S = torch.zeros_like(W).view(-1)
    S[order] = residual.view(-1)[order]
    return L, S.view_as(W)


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def prescribed(size: int, exponent: float, seed: int = 0) -> Tensor:
    """A square matrix with singular values i^-exponent."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    return (left * torch.arange(1, size + 1).float().pow(-exponent)) @ right.T


def decomposition(size: int = 4096, runs: int = 5) -> None:
    """Seconds for one matrix, ours and the peer in the same run, one after the other."""
    print(f"{size} x {size}, rank {RANK}, sparsity {SPARSITY}, one iteration; peer: torch.linalg.svd + full sort\n")
    print("| weights | peer, s | ours, s (median) | ratio | error, peer | error, ours |")
    print("|---|---|---|---|---|---|")
    nnz = round((1 - SPARSITY) * size * size)
    for name, W in (
        ("Gaussian", torch.randn(size, size, generator=torch.Generator().manual_seed(1))),
        ("σᵢ = i^-0.5", prescribed(size, 0.5)),
        ("σᵢ = i^-1", prescribed(size, 1.0)),
    ):
        decompose(W, RANK, nnz, UNSTRUCTURED)
        ours = [timed(lambda W=W: decompose(W, RANK, nnz, UNSTRUCTURED)) for _ in range(runs // 2)]
        start = time.perf_counter()
        L, S = peer(W, RANK, nnz)
        theirs = time.perf_counter() - start
        ours += [timed(lambda W=W: decompose(W, RANK, nnz, UNSTRUCTURED)) for _ in range(runs - runs // 2)]
        median = sorted(ours)[len(ours) // 2]
        error = decompose(W, RANK, nnz, UNSTRUCTURED).errors[-1]
        exact = float((W - L - S).norm() / W.norm())
        print(
            f"| {name} | {theirs:.1f} | {median:.3f} | {theirs / median:.0f}x | {exact:.5f} | {error:.5f} |", flush=True
        )


def _real_layers() -> Iterator[tuple[str, Tensor]]:
    checkpoint = open_checkpoint(smollm2())
    for name, entry in checkpoint.entries.items():
        if ".layers." in name and len(entry.shape) == 2:
            file = next(file for file in checkpoint.files if file.path == entry.path)
            yield name, file.read(entry).float()


def energy() -> None:
    """Share of the energy of the exact rank-8 factors that the randomized ones capture."""

    def captured(W: Tensor) -> float:
        U, s, Vh = truncated_svd(W, RANK)
        best = float(torch.linalg.svdvals(W)[:RANK].double().square().sum())
        left = float((W - (U * s) @ Vh).double().square().sum())
        return (float(W.double().square().sum()) - left) / best

    print("| weights | energy captured, of the exact rank 8 |")
    print("|---|---|")
    for exponent in (0.5, 1.0):
        print(f"| 4096 x 4096, σᵢ = i^-{exponent:g} | {captured(prescribed(4096, exponent)):.3%} |", flush=True)
    shares = sorted((captured(W), name) for name, W in _real_layers())
    print(f"| SmolLM2-135M, {len(shares)} layers, mean | {sum(s for s, _ in shares) / len(shares):.3%} |")
    print(f"| SmolLM2-135M, worst ({shares[0][1].removesuffix('.weight')}) | {shares[0][0]:.3%} |")
