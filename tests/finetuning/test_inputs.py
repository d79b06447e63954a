"""What layers are fed on training data, against one item at a time without any padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import losparse_cli
from losparse_cli.finetuning import inputs
from losparse_cli.finetuning.inputs import input_moments
from losparse_cli.models.skeleton import classify
from losparse_cli.tasks.kinds import open_task
from losparse_cli.tasks.rows import read_rows
from tests.finetuning.learners import request_for, write_learner


class Ready:
    """A model, its layers, and items of its task."""

    def __init__(self, place: Path, kind: str) -> None:
        self.task = open_task(request_for(place, kind, train=24, validation=0))
        self.model, self.tokenizer = losparse_cli.load(
            write_learner(place / "model", kind), model_class=self.task.auto_class
        )
        self.layers = list(classify(self.model)[0])
        rows = read_rows(self.task.request, "train")
        self.items = self.task.prepare(rows, self.tokenizer, self.model, training=True).items
        self.collate: Any = self.task.collator(self.tokenizer, self.model)

    def moments(self, items: list[dict[str, Any]], seed: int = 0) -> dict[str, Tensor]:
        return input_moments(self.model, self.layers, items, self.collate, seed=seed)


@pytest.mark.parametrize("kind", ["bert", "bert-qa", "llama", "gpt2", "t5", "bart", "bart-classifier"])
def test_moments_are_those_of_every_item_alone(kind: str, tmp_path: Path) -> None:
    ready = Ready(tmp_path, kind)
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + rows.T @ rows
            tokens[name] = tokens.get(name, 0) + len(rows)

        return hook

    hooks = [ready.model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in ready.layers]
    ready.model.eval()
    for item in ready.items:
        with torch.no_grad():
            ready.model(**ready.collate([item]))
    for hook in hooks:
        hook.remove()
    ready.model.train()
    found = ready.moments(ready.items)
    assert ready.model.training
    assert found.keys() == set(ready.layers)
    for name, H in found.items():
        torch.testing.assert_close(H.double(), sums[name] / tokens[name], rtol=1e-4, atol=1e-6)


def test_a_part_of_many_items_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which part, the seed says; a layer that nothing reaches is left out."""
    ready = Ready(tmp_path, "bert")
    monkeypatch.setattr(inputs, "TOKENS", 30)
    first, again, other = (ready.moments(ready.items, seed) for seed in (0, 0, 1))
    name = ready.layers[0]
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    monkeypatch.setattr(ready, "layers", [*ready.layers, "spare"])
    ready.model.add_module("spare", torch.nn.Linear(48, 48))
    assert "spare" not in ready.moments(ready.items)
