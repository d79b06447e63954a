"""Report: what was done to each layer, as written to losparse_report.json and shown by `inspect`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import PurePath
from typing import Any

from ..errors import CheckpointError, is_number, is_whole
from ..shim.layouts import LayerSpec

MAY_BE_UNKNOWN = ("weight_squared", "residual_squared", "held_out_error", "log_step", "tokens")
"""Figures of a layer that are None where they were not measured."""


@dataclass(frozen=True)
class LayerReport:
    """One compressed layer: how it is stored, and what was measured. Bytes count U, V, S and every index, not the bias.

    weight_squared and residual_squared: squared Frobenius norms of W and of W − U V − S, None if unknown.
    errors: relative Frobenius error after each iteration. output_errors: relative error of the layer's output on
    the text that it was solved with, after each stage of the solver; () without one. held_out_error: the same on text
    that was held out, as stored; None without any. log_step: of codes, log2 of the step that they were made with.
    tokens: that it was solved with, of an expert those that were sent to it; None without text. head: whether it is an
    output head, which as embeddings do has bits of its own.
    """

    name: str
    spec: LayerSpec
    bytes_before: int
    bytes_after: int
    weight_squared: float | None = None
    residual_squared: float | None = None
    errors: tuple[float, ...] = ()
    output_errors: tuple[float, ...] = ()
    held_out_error: float | None = None
    log_step: float | None = None
    tokens: int | None = None
    head: bool = False

    @property
    def aside(self) -> bool:
        """Whether it is an embedding or an output head, which `--bits` is not of."""
        return self.head or self.spec.kind == "embedding"

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.spec.shape

    @property
    def output_error(self) -> float | None:
        """sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)) at the end of the solver, on the text that it saw; None without any."""
        return self.output_errors[-1] if self.output_errors else None

    @property
    def parameters(self) -> int:
        """Of the dense weight."""
        return self.shape[0] * self.shape[1]

    @property
    def kept(self) -> int:
        """r(m + n) + nnz."""
        return self.spec.rank * sum(self.shape) + self.spec.nnz

    @property
    def density(self) -> float:
        return self.spec.nnz / self.parameters

    @property
    def bits(self) -> float:
        """Stored, a weight, all counted."""
        return 8 * self.bytes_after / self.parameters

    @property
    def coded(self) -> bool:
        """Whether S is whole numbers."""
        return self.spec.layout == "codes"

    @property
    def relative_error(self) -> float | None:
        """‖W − U V − S‖_F / ‖W‖_F, None if it was not recorded."""
        return total_error([self])

    def measured(self) -> dict[str, Any]:
        """JSON form without the spec."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "spec"}

    def to_dict(self) -> dict[str, Any]:
        """JSON form, complete; bits are only for reading."""
        stored = {name: getattr(self.spec, name) for name in ("shape", "rank", "nnz", "pattern", "layout")}
        return {"name": self.name, **stored, "bits": self.bits, **self.measured()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any], spec: LayerSpec) -> LayerReport:
        """What `measured` or `to_dict` wrote of the layer that is stored as `spec` says; TypeError if it is none."""
        known = {name: fields[name] for name in cls.__dataclass_fields__ if name in fields} | {"spec": spec}
        for stages in ("errors", "output_errors"):
            known[stages] = tuple(known.get(stages, ()))
        found = cls(**known)
        unknown = (getattr(found, name) for name in MAY_BE_UNKNOWN)
        figures = (figure for figure in unknown if figure is not None)
        if not all(
            map(is_number, (found.bytes_before, found.bytes_after, *found.errors, *found.output_errors, *figures))
        ):
            raise TypeError(f"a figure of {found.name} is no number")
        return found


