"""What an evaluation says: figures, and the protocol that makes them comparable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..tasks.paired import Estimate
from .scores import Sums, exponential, mean


@dataclass(frozen=True)
class Protocol:
    """How an Evaluation came about.

    length: tokens in a window, its first special tokens (ids in `before`) among them; of an encoder, the most of a
    line. stride: new tokens a window, 0 of an encoder. units: windows, or lines. tokens: predicted tokens, or tokens
    of all lines. memory: "alone", "together" or "apart". Standard errors count every unit as independent.
    """

    length: int
    stride: int
    units: int
    tokens: int
    before: tuple[int, ...]
    device: str
    dtype: str
    memory: str

    def __str__(self) -> str:
        """The protocol in a sentence or two, for beneath a table."""
        where = f"{self.dtype} on {self.device}; standard errors count"
        if not self.stride:
            return (
                f"{self.units} lines of at most {self.length} tokens, {self.tokens:,} tokens in all, mean-pooled last "
                f"hidden states, {where} lines as independent."
            )
        start = f"{len(self.before)} special" if self.before else "no special"
        return (
            f"{self.units} windows of {self.length} tokens, {start} at the start of each, stride {self.stride}, "
            f"{self.tokens:,} tokens predicted, {where} windows as independent."
        )


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model, and beside a dense one; None for what its kind or a missing dense model rules out.

    kind: "causal", "seq2seq" or "encoder". nbytes: of all tensors on disk. log_perplexity: mean negative
    log-likelihood in nats a token, and log_difference that of ours less that of dense, with the paired standard error.
    kl: KL(dense || ours), nats a token. agreement: share of tokens whose likeliest one is the same. cosine: of the
    two models' mean-pooled last hidden states, mean over lines.
    """

    model: str
    kind: str
    nbytes: int
    protocol: Protocol
    perplexity: Estimate | None = None
    log_perplexity: Estimate | None = None
    dense: str | None = None
    dense_nbytes: int | None = None
    dense_perplexity: Estimate | None = None
    dense_log_perplexity: Estimate | None = None
    log_difference: Estimate | None = None
    kl: Estimate | None = None
    agreement: Estimate | None = None
    cosine: Estimate | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: a figure that is not finite is None."""
        return {key: plain(value) for key, value in asdict(self).items()}


def with_figures(base: Evaluation, sums: Sequence[Sums]) -> Evaluation:
    """`base` with what the sums of all units say; beside a dense model if `base` names one."""
    counts = [s.tokens for s in sums]
    if base.kind == "encoder":
        return replace(base, cosine=mean([s.cosine for s in sums], [1] * len(sums)))
    log = mean([s.loss for s in sums], counts)
    alone = replace(base, log_perplexity=log, perplexity=exponential(log))
    if base.dense is None:
        return alone
    dense = mean([s.dense_loss for s in sums], counts)
    return replace(
        alone,
        dense_log_perplexity=dense,
        dense_perplexity=exponential(dense),
        log_difference=mean([s.loss - s.dense_loss for s in sums], counts),
        kl=mean([s.kl for s in sums], counts),
        agreement=mean([s.agree for s in sums], counts),
    )


def plain(value: Any) -> Any:
    """The value with None for every float in it that is not finite, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
