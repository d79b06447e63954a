"""vLLM's door: entry point `losparse` of the group `vllm.general_plugins`, which runs in each of its processes.

`quant_method` in config.json picks LosparseConfig; it gives every layer that a checkpoint compresses a method that
collects its tensors and then computes with ours (`parts`). Names of the interface are those of vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm import __version__ as VLLM
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from .. import kernels
from ..shim.layouts import LayerSpec
from ..shim.operator import rows_of_codes
from ..shim.quantizer import METHOD, LosparseQuantizationConfig
from .parts import Part, Ranges, layers, product

KNOWN = ("0.32", "0.33")
"""Versions whose interface was looked at."""
SHARDS = {"q": 0, "k": 1, "v": 2}
ARGUMENTS_BEFORE = 6
"""Of an embedding, the quantization's place among them when they are given without names."""

logger = init_logger("vllm.losparse")


@register_quantization_config(METHOD)
class LosparseConfig(QuantizationConfig):  # type: ignore[misc]
    """specs: module of the checkpoint -> its LayerSpec."""

    def __init__(self, specs: dict[str, LayerSpec]) -> None:
        super().__init__()
        self.specs = specs
        kernels.install()
        if not VLLM.startswith(tuple(f"{known}." for known in KNOWN)):
            logger.warning("losparse was tried with vLLM %s, and this is %s.", " and ".join(KNOWN), VLLM)

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LosparseConfig:
        read = LosparseQuantizationConfig(**config)
        if getattr(read, "fused", None):
            raise ValueError(
                "vLLM does not serve this checkpoint: its experts lie in one tensor in the dense one, as vLLM expects "
                "them. Serve the dense form: losparse export CHECKPOINT --dense -o PLAIN"
            )
        specs = read.specs()
        return cls({spec.tensor or name: spec for name, spec in specs.items()})  # vLLM goes by the names on disk

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.specs = hf_to_vllm_mapper.apply_dict(self.specs)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How a layer of vLLM called `prefix` computes; None for vLLM's own way."""
        if isinstance(layer, RoutedExperts):
            head = prefix.removesuffix(".routed_experts") + "."
            specs = {name.removeprefix(head): spec for name, spec in self.specs.items() if name.startswith(head)}
            return LosparseExperts(layer.moe_config, head, specs) if specs else None
        if isinstance(layer, ParallelLMHead):
            return LosparseHead(prefix, self.specs.get(prefix))
        if isinstance(layer, VocabParallelEmbedding):
            name = prefix or self._embedding_of((layer.org_vocab_size, layer.embedding_dim))
            spec = self.specs.get(name)
            return None if spec is None else LosparseEmbedding(name, spec)
        if not isinstance(layer, LinearBase):
            return None
        head, _, last = prefix.rpartition(".")
        fused = self.packed_modules_mapping.get(last, [last])
        names = [prefix] if prefix in self.specs else [f"{head}.{name}" if head else name for name in fused]
        found = [self.specs.get(name) for name in names]
        return LosparseLinear(names, found) if any(found) else UnquantizedLinearMethod()

    def _embedding_of(self, shape: tuple[int, int]) -> str:
        """The embedding of this shape, as models of vLLM often do not tell it its name; "" if there is not one."""
        found = [name for name, spec in self.specs.items() if spec.kind == "embedding" and tuple(spec.shape) == shape]
        return found[0] if len(found) == 1 else ""


# --- linear layers ------------------------------------------------------------------------------------


