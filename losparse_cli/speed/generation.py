"""A model's own speed: the pass over the prompt, and each token after it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


class _Clock(LogitsProcessor):  # type: ignore[misc]
    """Notes when each step's logits are there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        return scores


@dataclass
class Runner:
    """One model under measurement, and its times in seconds."""

    model: Any
    batch: int
    prompt: int
    new_tokens: int
    prefills: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(min(10, vocabulary - 1), vocabulary, (self.batch, self.prompt), generator=generator)
        self.tokens = tokens.to(self.device)

    @property
    def generates(self) -> bool:
        return self.new_tokens > 0 and bool(getattr(self.model, "can_generate", lambda: False)())

    def once(self, *, kept: bool = True) -> None:
        """One pass over the prompt, and the tokens after it one by one; kept: whether its times count."""
        clock = _Clock(self.device)
        with torch.inference_mode():
            started = time.perf_counter()
            if self.generates:
                fixed = GenerationConfig(
                    max_new_tokens=self.new_tokens + 1, min_new_tokens=self.new_tokens + 1, do_sample=False,
                    pad_token_id=0, decoder_start_token_id=getattr(self.model.config, "decoder_start_token_id", None),
                    bos_token_id=getattr(self.model.config, "bos_token_id", None),
                )  # fmt: skip
                self.model.generate(
                    self.tokens, attention_mask=torch.ones_like(self.tokens), generation_config=fixed,
                    logits_processor=LogitsProcessorList([clock]),
                )  # fmt: skip
            else:
                extra = {"decoder_input_ids": self.tokens} if self.model.config.is_encoder_decoder else {}
                self.model(self.tokens, **extra)
                clock(None, None)
        if kept:
            self.prefills.append(clock.times[0] - started)
            self.steps += [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]

    @property
    def prefill(self) -> float:
        """Tokens of the prompt a second."""
        return self.batch * self.prompt / statistics.median(self.prefills)

    @property
    def decode(self) -> float | None:
        """New tokens a second."""
        return self.batch / statistics.median(self.steps) if self.steps else None


def run_in_turn(runners: Sequence[Runner], rounds: int, on_run: Callable[[], object] = lambda: None) -> None:
    """Each model in turn, `rounds` times, after one that does not count."""
    for k in range(rounds + 1):
        for runner in runners:
            runner.once(kept=k > 0)
            on_run()
