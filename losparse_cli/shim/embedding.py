"""CodedEmbedding: rows a_i q_i of whole numbers and a factor each, looked up from the codes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layouts import LayerSpec
from .operator import rows_of_codes
from .stored import StoredIndex


class CodedEmbedding(StoredIndex, nn.Embedding):  # type: ignore[misc]
    """An embedding whose rows are whole numbers q times a factor, S_ij = a_i c_j q_ij.

    An nn.Embedding to whoever asks, but for its weight. Made by `replacing` alone, which also keeps what a class of the
    model's own does to the rows.

    Parameters: weight (vocabulary,), the factors of the rows. Buffers: the codes, as StoredIndex holds them.
    """

    @classmethod
    def replacing(cls, dense: nn.Embedding, spec: LayerSpec, owner: StoredIndex | None = None) -> CodedEmbedding:
        """An empty one for `dense`, on its device and in its dtype; with an owner, one that looks its codes up."""
        made: CodedEmbedding = _blank(type(dense))
        nn.Module.__init__(made)
        for name, value in vars(dense).items():
            vars(made)[name] = value.copy() if isinstance(value, dict | set) else value
        made.register_parameter("weight", None)
        made._hold(spec, device=dense.weight.device, dtype=dense.weight.dtype, owner=owner)
        # What a model's own code does to new embeddings is for what they hold beside their rows: Gemma's a scale.
        vars(made)["_is_hf_initialized"] = not made.holds_more
        return made

    @property
    def holds_more(self) -> bool:
        """Whether there are buffers beside the codes, as of a class that scales its rows."""
        return any(name[0] != "_" and not name.startswith("S_") for name, _ in self.named_buffers(recurse=False))

    def forward(self, input: Tensor) -> Tensor:
        """Token ids (...) -> rows (..., embedding_dim), in the dtype of `weight`. IndexError as of nn.Embedding."""
        if input.is_meta or self.weight.is_meta:
            return self.weight.new_empty(*input.shape, self.spec.shape[1], device="meta")
        factors = F.embedding(input, self.weight[:, None], self.padding_idx)  # which finds ids that are none
        index, scale = self._index_and_starts()
        if not factors.requires_grad:
            return rows_of_codes(input, self.weight.detach(), index, scale, self.spec.shape, self.form)
        ones = self.weight.new_ones(1, dtype=torch.float32).expand(self.weight.shape)
        rows = rows_of_codes(input, ones, index, scale, self.spec.shape, self.form)
        return (rows * factors.float()).to(self.weight.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes that were made here are made anew by whoever reads a pickle."""
        return _blank, (own_kind(type(self)),), self.__getstate__()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, layout={self.spec.layout}"


def own_kind(kind: type) -> type:
    """The class of an embedding as it was before its rows were codes."""
    return next(
        base for base in kind.__mro__ if not issubclass(base, CodedEmbedding) and issubclass(base, nn.Embedding)
    )


@cache
def _coded(kind: type) -> type:
    """Looked up before `kind`'s own base, so that its `super().forward` finds rows that are codes."""
    return CodedEmbedding if kind is nn.Embedding else type(f"Coded{kind.__name__}", (kind, CodedEmbedding), {})


def _blank(kind: type) -> Any:
    return object.__new__(_coded(kind))


def refuse_to_resize(model: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
    """In place of transformers' `resize_token_embeddings`. ValueError for another size than there is."""
    embeddings: nn.Module = model.get_input_embeddings()
    if new_num_tokens in (None, getattr(embeddings, "num_embeddings", None)) and not args and not any(kwargs.values()):
        return embeddings
    raise ValueError(
        "The embeddings of this model are stored as whole numbers and cannot be resized. Resize the dense model and "
        "compress it then, with losparse export --dense where there is no other."
    )
