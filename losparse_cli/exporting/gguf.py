"""A compressed checkpoint as one GGUF file for llama.cpp, and what U V hold beside it as a LoRA adapter.

Layers in whole numbers of a fixed width (`--grid`) arrive as they are: their codes are blocks of Q4_0 or Q8_0. Others
are U V + S in floats, or rounded again if that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..checkpoint.config import layer_specs, layer_tensors
from ..checkpoint.layers import read_finite_layer
from ..checkpoint.reader import TORCH_DTYPES, TensorEntry
from ..checkpoint.source import Checkpoint
from ..errors import CheckpointError, MissingExtraError, UsageError, write_errors
from ..linalg.factors import LowRankCodes, LowRankSparse
from ..models.names import NameMap
from ..models.skeleton import empty_model
from ..progress import Progress
from .gguf_blocks import BLOCK, narrowest, packed
from .gguf_metadata import architecture_of, rope_factors, rotary_order, write_metadata
from .gguf_vocabulary import write_vocabulary

TYPES = ("auto", "f32", "f16", "bf16", "q8_0", "q4_0")
"""What layers are stored as. auto: as blocks that hold them exactly, or else in 16-bit floats, which are those of the
source."""
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
"""What GGUF calls a file by the type of most of its layers."""


@dataclass(frozen=True)
class GgufFile:
    """path: of the model. adapter: of U V as a LoRA, None without any. exact: matrices that it holds as they are.
    nearly: those whose whole numbers it holds, with factors rounded to 16 bits. rounded: those that were rounded again,
    floats: those stored in 16 or 32 bits. kind: of the latter two. doubts: what llama.cpp may do otherwise, a sentence
    each."""

    path: Path
    adapter: Path | None
    exact: int
    nearly: int
    rounded: int
    floats: int
    kind: str
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file. shape: as torch has it. kind: of `gguf.GGMLQuantizationType`. make: what is stored.
    kept: of whole numbers `exact`, or `nearly` where factors are rounded."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], np.ndarray]
    kept: str = ""


def require_gguf() -> Any:
    """The package `gguf`; MissingExtraError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf", "A GGUF file") from error
    return gguf


