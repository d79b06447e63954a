"""register, then transformers' own from_pretrained -> model, tokenizer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import kernels
from .checkpoint import foreign
from .checkpoint.hub import hub_errors, remote_files
from .checkpoint.source import identifier_of
from .errors import CheckpointError, SourceError, UsageError, reason_of
from .shim import quantizer
from .text.tokenizer import load_tokenizer, tokenizer_is_there

__all__ = ["dtype_named", "load", "register"]

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""auto: as stored."""

WHERE = (
    "cache_dir", "force_download", "gguf_file", "local_files_only", "proxies", "revision", "subfolder", "token",
    "trust_remote_code", "code_revision",
)  # fmt: skip
"""Keywords of from_pretrained that say where files come from: config, model and tokenizer take the same."""


def dtype_named(name: str) -> Any:
    """What --dtype names, as from_pretrained takes it; UsageError for any other."""
    if name not in DTYPES:
        raise UsageError(f"--dtype is one of {', '.join(DTYPES)}, not {name!r}.")
    return DTYPES[name]


def register() -> None:
    """Make transformers load compressed checkpoints, onto fast kernels; safe to call again.

    UsageError if LOSPARSE_KERNEL names none.
    """
    # The loader of some checkpoint may have registered itself before; it knows no kernels.
    quantizer.register(replace=True)
    kernels.install()


def load(
    source: str | Path, *, model_class: Any = None, need_tokenizer: bool = False, **options: Any
) -> tuple[Any, Any]:
    """(model, tokenizer) of a compressed or dense checkpoint, a folder or a Hub id.

    The class is the one that config.json names, unless `model_class` (an AutoModel class, a model class, or its name)
    is given. The tokenizer is None if the checkpoint has none, and with a warning if it has one that cannot be
    loaded; with `need_tokenizer` both are a SourceError. `options` go to from_pretrained: dtype, device_map, revision,
    subfolder, trust_remote_code and so on; those that say where files come from reach config and tokenizer, too.
    UsageError for what names no place, SourceError if nothing can be loaded from there, CheckpointError if what is
    there is damaged.
    """
    if options.get("output_loading_info"):
        raise UsageError(
            "load returns a model and a tokenizer. For output_loading_info, call losparse_cli.register() and then "
            "from_pretrained of a transformers class."
        )
    register()
    name = _checked_name(source, options)
    where = {key: options[key] for key in WHERE if key in options}
    local_only = bool(options.get("local_files_only"))
    with _load_errors(name, local_only=local_only):  # before the tokenizer, whose absence would be the wrong reason
        config = _config(name, where, options)
    tokenizer = load_tokenizer(name, **where) if need_tokenizer else None
    with _load_errors(name, local_only=local_only):
        model = _model(name, config, model_class, options)
    if not need_tokenizer:
        try:
            tokenizer = load_tokenizer(name, **where)
        except SourceError as error:
            if tokenizer_is_there(name, where):
                warnings.warn(f"{error} The model is loaded without a tokenizer.", stacklevel=2)
    return model.eval(), tokenizer


def _checked_name(source: str | Path, options: dict[str, Any]) -> str:
    """What from_pretrained is given: a folder, `~` expanded, or a Hub id; SourceError for a folder without a model."""
    folder = Path(os.path.expanduser(identifier_of(source)))
    if not folder.exists():
        return str(source)
    inside = folder / (options.get("subfolder") or "")
    if not options.get("gguf_file") and not (inside / "config.json").is_file():
        raise foreign.no_model(inside) if inside.is_dir() else SourceError(f"There is no folder {inside}.")
    return str(folder)


def _config(name: str, where: dict[str, Any], options: dict[str, Any]) -> Any:
    import transformers

    given = options.get("config")
    if isinstance(given, transformers.PretrainedConfig):
        return given
    return transformers.AutoConfig.from_pretrained(name, **where)


def _model(name: str, config: Any, model_class: Any, options: dict[str, Any]) -> Any:
    import transformers

    chosen = model_class or _class_of(config)
    if isinstance(chosen, str):
        if not hasattr(transformers, chosen):
            raise UsageError(f"transformers has no class {chosen}. Give an Auto class, a model class or its name.")
        chosen = getattr(transformers, chosen)
    if isinstance(chosen, type) and issubclass(chosen, transformers.PreTrainedModel):
        options = {key: value for key, value in options.items() if key != "code_revision"}  # for the Auto classes
        options |= _text_config(chosen, config)
    folder = Path(name) / (options.get("subfolder") or "")
    if folder.is_dir() and "variant" not in options:
        variant = foreign.only_variant(str(folder), os.listdir(folder))
        options = options if variant is None else {**options, "variant": variant}
    try:
        return chosen.from_pretrained(name, **options)
    except OSError:
        variant = None
        if not folder.is_dir() and not options.get("subfolder") and "variant" not in options:
            variant = foreign.only_variant(name, remote_files(name, options.get("revision"), options.get("token")))
        if variant is None:
            raise
        return chosen.from_pretrained(name, **options, variant=variant)


def _text_config(chosen: Any, config: Any) -> dict[str, Any]:
    """The configuration to load a text model from a larger one's checkpoint with, as the Auto classes hand it on."""
    wanted = chosen.config_class
    text = config.get_text_config() if wanted is not None and not isinstance(config, wanted) else None
    if text is None or not isinstance(text, wanted):
        return {}
    if getattr(config, "quantization_config", None) is not None:
        text.quantization_config = config.quantization_config
    return {"config": text}


@contextmanager
def _load_errors(name: str, *, local_only: bool) -> Iterator[None]:
    """Turns what transformers raises while it loads into an error of ours."""
    with hub_errors(name, local_only=local_only):
        try:
            yield
        except ValueError as error:  # the shim's own, or transformers' about config.json
            raise CheckpointError(f"Cannot load {name}: {error}") from error
        except OSError as error:
            cause = error.__cause__
            if cause is None and error.errno is not None:
                raise
            if cause is not None and "huggingface_hub" in type(cause).__module__:
                raise cause from error
            raise SourceError(f"Cannot load {name}: {reason_of(error)}.") from error


def _class_of(config: Any) -> Any:
    """The class that config.json names, or the Auto class under which the model's own code has it."""
    import transformers

    architecture = (getattr(config, "architectures", None) or [""])[0]
    own = {k: v for k, v in (getattr(config, "auto_map", None) or {}).items() if k.startswith("AutoModel")}
    named = getattr(transformers, architecture, None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    auto = next((key for key, place in own.items() if str(place).endswith(f".{architecture}")), next(iter(own), ""))
    return getattr(transformers, auto or "AutoModel")
