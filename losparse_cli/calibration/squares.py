"""Σ x xᵀ in half the memory: tiles of rows, each from its diagonal on, in one flat tensor."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 384  # columns whose products are computed together: those left of them are known by symmetry


def empty_squares(n: int, device: torch.device) -> Tensor:
    """Zeros for a symmetric (n, n), flat, float32."""
    return torch.zeros(sum(rows * (n - begin) for begin, rows in _tiles(n)), device=device)


def add_squares(flat: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows; rows: (tokens, n), float32."""
    for begin, tile in _views(flat, rows.shape[1]):
        tile.addmm_(rows[:, begin : begin + len(tile)].T, rows[:, begin:])


def diagonals(flat: Tensor, n: int) -> list[Tensor]:
    """The diagonal, in pieces that may be written to."""
    return [tile.diagonal() for _, tile in _views(flat, n)]


def whole(flat: Tensor, n: int) -> Tensor:
    """The matrix, (n, n), with both of its sides."""
    H = flat.new_empty(n, n)
    for begin, tile in _views(flat, n):
        end = begin + len(tile)
        H[begin:end, begin:] = tile
        corner = H[begin:end, begin:end]
        corner.copy_(corner.triu().add_(corner.triu(1).T))
        H[end:, begin:end] = H[begin:end, end:].T
    return H


def _tiles(n: int) -> list[tuple[int, int]]:
    """First row of each tile, and how many it has."""
    return [(begin, min(TILE, n - begin)) for begin in range(0, n, TILE)]


def _views(flat: Tensor, n: int) -> list[tuple[int, Tensor]]:
    found, at = [], 0
    for begin, rows in _tiles(n):
        size = rows * (n - begin)
        found.append((begin, flat[at : at + size].view(rows, n - begin)))
        at += size
    return found
