"""How long large models would take with many ranks, from what each part of a run costs and how it is shared.

No machine that could measure it is at hand: products, bytes and groups are counted as losparse plans them, and turned
into seconds by the assumptions below.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losparse_cli.budget.plan import LayerPlan
from losparse_cli.compress import plan
from losparse_cli.compression.foreseen import SENSITIVITY_TOKENS
from losparse_cli.compression.needs import FORWARD_OVERHEAD
from losparse_cli.compression.plan import Job
from losparse_cli.compression.solve import effort
from losparse_cli.demo import smollm2
from losparse_cli.parallel.shares import deal, share
from losparse_cli.text.windows import Calibration

from .results import Options

FLOPS = 50e12  # of products in a second, a rank: a GPU, of whose bfloat16 half is reached
LINK = 10e9  # bytes a second between any two ranks: a network of 100 gigabits
DISK = 2e9  # bytes a second from one disk that all ranks share
TOKENS, LENGTH = 262_144, 2048
SIZES = (1, 8, 64)
MODELS: dict[str, dict[str, int]] = {
    "8 billion": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70 billion": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""Llama's shapes, with eight heads of keys and values and a vocabulary of 128,256."""
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Layers of a block that are fed the same, and are solved by one rank."""


@dataclass(frozen=True)
class Parts:
    """Seconds of a run. shared: what windows cost. solved: by the rank with most to solve. sent: second moments to
    those that solve, and what they store to all. read: weights, by every rank from one disk."""

    shared: float = 0.0
    solved: float = 0.0
    sent: float = 0.0
    read: float = 0.0

    @property
    def total(self) -> float:
        return self.shared + self.solved + self.sent + self.read


def parallel_forecast(options: Options, rows: Sequence[str] = ()) -> None:
    """Minutes of MODELS, or those named, coded at 3.25 bits by SIZES ranks."""
    print("| model | ranks | windows, min | solving | sending | reading | in all, min | times faster |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in rows or MODELS:
        job = _job(options, name)
        alone = _parts(job, 1).total
        for size in SIZES:
            found = _parts(job, size)
            told = " | ".join(
                f"{s / 60:.1f}" for s in (found.shared, found.solved, found.sent, found.read, found.total)
            )
            print(f"| {name} | {size} | {told} | {alone / found.total:.1f} |")


def _parts(job: Job, size: int) -> Parts:
    batches = TOKENS // LENGTH // 4
    most = len(share(batches, 0, size)) / batches  # of the busiest rank
    felt = min(TOKENS, SENSITIVITY_TOKENS)
    hops = math.ceil(math.log2(size))
    flops = solved = sent = read = 0.0
    units = job.scheduled().units
    for numbers in job.blocks.values():
        plans = [found for number in numbers if (found := units[number][1]) is not None]
        elements = sum(job.entries[number].elements for number in numbers)
        groups = [[one for one in plans if one.layer.name.endswith(ends)] for ends in GROUPS]
        assert sum(map(len, groups)) == len(plans)
        flops += FORWARD_OVERHEAD * 2 * (TOKENS * (2 * elements + _squares(groups)) + 4 * felt * elements)
        costs = [sum(effort(one, job.recipe) for one in group) for group in groups]
        owners = deal(costs, size)
        solved += max(sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in owners)
        sent += hops * (4 * _squares(groups) + sum(one.expected_bytes for one in plans)) / LINK
        read += 3 * sum(job.entries[number].nbytes for number in numbers) / DISK
    return Parts(flops * most / FLOPS, solved / FLOPS, sent, read)


def _squares(groups: Iterable[Sequence[LayerPlan]]) -> int:
    """Numbers in the second moments of all groups."""
    return sum(group[0].layer.shape[1] ** 2 for group in groups)


def _job(options: Options, name: str) -> Job:
    text = options.calibration()
    folder = _hollow(options.folder / f"hollow-{name.replace(' ', '-')}", MODELS[name])
    return plan(folder, bits=3.25, calibration=Calibration(text.source, TOKENS, LENGTH), device="cpu")


def _hollow(folder: Path, settings: dict[str, int]) -> Path:
    """A checkpoint of these shapes, whose weights take no room on disk: nobody reads them."""
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**settings, num_key_value_heads=8, vocab_size=128_256, tie_word_embeddings=False)  # type: ignore[arg-type]
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config).state_dict()
    header: dict[str, Any] = {}
    end = 0
    for tensor, values in names.items():
        begin, end = end, end + 2 * values.numel()
        header[tensor] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [begin, end]}
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        file.truncate(8 + len(told) + end)
    for path in smollm2().glob("tokenizer*"):
        shutil.copy(path, folder)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder
