"""A token in one call: against the model itself, for every type that is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import toy_model
from products import needs_compiler
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import losparse_cli
from losparse_cli import Recipe
from losparse_cli.generation.decoder import NORM_OFFSETS, Decoder
from losparse_cli.kernels.step import Unsuited

pytestmark = [needs_compiler, pytest.mark.usefixtures("installed_kernels")]

_COMMON: dict[str, Any] = {
    "vocab_size": 1100, "num_hidden_layers": 3, "hidden_size": 72, "intermediate_size": 131, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 18, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_experts": 9, "num_experts_per_tok": 3, "moe_intermediate_size": 44}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "head_dim": None},
    "qwen3": {"use_sliding_window": False, "tie_word_embeddings": True},
    "smollm3": {"no_rope_layers": [1, 0, 1], "hidden_act": "relu"},
    "mixtral": {"sliding_window": 7, "intermediate_size": 44, "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": _EXPERTS | {"head_dim": None, "shared_expert_intermediate_size": 33, "norm_topk_prob": False,
                             "decoder_sparse_step": 2},
    "qwen3_moe": _EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [1]},
    "olmoe": _EXPERTS | {"num_key_value_heads": 4, "head_dim": None, "norm_topk_prob": False},
    "gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 4, "intermediate_size": 44,
                "swiglu_limit": 1.0},
    "gemma3_text": {"sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 11},
}  # fmt: skip
RECIPES = {
    "codes": Recipe(bits=4.0),
    "low rank and codes": Recipe(rank=2, bits=5.0),
    "floats": Recipe(rank=4, sparsity=0.5),
    "gaps": Recipe(rank=4, sparsity=0.97),
}


def known(name: str, folder: Path) -> Path:
    """A random model of this type, biases and norms too."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(name, **{k: v for k, v in (_COMMON | CONFIGS[name]).items() if v is not None})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
            parameter.normal_(centre, 0.1, generator=generator)
    model.save_pretrained(folder)
    return folder


def steps(model: Any, rows: int = 1, prompt: int = 9, count: int = 12, room: int = 10) -> list[tuple[Tensor, Tensor]]:
    """Logits of the decoder and of the model, token by token."""
    tokens = torch.randint(3, 100, (rows, prompt + count), generator=torch.Generator().manual_seed(rows))
    with torch.inference_mode():
        past = DynamicCache(config=model.config)
        model(tokens[:, :prompt], past_key_values=past, use_cache=True)
        decoder = Decoder(model, rows, room)
        decoder.begin(past)
        found = []
        for k in range(prompt, prompt + count):
            expected = model(tokens[:, k : k + 1], past_key_values=past, use_cache=True).logits[:, -1]
            logits = decoder(tokens[:, k])
            assert logits is not None
            found.append((logits.clone(), expected.float()))
    return found


def furthest(found: list[tuple[Tensor, Tensor]]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in found)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_known_type(name: str, tmp_path: Path) -> None:
    """Beyond its window, and beyond the room that there was at first; several sequences at once."""
    folder = known(name, tmp_path / "dense")
    made = losparse_cli.compress(folder, tmp_path / "small", Recipe(bits=4.0)).output
    model, _ = losparse_cli.load(made)
    assert furthest(steps(model)) < 1e-5
    assert furthest(steps(model, rows=3)) < 1e-5


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("name", ["qwen3", "qwen2_moe", "gpt_oss"])
def test_every_instruction_set(name: str, tmp_path: Path) -> None:
    made = losparse_cli.compress(known(name, tmp_path / "dense"), tmp_path / "small", Recipe(bits=4.0)).output
    model, _ = losparse_cli.load(made)
    assert furthest(steps(model)) < 1e-5
    assert furthest(steps(model, rows=3, count=3)) < 1e-5


def test_every_known_type_is_tried() -> None:
    assert CONFIGS.keys() == NORM_OFFSETS.keys()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_every_kind_of_layer(recipe: str, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    made = losparse_cli.compress(known("llama", tmp_path / "dense"), tmp_path / "small", RECIPES[recipe]).output
    model, _ = losparse_cli.load(made, dtype=dtype)
    assert furthest(steps(model)) < tolerance
    assert furthest(steps(model, rows=2)) < tolerance


@pytest.mark.parametrize("name", ["qwen2", "qwen2_moe"])
def test_a_dense_model(name: str, tmp_path: Path) -> None:
    model, _ = losparse_cli.load(known(name, tmp_path / "dense"))
    assert furthest(steps(model, rows=2)) < 1e-5


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    return losparse_cli.compress(known("mixtral", folder / "dense"), folder / "small", Recipe(bits=4.0)).output


def test_experts_in_bfloat16(mixture: Path) -> None:
    """Where two experts are as good, rounding decides: so not of every step."""
    model, _ = losparse_cli.load(mixture, dtype=torch.bfloat16)
    gaps = sorted(furthest([step]) for step in steps(model))
    assert gaps[len(gaps) // 2] < 3e-2


def test_a_prompt_longer_than_the_window(tmp_path: Path) -> None:
    """The cache of transformers holds the last positions alone then."""
    model, _ = losparse_cli.load(known("gemma3_text", tmp_path / "dense"))
    assert furthest(steps(model, prompt=20, count=8, room=64)) < 1e-5


def test_numbers_that_are_none_are_told(tmp_path: Path) -> None:
    made = losparse_cli.compress(known("llama", tmp_path / "dense"), tmp_path / "small", Recipe(bits=4.0)).output
    model, _ = losparse_cli.load(made)
    past = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([[5, 6, 7]]), past_key_values=past, use_cache=True)
        model.model.layers[1].input_layernorm.weight.fill_(float("nan"))
        decoder = Decoder(model, 1, 8)
        decoder.begin(past)
        assert decoder(torch.tensor([8])) is None


def _watched(part: str) -> Any:
    def change(model: Any) -> None:
        model.get_submodule(part).register_forward_hook(lambda *arguments: None)

    return change


def _patched(part: str) -> Any:
    def change(model: Any) -> None:
        module = model.get_submodule(part)
        module.forward = module.forward

    return change


def _of_another_class(model: Any) -> None:
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj)


def _last_of_another_class(model: Any) -> None:
    model.model.layers[0].mlp.down_proj = nn.Sequential(model.model.layers[0].mlp.down_proj)


def _of_another_dtype(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.double()


def _wider_head(model: Any) -> None:
    model.lm_head = nn.Linear(72, 2000, bias=False)


def _wider_inside(model: Any) -> None:
    model.model.layers[1].mlp.gate_proj = nn.Linear(72, 5000)


def _wider_norm(model: Any) -> None:
    model.model.norm.weight = nn.Parameter(torch.ones(720))


def _other_activation(model: Any) -> None:
    model.model.layers[2].mlp.act_fn = nn.ReLU()


def _reversed(model: Any) -> None:
    model.model.layers = nn.ModuleList(list(model.model.layers)[::-1])


def _twice(model: Any) -> None:
    model.model.layers[1] = model.model.layers[0]


def _fewer(model: Any) -> None:
    model.model.layers = model.model.layers[:2]


def _earlier(model: Any) -> None:
    model.config.num_hidden_layers = 2


def _own_block(model: Any) -> None:
    class Block(type(model.model.layers[0])):  # type: ignore[misc]
        pass

    model.model.layers[0].__class__ = Block


def _more_experts(model: Any) -> None:
    router = model.model.layers[1].mlp.gate
    router.weight = nn.Parameter(torch.randn(11, router.weight.shape[1]))


def _all_experts_and_more(model: Any) -> None:
    model.model.layers[1].mlp.gate.top_k = 6


def _other_router(model: Any) -> None:
    model.model.layers[0].mlp.gate = nn.Linear(72, 5)


def _other_activation_inside(model: Any) -> None:
    model.model.layers[2].mlp.experts.act_fn = nn.ReLU()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *[(_watched(part), "watches or replaces") for part in (
            "model.layers.0.mlp.experts", "model.layers.0.mlp.experts.3.w2", "model.layers.1.mlp.gate")],
        (_more_experts, "of another size"), (_all_experts_and_more, "another number of experts"),
        (_other_router, "router is of type Linear"), (_other_activation_inside, "an activation is ReLU"),
    ],
)  # fmt: skip
def test_what_is_not_as_a_mixture_has_it_is_left_alone(change: Any, reason: str, mixture: Path) -> None:
    model, _ = losparse_cli.load(mixture)
    change(model)
    with pytest.raises(Unsuited, match=reason):
        Decoder(model, 1, 8)


