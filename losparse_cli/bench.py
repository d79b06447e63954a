"""A checkpoint -> how fast and how small it is in use, beside the dense model in the same run."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .checkpoint.source import open_checkpoint
from .errors import UsageError
from .load import load
from .models.device import find_device, memory_errors
from .speed.generation import Runner, run_in_turn
from .speed.layers import by_shape, compressed_layers, layer_speeds
from .speed.report import BenchReport, ModelSpeed
from .speed.resident import resident
from .speed.timing import copy_bandwidth

ROWS = (1, 16, 256)
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bench(
    source: str | Path,
    *,
    against: str | Path | None = None,
    batch: int = 1,
    prompt: int = 128,
    new_tokens: int = 32,
    rows: Sequence[int] = ROWS,
    rounds: int = 5,
    threads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    on_step: Callable[[str, int, int], object] = lambda what, done, total: None,
) -> BenchReport:
    """Figures of a compressed checkpoint, a folder or a Hub id; with `against`, of the dense model beside it.

    Every compressed layer shape is timed at each number of `rows` of x beside nn.Linear. The model reads `batch`
    prompts of `prompt` random tokens and writes `new_tokens` more, `rounds` times, the two models in turn. threads:
    of torch. on_step hears what is measured, and how far it is. UsageError for values out of range or models that
    hold nothing to compare; otherwise the errors of `load`.
    """
    for name, value in {"batch": batch, "prompt": prompt, "rounds": rounds, "rows": min(rows, default=0)}.items():
        if value < 1:
            raise UsageError(f"--{name} must be at least 1, not {value}.")
    if new_tokens < 0:
        raise UsageError(f"--new-tokens must be at least 0, not {new_tokens}.")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype is one of {', '.join(DTYPES)}, not {dtype!r}.")
    where = find_device(device)
    shared: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    options = {k: v for k, v in shared.items() if v}
    with _threads(threads), memory_errors("Take fewer --rows, a smaller --batch or --prompt, or leave --against out."):
        ours = _model(source, dtype, where, options)
        layers = list(compressed_layers(ours).values())
        if not layers:
            raise UsageError(f"{source} holds no compressed layer. Name a result of losparse compress, and the dense "
                             "model with --against.")  # fmt: skip
        report = BenchReport(
            str(source), str(where), str(layers[0].weight.dtype).removeprefix("torch."), torch.get_num_threads(),
            _processor(where), copy_bandwidth(where), batch, prompt, new_tokens,
        )  # fmt: skip
        found, cases = [], len(by_shape(layers)) * len(rows)
        for speed in layer_speeds(layers, rows, rounds):
            found.append(speed)
            on_step("layers", len(found), cases)
        runners = [Runner(ours, batch, prompt, new_tokens)]
        if against is not None:
            dense = _model(against, dtype, where, {k: v for k, v in options.items() if k != "revision"})
            if dense.config.vocab_size != ours.config.vocab_size:
                raise UsageError(f"{against} has another vocabulary than {source}: it is not its dense model.")
            runners.append(Runner(dense, batch, prompt, new_tokens))
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            on_step("models", done, (rounds + 1) * len(runners))

        run_in_turn(runners, rounds, advance)
        speeds = [
            _speed(runner, path, dtype, where)
            for runner, path in zip(runners, (source, against) if against else (source,), strict=True)
        ]
    return report.with_(layers=tuple(found), compressed=speeds[0], dense=speeds[1] if against else None)


def _model(source: str | Path | None, dtype: str, device: torch.device, options: dict[str, Any]) -> Any:
    model, _ = load(str(source), dtype=DTYPES[dtype], **options)
    return model.to(device)


def _speed(runner: Runner, source: str | Path, dtype: str, device: torch.device) -> ModelSpeed:
    """Figures of a model that has run; how a fresh process grows is only known of folders, and of the CPU."""
    tensors = {t.untyped_storage().data_ptr(): t for t in (*runner.model.parameters(), *runner.model.buffers())}
    nbytes = sum(t.untyped_storage().nbytes() for t in tensors.values())
    local = Path(source).is_dir()
    disk = open_checkpoint(str(source)).nbytes if local else 0
    grown = resident(str(source), dtype) if local and device.type == "cpu" else None
    return ModelSpeed(runner.prefill, runner.decode, disk, nbytes, grown)


@contextmanager
def _threads(count: int | None) -> Any:
    if count is not None and count < 1:
        raise UsageError(f"--threads must be at least 1, not {count}.")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
