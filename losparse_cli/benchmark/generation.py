"""A model's own speed: the pass over the prompt, and each token after it."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..generation.clock import Clock
from ..generation.loop import decode, why_not
from ..models.reading import vocabulary


@dataclass
class Runner:
    """One model under measurement, and its times in seconds."""

    model: Any
    batch: int
    prompt: int
    new_tokens: int
    compressed: bool = True
    """Whether this is the model of losparse, which writes by `generation.loop.decode` where that can; the dense one is
    run as transformers does it."""
    prefills: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.vocabulary = vocabulary(self.model) or 1  # a model that names none knows token 0
        self.tokens = self._random_tokens().to(self.device)
        self.plain = why_not(self.model) if self.compressed else "it is dense"
        if self.generates:
            self.model.generation_config = self._plainly()

    @property
    def generates(self) -> bool:
        return self.new_tokens > 0 and bool(self.model.can_generate())

    def once(self, *, kept: bool = True) -> None:
        """One pass over the prompt, and the tokens after it one by one; kept: whether its times count."""
        with torch.inference_mode():
            clock = Clock(self.device)
            if self.generates:
                fast = {"custom_generate": decode} if self.plain is None else {}
                mask = torch.ones_like(self.tokens)
                self.model.generate(self.tokens, attention_mask=mask, logits_processor=[clock], **fast)
            else:
                decodes = "decoder_input_ids" in inspect.signature(self.model.forward).parameters
                self.model(self.tokens, **({"decoder_input_ids": self.tokens} if decodes else {}))
                clock(None, None)
        if kept:
            self.prefills.append(clock.first)
            self.steps += clock.steps

    @property
    def prefill(self) -> float:
        """Tokens of the prompts a second."""
        return self.batch * self.prompt / statistics.median(self.prefills)

    @property
    def decode(self) -> float | None:
        """New tokens a second."""
        return self.batch / statistics.median(self.steps) if self.steps else None

    def _random_tokens(self) -> Tensor:
        """(batch, prompt): the same for every model of that vocabulary, and none with a meaning of its own."""
        config = self.model.config
        special = {
            value
            for part in (config, config.get_text_config())
            for name, value in part.to_dict().items()
            if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
        }
        # Where the special ones begin or end is nobody's rule, but most have them first.
        plain = [k for k in range(min(10, self.vocabulary - 1), self.vocabulary) if k not in special] or [0]
        choice = torch.randint(len(plain), (self.batch, self.prompt), generator=torch.Generator().manual_seed(0))
        tokens = torch.tensor(plain)[choice]
        end = getattr(config, "eos_token_id", None)
        if config.is_encoder_decoder and isinstance(end, int):
            tokens[:, -1] = end  # some heads sit on the last token of a text, and look for it
        return tokens

    def _plainly(self) -> GenerationConfig:
        """One likeliest token after the other and no end before all are there, whatever the checkpoint prefers."""
        own = self.model.generation_config
        starts = (own.decoder_start_token_id, own.bos_token_id, getattr(self.model.config, "decoder_start_token_id", 0))
        return GenerationConfig(
            # The prompt's pass yields the first, so that one more gives as many steps as tokens were asked for.
            max_new_tokens=self.new_tokens + 1, do_sample=False, num_beams=1, pad_token_id=0,
            decoder_start_token_id=next((s for s in starts if s is not None), 0),
        )  # fmt: skip


class Runs(Protocol):
    """What is measured in turn."""

    def once(self, *, kept: bool = True) -> None: ...


def run_in_turn(runners: Sequence[Runs], rounds: int, on_run: Callable[[int], object] = lambda k: None) -> None:
    """Each model in turn, `rounds` times, after one that does not count. on_run hears which one has run."""
    for k in range(rounds + 1):
        for i, runner in enumerate(runners):
            runner.once(kept=k > 0)
            on_run(i)
