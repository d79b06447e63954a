"""What vLLM calls when it starts, by the entry point `losparse`."""

from __future__ import annotations

from importlib import import_module


def register() -> None:
    """Make checkpoints with `quant_method: losparse` known to vLLM and to transformers, in this process; idempotent."""
    from ..shim import quantizer

    quantizer.register()
    import_module(f"{__package__}.vllm")  # which registers what it holds
