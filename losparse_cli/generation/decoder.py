"""A decoder of transformers -> the same as a program that runs a token in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from ..kernels.step import ACTIVATIONS, Program, Unsuited

NORM_OFFSETS = {"llama": 0.0, "mistral": 0.0, "qwen2": 0.0, "qwen3": 0.0, "smollm3": 0.0, "gemma3_text": 1.0}
"""Model types that are known, and what their norms add to their weights."""


def _check_modules(model: Any) -> None:
    """Unsuited where something in the model is not transformers' own, or is watched, replaced or trained."""
    if model.training:
        raise Unsuited("it is in training mode")
    if torch.is_autocast_enabled("cpu"):
        raise Unsuited("autocast is on")
    if torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks:
        raise Unsuited("something watches every module")
    embeddings = model.get_input_embeddings()  # is called as it is
    for name, module in model.named_modules():
        if module is embeddings:
            continue
        hooks = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
        if hooks or "forward" in vars(module):
            raise Unsuited(f"something watches or replaces {name or 'it'}")
        own = name.rpartition(".")[2] in ("self_attn", "mlp") or name.rpartition(".")[0] == "model.layers"
        if (own or name == "model") and type(module).__module__ != type(model).__module__:
            raise Unsuited(f"{name} is of type {type(module).__name__}")


class Decoder:
    """A causal language model of a known type, from a prompt that was read on: one token for each sequence a call.

    What it computes is what the model does, but between two products in float32 throughout. Unsuited if the model is
    of another type, or something in it is not as that type has it.
    """

    def __init__(self, model: Any, rows: int, room: int) -> None:
        """For `rows` sequences of the same length without padding, and at first `room` tokens."""
        config, self.model, kind = model.config, model, type(model)
        if config.model_type not in NORM_OFFSETS or not kind.__module__.startswith("transformers.models."):
            raise Unsuited(f"models of type {config.model_type} are not known to it")
        if not kind.__name__.endswith("ForCausalLM"):
            raise Unsuited("it is no causal language model")
        _check_modules(model)
        for name in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
            if getattr(config, name, None):
                raise Unsuited(f"its configuration has {name}")
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        if activation not in ACTIVATIONS:
            raise Unsuited(f"its activation is {activation}")
        self._offset = NORM_OFFSETS[config.model_type]
        program = self.program = Program(model.get_input_embeddings().weight.dtype, rows, room)
        hidden, inside = config.hidden_size, config.intermediate_size
        head = model.get_output_embeddings()
        self.width, self.outputs = hidden, head.out_features
        self._stream, normed, made = (program.vector(hidden) for _ in range(3))
        base, stream = model.model, self._stream
        types = getattr(config, "layer_types", None) or [""] * len(base.layers)
        self._turns: dict[str, Tensor] = {}
        gate, up, down = program.vector(inside), program.vector(inside), program.vector(hidden)
        if not len(base.layers) == len(types) == config.num_hidden_layers:
            raise Unsuited("it has not as many blocks as its configuration says")
        for k, (block, layer_type) in enumerate(zip(base.layers, types, strict=True)):
            if block.self_attn.layer_idx != k:
                raise Unsuited("its blocks stand in another order, or one stands twice")
            if type(block.mlp.act_fn) is not type(ACT2FN[activation]):
                raise Unsuited(f"an activation is {type(block.mlp.act_fn).__name__}")
            self._norm(block.input_layernorm, stream, normed)
            self._attention(block.self_attn, layer_type, normed, made)
            after = getattr(block, "pre_feedforward_layernorm", None)
            if after is not None:
                self._norm(block.post_attention_layernorm, made, made)
            program.add(made, stream, hidden)
            self._norm(after or block.post_attention_layernorm, stream, normed)
            program.products((block.mlp.gate_proj, block.mlp.up_proj), normed, (gate, up))
            program.gate(gate, up, inside, activation)
            program.products((block.mlp.down_proj,), up, (down,))
            if after is not None:
                self._norm(block.post_feedforward_layernorm, down, down)
            program.add(down, stream, hidden)
        self._norm(base.norm, stream, normed)
        self._logits = program.vector(self.outputs)
        program.products((head,), normed, (self._logits,))
        self._turn(0)

    def begin(self, past: Any) -> None:
        """Go on after what the model has read: `past` is its cache, a DynamicCache of transformers."""
        self.program.begin([(layer.keys, layer.values) for layer in past.layers], past.get_seq_length())

    def _norm(self, module: Any, source: int, to: int, count: int = 1) -> None:
        if not type(module).__name__.endswith("RMSNorm"):
            raise Unsuited(f"it holds a norm of type {type(module).__name__}")
        epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
        self.program.norm(source, to, module.weight.detach().float() + self._offset, epsilon, count)

    def _attention(self, attention: Any, layer_type: str, normed: int, made: int) -> None:
        program, config, width = self.program, self.model.config, attention.head_dim
        heads, kept = config.num_attention_heads, config.num_key_value_heads
        if not hasattr(self, "_places"):
            sizes = (heads, kept, kept, heads)
            self._places: Sequence[int] = [program.vector(size * width) for size in sizes]
        query, key, value, found = self._places
        program.products((attention.q_proj, attention.k_proj, attention.v_proj), normed, (query, key, value))
        for name, place, count in (("q_norm", query, heads), ("k_norm", key, kept)):
            if hasattr(attention, name):
                self._norm(getattr(attention, name), place, place, count)
        if getattr(attention, "use_rope", True):
            turn = self._turns.setdefault(layer_type, torch.zeros(2, width, dtype=torch.float32))
            program.rotate(query, heads, turn)
            program.rotate(key, kept, turn)
        everywhere = config.sliding_window if config.model_type == "mistral" else None
        window = getattr(attention, "sliding_window", None) or everywhere or 0
        program.attend(
            query, key, value, found, heads=heads, kept=kept, width=width, scale=attention.scaling, window=window
        )
        program.products((attention.o_proj,), found, (made,))

    def __call__(self, tokens: Tensor) -> Tensor | None:
        """(rows,) tokens -> (rows, vocabulary) logits in float32, valid until the next call; None if one is NaN."""
        self._turn(self.program.position)
        self.program.at(self._stream, self.width)[:] = self.model.get_input_embeddings()(tokens)
        logits = self.program.at(self._logits, self.outputs) if self.program.run() else None
        return None if logits is None or bool(logits.isnan().any()) else logits

    def _turn(self, position: int) -> None:
        """Cosines and sines of this position, as the model itself has them."""
        model, places = self.model.model, torch.tensor([[position]])
        for layer_type, turn in self._turns.items():
            more = (layer_type,) if self.model.config.model_type == "gemma3_text" else ()
            cosine, sine = model.rotary_emb(model.norm.weight, places, *more)
            if cosine.shape[-1] != turn.shape[1]:
                raise Unsuited("it turns a part of each head alone")
            turn[0], turn[1] = cosine[0, 0], sine[0, 0]
