"""What a tiny model is called with: found from the names that its forward pass takes, and from what it complains of."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import TEXT, ways

Batch = dict[str, Any]
MOST = 100  # batches that are tried
SECONDS = 10.0


def find_batch(model: Any) -> tuple[Batch, str]:
    """The first batch that `model` takes, and "" or the reason why it takes none."""
    if type(model).forward is nn.Module.forward:
        return {}, "its class has no forward pass"
    reason, widest, tried = "no way to call it was found", 0, 0
    takes = inspect.signature(model.forward).parameters
    waiting = list(_beginnings(model, takes))
    known = set(waiting)
    end = time.monotonic() + SECONDS
    while waiting and tried < MOST and time.monotonic() < end:
        names = waiting.pop(0)
        wanted: set[str] = set()
        for batch in _batches(model, names):
            tried += 1
            try:
                with torch.no_grad():
                    torch.manual_seed(0)
                    model(**batch)
                return batch, ""
            except Exception as error:
                if len(names) > widest:
                    reason = f"{type(error).__name__}: {(str(error).strip() or ' ').splitlines()[0]}"
                    widest = len(names)
                wanted |= _asked(error, takes) - names
        if "pixel_values" in wanted | names:
            wanted |= {"image_embeds_position_mask"} & set(takes) - names
        # What it lacks is tried before any other beginning.
        further = [names | wanted, *(names | {n} for n in sorted(wanted, key=lambda n: (n not in PICTURES, n)))]
        further += [frozenset({name}) for name in sorted(wanted)]
        waiting[:0] = [f for f in dict.fromkeys(further) if f not in known]
        known.update(further)
    return {}, reason


def _beginnings(model: Any, takes: Any) -> Iterator[frozenset[str]]:
    """Sets of arguments worth trying, the fullest kind of text first."""
    needs = {n for n, p in takes.items() if p.default is inspect.Parameter.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    given = getattr(model, "main_input_name", "input_ids")
    main = {given} if isinstance(given, str) else set(given)
    text = {name for name in TEXT if name in takes}
    if not getattr(model.config, "is_encoder_decoder", False):
        text.discard("decoder_input_ids")
    kinds = [name for name in PICTURES if name in takes]
    first = {name for name in takes if name in main | needs}
    for names in (needs, first, main, set(kinds[:1]), set(kinds), {*kinds, *first}):
        for base in (text, text & {"decoder_input_ids"}, set()):
            if names | base:
                yield frozenset(names | base)


PICTURES = ("pixel_values", "pixel_values_videos", "input_features", "input_values", "audio_values", "image",
            "image_embeds_position_mask")  # fmt: skip


def _batches(model: Any, names: frozenset[str]) -> Iterator[Batch]:
    """Batches of the arguments `names`, each argument in one way after another."""
    found = {name: ways(model, name, names) for name in sorted(names)}
    if all(found.values()):
        for way in range(max(map(len, found.values()))):
            yield {name: values[way % len(values)]() for name, values in found.items()}


def _asked(error: BaseException, takes: Any) -> set[str]:
    """Arguments that the error names, or that are None where it was raised."""
    found = {name for name in re.findall(r"\w+", str(error)) if name in takes}
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "/transformers/models/" in code.co_filename:
            line = _line(code.co_filename, trace.tb_lineno)
            held = trace.tb_frame.f_locals
            found |= {n for n in re.findall(r"\w+", line) if n in takes and n in held and held[n] is None}
        trace = trace.tb_next
    if "num_hidden_layers" in str(error):
        found |= {"use_cache"} & set(takes)
    return found - {"labels", "return_dict", "kwargs", "encoder_outputs"}


def _line(file: str, number: int) -> str:
    import linecache

    return linecache.getline(file, number)


def tensors(batch: Batch) -> dict[str, Tensor]:
    """What of a batch is a tensor."""
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}
