"""LowRankSparseLinear: y = x Vᵀ Uᵀ + x Sᵀ + b, from the tensors as they are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .codec import decode, encode, pack_bits
from .layouts import LayerSpec
from .operator import kernels, product, sparse, support

AS_STORED = {"bitmask": "S_mask", "rows": "S_rows", "columns": "S_columns"}
"""Layout -> the stored tensor that serves as index as it is."""


class LowRankSparseLinear(nn.Linear):
    """A linear layer whose weight is U V + S, with S in one of the layouts of `layouts`.

    An nn.Linear to whoever asks, so that LoRA and the like can be laid over it (peft knows layers by their class).

    Parameters: U (out, rank) and V (rank, in), absent at rank 0; weight (nnz,), the entries of S in
    row-major order; bias (out,) or None. Buffers: the index tensors of the layout, until `settle` checks them and
    puts the index that `forward` computes with in their place; state dicts hold the layout's again. All parameters
    are trainable; the zeros of S have no parameter and stay zero.
    """

    weight: nn.Parameter
    U: Tensor | None
    V: Tensor | None
    bias: Any  # nn.Parameter | None
    _index: Tensor | None
    _starts: Tensor | None
    _is_hf_initialized = True  # whatever a model's own code does to new linear layers, it leaves this one alone

    def __init__(
        self,
        spec: LayerSpec,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make a dense weight
        self.spec = spec
        self.out_features, self.in_features = spec.shape
        dtype = dtype or torch.get_default_dtype()
        for name in ("U", "V"):
            self.register_parameter(name, None)
        for name, (shape, kind) in spec.tensor_shapes(dtype).items():
            empty = torch.empty(shape, dtype=kind, device=device)
            if kind.is_floating_point:
                self.register_parameter(name, nn.Parameter(empty))
            else:
                self.register_buffer(name, empty)
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device)) if bias else None
        self.form = spec.layout if spec.layout in ("rows", "columns") else _smaller_form(spec, dtype.itemsize)
        self.register_buffer("_index", None, persistent=False)
        self.register_buffer("_starts", None, persistent=False)
        self._checked = False
        self._ready: Any = None  # the product as (who made it, how), once it is known where the tensors lie

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features). RuntimeError for x of another width, as of nn.Linear."""
        if self._checked and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            y = self._at_once(x)
            if y is not None:
                return y
        if x.shape[-1] != self.in_features:
            raise RuntimeError(f"x has {x.shape[-1]} features, and this layer takes {self.in_features}.")
        if x.is_meta:
            return x.new_empty(*x.shape[:-1], self.out_features)
        index, starts = self._index_and_starts()
        values: Tensor = self.weight
        U, V, bias = self.U, self.V, self.bias
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, values = x.to(dtype), values.to(dtype)
            U, V, bias = (t if t is None else t.to(dtype) for t in (U, V, bias))
        return product(x, values, index, starts, U, V, bias, self.out_features, self.form)

    def sparse(self) -> Tensor:
        """S as a dense (out, in) matrix, without gradients."""
        index, starts = self._index_and_starts()
        return sparse(self.weight.detach(), index, starts, self.spec.shape, self.form)

    def dense(self) -> Tensor:
        """U V + S in float32, (out, in), without gradients."""
        S = self.sparse().float()
        if self.U is None or self.V is None:
            return S
        return torch.addmm(S, self.U.detach().float(), self.V.detach().float())

    def support(self) -> Tensor:
        """Where S holds entries: (out, in), bool. ValueError if the index is damaged."""
        return support(*self._index_and_starts(), self.spec.shape, self.form)

    def _at_once(self, x: Tensor) -> Tensor | None:
        """The product without looking anything up; None where that is not possible."""
        makers = kernels()
        if self._ready is None or self._ready[0] is not makers:
            index, starts = self._index_and_starts()
            parts = (self.weight, index, starts, self.U, self.V, self.bias)
            self._ready = makers, makers.ready(*parts, self.spec.shape, self.form)
        call = self._ready[1]
        found: Tensor | None = None if call is None else call(x, self._parameters)
        return found

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._ready = None  # dtype or device may change
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ready": None}  # addresses are of this copy alone

    # --- the index ------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Check the stored index, once, and compute with a faster one from now on, held in its place.

        ValueError if the index is damaged. Nothing happens to a layer whose tensors come and go, as when they are
        offloaded: it does this work whenever it computes.
        """
        if self._checked or self.weight.is_meta or self._comes_and_goes():
            return
        with torch.inference_mode(False):  # or no gradient could flow past what is made here
            index, starts = self._made()
        kept = AS_STORED.get(self.spec.layout)
        if kept is None:
            for suffix in self._stored():
                delattr(self, suffix)
            self._index = index
        self._starts = starts
        self._checked = True

    def _index_and_starts(self) -> tuple[Tensor, Tensor | None]:
        if not self._checked:
            self.settle()
        if not self._checked:
            return self._made()
        kept = AS_STORED.get(self.spec.layout)
        index = self._index if kept is None else getattr(self, kept)
        assert index is not None, "a settled layer has its index"
        return index, self._starts

    def _made(self) -> tuple[Tensor, Tensor | None]:
        """The index that `forward` computes with, and where rows start in it, from the tensors as stored."""
        stored = self._stored()
        if self.form == "bits":
            found = kernels().bits(self.spec, stored)
            if found is not None:
                return found
        where = decode(self.spec, stored)
        if self.form in ("rows", "columns"):
            return stored[AS_STORED[self.form]], None
        counts = where.sum(1)
        starts = torch.cat((counts.new_zeros(1), torch.cumsum(counts, 0))).int()
        if self.form == "bits":
            return stored["S_mask"] if self.spec.layout == "bitmask" else pack_bits(where), starts
        m, n = self.spec.shape
        gaps = encode(LayerSpec((m, n), 0, self.spec.nnz, "unstructured", "gaps8", group_rows=1), where)
        return gaps["S_gaps"], torch.stack((starts, gaps["S_offsets"][:, 1]))

    def _stored(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.named_buffers(recurse=False) if name.startswith("S_")}

    def _comes_and_goes(self) -> bool:
        """Whether accelerate fetches this layer's tensors for each use."""
        hook = getattr(self, "_hf_hook", None)
        return any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ())))

    def _unsettle(self) -> None:
        """Stored index tensors again, with nothing in them yet."""
        if self._checked and self.spec.layout not in AS_STORED:
            for name, (shape, kind) in self.spec.tensor_shapes(self.weight.dtype).items():
                if name.startswith("S_"):
                    self.register_buffer(name, torch.empty(shape, dtype=kind, device=self.weight.device))
        self._index = self._starts = self._ready = None
        self._checked = False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._checked and self.spec.layout not in AS_STORED:
            for suffix, tensor in encode(self.spec, self.support()).items():
                destination[prefix + suffix] = tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        if any(
            prefix + suffix in state_dict for suffix in self.spec.tensor_shapes(torch.float32) if suffix[:2] == "S_"
        ):
            self._unsettle()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        s = self.spec
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={s.rank}, nnz={s.nnz}, "
            f"pattern={s.pattern}, layout={s.layout}, bias={self.bias is not None}"
        )


def _smaller_form(spec: LayerSpec, itemsize: int) -> str:
    """`bits`, which is computed with fastest, unless that takes more than a quarter above the bytes on disk."""
    m, n = spec.shape
    bits = LayerSpec(spec.shape, spec.rank, spec.nnz, "unstructured", "bitmask").nbytes(torch.uint8)
    stored = spec.nbytes(torch.uint8)
    floats = (spec.nnz + spec.rank * (m + n)) * (itemsize - 1)
    return "bits" if spec.layout == "bitmask" or bits + floats <= 1.25 * (stored + floats) else "gaps"
