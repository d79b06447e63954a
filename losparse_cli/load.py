"""register, then transformers' own from_pretrained -> model, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import kernels
from .errors import CheckpointError, SourceError
from .shim import quantizer
from .text.tokenizer import TOKENIZER_FILES, has_tokenizer

__all__ = ["load", "register"]


def register() -> None:
    """Make transformers load compressed checkpoints, onto fast kernels; safe to call again.

    ValueError if LOSPARSE_KERNEL names none.
    """
    # The loader of some checkpoint may have registered itself before; it knows no kernels.
    quantizer.register(replace=True)
    kernels.install()


def load(source: str | Path, *, model_class: Any = None, **options: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a compressed or dense checkpoint, a folder or a Hub id.

    The class is the one that config.json names, unless `model_class` (an AutoModel class or a model class)
    is given. The tokenizer is None if the checkpoint has none. `options` go to from_pretrained: dtype,
    device_map, revision, trust_remote_code and so on. SourceError if nothing can be loaded from there,
    CheckpointError if what is there is damaged.
    """
    import transformers

    from .checkpoint.hub import hub_errors

    register()
    folder = Path(source).expanduser()
    name = str(folder) if folder.exists() else str(source)
    if folder.exists() and not (folder / "config.json").is_file():
        raise SourceError(f"{folder} has no config.json, so it is no transformers checkpoint.")
    shared: dict[str, Any] = {
        k: options[k] for k in ("revision", "cache_dir", "token", "trust_remote_code") if k in options
    }
    with hub_errors(name):
        try:
            config = transformers.AutoConfig.from_pretrained(name, **shared)
            chosen = model_class or _class_of(config)
            model = chosen.from_pretrained(name, **options)
        except ValueError as error:  # the shim's own, or transformers' about config.json
            raise CheckpointError(f"Cannot load {name}: {error}") from error
        except OSError as error:
            cause = error.__cause__
            if cause is None and error.errno is not None:
                raise
            if cause is not None and "huggingface_hub" in type(cause).__module__:
                raise cause from error
            raise SourceError(f"Cannot load {name}: {str(error).splitlines()[0]}") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **shared)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if _has_tokenizer(name, shared):
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SourceError(f"The tokenizer of {name} cannot be loaded: {reason}") from error
        tokenizer = None
    return model.eval(), tokenizer if _has_tokenizer(name, shared) else None


def _has_tokenizer(name: str, shared: dict[str, Any]) -> bool:
    """Whether any file of a tokenizer is there; without one transformers invents an empty tokenizer."""
    if Path(name).is_dir():
        return has_tokenizer(Path(name))
    from huggingface_hub import try_to_load_from_cache

    where = {k: shared[k] for k in ("cache_dir", "revision") if shared.get(k) is not None}
    return any(isinstance(try_to_load_from_cache(name, file, **where), str) for file in TOKENIZER_FILES)


def _class_of(config: Any) -> Any:
    import transformers

    architecture = (getattr(config, "architectures", None) or [None])[0]
    if architecture and hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    for auto in getattr(config, "auto_map", None) or {}:
        if auto.startswith("AutoModel"):
            return getattr(transformers, auto)
    return transformers.AutoModel
