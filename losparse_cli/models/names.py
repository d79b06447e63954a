"""Names on disk <-> names in memory: transformers renames, adds and strips prefixes, and fuses at load."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

from torch import Tensor

from ..shim.experts import without_merging


class NameMap:
    """Which parameter of `model` each tensor on disk becomes, by transformers' own rules."""

    def __init__(self, model: Any, tensors: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = without_merging(get_model_conversion_mapping(model) or [], model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._model = model
        self._prefix = model.base_model_prefix
        self._state: dict[str, Any] = dict(model.state_dict())
        self.disk: dict[str, list[str]] = {}
        """Parameter in memory -> tensors on disk that it is read from as it stands."""
        self.converted: set[str] = set()
        """Parameters that are assembled from, or split off, other tensors at load."""
        self._conversions: dict[str, str] = {}  # converted parameter -> a name for its conversion
        self._sources: dict[str, list[tuple[str, str]]] = {}  # conversion -> (tensor on disk, its pattern)
        self.converted_from: dict[str, str] = {}
        """Tensor on disk -> one of the parameters that it is a part of."""
        for name in tensors:
            renamed, converter = self._rename(name)
            if converter is None:
                self.disk.setdefault(renamed, []).append(name)
            else:
                self._sources.setdefault(renamed, []).append((name, converter))
                self.converted_from[name] = renamed
                self._conversions |= dict.fromkeys(self._targets(renamed, converter), renamed)
        self.converted |= set(self._conversions)

    def _rename(self, name: str, state: dict[str, Any] | None = None) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        state = self._state if state is None else state
        renamed, converter = rename_source_key(name, self._renamings, self._converters, self._prefix, state)
        if renamed not in state and name in state:  # the loader's own second try
            renamed, converter = rename_source_key(name, [], [], self._prefix, state)
        return renamed, converter

    def _targets(self, renamed: str, pattern: str) -> Iterable[str]:
        for converter in self._converters:
            if pattern in converter.source_patterns:
                first = converter.target_patterns[0]
                yield from (renamed.replace(first, target) for target in converter.target_patterns)

    def convert(self, parameter: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The value of a converted `parameter`, and of those made with it, from the tensors that `read` returns."""
        from transformers.core_model_loading import dot_natural_key

        renamed = self._conversions[parameter]
        sources = sorted(self._sources[renamed], key=lambda source: dot_natural_key(source[0]))
        pattern = sources[0][1]
        converter = deepcopy(next(c for c in self._converters if pattern in c.source_patterns))
        for tensor, source_pattern in sources:
            converter.add_tensor(renamed, tensor, source_pattern, read(tensor))
        made = converter.convert(renamed, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def disk_module(self, module: str, tensor: str) -> str | None:
        """What `module`'s new tensors must be called on disk so that the loader finds them again.

        tensor: the dense weight's name on disk. None if no such name survives the loader's renaming.
        """
        suffixes = (
            "U", "V", "weight", "S_mask", "S_gaps", "S_offsets", "S_rows", "S_columns", "S_index", "S_codes", "S_scale",
            "S_runs",
        )  # fmt: skip
        state = self._state | {f"{module}.{suffix}": True for suffix in suffixes}
        for candidate in (tensor.removesuffix(".weight"), module):
            if all(self._rename(f"{candidate}.{s}", state) == (f"{module}.{s}", None) for s in suffixes):
                return candidate
        return None
