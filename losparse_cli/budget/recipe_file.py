"""A recipe as a YAML file or a mapping holds it: what is asked of the layers, and of a whole run."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RecipeError, UsageError, flag

RANK_CHOICES = ("rank", "rank_ratio")
BUDGETS = ("size", "keep", "keep_parameters", "bits", "value_bits", "grid")
SIZE_CHOICES = ("sparsity", *BUDGETS)
EXCLUSIVE = (RANK_CHOICES, ("sparsity", "size", "keep", "keep_parameters"), BUDGETS)
"""Settings of which one may be given at most. Whole numbers may be sparse, and have a budget, too."""
PER_LAYER = (*RANK_CHOICES, *(name for name in SIZE_CHOICES if name != "size"), "pattern", "threshold_scope",
             "iterations")  # fmt: skip
WHOLE_RUN = ("size", "targets", "ignore", "values", "embedding_bits", "solver", "sensitivity", "allocate", "seed")
RUN = ("calibration", "refine", "device", "memory_limit", "max_shard_size", "sensitivity_file")
"""What a recipe may say of a run beside its layers."""
LEADING = ("source", "mode")
"""Of these settings the part that an option by their own name gives."""


@dataclass(frozen=True)
class RecipeFile:
    """name: of the file, or "the recipe", for messages. settings: for all layers. layers: for some of them, by target.
    run: of RUN, as they stand there."""

    name: str = "the recipe"
    settings: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    def _entries(self, target: str) -> dict[str, tuple[str, Any]]:
        """Setting, as options have it -> how it stands here, and its value; those of `layers: target` win."""
        found = {name: (name, value) for name, value in self.settings.items()}
        for name, part in self.run.items():
            if isinstance(part, Mapping):
                parts = {(name if key in LEADING else f"{name}_{key}"): (f"{name}: {key}", part[key]) for key in part}
                found |= parts
            else:
                found[name] = name, part
        return found | {name: (name, value) for name, value in self.layers.get(target, {}).items()}

    @contextmanager
    def errors(self, given: Container[str] = (), target: str = "") -> Iterator[None]:
        """Turns a UsageError about entries of this file into a RecipeError that names it, and them in place of the
        options that say the same.

        given: settings that were given beside the file, and win. target: of `layers`, whose settings are at fault.
        """
        try:
            yield
        except UsageError as error:
            said = sentence = f"layers: {target}: {error}" if target else str(error)
            for name, (shown, value) in self._entries(target).items():
                if name not in given or name in self.layers.get(target, {}):
                    sentence = _as_entry(flag(name), shown, value, sentence)
            if sentence == said and sentence.partition(" ")[0].rstrip(":") not in (*self.settings, *self.run, "layers"):
                raise
            comma = "," if sentence.startswith("layers: ") else ":"
            raise RecipeError(f"{self.name}{comma} {sentence}") from error


def _as_entry(option: str, shown: str, value: Any, sentence: str) -> str:
    """The sentence with the option as the entry of a file, which is `shown`, and its value where that stands there."""
    sentence = re.sub(rf"{option} {re.escape(str(value))}(?!\w|[.:]\w)", f"'{shown}: {value}'", sentence)
    return re.sub(rf"{option}(?![\w-])", shown, sentence)


def asked(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that were given; a number of NumPy or torch as Python's own, which can be written."""
    plain = {name: value.item() if getattr(value, "ndim", None) == 0 else value for name, value in flags.items()}
    return {name: value for name, value in plain.items() if value is not None and not _is_empty(value)}


def _is_empty(value: Any) -> bool:
    return isinstance(value, tuple) and not value


def read_recipe(source: str | Path | Mapping[str, Any]) -> RecipeFile:
    """The recipe in a YAML file, or the mapping that such a file would hold; RecipeError otherwise."""
    if isinstance(source, Mapping):
        name, content = "the recipe", dict(source)
    else:
        name, content = str(source), _read(Path(source).expanduser())
    layers = content.pop("layers", None) or {}
    if isinstance(source, Mapping) and not layers:
        layers = content.pop("overrides", None) or {}  # what a report of before called them
    _only_known(name, content, (*PER_LAYER, *WHOLE_RUN, "layers", *RUN), "")
    for key in ("targets", "ignore"):
        if key in content:
            targets = content[key] or ()
            content[key] = tuple(targets) if isinstance(targets, list | tuple) else (targets,)
    if not isinstance(layers, Mapping) or not all(isinstance(fields, Mapping) for fields in layers.values()):
        raise RecipeError(f"'layers' in {name} must map each glob to its settings, as in '*.mlp.*: {{rank: 16}}'.")
    for target, fields in layers.items():
        _only_known(name, fields, PER_LAYER, f" under layers: {target}")
    run = {key: content.pop(key) for key in RUN if key in content}
    return RecipeFile(name, content, {str(target): dict(fields) for target, fields in layers.items()}, run)


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _loader())
    except OSError as error:
        raise RecipeError(f"Cannot read the recipe {file}: {error.strerror}. Check the path after --recipe.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        at, problem = (getattr(error, name, None) for name in ("problem_mark", "problem"))
        line = f" at line {at.line + 1}" if at else ""
        reason = f" ({problem})" if problem else ""
        raise RecipeError(
            f"The recipe {file} is not valid YAML{line}{reason}. Correct it, or use flags instead."
        ) from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise RecipeError(f"The recipe {file} must be a mapping such as 'rank: 8', not {type(content).__name__}.")
    return content


def _loader() -> Any:
    """YAML's safe loader with the numbers of YAML 1.2, and without keys given twice.

    In YAML 1.1, which PyYAML reads, `2:4` is the number 124 in base 60, and `1e-3` is a text.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    numbers = {
        "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9]*)$",
        "tag:yaml.org,2002:float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$",
    }
    Loader.yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag not in numbers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag, regexp in numbers.items():
        Loader.add_implicit_resolver(tag, re.compile(regexp), list("-+.0123456789"))

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        seen: list[Any] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.append(key.value)
        return dict(loader.construct_mapping(node, deep=True))

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return Loader


def _only_known(name: str, fields: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in fields:
        if key not in known:
            raise RecipeError(f"{name} has the unknown setting {key!r}{where}; known are {', '.join(known)}.")
