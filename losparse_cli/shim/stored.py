"""StoredIndex: what layers have in common whose S lies in a stored index: checked once, computed with, stored again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .codec import decode, encode, pack_bits
from .installed import kernels
from .kept import Kept
from .kept import decode as decode_codes
from .kept import encode as encode_codes
from .layouts import LayerSpec, over_runs, times_runs
from .operator import FORMS, codes_of, held, sparse, support

AS_STORED = {"bitmask": "S_mask", "rows": "S_rows", "columns": "S_columns"}
"""Layout -> the stored tensor that serves as index as it is."""


class StoredIndex(nn.Module):
    """A module whose weight is U V + S, by `spec`, as its parameters and index tensors say.

    Or one that computes with the codes of another, its owner, whose `weight` is its own, too: it has no index then, and
    nothing of it is stored.
    """

    spec: LayerSpec
    weight: nn.Parameter
    U: Tensor | None
    V: Tensor | None
    S_codes: Tensor
    S_runs: Tensor
    _index: Tensor | None
    _starts: Tensor | None

    def _hold(
        self,
        spec: LayerSpec,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        owner: StoredIndex | None = None,
    ) -> None:
        """Make empty parameters and index tensors; of an owner take its weight."""
        dtype = dtype or torch.get_default_dtype()
        self.spec = spec
        for name in ("U", "V"):
            self.register_parameter(name, None)
        if owner is not None:
            self.weight = owner.weight
        for name, (shape, kind) in spec.tensor_shapes(dtype).items() if owner is None else ():
            empty = torch.empty(shape, dtype=kind, device=device)
            if kind.is_floating_point:
                self.register_parameter(name, nn.Parameter(empty))
            else:
                self.register_buffer(name, empty)
        self._form = spec.layout if spec.layout in FORMS else _smaller_form(spec, dtype.itemsize)
        self.register_buffer("_index", None, persistent=False)
        self.register_buffer("_starts", None, persistent=False)
        self._owner = () if owner is None else (owner,)  # in a tuple torch does not take it for a part of this module
        self._contexts: Any = None  # of the stream that codes were read from, by which the same one is written again
        self._checked = False
        self._ready: Any = None  # the product as (who made it, how), once it is known where the tensors lie

    @property
    def form(self) -> str:
        """Which of operator.FORMS this computes with."""
        return self._owner[0].form if self._owner else self._form

    def dense(self) -> Tensor:
        """U V + S in float32, (out, in), without gradients."""
        index, starts = self._index_and_starts()
        S = sparse(self.weight.detach().float(), index, starts, self.spec.shape, self.form)
        if self.U is None or self.V is None:
            return S
        return torch.addmm(S, self.U.detach().float(), self.V.detach().float())

    def support(self) -> Tensor:
        """Where S holds entries: (out, in), bool. ValueError if the index is damaged."""
        return support(*self._index_and_starts(), self.spec.shape, self.form)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._ready = None  # dtype or device may change
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ready": None}  # addresses are of this copy alone

    # --- the index ------------------------------------------------------------------------------------

    def settle(self, on_read: Callable[[Tensor], object] = lambda index: None) -> None:
        """Check the stored index, once, and compute with a faster one from now on, held in its place.

        on_read hears of a stream of codes as soon as nobody reads it any more.

        ValueError if the index is damaged. Nothing happens to a layer whose tensors come and go, as when they are
        offloaded: it does this work whenever it computes.
        """
        if self._owner or self._checked or self.weight.is_meta or self._comes_and_goes():
            return
        with torch.inference_mode(False):  # or no gradient could flow past what is made here
            index, starts = self._made()
            kept = AS_STORED.get(self.spec.layout)
            if self._form == "codes":
                on_read(self.S_codes)
            if kept is None:
                for suffix in self._stored():
                    if suffix != "S_runs":  # by which the stream is made again
                        delattr(self, suffix)
            if self._form == "codes":  # with the stream gone, or there would be three at once
                how = self._contexts
                lines = [line for line in ("rows", "columns") if isinstance(how, Kept) and getattr(how, line)]
                index, self._form = held(index, starts, tuple(lines))
        if kept is None:
            self._index = index
        self._starts = starts
        self._checked = True

    def settle_with(self, codes: Tensor, scale: Tensor) -> None:
        """Compute with these codes (out, in) and what `S_scale` holds, of which nothing is stored: they are part of
        another layer's, or those of several."""
        with torch.inference_mode(False):
            for suffix in self._stored():
                delattr(self, suffix)
            self._index, self._form = held(codes)
            self._starts = scale
        self._checked = True

    def _index_and_starts(self) -> tuple[Tensor, Tensor | None]:
        if self._owner:
            codes, scale = self._owner[0]._fetched()
            device = self.weight.device
            return codes.to(device), None if scale is None else scale.to(device)
        if not self._checked:
            self.settle()
        if not self._checked:
            return self._made()
        kept = AS_STORED.get(self.spec.layout)
        index = self._index if kept is None else getattr(self, kept)
        assert index is not None, "a settled layer has its index"
        return index, self._starts

    def _fetched(self) -> tuple[Tensor, Tensor | None]:
        """The index for another module, which computes while the tensors of this one may be away."""
        if not self._comes_and_goes():
            return self._index_and_starts()
        hook: Any = self._hf_hook
        hook.pre_forward(self)
        try:
            return self._made()
        finally:
            hook.post_forward(self, None)

    def _made(self) -> tuple[Tensor, Tensor | None]:
        """The index that `forward` computes with, and where rows start in it, from the tensors as stored."""
        stored = self._stored()
        if self.form == "codes":
            codes, self._contexts = decode_codes(stored["S_codes"], self.spec.shape)
            runs = stored.get("S_runs")
            return codes if runs is None else times_runs(codes, runs), stored["S_scale"]
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
        if self.spec.layout == "codes":
            self._form = "codes"
        self._checked = False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._checked and self.spec.layout not in AS_STORED:
            for suffix, tensor in self._encoded().items():
                destination[prefix + suffix] = tensor

    def _encoded(self) -> dict[str, Tensor]:
        """The index tensors as they were stored."""
        if self.spec.layout != "codes":
            return encode(self.spec, self.support())
        assert self._index is not None
        assert self._starts is not None
        codes = codes_of(self._index, self.spec.shape, self.form)
        if self.spec.run:
            codes = over_runs(codes, self.S_runs)
        return {"S_codes": encode_codes(codes, self._contexts), "S_scale": self._starts}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        if any(
            prefix + suffix in state_dict for suffix in self.spec.tensor_shapes(torch.float32) if suffix[:2] == "S_"
        ):
            self._unsettle()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _smaller_form(spec: LayerSpec, itemsize: int) -> str:
    """`bits`, which is computed with fastest, unless that takes more than a quarter above the bytes on disk."""
    m, n = spec.shape
    bits = LayerSpec(spec.shape, spec.rank, spec.nnz, "unstructured", "bitmask").nbytes(torch.uint8)
    stored = spec.nbytes(torch.uint8)
    floats = (spec.nnz + spec.rank * (m + n)) * (itemsize - 1)
    return "bits" if spec.layout == "bitmask" or bits + floats <= 1.25 * (stored + floats) else "gaps"
