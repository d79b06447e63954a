"""A block's layers in rounds: in their order, those of a module together, within the room there is."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest

from losparse_cli.compression.rounds import moment_bytes, rounds


def plans(widths: dict[str, int]) -> dict[str, Any]:
    return {name: Mock(layer=Mock(shape=(8, width))) for name, width in widths.items()}


BLOCK = {"attn.q": 16, "attn.k": 16, "mlp.0.up": 16, "mlp.0.down": 32, "mlp.1.up": 16, "mlp.1.down": 32, "mlp.gate": 16}


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("room", [0, 4 * 16**2, 10_000, 20_000, 1 << 30])
def test_every_layer_once_within_the_room(room: int, copies: int) -> None:
    made = plans(BLOCK)
    found = rounds(made, room, copies)
    assert [layer for layers in found for layer in layers] == list(BLOCK)
    for layers in found:
        modules = {layer.rpartition(".")[0] for layer in layers}
        assert len(modules) == 1 or copies * sum(moment_bytes(made[layer]) for layer in layers) <= room
    owners = [{layer.rpartition(".")[0] for layer in layers} for layers in found]
    assert sum(map(len, owners)) == len({layer.rpartition(".")[0] for layer in BLOCK})
    assert len(found) == {0: 4, 4 * 16**2: 4, 1 << 30: 1}.get(room, len(found))


def test_nothing_is_no_round() -> None:
    assert rounds({}, 0, 1) == []
