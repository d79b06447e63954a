"""A checkpoint and a prompt -> what the model writes after it, piece by piece."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from .errors import UsageError, reason_of
from .generation.clock import Clock
from .generation.loop import decode, why_not
from .load import dtype_named, load
from .models.device import find_device, memory_errors, threads_of_torch
from .models.reading import cannot_be_run, require_text
from .text.tokenizer import length_limit

LEAST_TEMPERATURE = 1e-3
ONE = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Generated:
    """What a model wrote.

    text: without special tokens. tokens: how many were written, prompt_tokens: how many were read. prefill, decode:
    tokens read and written a second, None where there was nothing to time. plain: why transformers' own loop ran the
    model, None where each token was one call.
    """

    text: str
    tokens: int
    prompt_tokens: int
    prefill: float
    decode: float | None
    plain: str | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def generate(
    source: Any,
    prompt: str,
    *,
    tokenizer: Any = None,
    system: str | None = None,
    raw: bool = False,
    new_tokens: int = 512,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    threads: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    on_text: Callable[[str], object] | None = None,
) -> Generated:
    """Let a model, compressed or dense, write after `prompt` until it ends its text, at most `new_tokens`.

    source: a folder, a Hub id, or a loaded model, whose `tokenizer` is given beside it. The prompt is a message of a
    chat, after `system`, where the tokenizer has a template for one; with `raw`, or without a template, a text to go on
    from. How a token is chosen is what the checkpoint's generation_config says, unless `temperature` (0: the
    likeliest), `top_p` or `top_k` is given; the same `seed` gives the same text on the same machine. `on_text` hears
    it, word by word. On a CPU known decoders write by `generation.loop.decode`.

    UsageError for values out of range, an empty prompt, a prompt that is too long, and a model that writes no text;
    ResourceError if memory runs out; otherwise the errors of `load`.
    """
    _check(prompt, system, new_tokens, temperature, top_p, top_k, threads)
    where, kind = find_device(device), dtype_named(dtype)
    model, name = source, type(source).__name__
    if isinstance(source, torch.nn.Module):
        if tokenizer is None:
            raise UsageError("Give the tokenizer beside a loaded model: generate(model, prompt, tokenizer=tokenizer).")
    else:
        places = {"revision": revision, "cache_dir": cache_dir, "trust_remote_code": trust_remote_code or None}
        given = {key: value for key, value in places.items() if value is not None}
        model, tokenizer = load(source, need_tokenizer=True, dtype=kind, **given)
        model, name = model.to(where), str(source)
    require_text(model, name, "Give a language model.")
    if not model.can_generate():
        raise UsageError(f"{name} is {type(model).__name__}, which writes no text. Give a language model.")
    found = _tokens(tokenizer, prompt, system, raw, name)
    inputs = {key: found[key].to(model.device) for key in ("input_ids", "attention_mask") if key in found}
    read = inputs["input_ids"].shape[1]
    room, written = length_limit(model, None), 0 if model.config.is_encoder_decoder else 1
    if room is not None and read + written > room:
        raise UsageError(f"The prompt has {read} tokens, and {name} takes {room - written}. Shorten it.")
    if room is not None and written:
        new_tokens = min(new_tokens, room - read)
    streamer = _Streamer(tokenizer, on_text)
    choice: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    choice = {key: value for key, value in choice.items() if value is not None}
    choice = GREEDY if temperature == 0 else choice | ({"do_sample": True} if choice else {})
    options: dict[str, Any] = {}
    plain = why_not(model)
    if plain is None and model.generation_config.stop_strings:
        plain = "its texts end at certain strings"
    reasons = [plain] if plain is not None else []
    if plain is None:
        options["custom_generate"] = partial(decode, streamer=streamer, on_plain=reasons.append)
    else:
        options["tokenizer"] = tokenizer
    options["streamer"] = streamer
    settings = copy.deepcopy(model.generation_config)
    settings.update(max_new_tokens=new_tokens, **choice, **ONE)
    with threads_of_torch(threads), _seeded(seed, model.device), memory_errors("Lower --new-tokens."):
        clock = Clock(model.device)
        # What settings leave as it is by default transformers would take from the model's own.
        own, model.generation_config = model.generation_config, settings
        try:
            with cannot_be_run(name, "Give a language model."), torch.inference_mode():
                ids = model.generate(**inputs, logits_processor=[clock], **options)
        except UsageError:
            if streamer.failure is not None:  # of whoever hears the text, not the model's
                raise streamer.failure from None
            raise
        finally:
            model.generation_config = own
    written = ids.shape[1] - (read if written else 1)  # what a decoder of its own begins with is nobody's text
    return Generated(
        streamer.text, written, read, read / clock.first, clock.pace, reasons[0] if reasons else None
    )  # fmt: skip


def _check(
    prompt: str, system: str | None, new_tokens: int, temperature: float | None, top_p: float | None,
    top_k: int | None, threads: int | None,
) -> None:  # fmt: skip
    if not prompt.strip():
        raise UsageError("The prompt is empty. Give a text to go on from.")
    try:
        (prompt + (system or "")).encode()
    except UnicodeEncodeError as error:
        raise UsageError("The prompt holds bytes that are no UTF-8. Give it as text.") from error
    for name, value in (("new-tokens", new_tokens), ("top-k", top_k), ("threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, not {value}.")
    if temperature and not LEAST_TEMPERATURE <= temperature < float("inf"):
        raise UsageError(f"--temperature is 0, or a number from {LEAST_TEMPERATURE} on, not {temperature}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"--top-p lies above 0 and is at most 1, not {top_p}.")


def _tokens(tokenizer: Any, prompt: str, system: str | None, raw: bool, name: str) -> Any:
    """The prompt as a batch of one."""
    if raw or not getattr(tokenizer, "chat_template", None):
        if system is not None:
            raise UsageError(f"--system is for chats, and {'--raw asks for none' if raw else f'{name} has none'}.")
        found = tokenizer(prompt, return_tensors="pt")
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        try:
            found = tokenizer.apply_chat_template(
                [*messages, {"role": "user", "content": prompt}],
                add_generation_prompt=True, return_tensors="pt", return_dict=True,
            )  # fmt: skip
        except Exception as error:  # whatever a checkpoint's own template raises
            reason = reason_of(error)
            raise UsageError(f"The chat template of {name} fails: {reason}. Give --raw.") from error
    if not found["input_ids"].numel():
        raise UsageError("The prompt has no tokens. Give a text to go on from.")
    return found


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Hands on whole words as they are written, and keeps the text."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], object] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text, self.text = on_text, ""
        self.failure: BaseException | None = None

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if self.on_text is not None and text:
            try:
                self.on_text(text)
            except BaseException as failure:
                self.failure = failure
                raise


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed`, and torch's own generators as they were; without a seed nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            torch.manual_seed(seed)
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"--seed {seed} is no seed of torch: give a whole number below 2^63.") from error
        yield
