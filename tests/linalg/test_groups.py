"""Plain rounding in groups: within half a step, exact on its own grid, all bits counted."""

from __future__ import annotations

import pytest
import torch

from losparse_cli.linalg.groups import GROUP, round_groups


@pytest.mark.parametrize("width", [3, 4, 8])
@pytest.mark.parametrize(("n", "shift"), [(96, 0), (96, 16), (70, 0), (70, 16)])
def test_every_entry_is_within_half_a_step(width: int, n: int, shift: int) -> None:
    W = torch.randn(5, n, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 5)[:, None]
    rounded, bits = round_groups(W, width, shift=shift)
    assert rounded.shape == W.shape
    groups = -(-n // GROUP)
    assert bits == pytest.approx((width * GROUP + 16 + width) * groups / n)
    moved, was = rounded.roll(-shift, 1), W.roll(-shift, 1)
    for begin in range(0, n, GROUP):
        part = was[:, begin : begin + GROUP]
        span = part.amax(1).clamp_min(0) - part.amin(1).clamp_max(0)
        error = (moved[:, begin : begin + GROUP] - part).abs().amax(1)
        assert (error <= 1.01 * span / (2**width - 1)).all()  # a half for the entry, a half for the zero point


def test_what_lies_on_the_grid_stays_and_zeros_are_no_trouble() -> None:
    W = torch.cat((torch.arange(-8.0, 8.0), torch.zeros(GROUP), torch.arange(16.0)))[None] / 4
    W = torch.cat((W, torch.zeros_like(W)))
    once, _ = round_groups(W, 4, shift=16)
    assert torch.isfinite(once).all()
    torch.testing.assert_close(round_groups(once, 4, shift=16)[0], once)
    assert not once[1].any()
