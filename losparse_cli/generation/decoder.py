"""A decoder of transformers -> the same as a program that runs a token in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels.step import ACTIVATIONS, Expert, Program, Unsuited
from ..shim.experts import Expert as OneExpert
from ..shim.experts import SplitExperts
from ..shim.linear import LowRankSparseLinear

NORM_OFFSETS = {
    "llama": 0.0, "mistral": 0.0, "qwen2": 0.0, "qwen3": 0.0, "smollm3": 0.0, "gemma3_text": 1.0, "mixtral": 0.0,
    "qwen2_moe": 0.0, "qwen3_moe": 0.0, "olmoe": 0.0, "gpt_oss": 0.0,
}  # fmt: skip
"""Model types that are known, and what their norms add to their weights."""
WINDOWED = ("mistral", "mixtral")
"""Those whose configuration has one window for all blocks."""
PLAIN = (nn.Linear, LowRankSparseLinear, *(type(ACT2FN[name]) for name in ACTIVATIONS))
"""Classes of which a model may hold modules, beside those that are its type's own."""
HOLDERS = (nn.ModuleList, OneExpert)
"""Those that compute nothing."""
HARMLESS = "transformers.utils.output_capturing"
"""Whose hooks stay for good where outputs beside logits were once asked for, and do nothing until they are again."""


def _check_modules(model: Any) -> None:
    """Unsuited where something in the model is not transformers' own, or is watched, replaced or trained."""
    if model.training:
        raise Unsuited("it is in training mode")
    if torch.is_autocast_enabled("cpu"):
        raise Unsuited("autocast is on")
    if torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks:
        raise Unsuited("something watches every module")
    if "prepare_inputs_for_generation" in vars(model):
        raise Unsuited("something writes its inputs, as prompt tuning does")
    config = model.config
    for functions, chosen in (
        (ALL_ATTENTION_FUNCTIONS, config._attn_implementation),
        (ALL_EXPERTS_FUNCTIONS, config._experts_implementation),
    ):
        if chosen not in (None, "eager") and not _is_its_own(functions.get(chosen), "transformers"):
            raise Unsuited(f"{chosen} is no implementation of transformers")
    called = set(model.get_input_embeddings().modules())  # as they are
    home, known = type(model).__module__, dict[type[nn.Module], bool]()
    for name, module in model.named_modules():
        if module in called:
            continue
        held = vars(module)  # asking the module itself for what it lacks takes longer than all the rest
        hooks = (*held["_forward_hooks"].values(), *held["_forward_pre_hooks"].values())
        if any(hook.__module__ != HARMLESS for hook in hooks) or "_hf_hook" in held or "forward" in held:
            raise Unsuited(f"something watches or replaces {name or 'it'}")
        kind = module.kind if type(module) is SplitExperts else type(module)
        if kind not in known:
            known[kind] = kind in HOLDERS or (
                (kind in PLAIN or kind.__module__ == home) and _is_its_own(kind.forward, kind.__module__)
            )
        if not known[kind]:
            raise Unsuited(f"{name} is of type {type(module).__name__}, or computes otherwise than that")