@dataclass(frozen=True)
class Report:
    """A compressed checkpoint in numbers.

    name: of the checkpoint, as it was opened; "" before that, and in its file, for a folder may be renamed.
    model_bytes_before and after: all tensors. parameters: of the whole dense model. source: name, commit
    and files of the dense model. recipe: the resolved request. files: name -> {size, sha256}. calibration: what text
    was used, {} without any. blocks: per block of the model, what matching did to its output.
    training: how the result was trained and what it scores, {} if it was not. refinement: how it was trained towards
    the whole dense model, and how far it was from it before and after, {} if it was not; `followed_by` blocks where
    these were matched afterwards, not before.
    """

    layers: tuple[LayerReport, ...]
    skipped: dict[str, str]
    model_bytes_before: int
    model_bytes_after: int
    parameters: int
    source: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    fingerprint: str = ""
    calibration: dict[str, Any] = field(default_factory=dict)
    blocks: tuple[dict[str, Any], ...] = ()
    training: dict[str, Any] = field(default_factory=dict)
    refinement: dict[str, Any] = field(default_factory=dict)
    name: str = field(default="", compare=False)

    @property
    def matching(self) -> Distance | None:
        """Squared, relative, of all matched blocks' outputs from the dense ones'; None where none was matched."""
        if not self.blocks:
            return None
        held_out = self.blocks[0].get("held_out_before") is not None
        names = ("held_out_before", "held_out_after") if held_out else ("loss_before", "loss_after")
        before, after = (sum(block[name] for block in self.blocks) for name in names)
        return Distance(before, after, held_out)

    @property
    def divergence(self) -> Distance | None:
        """Nats a token, of training towards the whole dense model; None without."""
        if not (done := self.refinement):
            return None
        return Distance(done["divergence_before"], done["divergence_after"], bool(done["held_out"]))

    @property
    def bytes_before(self) -> int:
        """Of the compressed layers."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def targeted_parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def targeted_share(self) -> float:
        """Share of the model's parameters that lies in compressed layers."""
        return self.targeted_parameters / max(1, self.parameters)

    @property
    def bits(self) -> float:
        """Stored, a weight of the compressed layers, all counted; embeddings and heads have bits of their own."""
        return _bits(self.inner)

    @property
    def embedding_bits(self) -> float | None:
        """The same of embeddings and heads; None where there are none, or nothing else."""
        aside = [layer for layer in self.layers if layer.aside]
        return _bits(aside) if 0 < len(aside) < len(self.layers) else None

    @property
    def zeros(self) -> float:
        """Share of the entries of S that are zero, of the same layers."""
        return 1 - sum(one.spec.nnz for one in self.inner) / max(1, sum(one.parameters for one in self.inner))

    @property
    def inner(self) -> Sequence[LayerReport]:
        """Layers without embeddings and output heads, unless there are no others."""
        return [layer for layer in self.layers if not layer.aside] or self.layers

    @property
    def coded(self) -> bool:
        """Whether S is whole numbers in every layer."""
        return bool(self.layers) and all(layer.coded for layer in self.layers)

    @property
    def kept_parameters(self) -> float:
        """(r(m+n) + nnz) / mn over the compressed layers."""
        return sum(layer.kept for layer in self.layers) / max(1, self.targeted_parameters)

    @property
    def relative_error(self) -> float | None:
        """Relative Frobenius error over all compressed layers together."""
        return total_error(self.layers)

    @property
    def starved(self) -> tuple[LayerReport, ...]:
        """Layers that were solved with fewer tokens than they have inputs, as experts may be that few are sent to."""
        return tuple(layer for layer in self.layers if layer.tokens is not None and layer.tokens < layer.shape[1])

    @property
    def held_out_error(self) -> float | None:
        """Mean of the layers' output errors on text that was held out, None without any."""
        return error_of(self.layers, "held_out_error")

    def totals(self) -> dict[str, Any]:
        """The sums above under their names, for JSON."""
        names = ["bytes_before", "bytes_after", "model_bytes_before", "model_bytes_after", "parameters"]
        names += ["targeted_parameters", "targeted_share", "kept_parameters", "bits", "embedding_bits", "zeros"]
        names += ["relative_error", "held_out_error"]
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `totals`, and how layers are stored, are only for reading: config.json says it to the loader."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("layers", "name")}
        return fields | {"totals": self.totals(), "layers": [layer.to_dict() for layer in self.layers]}

    @classmethod
    def from_dict(cls, fields: dict[str, Any], specs: Mapping[str, LayerSpec], where: str) -> Report:
        """What `to_dict` wrote, with the layers of config.json; CheckpointError that names `where` if it is wrong."""
        try:
            known = {name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
            known["layers"] = tuple(LayerReport.from_dict(layer, specs[layer["name"]]) for layer in fields["layers"])
            for name in ("skipped", "source", "recipe", "versions", "files", "calibration", "training", "refinement"):
                known[name] = dict(known.get(name, {}))
            known["blocks"] = tuple(dict(block) for block in fields.get("blocks", ()))
            known["files"] = {file: dict(expected) for file, expected in known["files"].items()}
            found = cls(**known)
            for name in ("model_bytes_before", "model_bytes_after", "parameters"):
                if not is_whole(getattr(found, name)):
                    raise TypeError(f"{name} is no number")
            return found
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{where} is incomplete ({error!r}). Compress the model again.") from error


@dataclass(frozen=True)
class Distance:
    """From the dense model before and after training: on held-out text, or else on the text that was trained on."""

    before: float
    after: float
    held_out: bool

    @property
    def where(self) -> str:
        return "on held-out text" if self.held_out else "on the text that it was trained on"

    @property
    def change(self) -> float:
        """Relative: -0.2 of what is a fifth nearer."""
        return self.after / self.before - 1 if self.before else 0.0


def _bits(layers: Collection[LayerReport]) -> float:
    return 8 * sum(layer.bytes_after for layer in layers) / max(1, sum(layer.parameters for layer in layers))


def text_used(calibration: Mapping[str, Any]) -> str:
    """What text was used, in words, and what was asked for where that is more; without folders of whoever ran it."""
    given = (calibration.get(name) for name in ("windows", "length", "tokens", "held_out", "tokens_used"))
    count, length, asked, held_out, used = (value if isinstance(value, int) else 0 for value in given)
    source = str(calibration.get("source"))
    if source == "self":
        name = "text that the model wrote itself"
    else:
        name = source if calibration.get("split") is not None else PurePath(source).name
    unit, short = "windows", bool(length and count < round(asked / length))
    if calibration.get("image_field") is not None:
        unit, short = "rows", used < asked
    else:
        used = count * length
    amount = f"{used:,} of {asked:,} tokens asked for (the text has no more)" if short else f"{used:,} tokens"
    return f"{amount} in {count} {unit} from {name}, {held_out or 'none'} of them held out"


def telling_error(layers: Collection[LayerReport]) -> str:
    """The property of LayerReport to judge these layers by: held_out_error, output_error or relative_error.

    The first where held-out text reaches a layer, though not each of many experts; the second where all layers have it.
    """
    if any(layer.held_out_error is not None for layer in layers):
        return "held_out_error"
    by_output = bool(layers) and all(layer.output_error is not None for layer in layers)
    return "output_error" if by_output else "relative_error"


def error_of(layers: Collection[LayerReport], measure: str) -> float | None:
    """What `telling_error` names, of all these layers: of weights together, else the mean of what is known, or None."""
    if measure == "relative_error":
        return total_error(layers)
    known = [error for layer in layers if (error := getattr(layer, measure)) is not None]
    return sum(known) / len(known) if known else None


def total_error(layers: Iterable[LayerReport]) -> float | None:
    """sqrt(Σ ‖residual‖² / Σ ‖weight‖²), None if a layer has no record of it or all weights are zero."""
    weight = residual = 0.0
    for layer in layers:
        if layer.weight_squared is None or layer.residual_squared is None:
            return None
        weight += layer.weight_squared
        residual += layer.residual_squared
    return (residual / weight) ** 0.5 if weight else None


def error_range(layers: Iterable[LayerReport], measure: str) -> tuple[float, float] | None:
    """Least and largest error of a single layer, None if none is known."""
    errors = [error_of([layer], measure) for layer in layers]
    known = [error for error in errors if error is not None and isfinite(error)]
    return (min(known), max(known)) if known else None
