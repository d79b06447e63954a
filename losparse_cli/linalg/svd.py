"""Truncated singular value decomposition: randomized block Krylov, and exact.

Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate singular value
decomposition" (NeurIPS 2015), algorithm 2. Trained weights have nearly flat spectra, on which the subspace
iteration of `torch.svd_lowrank` needs three times as many products for the same energy: it keeps only the
last block of what each product paid for. The exact one is LAPACK's, through `torch.linalg.svd`.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

KRYLOV_DEPTH = 6
"""Products with A Aᵀ: enough for 99.5 % of the energy of the exact factors on every layer measured."""


OUTPUT_DAMPING = 0.01
"""λ of `output_factors`: share of the mean diagonal of H that is added to it."""


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed for the tensor `name`, so that its result depends neither on order nor on the rest."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def truncated_svd(A: Tensor, rank: int, *, exact: bool = False, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets of A: U (m, rank), s (rank,), Vh (rank, n), s descending.

    A: (m, n), float32 or float64. `rank` must lie in 0..min(m, n), else ValueError.
    The randomized method draws from a generator of its own, seeded with `seed`. It gives way to the exact
    one where its basis would be no smaller than half the matrix.
    """
    m, n = A.shape
    if not 0 <= rank <= min(m, n):
        raise ValueError(f"rank {rank} is outside 0..{min(m, n)} of a {m} x {n} matrix")
    if rank == 0:
        return A.new_zeros(m, 0), A.new_zeros(0), A.new_zeros(0, n)
    block = max(16, rank + 8)
    if exact or 2 * block * (KRYLOV_DEPTH + 1) >= min(m, n):
        U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    elif m < n:
        V, s, Uh = _block_krylov(A.T, block, seed)
        U, Vh = Uh.T, V.T
    else:
        U, s, Vh = _block_krylov(A, block, seed)
    return U[:, :rank].contiguous(), s[:rank], Vh[:rank].contiguous()


def _block_krylov(A: Tensor, block: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets of A (m, n), m >= n, within the Krylov space of [A Ω, (A Aᵀ) A Ω, ...]."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device starts alike
    omega = torch.randn(A.shape[1], block, generator=generator, dtype=A.dtype).to(A.device)
    Q = torch.linalg.qr(A @ omega).Q
    basis = [Q]
    for _ in range(KRYLOV_DEPTH):
        Q = torch.linalg.qr(A @ (A.T @ Q)).Q
        basis.append(Q)
    Q = torch.linalg.qr(torch.cat(basis, dim=1)).Q
    U, s, Vh = torch.linalg.svd(Q.T @ A, full_matrices=False)
    return Q @ U, s, Vh


def balanced_factors(U: Tensor, s: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """U √s and √s Vh: the singular values split evenly (LoSparse, section 3.1)."""
    root = s.clamp_min(0).sqrt()
    return U * root, root[:, None] * Vh


def output_factors(W: Tensor, H: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """U (m, rank) and V (rank, n), balanced, of least tr((W − U V) H (W − U V)ᵀ): nearest to W in what it puts out.

    W: (m, n), float32; H: (n, n), the second moment of its inputs. The columns of U span the leading eigenvectors of
    W H Wᵀ, the principal components of the outputs, and U V is the projection of W on them (DRONE, Chen et al.,
    NeurIPS 2021). H is damped a little, so that what never occurs is kept where that costs nothing. ValueError for a
    rank that W cannot have, and for an H without positive diagonal entries.
    """
    mean = float(H.diagonal().double().mean())
    if not 0 < mean < float("inf"):
        raise ValueError(f"the mean square of the inputs is {mean}")
    damped = H.double() / mean
    damped.diagonal().add_(OUTPUT_DAMPING)
    root = torch.linalg.cholesky(damped).to(W.dtype)
    U, _, _ = truncated_svd(W @ root, rank, seed=seed)
    return balanced_product(U, U.T @ W)


def balanced_product(Q: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
    """Q P, each column of Q and row of P brought to the same norm; Q: (m, rank) of unit columns, P: (rank, n)."""
    root = torch.linalg.vector_norm(P, dim=1).sqrt()
    return Q * root, P * torch.where(root > 0, 1 / root, 0.0)[:, None]