class GgufWriter:
    """One checkpoint, compressed or dense, on its way into one file."""

    def __init__(self, checkpoint: Checkpoint, kind: str) -> None:
        self._gguf = require_gguf()
        if kind not in TYPES:
            raise UsageError(f"--gguf-type is {', '.join(TYPES[:-1])} or {TYPES[-1]}, not {kind!r}.")
        self.checkpoint = checkpoint
        self._specs = layer_specs(checkpoint) if checkpoint.is_compressed else {}
        self._model = empty_model(checkpoint.folder, checkpoint.config)
        self._config = self._model.config
        self._architecture = architecture_of(self._config, checkpoint.address)
        if self._model.get_output_embeddings() is None:
            raise UsageError(
                f"{checkpoint.address} is a {type(self._model).__name__}, which has no output head, and llama.cpp "
                "would make one of the embeddings. Leave out --gguf."
            )
        self._names = NameMap(self._model, checkpoint.entries)
        self._files = {file.path: file for file in checkpoint.files}
        self._parts = {name: layer_tensors(checkpoint, name, spec) for name, spec in self._specs.items()}
        self._as_they_are, self._floats = kind == "auto", self._float_kind() if kind == "auto" else kind.upper()
        blocks = self._config.num_hidden_layers
        self._map = self._gguf.get_tensor_name_map(self._gguf.MODEL_ARCH[self._architecture.name], blocks)
        self._adapter: list[_Tensor] = []
        self._tensors = self._planned()

    @property
    def has_adapter(self) -> bool:
        """Whether there are U V that no sum was made of."""
        return bool(self._adapter)

    def write(self, path: Path, adapter: Path | None, told: Progress) -> GgufFile:
        """Write the file, and the adapter if there is one to be."""
        gguf, architecture = self._gguf, self._gguf.MODEL_ARCH_NAMES[self._gguf.MODEL_ARCH[self._architecture.name]]
        writer = gguf.GGUFWriter(None, architecture)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(self.checkpoint.name.rpartition("/")[2])
        writer.add_quantized_by(f"losparse {__version__}")
        layers = [t for t in self._tensors if len(t.shape) == 2]
        exact, nearly = (sum(t.kept == how for t in layers) for how in ("exact", "nearly"))
        kinds = [t.kind for t in layers]
        writer.add_file_type(FILE_TYPES[max(sorted(set(kinds)), key=kinds.count)])
        if any(kind in kinds for kind in ("Q4_0", "Q8_0")):
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        rounded = sum(not t.kept and t.kind in ("Q4_0", "Q8_0") for t in layers)
        floats = len(layers) - exact - nearly - rounded
        said = f"{exact} exact, {nearly} with factors rounded, {rounded} requantized, {floats} in floats"
        writer.add_string("losparse.layers", said)
        embeddings = next(t for t in self._tensors if t.name == "token_embd.weight")
        write_metadata(writer, self._config, embeddings.shape[0])
        doubt = write_vocabulary(writer, self.checkpoint.folder, embeddings.shape[0])
        told.start("tensors", len(self._tensors) + len(self._adapter), 0)
        self._write(writer, self._tensors, path, told)
        if adapter is not None:
            beside = gguf.GGUFWriter(None, architecture)
            beside.add_type(gguf.GGUFType.ADAPTER)
            beside.add_string(gguf.Keys.Adapter.TYPE, "lora")
            beside.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # the factors are added as they are
            self._write(beside, self._adapter, adapter, told)
        return GgufFile(
            path,
            adapter,
            exact,
            nearly,
            rounded,
            floats,
            self._floats.lower(),
            (f"{doubt[0].upper()}{doubt[1:]}: compare some tokens.",) if doubt else (),
        )

    def _write(self, writer: Any, tensors: list[_Tensor], path: Path, told: Progress) -> None:
        kinds = self._gguf.GGMLQuantizationType
        for tensor in tensors:
            block, nbytes = self._gguf.GGML_QUANT_SIZES[kinds[tensor.kind]]
            size = torch.Size(tensor.shape).numel() // block * nbytes
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kinds[tensor.kind])
        with write_errors(path):
            try:
                writer.write_header_to_file(path)
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for tensor in tensors:
                    writer.write_tensor_data(tensor.make())
                    told.advance("tensors", name=tensor.name)
            finally:
                writer.close()

    # --- which tensors there are ----------------------------------------------------------------------

    def _planned(self) -> list[_Tensor]:
        """Every tensor of the file, its type settled; those of the adapter as well."""
        used = {entry.name: name for name, parts in self._parts.items() for entry in parts.values()}
        in_memory = {tensor: name for name, tensors in self._names.disk.items() for tensor in tensors}
        tied = set(getattr(self._model, "all_tied_weights_keys", None) or {})
        tensors = []
        for disk, entry in self.checkpoint.entries.items():
            layer = used.get(disk)
            if layer is not None:
                if disk == self._parts[layer]["weight"].name:
                    tensors.append(self._layer(layer))
                continue
            name = in_memory.get(disk, disk)
            if name in tied or name.endswith("rotary_emb.inv_freq"):
                continue  # the same numbers again, or what llama.cpp computes itself
            tensors.append(self._dense(name, entry))
        factors = rope_factors(self._config)
        if factors is not None:
            tensors.append(_Tensor("rope_freqs.weight", tuple(factors.shape), "F32", factors.numpy))
        return tensors

    def _name(self, parameter: str) -> str:
        module, _, suffix = parameter.rpartition(".")
        found = self._map.get_name(module)
        if found is None:
            raise UsageError(
                f"{self.checkpoint.address}: llama.cpp knows no tensor such as {parameter}. Leave out --gguf."
            )
        return f"{found}.{suffix}"

    def _dense(self, name: str, entry: TensorEntry) -> _Tensor:
        """A tensor that was copied into the checkpoint."""
        module, _, suffix = name.rpartition(".")
        kind = "F32" if len(entry.shape) == 1 else self._fitting(self._name(name), entry.shape[-1])

        def make() -> np.ndarray:
            W = self._files[entry.path].read(entry).float()
            if len(entry.shape) == 1 and suffix == "weight":
                W = W + self._architecture.norm_offset
            return self._stored(self._moved(module, W), kind)

        return _Tensor(self._name(name), entry.shape, kind, make)

    def _layer(self, name: str) -> _Tensor:
        """A compressed layer, as blocks where they hold it exactly, and its U V in the adapter."""
        spec, gguf_name = self._specs[name], self._name(f"{name}.weight")
        found = self._kept(name)
        if found is None:
            kind = self._fitting(gguf_name, spec.shape[1])

            def make() -> np.ndarray:
                return self._stored(self._moved(name, self._read(name).dense()), kind)

            return _Tensor(gguf_name, spec.shape, kind, make)

        blocks_of, exact = found

        def blocks() -> np.ndarray:
            factors, order = self._codes(name), self._moved(name, torch.arange(spec.shape[0]))
            runs = None if factors.runs is None else factors.runs[order]
            return packed(factors.rows[order], factors.codes[order], runs, blocks_of)

        if spec.rank:
            self._adapt(name, gguf_name)
        return _Tensor(gguf_name, spec.shape, blocks_of, blocks, "exact" if exact else "nearly")

    def _adapt(self, name: str, gguf_name: str) -> None:
        """U V of the layer as lora_b and lora_a."""
        m, n = self._specs[name].shape
        rank = self._specs[name].rank

        def down() -> np.ndarray:
            return self._read(name).V.float().numpy()

        def up() -> np.ndarray:
            return self._moved(name, self._read(name).U.float()).contiguous().numpy()

        self._adapter.append(_Tensor(f"{gguf_name}.lora_a", (rank, n), "F32", down))
        self._adapter.append(_Tensor(f"{gguf_name}.lora_b", (m, rank), "F32", up))

    # --- what they hold -------------------------------------------------------------------------------

    def _read(self, name: str) -> LowRankSparse | LowRankCodes:
        return read_finite_layer(self.checkpoint, name, self._specs[name], self._parts[name])

    def _codes(self, name: str) -> LowRankCodes:
        factors = self._read(name)
        assert isinstance(factors, LowRankCodes)
        return factors

    def _kept(self, name: str) -> tuple[str, bool] | None:
        """The type of block that holds the layer's whole numbers, and whether exactly; None if none does: none knows
        factors of columns."""
        if not self._as_they_are or self._specs[name].layout != "codes":
            return None
        factors = self._codes(name)
        return narrowest(factors.rows, factors.codes, factors.runs) if bool((factors.columns == 1).all()) else None

    def _moved(self, module: str, W: Tensor) -> Tensor:
        """A weight or bias of `module` with its rows in the order of llama.cpp."""
        if not self._architecture.permuted or not module.endswith((".q_proj", ".k_proj")):
            return W
        heads = self._config.num_attention_heads if module.endswith("q_proj") else self._config.num_key_value_heads
        return rotary_order(W, heads)

    def _float_kind(self) -> str:
        kinds = {TORCH_DTYPES[parts["weight"].dtype] for parts in self._parts.values()}
        return "BF16" if kinds == {torch.bfloat16} else "F16"

    def _fitting(self, name: str, width: int) -> str:
        """The type asked for, or 16-bit floats where rows are not made of whole blocks.

        Embeddings and heads have 8 bits where others have 4, as llama.cpp's own quantizer gives them more.
        """
        if self._floats in ("Q4_0", "Q8_0") and width % BLOCK:
            return "F16"
        return "Q8_0" if self._floats == "Q4_0" and name in ("token_embd.weight", "output.weight") else self._floats

    def _stored(self, W: Tensor, kind: str) -> np.ndarray:
        if kind == "F32":
            return np.ascontiguousarray(W.float().numpy())
        largest = float(W.abs().max()) / {"F16": 1, "Q4_0": 8, "Q8_0": 127}.get(kind, math.inf)
        if largest > torch.finfo(torch.float16).max:
            raise CheckpointError(
                f"A weight of {float(W.abs().max()):.3g} is beyond what {kind.lower()} holds. Say --gguf-type bf16."
            )
        if kind == "F16":
            return np.ascontiguousarray(W.half().numpy())
        if kind == "BF16":
            return np.ascontiguousarray(W.bfloat16().contiguous().view(torch.uint16).numpy())
        return np.ascontiguousarray(
            self._gguf.quants.quantize(W.contiguous().numpy(), self._gguf.GGMLQuantizationType[kind])
        )