class _Wrapped(Tensor):
    """A tensor without memory of its own, as quantizing libraries have them."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        bare = torch.utils._pytree.tree_map(lambda x: x.inner if isinstance(x, cls) else x, (args, kwargs or {}))
        return function(*bare[0], **bare[1])


def _wrapped(model: Any) -> None:
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(_Wrapped(layer.weight.detach()), requires_grad=False)


def _sparse(model: Any) -> None:
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)


def _broadcast_bias(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.ones(1))


def _own_norm(model: Any) -> None:
    kind = type(model.model.norm)
    shifted = type("ShiftedRMSNorm", (kind,), {"forward": lambda self, x: kind.forward(self, x) + 1})
    model.model.layers[1].input_layernorm = shifted(72)


def _plain_norm(model: Any) -> None:
    model.model.layers[1].input_layernorm = nn.RMSNorm(72)


def _embeddings_of_another_class(model: Any) -> None:
    model.model.embed_tokens = nn.Sequential(model.model.embed_tokens)


def _own_attention(model: Any) -> None:
    AttentionInterface.register("of the caller", lambda *arguments, **more: sdpa_attention_forward(*arguments, **more))
    model.set_attn_implementation("of the caller")


def _own_inputs(model: Any) -> None:
    model.prepare_inputs_for_generation = lambda *arguments, **more: {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *[(_watched(part), "watches or replaces") for part in (
            "", "model", "model.norm", "model.layers.1", "model.layers.1.self_attn", "model.layers.0.mlp.up_proj",
            "lm_head")],
        *[(_patched(part), "watches or replaces") for part in ("", "model.layers.1", "model.layers.2.mlp")],
        (_of_another_class, "of type Sequential"), (_last_of_another_class, "of type Sequential"),
        (_of_another_dtype, "are not all"),
        (_wider_inside, "of another size"), (_wider_norm, "as wide as no vector"),
        (_other_activation, "an activation is ReLU"), (_reversed, "another order"), (_twice, "another order"),
        (_fewer, "as many blocks"), (_earlier, "as many blocks"), (_own_block, "is of type Block"),
        (lambda model: model.train(), "training mode"),
        (_wrapped, "not all"), (_sparse, "not all"), (_broadcast_bias, "bias is of another size"),
        (_own_norm, "ShiftedRMSNorm"), (_plain_norm, "of type RMSNorm"), (_own_inputs, "writes its inputs"),
        (_embeddings_of_another_class, "embeddings are of type Sequential"),
        (_own_attention, "no implementation of transformers"),
    ],
)  # fmt: skip
def test_what_is_not_as_its_type_has_it_is_left_alone(change: Any, reason: str, tmp_path: Path) -> None:
    model, _ = losparse_cli.load(known("llama", tmp_path / "dense"))
    change(model)
    with pytest.raises(Unsuited, match=reason):
        Decoder(model, 1, 8)


def test_a_class_that_was_patched_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = losparse_cli.load(known("llama", tmp_path / "dense"))
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, x: x)
    with pytest.raises(Unsuited, match="computes otherwise"):
        Decoder(model, 1, 8)


@pytest.mark.parametrize(("name", "window"), [("llama", 5), ("qwen3", 5), ("mistral", 9), ("gpt_oss", 9)])
def test_a_window_that_blocks_do_not_have_is_left_alone(name: str, window: int, tmp_path: Path) -> None:
    """Caches and masks follow the configuration, and blocks what it was when they were made."""
    made = losparse_cli.compress(known(name, tmp_path / "dense"), tmp_path / "small", Recipe(bits=4.0)).output
    model, _ = losparse_cli.load(made)
    decoder = Decoder(model, 1, 8)
    decoder.check(DynamicCache(config=model.config))
    if name == "qwen3":
        model.config.layer_types = ["sliding_attention"] * 3
    model.config.sliding_window = window
    if name == "mistral":  # whose blocks read it there
        decoder = Decoder(model, 1, 8)
        decoder.check(DynamicCache(config=model.config))
    else:
        with pytest.raises(Unsuited, match="other windows"):
            decoder.check(DynamicCache(config=model.config))


def test_experts_that_are_as_good_are_left_alone(mixture: Path) -> None:
    model, _ = losparse_cli.load(mixture)
    weight = model.model.layers[1].mlp.gate.weight
    with torch.no_grad():
        weight[2].copy_(weight[0])
    with pytest.raises(Unsuited, match="as good for every token"):
        Decoder(model, 1, 8)


def test_outputs_that_were_asked_for_once_do_no_harm(tmp_path: Path) -> None:
    model, _ = losparse_cli.load(known("llama", tmp_path / "dense"))
    model(torch.tensor([[3, 4]]), output_hidden_states=True)
    assert furthest(steps(model, count=2)) < 1e-5


def test_autocast_and_hooks_on_everything_are_left_alone(tmp_path: Path) -> None:
    model, _ = losparse_cli.load(known("llama", tmp_path / "dense"))
    with torch.autocast("cpu"), pytest.raises(Unsuited, match="autocast"):
        Decoder(model, 1, 8)
    handle = nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    with pytest.raises(Unsuited, match="every module"):
        Decoder(model, 1, 8)
    handle.remove()


def test_a_head_of_another_size(tmp_path: Path) -> None:
    model, _ = losparse_cli.load(known("llama", tmp_path / "dense"))
    model.lm_head = nn.Linear(72, 1300, bias=False)
    assert furthest(steps(model)) < 1e-5


def test_a_block_of_another_size(tmp_path: Path) -> None:
    model, _ = losparse_cli.load(known("llama", tmp_path / "dense"))
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (nn.Linear(*s) for s in ((72, 5000), (72, 5000), (5000, 72)))
    assert furthest(steps(model)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_memory_is_float32_whatever_torch_makes_otherwise(dtype: torch.dtype, tmp_path: Path) -> None:
    model, _ = losparse_cli.load(known("llama", tmp_path / "dense"))
    torch.set_default_dtype(dtype)
    try:
        found = steps(model, count=6)
    finally:
        torch.set_default_dtype(torch.float32)
    assert furthest(found) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "opt", "mamba", "bert", "t5", "falcon"])
def test_other_types_are_left_alone(name: str) -> None:
    with pytest.raises(Unsuited, match="not known"):
        Decoder(toy_model(name), 1, 8)


def test_heads_that_turn_in_part_are_left_alone(tmp_path: Path) -> None:
    model, _ = losparse_cli.load(known("llama", tmp_path / "dense"))
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq[:-2]
    with pytest.raises(Unsuited, match="a part of each head"):
        Decoder(model, 1, 8)
