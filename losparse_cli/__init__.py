"""losparse: any transformer as W ≈ U V + S, smaller on disk and in memory.

    import losparse_cli
    result = losparse_cli.compress("user/model", bits=3.25, calibration="text.txt")
    model, tokenizer = losparse_cli.load(result.output)

Names are imported when first used, so that `import losparse_cli` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "bench": ".bench",
    "compress": ".compress",
    "decode": ".generation.loop",
    "forecast": ".compression.estimate",
    "plan": ".compress",
    "Progress": ".progress",
    "Recipe": ".budget.recipe",
    "Calibration": ".text.request",
    "ModelRefinement": ".compression.request",
    "Refinement": ".compression.request",
    "refine": ".refine",
    "finetune": ".finetune",
    "Finetuning": ".finetuning.request",
    "Pruning": ".finetuning.pruner",
    "TaskRequest": ".tasks.request",
    "evaluate": ".evaluate",
    "export": ".export",
    "export_gguf": ".export",
    "export_packed": ".export",
    "generate": ".generate",
    "inspect": ".inspection",
    "join": ".join",
    "load": ".load",
    "push": ".push",
    "register": ".load",
    "verify": ".verify",
    "LosparseError": ".errors",
}

__all__ = [
    "Calibration",
    "Finetuning",
    "LosparseError",
    "ModelRefinement",
    "Progress",
    "Pruning",
    "Recipe",
    "Refinement",
    "TaskRequest",
    "__version__",
    "bench",
    "compress",
    "decode",
    "evaluate",
    "export",
    "export_gguf",
    "export_packed",
    "finetune",
    "forecast",
    "generate",
    "inspect",
    "join",
    "load",
    "plan",
    "push",
    "refine",
    "register",
    "verify",
]

if TYPE_CHECKING:
    from .bench import bench
    from .budget.recipe import Recipe
    from .compress import compress, plan
    from .compression.estimate import forecast
    from .compression.request import ModelRefinement, Refinement
    from .errors import LosparseError
    from .evaluate import evaluate
    from .export import export, export_gguf, export_packed
    from .finetune import finetune
    from .finetuning.pruner import Pruning
    from .finetuning.request import Finetuning
    from .generate import generate
    from .generation.loop import decode
    from .inspection import inspect
    from .join import join
    from .load import load, register
    from .progress import Progress
    from .push import push
    from .refine import refine
    from .tasks.request import TaskRequest
    from .text.request import Calibration
    from .verify import verify


def _in_python(value: Any) -> Any:
    """A function whose errors speak of arguments, not of options alone; anything else as it is."""
    if not isinstance(value, FunctionType):
        return value
    from .errors import in_python

    return in_python(value)


class _Package(ModuleType):
    """Keeps `losparse_cli.compress` the function when the module of the same name is imported.

    Python binds every imported submodule to its package, which would hide the public function behind it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOMES and value.__name__ == f"{__name__}.{name}":
            value = _in_python(getattr(value, name))
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = _in_python(getattr(import_module(_HOMES[name], __name__), name))
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted([*vars(self), *_HOMES])


sys.modules[__name__].__class__ = _Package
