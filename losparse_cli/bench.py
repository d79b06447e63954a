"""A checkpoint -> how fast and how small it is in use, beside the dense model in the same run."""

from __future__ import annotations

import gc
import os
import platform
import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from .benchmark.generation import Runner, run_in_turn
from .benchmark.layers import by_shape, compressed_layers, layer_speeds
from .benchmark.peer import Peer
from .benchmark.report import BenchReport, LayerSpeed, ModelSpeed
from .benchmark.resident import resident, tensor_bytes, token_bytes
from .benchmark.timing import copy_bandwidth
from .checkpoint.source import Checkpoint, open_checkpoint
from .errors import UsageError, is_whole
from .load import dtype_named, load
from .models.device import find_device, memory_errors, threads_of_torch
from .models.reading import TEXT_MODELS, cannot_be_run, require_text
from .parallel.group import require_alone
from .progress import Progress, listener
from .text.tokenizer import length_limit, positions

ROWS = (1, 16, 256)
PROCESSORS = Path("/proc/cpuinfo")


def bench(
    source: str | Path,
    *,
    against: str | Path | None = None,
    peer: str | Path | None = None,
    batch: int = 1,
    prompt: int = 128,
    new_tokens: int = 32,
    rows: Sequence[int] | int = ROWS,
    rounds: int = 5,
    threads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> BenchReport:
    """Figures of a compressed checkpoint, a folder or a Hub id; with `against`, of the dense model beside it; with
    `peer`, of a GGUF file in llama.cpp, on a CPU and with a batch of one.

    Every shape of compressed layer is timed at each number of `rows` of x beside nn.Linear. The model reads `batch`
    prompts of `prompt` random tokens and writes `new_tokens` more, `rounds` times, the two models in turn; a model
    that writes nothing only reads. The compressed one writes by `generation.loop.decode` where that can. `threads` are
    those of torch and llama.cpp. `revision` is that of `source`.

    UsageError for several processes, values out of range, a model that reads no text, and models that hold nothing to
    compare; ResourceError if memory runs out; MissingExtraError for `peer` without xllamacpp; otherwise the errors of
    `load`.
    """
    require_alone("A benchmark")
    told = listener(progress)
    rows = (rows,) if isinstance(rows, int) else tuple(rows)
    if not all(is_whole(number) for number in rows):
        raise UsageError(f"--rows lists whole numbers, not {', '.join(map(repr, rows))}.")
    least = {"batch": (batch, 1), "prompt": (prompt, 1), "new-tokens": (new_tokens, 0), "rounds": (rounds, 1)}
    least |= {"rows": (min(rows, default=0), 1), "threads": (1 if threads is None else threads, 1)}
    for name, (value, low) in least.items():
        if value < low:
            raise UsageError(f"--{name} must be at least {low}, not {value}.")
    kind = dtype_named(dtype)
    if peer is not None and batch > 1:
        raise UsageError(f"--peer runs one prompt at a time: leave --batch {batch} out.")
    where, cache = find_device(device), None if cache_dir is None else Path(cache_dir)
    checkpoints = [open_checkpoint(source, revision=revision, cache_dir=cache)]
    if not checkpoints[0].is_compressed:
        raise UsageError(
            f"{source} is not compressed. Name a result of losparse compress, and the dense model with --against."
        )
    if against is not None:
        checkpoints.append(open_checkpoint(against, cache_dir=cache))
        if checkpoints[1].is_compressed:
            raise UsageError(f"{against} is compressed itself. Name the dense model with --against.")
        checkpoints[0].check_vocabulary(checkpoints[1])

    if peer is not None and where.type != "cpu":
        raise UsageError("--peer runs llama.cpp on the CPU: add --device cpu.")
    other = (
        None if peer is None else Peer(Path(peer).expanduser(), prompt, new_tokens, threads or torch.get_num_threads())
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # before this run adds to it
    with (
        threads_of_torch(threads),
        memory_errors("Take fewer --rows, a smaller --batch or --prompt, or leave --against out."),
    ):
        runners = [_runner(checkpoint, (batch, prompt, new_tokens), kind, where, trust_remote_code)
                   for checkpoint in checkpoints]  # fmt: skip
        ours = runners[0]
        layers = list(compressed_layers(ours.model).values())
        if not layers:
            raise UsageError(f"{source} holds no compressed layer, so there is nothing to measure.")
        report = BenchReport(
            checkpoints[0].address, str(where), str(layers[0].weight.dtype).removeprefix("torch."),
            torch.get_num_threads(), _processor(where), copy_bandwidth(where), batch, prompt,
            new_tokens if ours.generates else 0, against=checkpoints[1].address if against is not None else None,
            load=load, peer_file=None if other is None else str(peer),
        )  # fmt: skip
        total = len(by_shape(layers)) * len(rows) + (rounds + 2) * len(runners) + (rounds + 1) * (other is not None)
        told.start("measurements", total)

        def hear(what: str) -> None:
            told.advance("measurements", name=what)

        found: list[LayerSpeed] = []
        for speed in layer_speeds(layers, rows, rounds):
            found.append(speed)
            hear(f"{speed.shape[0]} x {speed.shape[1]}, {speed.rows} row{'s' * (speed.rows > 1)} of x")
        names = [checkpoint.name for checkpoint in checkpoints]
        beside: ModelSpeed | None = None
        with cannot_be_run(checkpoints[0].address, TEXT_MODELS):
            if other is None:
                run_in_turn(runners, rounds, lambda k: hear(names[k]))
            else:
                names.append(other.path.name)
                with closing(other):
                    other.start()
                    run_in_turn([*runners, other], rounds, lambda k: hear(names[k]))
                    beside = ModelSpeed(other.prefill, other.decode, other.nbytes, None, other.resident)
        known = [
            (tensor_bytes(runner.model), token_bytes(runner.model), runner.plain if runner.generates else None)
            for runner in runners
        ]
        # What they measured is kept; without the models there is room for one in another process.
        del layers
        for runner in runners:
            runner.model = None
        gc.collect()
        speeds = []
        for runner, checkpoint, (nbytes, read, plain) in zip(runners, checkpoints, known, strict=True):
            # How a fresh process grows is only asked on a CPU: on a GPU it says nothing about the model.
            grown = resident(checkpoint.folder, dtype, trust_remote_code) if where.type == "cpu" else None
            speeds.append(ModelSpeed(runner.prefill, runner.decode, checkpoint.nbytes, nbytes, grown, read, plain))
            hear(f"memory of {checkpoint.name}")
    return report.with_(
        layers=tuple(found), compressed=speeds[0], dense=speeds[1] if against is not None else None, peer=beside
    )


def _runner(
    checkpoint: Checkpoint, sizes: tuple[int, int, int], dtype: Any, device: torch.device, trust_remote_code: bool
) -> Runner:
    """The loaded model, ready to run; UsageError if it reads no text, or not that much."""
    options = {"trust_remote_code": True} if trust_remote_code else {}
    model, tokenizer = load(checkpoint.folder, dtype=dtype, **options)
    name = checkpoint.address
    require_text(model, name, TEXT_MODELS)
    runner = Runner(model.to(device), *sizes, checkpoint.is_compressed)
    _, prompt, new_tokens = sizes
    # Before it runs: on a GPU an index out of range ends the process.
    new_tokens = new_tokens if runner.generates else 0
    named = None if runner.generates or tokenizer is None else tokenizer.model_max_length
    limit = length_limit(model, named) or prompt + new_tokens
    if model.config.is_encoder_decoder:  # each side has positions of its own
        written = positions(model, decoder=True) or new_tokens + 1
        if prompt > limit or new_tokens + 1 > written:
            raise UsageError(f"{name} takes at most {limit} tokens. Give --prompt {limit} or less, and --new-tokens "
                             f"below {written}.")  # fmt: skip
    elif prompt + new_tokens > limit:
        fewer = f"a smaller --prompt or fewer --new-tokens: together {limit}" if new_tokens else f"--prompt {limit}"
        raise UsageError(f"{name} takes at most {limit} tokens. Give {fewer} or less.")
    return runner


def _processor(device: torch.device) -> str:
    """What computes, as its maker calls it; of a CPU also the instructions that torch uses."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    known: Any = PROCESSORS.is_file() and re.search(r"^model name\s*: *(\S.*)", PROCESSORS.read_text(), re.MULTILINE)
    return f"{known[1] if known else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
