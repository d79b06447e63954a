"""register, then transformers' own from_pretrained -> model, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import LosparseError, SourceError
from .shim.quantizer import register

__all__ = ["load", "register"]


def load(source: str | Path, *, model_class: Any = None, **options: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a compressed or dense checkpoint, a folder or a Hub id.

    The class is the one that config.json names, unless `model_class` (an AutoModel class or a model class)
    is given. The tokenizer is None if the checkpoint has none. `options` go to from_pretrained: dtype,
    device_map, revision, trust_remote_code and so on. SourceError if nothing can be loaded from there.
    """
    import transformers

    from .checkpoint.source import hub_errors

    register()
    name = str(Path(source).expanduser()) if Path(source).expanduser().exists() else str(source)
    shared = {k: options[k] for k in ("revision", "cache_dir", "token", "trust_remote_code") if k in options}
    with hub_errors(name):
        try:
            config = transformers.AutoConfig.from_pretrained(name, **shared)
            chosen = model_class or _class_of(config)
            model = chosen.from_pretrained(name, **options)
        except OSError as error:
            if isinstance(error, LosparseError) or error.__cause__ is None and error.errno is not None:
                raise
            if error.__cause__ is not None and "huggingface_hub" in type(error.__cause__).__module__:
                raise error.__cause__ from error
            raise SourceError(f"Cannot load {name}: {str(error).splitlines()[0]}") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **shared)
    except (OSError, ValueError, KeyError, ImportError):
        tokenizer = None
    return model.eval(), tokenizer


def _class_of(config: Any) -> Any:
    import transformers

    architecture = (getattr(config, "architectures", None) or [None])[0]
    if architecture and hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    for auto in getattr(config, "auto_map", None) or {}:
        if auto.startswith("AutoModel"):
            return getattr(transformers, auto)
    return transformers.AutoModel
