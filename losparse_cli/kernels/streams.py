"""Codes to and from their stream of bytes on a CPU, by streams.h."""

from __future__ import annotations

import torch
from torch import Tensor

from ..shim.streams import LANES, WIDTHS, Contexts, Parts, width_of
from .native import Classes, Library


def decode(code: Library, contexts: Contexts, parts: Parts) -> Tensor | None:
    """The codes, or None if the stream is damaged: plain torch then says how."""
    described, _kept = _describe(contexts, code.level)
    codes = torch.empty(described.m, described.n, dtype=WIDTHS[parts.width])
    damaged = code.decode_codes(
        described, parts.counts.data_ptr(), parts.states.data_ptr(), parts.words.data_ptr(), parts.escapes.data_ptr(),
        parts.escapes.numel(), parts.width, codes.data_ptr(),
    )  # fmt: skip
    return None if damaged or width_of(codes) != parts.width else codes


def encode(code: Library, codes: Tensor, contexts: Contexts) -> Parts | None:
    """Of int32 codes (m, n); None if there is no memory for it."""
    described, _kept = _describe(contexts, code.level)
    lanes = -(-described.m // described.lane_rows)
    counts = torch.empty(-(-lanes // LANES), dtype=torch.int32)
    states = torch.empty(lanes, dtype=torch.int32)
    # Room for the most that there can be: memory is taken where it is written to.
    words, escapes = torch.empty(codes.numel(), dtype=torch.int16), torch.empty(codes.numel(), dtype=torch.int32)
    results = (x.data_ptr() for x in (counts, states, words, escapes))
    found = code.encode_codes(described, codes.data_ptr(), *results)
    if found < 0:
        return None
    used = int((counts.long() & 0xFFFFFFFF).sum())
    return Parts(counts, states, words[:used].clone().view(torch.uint8), escapes[:found].clone(), width_of(codes))


def _describe(contexts: Contexts, level: int) -> tuple[Classes, tuple[Tensor, ...]]:
    """The contexts as streams.h sees them, and what must not be let go meanwhile."""
    tables = contexts.every_table()
    kept = (
        contexts.rows.contiguous(),
        contexts.columns.contiguous(),
        torch.tensor([f for frequencies in tables for f in frequencies], dtype=torch.int32),
        torch.tensor([len(frequencies) // 2 for frequencies in tables], dtype=torch.int32),
    )
    sizes = (contexts.rows.numel(), contexts.columns.numel(), contexts.lane_rows)
    return Classes(*sizes, *(x.data_ptr() for x in kept), len(tables), torch.get_num_threads(), level), kept