def _is_its_own(function: Any, home: str) -> bool:
    """Whether a function is of the module `home`, or a package of that name, and was not put there."""
    return f"{getattr(function, '__module__', '')}.".startswith(f"{home}.")


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
        for name in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention", "clip_qkv"):
            if getattr(config, name, None):
                raise Unsuited(f"its configuration has {name}")
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        if activation not in ACTIVATIONS:
            raise Unsuited(f"its activation is {activation}")
        self._offset, self._activation = NORM_OFFSETS[config.model_type], activation
        weight = getattr(model.get_input_embeddings(), "weight", None)
        if not isinstance(weight, Tensor):
            raise Unsuited(f"its embeddings are of type {type(model.get_input_embeddings()).__name__}")
        program = self.program = Program(weight.dtype, rows, room)
        hidden = config.hidden_size
        head = model.get_output_embeddings()
        self.width, self.outputs = hidden, head.out_features
        self._stream, normed, made = (program.vector(hidden) for _ in range(3))
        base, stream = model.model, self._stream
        types = getattr(config, "layer_types", None) or [""] * len(base.layers)
        self._turns: dict[str, Tensor] = {}
        self._windows: list[int] = []
        self.routes = False  # tokens to experts
        down = program.vector(hidden)
        if not len(base.layers) == len(types) == config.num_hidden_layers:
            raise Unsuited("it has not as many blocks as its configuration says")
        for k, (block, layer_type) in enumerate(zip(base.layers, types, strict=True)):
            if block.self_attn.layer_idx != k:
                raise Unsuited("its blocks stand in another order, or one stands twice")
            self._norm(block.input_layernorm, stream, normed)
            self._attention(block.self_attn, layer_type, normed, made)
            after = getattr(block, "pre_feedforward_layernorm", None)
            if after is not None:
                self._norm(block.post_attention_layernorm, made, made)
            program.add(made, stream, hidden)
            self._norm(after or block.post_attention_layernorm, stream, normed)
            if hasattr(block.mlp, "experts"):
                self._experts(block.mlp, normed, down)
            else:
                self._gated(block.mlp, normed, down)
            if after is not None:
                self._norm(block.post_feedforward_layernorm, down, down)
            program.add(down, stream, hidden)
        self._norm(base.norm, stream, normed)
        self._logits = program.vector(self.outputs)
        program.products((head,), normed, (self._logits,))
        self._turn(0)

    def check(self, past: Any) -> None:
        """Unsuited where this cache, which follows the configuration as it is now, keeps other positions than blocks
        here look back at."""
        kept = [getattr(layer, "sliding_window", None) or 0 for layer in past.layers]
        if kept != self._windows[: len(kept)]:
            raise Unsuited("its configuration has other windows than its blocks")

    def begin(self, past: Any) -> None:
        """Go on after what the model has read: `past` is its cache, a DynamicCache of transformers."""
        self.program.begin([(layer.keys, layer.values) for layer in past.layers], past.get_seq_length())

    def _norm(self, module: Any, source: int, to: int, count: int = 1) -> None:
        if not type(module).__name__.endswith("RMSNorm"):
            raise Unsuited(f"it holds a norm of type {type(module).__name__}")
        epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
        self.program.norm(source, to, module.weight.detach().float() + self._offset, epsilon, count)

    def _gated(self, mlp: Any, source: int, to: int) -> None:
        self._check_activation(mlp)
        layers = Expert((mlp.gate_proj, mlp.up_proj), mlp.down_proj)
        self.program.feed_forward(layers, source, to, self._activation)

    def _experts(self, mlp: Any, source: int, to: int) -> None:
        """A router, which chooses among experts for each token, and what all of them share, if anything."""
        program, experts = self.program, mlp.experts
        router: Any = mlp.router if hasattr(mlp, "router") else mlp.gate
        self.routes = True
        clamps = self.model.config.model_type == "gpt_oss"
        if not clamps:
            self._check_activation(experts)
        if not type(router).__name__.endswith("TopKRouter"):
            raise Unsuited(f"its router is of type {type(router).__name__}")
        if _has_twins(router.weight):
            raise Unsuited("two of its experts are as good for every token")  # and which goes first is left to chance
        if not hasattr(self, "_router"):
            self._router = program.vector(len(router.weight)), program.vector(1), program.vector(self.width)
        logits, share, shared = self._router
        program.products((_linear(router.weight, getattr(router, "bias", None)),), source, (logits,))
        program.experts(
            logits, source, to, _apart(experts, clamps), most=router.top_k,
            whole=getattr(router, "norm_topk_prob", True),
            activation=torch.tensor([experts.limit, experts.alpha]).float() if clamps else self._activation,
        )  # fmt: skip
        if hasattr(mlp, "shared_expert"):
            self._gated(mlp.shared_expert, source, shared)
            program.products((mlp.shared_expert_gate,), source, (share,))
            program.share(share, shared, self.width)
            program.add(shared, to, self.width)

    def _check_activation(self, module: Any) -> None:
        if type(module.act_fn) is not type(ACT2FN[self._activation]):
            raise Unsuited(f"an activation is {type(module.act_fn).__name__}")

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
                norm = getattr(attention, name)  # of each head, or of all of them together
                self._norm(norm, place, place, count if norm.weight.numel() == width else 1)
        if getattr(attention, "use_rope", True):
            turn = self._turns.setdefault(layer_type, torch.zeros(2, width, dtype=torch.float32))
            program.rotate(query, heads, turn)
            program.rotate(key, kept, turn)
        everywhere = config.sliding_window if config.model_type in WINDOWED else None
        window = getattr(attention, "sliding_window", None) or everywhere or 0
        if window == 1:  # of which transformers' caches keep everything
            raise Unsuited("its window is a single token")
        self._windows.append(window)
        program.attend(
            query, key, value, found, heads=heads, kept=kept, width=width, scale=attention.scaling, window=window,
            sinks=getattr(attention, "sinks", None),
        )  # fmt: skip
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
            if model.config.model_type == "gpt_oss":  # whose halves turn alike
                cosine, sine = cosine.repeat(1, 1, 2), sine.repeat(1, 1, 2)
            if cosine.shape[-1] != turn.shape[1]:
                raise Unsuited("it turns a part of each head alone")
            turn[0], turn[1] = cosine[0, 0], sine[0, 0]


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A layer of this weight, (out, in), and this bias, (out,)."""
    m, n = weight.shape
    layer = nn.Linear(n, m, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    return layer


def _has_twins(weight: Tensor) -> bool:
    """Whether two rows of a matrix are equal."""
    probe = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = weight.detach().double() @ probe
    return len(set(sums.tolist())) < len(sums)


def _apart(experts: Any, clamps: bool) -> list[Expert]:
    """The layers of each expert, of compressed ones and of those that lie in one tensor for all.

    clamps: as those of gpt-oss, whose gate and up are one matrix, with biases; else neither is known.
    """
    found: list[Expert] = []
    if not isinstance(experts, SplitExperts):
        if clamps:
            raise Unsuited("its experts are dense, and turned")
        for first, last in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            upper, lower = first.chunk(2)
            found.append(Expert((_linear(upper), _linear(lower)), _linear(last)))
        return found
    gate, up, down = experts.names
    if (gate is None) != clamps:
        raise Unsuited("gate and up of its experts are one matrix" if gate is None else "its experts have gates apart")
    parts: Any = experts
    biases = (parts.gate_up_proj_bias, parts.down_proj_bias) if clamps else ()
    for number in range(experts.count):
        one = experts.get_submodule(str(number))
        into = tuple(getattr(one, name) for name in (gate, up) if name is not None)
        found.append(Expert(into, getattr(one, down), tuple(bias[number] for bias in biases)))
    return found