class LosparseLinear(LinearMethodBase):  # type: ignore[misc]
    """A layer of vLLM made of layers of the checkpoint. names, specs: of those, one below the other."""

    def __init__(self, names: Sequence[str], specs: Sequence[LayerSpec | None]) -> None:
        self.names, self.specs = names, specs

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        held: Any = layer
        split = isinstance(layer, RowParallelLinear) and layer.tp_size > 1
        columns = _nth(held.tp_rank, input_size_per_partition) if split else None
        rows: list[Ranges | None] = []
        for k, size in enumerate(output_partition_sizes):
            rank = held.tp_rank
            if k and isinstance(layer, QKVParallelLinear):
                rank //= layer.num_kv_head_replicas
            rows.append(None if split or held.tp_size == 1 else [_nth(rank, size)])
        if len(self.names) == 1 and len(rows) > 1 and rows[0] is not None:  # one layer on disk, and several here
            begins = [held.tp_size * sum(output_partition_sizes[:k]) for k in range(len(rows))]
            shifted = [(begin + a, begin + b) for begin, one in zip(begins, rows, strict=True) for a, b in one or ()]
            rows = [shifted]
        elif len(self.names) == 1:
            rows = rows[:1]
        parts = [Part(n, spec, r, columns) for n, spec, r in zip(self.names, self.specs, rows, strict=True)]
        held.losparse_parts = parts

        def load(param: Any, tensor: Tensor, shard_id: Any = None) -> None:
            number = SHARDS.get(shard_id, shard_id) or 0
            parts[number].take(param.losparse_suffix, tensor)

        _placeholders(layer, self.specs, params_dtype, load)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        _build(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = product(layer.losparse_layers, x)  # type: ignore[arg-type]
        return y if bias is None else y + bias


def _nth(rank: int, size: int) -> tuple[int, int]:
    return rank * size, (rank + 1) * size


def _placeholders(
    layer: nn.Module, specs: Sequence[LayerSpec | None], dtype: torch.dtype, load: Callable[..., Any], stem: str = ""
) -> None:
    """Empty parameters by the names of what is stored, whose loader hears of each tensor; `weight` among them in any
    case, as LoRA asks it for its device."""
    kinds = {"weight": dtype}
    for spec in specs:
        if spec is not None:
            kinds |= {suffix: kind for suffix, (_, kind) in spec.tensor_shapes(dtype).items()}
    for suffix, kind in kinds.items():
        parameter: Any = nn.Parameter(torch.empty(0, dtype=kind), requires_grad=False)
        parameter.weight_loader = load
        parameter.losparse_suffix = suffix
        layer.register_parameter(f"{stem}{suffix}", parameter)


def _build(layer: Any) -> None:
    """The layers that compute, in place of the parts that arrived."""
    device, dtype = layer.weight.device, layer.weight.dtype
    layer.losparse_layers = layers(layer.losparse_parts, dtype, device)
    del layer.losparse_parts
    _clear(layer)


def _clear(layer: nn.Module) -> None:
    """Without the placeholders but `weight`, or an expert's, which are asked for their device."""
    for name in [name for name, p in layer.named_parameters(recurse=False) if hasattr(p, "losparse_suffix")]:
        if not name.endswith("weight"):
            delattr(layer, name)


# --- embeddings and heads -----------------------------------------------------------------------------


@torch.library.custom_op("losparse_serving::rows", mutates_args=())
def _looked_up(
    ids: Tensor, values: Tensor, index: Tensor, starts: Tensor, rows: int, columns: int, form: str
) -> Tensor:
    return rows_of_codes(ids, values, index, starts, (rows, columns), form)


@_looked_up.register_fake
def _(ids: Tensor, values: Tensor, index: Tensor, starts: Tensor, rows: int, columns: int, form: str) -> Tensor:
    return values.new_empty((*ids.shape, columns))


def _ask_for_embeddings() -> None:
    """Let every embedding ask for its method: some models of vLLM forget to tell it of the quantization."""
    plain = VocabParallelEmbedding.__init__

    @wraps(plain)
    def init(self: Any, *args: Any, **options: Any) -> None:
        config = get_current_vllm_config_or_none()
        ours = getattr(config, "quant_config", None)
        if isinstance(ours, LosparseConfig) and len(args) < ARGUMENTS_BEFORE and options.get("quant_config") is None:
            options["quant_config"] = ours
        plain(self, *args, **options)

    if not hasattr(plain, "__wrapped__"):
        VocabParallelEmbedding.__init__ = init


_ask_for_embeddings()


class LosparseEmbedding(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """An embedding in whole numbers; a head that is tied to it computes with the same."""

    def __init__(self, name: str, spec: LayerSpec) -> None:
        self.name, self.spec = name, spec

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        held: Any = layer
        own = held.shard_indices
        part = Part(self.name, self.spec, [(own.org_vocab_start_index, own.org_vocab_end_index)])
        held.losparse_parts = [part]
        _placeholders(layer, [self.spec], params_dtype, lambda param, tensor: part.take(param.losparse_suffix, tensor))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if hasattr(layer, "losparse_parts"):  # a head may be the embedding itself, and is asked twice
            _build(layer)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        (rows,) = layer.losparse_layers
        index, starts = rows._index_and_starts()
        found: Tensor = _looked_up(input_, rows.weight, index, starts, *rows.spec.shape, rows.form)
        return found

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = product(layer.losparse_layers, x)
        missing = layer.num_embeddings_per_partition - y.shape[-1]
        y = F.pad(y, (0, missing)) if missing else y  # rows that make the vocabulary a round number
        return y if bias is None else y + bias


class LosparseHead(LosparseEmbedding):
    """An output head in whole numbers, or, without a spec, a dense one, or one tied to an embedding of either kind."""

    def __init__(self, name: str, spec: LayerSpec | None) -> None:
        self.name, self._own = name, spec
        if spec is not None:
            self.spec = spec

    def create_weights(self, layer: nn.Module, *args: Any, **attributes: Any) -> None:
        if self._own is not None:
            super().create_weights(layer, *args, **attributes)
        else:
            UnquantizedEmbeddingMethod.create_weights(self, layer, *args, **attributes)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        layer.weight = embed_tokens.weight
        if isinstance(embed_tokens.quant_method, LosparseEmbedding):
            layer.losparse_tied = (embed_tokens,)  # in a tuple torch does not take it for a part of the head
        return layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if self._own is not None:
            super().process_weights_after_loading(layer)
        elif not hasattr(layer, "losparse_tied"):
            UnquantizedEmbeddingMethod.process_weights_after_loading(self, layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._own is not None:
            return super().apply(layer, x, bias)
        tied = getattr(layer, "losparse_tied", None)
        if tied is not None:
            return LosparseEmbedding.apply(self, tied[0], x, bias)
        y: Tensor = UnquantizedEmbeddingMethod.apply(self, layer, x, bias)
        return y


# --- experts ------------------------------------------------------------------------------------------


class LosparseExperts(FusedMoEMethodBase):  # type: ignore[misc]
    """Experts of one block, each of three compressed matrices. specs: `3.w1`, as the checkpoint has it -> LayerSpec."""

    def __init__(self, moe: Any, prefix: str, specs: dict[str, LayerSpec]) -> None:
        super().__init__(moe)
        self.prefix, self.specs = prefix, specs

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        names = {"w1": layer.ckpt_gate_proj_name, "w3": layer.ckpt_up_proj_name, "w2": layer.ckpt_down_proj_name}
        rank, size = self.moe.tp_rank, self.moe.tp_size
        share = _nth(rank, intermediate_size_per_partition) if size > 1 else None
        parts: dict[tuple[int, str], Part] = {}
        layer.losparse_experts, layer.losparse_dtype = parts, params_dtype

        def load(
            param: Any,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool:
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local == -1:
                return False
            if (local, shard_id) not in parts:
                name = f"{expert_id}.{names[shard_id]}"
                rows, columns = (None, share) if shard_id == "w2" else (share and [share], None)
                parts[local, shard_id] = Part(f"{self.prefix}{name}", self.specs.get(name), rows, columns)
            parts[local, shard_id].take(param.losparse_suffix, loaded_weight)
            return True

        layer.losparse_count = num_experts
        for stem in ("w13_", "w2_"):
            _placeholders(layer, list(self.specs.values()), params_dtype, load, stem)

    def process_weights_after_loading(self, layer: Any) -> None:
        device = layer.w2_weight.device
        found = layer.losparse_experts
        for expert in range(layer.losparse_count):
            for shard in ("w1", "w3", "w2"):
                if (expert, shard) not in found:
                    raise ValueError(
                        f"The weights hold no tensors of {self.prefix}{expert}, part {shard}. Download or compress the "
                        "checkpoint again."
                    )
        made = [
            nn.ModuleDict(
                {
                    "gate_up": layers([found[expert, "w1"], found[expert, "w3"]], layer.losparse_dtype, device),
                    "down": layers([found[expert, "w2"]], layer.losparse_dtype, device),
                }
            )
            for expert in range(layer.losparse_count)
        ]
        layer.losparse_layers = nn.ModuleList(made)
        del layer.losparse_experts
        _clear(layer)

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Any = None,
    ) -> Tensor:
        activation = _activation(self.moe.activation)
        y = torch.zeros_like(x)
        for expert in torch.unique(topk_ids).tolist():
            if not 0 <= expert < layer.losparse_count:
                continue
            tokens, ranks = torch.where(topk_ids == expert)
            own = layer.losparse_layers[expert]
            gate, up = product(own["gate_up"], x[tokens]).chunk(2, -1)
            out = product(own["down"], activation(gate) * up)
            y.index_add_(0, tokens, (out * topk_weights[tokens, ranks, None]).to(x.dtype))
        return y


def _activation(kind: Any) -> Callable[[Tensor], Tensor]:
    known: dict[Any, Callable[[Tensor], Tensor]] = {
        MoEActivation.SILU: F.silu,
        MoEActivation.GELU: F.gelu,
        MoEActivation.GELU_TANH: partial(F.gelu, approximate="tanh"),
    }
    if kind not in known:
        raise ValueError(f"losparse computes experts with silu or gelu, and this model asks for {kind.value}.")
    return known[kind]
