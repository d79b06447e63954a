"""Published methods that ours is measured against, written from their papers and independent of our solvers.

Each takes a weight W (m, n), the second moment H (n, n) of its inputs, the rank of U V and the entries of S, with the
largest entries chosen row by row, and computes in float32. `peer` sends them through our own route, block by block, so
that nothing but the solver differs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from losparse_cli.linalg.factors import Decomposition, LowRankSparse

# --- layers -----------------------------------------------------------------------------------------


def oats(
    W: Tensor, H: Tensor, rank: int, nnz: int, *, iterations: int = 80, dtype: torch.dtype = torch.float32
) -> Decomposition:
    """OATS (https://arxiv.org/abs/2409.13652): of W diag(d), d the root mean square of each input, an exact truncated
    SVD and row-wise hard thresholding in turn, 80 times, scaled back."""
    W, d, inverse = _scaled(W, H.diagonal())
    A, S = W * d, torch.zeros_like(W)
    U = V = W.new_zeros(0, 0)
    for _ in range(iterations):
        U, V = _truncated_svd(A - S, rank)
        S = _largest_in_rows(A - U @ V, nnz)
    U, V = _balanced(U, V * inverse, dtype)
    # As in the method, S is what the low-rank part leaves: of the one that is stored, which favours it a little.
    support = S != 0
    return _decomposition(W, H, U, V, (W - U.float() @ V.float()) * support, support, dtype)


def hassle(
    W: Tensor, H: Tensor, rank: int, nnz: int, *, rounds: int = 20, dtype: torch.dtype = torch.float32
) -> Decomposition:
    """HASSLE-free (https://arxiv.org/abs/2502.00899) with ALPS (https://arxiv.org/abs/2406.07831) for S, in turn with
    the exact rank-r fit of W - S under H for L.

    ALPS starts anew in each turn, with its published penalties, and takes up to 60 steps, by when its support rests.
    Up to 20 turns, ended when five gain less than a thousandth together; twice as many gained 6 % more at half the
    parameters, in twice the time.
    """
    return _in_turn(W, H, rank, nnz, dtype, rounds=rounds, steps=60, growth=1.0, anew=True)


def basil(
    W: Tensor, H: Tensor, rank: int, nnz: int, *, rounds: int = 80, dtype: torch.dtype = torch.float32
) -> Decomposition:
    """As `hassle`, but one long ADMM that sees L change every third step, as 3BASiL
    (https://arxiv.org/abs/2603.01376) solves for both at once; its exact low-rank step is kept.

    The penalty grows a quarter as fast as ALPS's, which the many turns need: at ALPS's own pace the error at half the
    parameters was a quarter larger.
    """
    return _in_turn(W, H, rank, nnz, dtype, rounds=rounds, steps=3, growth=0.25, anew=False)


def _in_turn(
    W: Tensor,
    H: Tensor,
    rank: int,
    nnz: int,
    dtype: torch.dtype,
    *,
    rounds: int,
    steps: int,
    growth: float,
    anew: bool,
    damping: float = 0.01,
    tolerance: float = 1e-3,
) -> Decomposition:
    """S by ADMM given L, L given S; inputs scaled to unit variance and H damped as in ALPS. The best turn is kept."""
    diagonal = H.diagonal()
    W, d, inverse = _scaled(W, diagonal + damping * diagonal.mean() * (diagonal > 0))
    scaled = H * inverse[:, None] * inverse
    scaled.diagonal().fill_(1.0)  # the damping; of an input that is always zero, only to stay regular
    values, vectors = torch.linalg.eigh(scaled.double())
    values = values.clamp_min(1e-9)
    root = ((vectors * values.sqrt()) @ vectors.T).float()
    inverse_root = ((vectors / values.sqrt()) @ vectors.T).float()
    alps = _Alps(scaled, values, vectors, nnz, growth)
    A = W * d
    U, V = A.new_zeros(A.shape[0], rank), A.new_zeros(rank, A.shape[1])
    best, kept, history = math.inf, (U, V, torch.zeros_like(A)), [math.inf]
    for _ in range(rounds):
        if anew:
            alps.forget()
        S = alps.prune(A - U @ V, steps)
        U, V = _truncated_svd((A - S) @ root, rank)
        V = V @ inverse_root
        error = _objective(A - S - U @ V, scaled)
        if error < best:
            best, kept = error, (U, V, S)
        history.append(best)
        if len(history) > 6 and best > (1 - tolerance) * history[-6]:
            break
    U, V, S = kept
    U, V = _balanced(U, V * inverse, dtype)
    # The last refit of S sees the low-rank part as it is stored.
    S = _conjugate_gradients(A - (U.float() @ V.float()) * d, S, scaled, 10)
    return _decomposition(W, H, U, V, S * inverse, S != 0, dtype)


def magnitude(W: Tensor, H: Tensor, rank: int, nnz: int, *, dtype: torch.dtype = torch.float32) -> Decomposition:
    """No data: a truncated SVD, and the largest entries of what it leaves, as LoSparse starts
    (https://arxiv.org/abs/2306.11222)."""
    W = W.float()
    U, V = _balanced(*_truncated_svd(W, rank), dtype)
    residual = W - U.float() @ V.float()
    S = _largest_in_rows(residual, nnz)
    return _decomposition(W, H, U, V, S, S != 0, dtype)


PEERS: dict[str, Callable[..., Decomposition]] = {
    "oats": oats,
    "hassle": hassle,
    "basil": basil,
    "magnitude": magnitude,
}


@contextmanager
def peer(name: str) -> Iterator[None]:
    """Within it, calibrated compression solves each layer by the published method `name`; RuntimeError if none was."""
    with solved_by(PEERS[name], name):
        yield


@contextmanager
def solved_by(method: Callable[..., Decomposition], name: str) -> Iterator[None]:
    """As `peer`, by a method that takes what those of PEERS do."""
    import losparse_cli.compress  # noqa: F401  so that all modules that call the solver are there
    from losparse_cli.compression import solve as route

    ours = route.solve_layers
    called: list[str] = []

    def solve_layers(
        plans: Sequence[Any], stored: Sequence[Tensor], H: Tensor, recipe: Any, device: torch.device
    ) -> list[Decomposition]:
        found = []
        for plan, W in zip(plans, stored, strict=True):
            if (plan.pattern, plan.scope) != ("unstructured", "row"):
                raise ValueError(f"{name} chooses the entries of S row by row, not {plan.pattern} by {plan.scope}")
            found.append(method(route.as_matrix(W, plan.layer, device), H, plan.rank, plan.nnz, dtype=W.dtype))
        called.append(name)
        return found

    users: list[Any] = [module for module in sys.modules.values() if vars(module).get("solve_layers") is ours]
    for module in users:
        module.solve_layers = solve_layers
    try:
        yield
    finally:
        for module in users:
            module.solve_layers = ours
    if not called:
        raise RuntimeError(f"{name} solved nothing: compression went another way")


class _Alps:
    """ALPS for one matrix after another under the same H, each from the state in which the last one ended.

    growth: exponent on the published factors by which the penalty grows.
    """

    def __init__(self, H: Tensor, values: Tensor, vectors: Tensor, nnz: int, growth: float) -> None:
        self.H, self.values, self.vectors = H, values.float(), vectors.float()
        self.nnz, self.growth = nnz, growth
        self.forget()

    def forget(self) -> None:
        self.rho = 0.1
        self.state: tuple[Tensor, Tensor] | None = None

    def prune(self, A: Tensor, steps: int, every: int = 3) -> Tensor:
        """S with `nnz` entries, about the least tr((A - S) H (A - S)ᵀ), by `steps` of ADMM and conjugate gradients.

        The penalty grows the faster, the more of the support has changed in the last `every` steps.
        """
        S, Y = self.state or (_largest_in_rows(A, self.nnz), torch.zeros_like(A))
        G = A @ self.H
        support = S != 0
        for step in range(steps):
            if step % every == 0:
                inverse = (self.vectors / (self.values + self.rho)) @ self.vectors.T
            B = (G - Y + self.rho * S) @ inverse
            S = _largest_in_rows(B + Y / self.rho, self.nnz)
            Y = Y + self.rho * (B - S)
            if step % every == every - 1:
                changed = int(((S != 0) != support).sum()) / max(1, self.nnz)
                support = S != 0
                self.rho *= (1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1) ** self.growth
                if changed < 3e-4:
                    break
        self.state = S, Y
        return _conjugate_gradients(A, _largest_in_rows(B, self.nnz), self.H, 3)


def _scaled(W: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W in float32, the roots of the diagonal, and their inverses, which are 0 where no input arrives."""
    d = diagonal.float().clamp_min(0).sqrt()
    return W.float(), d, torch.where(d > 0, 1 / d, 0.0)


def _truncated_svd(A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (m, rank), of orthonormal columns, and V (rank, n): from all eigenvectors of the smaller Gram matrix."""
    if A.shape[0] > A.shape[1]:
        left, right = _truncated_svd(A.T, rank)
        norm = torch.linalg.vector_norm(right, dim=1)
        return right.T / norm.clamp_min(1e-30), norm[:, None] * left.T
    U = torch.linalg.eigh(A @ A.T).eigenvectors[:, A.shape[0] - rank :]
    return U, U.T @ A


def _largest_in_rows(A: Tensor, nnz: int) -> Tensor:
    """A with all but nnz / m entries a row set to zero."""
    m = A.shape[0]
    if nnz % m:
        raise ValueError(f"{nnz} entries are no whole number in each of {m} rows")
    index = A.abs().topk(nnz // m, dim=1, sorted=False).indices
    return torch.zeros_like(A).scatter(1, index, A.gather(1, index))


def _balanced(U: Tensor, V: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """U V with the norms of U's columns and V's rows made equal, rounded to `dtype`."""
    left, right = torch.linalg.vector_norm(U, dim=0), torch.linalg.vector_norm(V, dim=1)
    root = (right / left.clamp_min(1e-30)).sqrt()
    return (U * root).to(dtype), (V / root.clamp_min(1e-30)[:, None]).to(dtype)


def _conjugate_gradients(A: Tensor, S: Tensor, H: Tensor, steps: int) -> Tensor:
    """S with its support held, moved towards the least tr((A - S) H (A - S)ᵀ), row by row."""
    mask = S != 0
    residual = ((A - S) @ H) * mask
    direction, squared = residual, residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        ahead = (direction @ H) * mask
        step = squared / (direction * ahead).sum(1, keepdim=True).clamp_min(1e-30)
        S = S + step * direction
        residual = residual - step * ahead
        last, squared = squared, residual.square().sum(1, keepdim=True)
        direction = residual + squared / last.clamp_min(1e-30) * direction
    return S


def _objective(E: Tensor, H: Tensor) -> float:
    return float(((E @ H) * E).double().sum())


def _decomposition(
    W: Tensor, H: Tensor, U: Tensor, V: Tensor, S: Tensor, support: Tensor, dtype: torch.dtype
) -> Decomposition:
    """The result as it is stored, with its errors."""
    factors = LowRankSparse(U, V, S[support].to(dtype), support)
    E = W - factors.dense()
    weight, residual = float(W.square().double().sum()), float(E.square().double().sum())
    output = math.sqrt(max(0.0, _objective(E, H)) / max(_objective(W, H), 1e-30))
    return Decomposition(factors, (math.sqrt(residual / weight) if weight else 0.0,), weight, residual, (output,))


# --- quantization -----------------------------------------------------------------------------------


def gptq(W: Tensor, H: Tensor, bits: int, group: int, *, damping: float = 0.01) -> Tensor:
    """GPTQ (https://arxiv.org/abs/2210.17323) with a scale and a zero point for each `group` entries of a row: (m, n).

    Columns in their own order, each rounded and its error made up for by those after it. When a group is reached, its
    range is shrunk as far as that lowers the squared error of its entries, in a hundredth of steps down to a fifth.
    """
    W, H = W.float().clone(), H.double().clone()
    dead = H.diagonal() == 0
    W[:, dead] = 0.0
    H.diagonal()[dead] = 1.0
    H.diagonal().add_(damping * H.diagonal().mean())
    R = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True).float()
    result, top = torch.empty_like(W), 2**bits - 1
    for begin in range(0, W.shape[1], group):
        end = min(begin + group, W.shape[1])
        scale, zero = _affine_grid(W[:, begin:end], top)
        E = torch.empty_like(W[:, begin:end])
        for i in range(begin, end):
            w = W[:, i]
            result[:, i] = scale * ((w / scale + zero).round().clamp(0, top) - zero)
            E[:, i - begin] = (w - result[:, i]) / R[i, i]
            W[:, i + 1 : end].addr_(E[:, i - begin], R[i, i + 1 : end], alpha=-1)
        W[:, end:].addmm_(E, R[begin:end, end:], alpha=-1)
    return result


def gptq_solver(bits: int, group: int) -> Callable[..., Decomposition]:
    """GPTQ in the form of PEERS: all of W in S, kept in float32 and counted by nobody."""

    def solve(W: Tensor, H: Tensor, rank: int, nnz: int, *, dtype: torch.dtype = torch.float32) -> Decomposition:
        none, all_of_it = W.new_zeros(len(W), 0), torch.ones_like(W, dtype=torch.bool)
        return _decomposition(
            W, H, none, none.new_zeros(0, W.shape[1]), gptq(W, H, bits, group), all_of_it, torch.float32
        )

    return solve


def _affine_grid(W: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale in half precision and whole zero point of each row: of ranges shrunk ever more the one that fits best."""
    low, high = W.amin(1).clamp_max(0.0), W.amax(1).clamp_min(0.0)
    best = torch.full_like(low, math.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for percent in range(100, 19, -1):
        a = ((high - low) * (percent / 100) / top).half().float().clamp_min(6e-8)
        z = (-low * (percent / 100) / a).round().clamp(0, top)
        q = (W / a[:, None] + z[:, None]).round().clamp(0, top) - z[:, None]
        error = (W - a[:, None] * q).square().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, a, scale), torch.where(better, z, zero)
    return scale, zero


def quantize(model: Any, names: Sequence[str], bits: int, group: int = 0) -> int:
    """Round the weights of the linear layers `names` to `bits` by torchao, in place; the bytes that they take.

    A scale and a zero point for each row, or for each `group` entries of a row, which lost less than scales alone at 8
    bits too. Scales count as bfloat16, zero points at the width of the weights. The packaged SmolLM2 was stored in 4
    bits in groups of 32, a grid on which 4 bits may lose too little: so groups begin half of that later (with torchao's
    whole-numbered zero points, that changes the error of the weights by less than a hundredth).
    """
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group) if group else PerAxis(0),
        mapping_type=MappingType.ASYMMETRIC,
        scale_dtype=torch.bfloat16,
    )
    shift = 16 if group else 0
    nbytes = 0
    for name in names:
        weight = model.get_submodule(name).weight
        holder: Any = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        with torch.no_grad():
            holder[0].weight.copy_(weight.roll(-shift, 1))
            quantize_(holder, config)
            stored = holder[0].weight
            weight.copy_(stored.dequantize().roll(shift, 1))
        nbytes += (weight.numel() + stored.zero_point.numel()) * bits // 8 + stored.scale.numel() * 2
    return nbytes
