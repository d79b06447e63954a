"""transformers' loop over tokens, with a whole step of the model in one call where that is possible."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from .. import kernels
from ..errors import LosparseError, UsageError
from ..kernels.step import Unsuited
from .decoder import Decoder

FIRST_ROOM = 256
"""Tokens beyond the prompt that there is memory for at first."""
TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-3}
"""How far logits may be from the model's own, relatively: its own roundings to bfloat16 come to 1 to 2 percent."""
TRIES = 8
"""Steps of a mixture of experts, one of which is to agree: where two experts are as good, rounding decides which one a
token goes to, and another one says something else."""
NO_NUMBERS = "What the model says after {} tokens is no number. Check the checkpoint with losparse verify."
KNOWN = {"attention_mask", "past_key_values", "use_cache", "cache_position", "logits_to_keep", "position_ids"}

logger = logging.getLogger("losparse")
_proven: WeakSet[Any] = WeakSet()


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    on_plain: Callable[[str], object] = lambda reason: None,
    **model_kwargs: Any,
) -> Any:
    """For `model.generate(…, custom_generate=losparse_cli.decode)`: what the model would write, up to rounding, sooner.

    A step of a decoder that is known (`generation.decoder`) runs in one call on a CPU. The first step of each model is
    computed by the model, too (of mixtures of experts the first eight, until one agrees): where its logits are others,
    the model goes on alone, with a warning. What is asked of `generate` holds: processors, criteria, sampling,
    streamers. Whatever else is asked or given (beams, padding, another cache, outputs beside the tokens, other models
    and devices) goes to transformers' own loop, and `on_plain` hears why. transformers hands no streamer on: where
    there is one, give `functools.partial(losparse_cli.decode, streamer=streamer)`.

    LosparseError where logits are no numbers. UsageError for contrastive search, DoLa, and a streamer beside beams.
    """
    _refuse(generation_config, streamer)
    kernels.install()
    reason = _reason(input_ids, generation_config, model_kwargs)
    if reason is None:
        try:
            decoder = Decoder(model, len(input_ids), input_ids.shape[1] + FIRST_ROOM)
            decoder.check(model_kwargs["past_key_values"])
        except Unsuited as unsuited:  # later the cache would no longer be empty
            reason = str(unsuited)
        else:
            return _write(
                model, decoder, input_ids, logits_processor, stopping_criteria, generation_config, streamer,
                model_kwargs["past_key_values"], on_plain,
            )  # fmt: skip
    logger.info("transformers' own loop writes, because %s.", reason)
    on_plain(reason)
    own = model._beam_search if generation_config.num_beams > 1 else model._sample
    return own(
        input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=synced_gpus, streamer=streamer,
        **model_kwargs,
    )  # fmt: skip


def why_not(model: Any) -> str | None:
    """Why `decode` leaves this model to transformers' loop; None if it does not."""
    from transformers import DynamicCache

    kernels.install()
    try:
        Decoder(model, 1, 1).check(DynamicCache(config=model.config))
    except Unsuited as unsuited:
        return str(unsuited)
    return None


def _reason(input_ids: Tensor, settings: Any, given: dict[str, Any]) -> str | None:
    from transformers import DynamicCache

    mask, past = given.get("attention_mask"), given.get("past_key_values")
    if settings.num_beams > 1:
        return "several beams are followed"
    if settings.return_dict_in_generate:
        return "more than tokens is asked for"
    if not input_ids.numel():
        return "there is no prompt"
    if mask is not None and (mask.shape != input_ids.shape or not bool((mask == 1).all())):
        return "prompts are padded"
    places = given.get("position_ids")
    if places is not None and not bool((places == torch.arange(places.shape[-1])).all()):
        return "positions are given"
    if not isinstance(past, DynamicCache) or getattr(past, "_is_user_defined", False):
        return "another cache is used"
    if past.get_seq_length() or not given.get("use_cache", True):
        return "another cache is used"
    if set(given) - KNOWN:
        return f"{', '.join(sorted(set(given) - KNOWN))} is given"
    return None if input_ids.device.type == "cpu" else "nothing is on a CPU"


def _refuse(settings: Any, streamer: Any) -> None:
    """UsageError for what is asked of `generate` and could not be had with a loop of one's own."""
    from transformers.generation.configuration_utils import GenerationMode

    mode = settings.get_generation_mode()
    if mode in (GenerationMode.CONTRASTIVE_SEARCH, GenerationMode.DOLA_GENERATION):
        raise UsageError(
            f"{mode.value.replace('_', ' ').capitalize()} needs a loop of its own. Leave out custom_generate, or "
            f"{'dola_layers' if settings.dola_layers is not None else 'penalty_alpha'}."
        )
    if streamer is not None and settings.num_beams > 1:
        raise UsageError("A streamer can follow one beam alone. Leave out the streamer, or num_beams.")


def _write(
    model: Any, decoder: Decoder, ids: Tensor, processors: Any, criteria: Any, settings: Any, streamer: Any, past: Any,
    on_plain: Callable[[str], object],
) -> Tensor:  # fmt: skip
    """ids (rows, prompt) -> (rows, prompt and more)."""
    scores = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1).logits[:, -1].float()
    if bool(scores.isnan().any()):
        raise LosparseError(NO_NUMBERS.format(ids.shape[1]))
    decoder.begin(past)
    step: Callable[[Tensor], Tensor | None] | None = decoder if model in _proven else None
    tries = TRIES if decoder.routes else 1
    ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    unfinished = torch.ones(len(ids), dtype=torch.long)
    while True:
        scores = processors(ids, scores)
        tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0] if settings.do_sample else scores.argmax(-1)
        if ends:
            tokens = tokens * unfinished + settings._pad_token_tensor * (1 - unfinished)
        ids = torch.cat((ids, tokens[:, None]), dim=1)
        if streamer is not None:
            streamer.put(tokens)
        unfinished = unfinished & ~criteria(ids, None)
        if not unfinished.any():
            break
        if step is None:
            tries -= 1
            step, scores = _prove(model, decoder, tokens, past, on_plain if tries == 0 else None)
        else:
            found = step(tokens)
            if found is None:
                raise LosparseError(NO_NUMBERS.format(ids.shape[1]))
            scores = found.clone()
    if streamer is not None:
        streamer.end()
    return ids


def _prove(
    model: Any, decoder: Decoder, tokens: Tensor, past: Any, on_plain: Callable[[str], object] | None
) -> tuple[Any, Tensor]:
    """How to go on after a first step in both ways, and its logits by the model. on_plain: None where the next step may
    prove what this one did not, which is then what to do: None."""

    def alone(tokens: Tensor) -> Tensor:
        logits: Tensor = model(tokens[:, None], past_key_values=past, use_cache=True).logits
        return logits[:, -1].float()

    expected, found = alone(tokens), decoder(tokens)
    limit = TOLERANCE[decoder.program.dtype]
    if found is not None and (found - expected).norm() <= limit * expected.norm():
        _proven.add(model)
        return decoder, expected
    if on_plain is None:
        return None, expected
    logger.warning(
        "The fast way of writing does not compute what %s does, and is left out. Please report this.",
        type(model).__name__,
    )
    on_plain("the fast way does not compute what it does")
    return alone, expected
