"""The package's public names: what they are, in whatever order things are imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

import losparse_cli

ORDERS = [["inspect", "push", "compress"], ["verify", "export", "load"], ["evaluate", "load"], ["compress"], []]
SCRIPT = """
import os, torch, transformers  # once for all orders

def check(order):
    import losparse_cli
    for name in order:
        getattr(losparse_cli, name)
        __import__("losparse_cli." + name) if name != "inspect" else None
    for name in losparse_cli.__all__:
        value = getattr(losparse_cli, name)
        assert name == "__version__" or callable(value), (order, name, value)
    from losparse_cli.compress import run
    assert callable(losparse_cli.compress) and callable(losparse_cli.verify), order

for order in ORDERS:
    child = os.fork()
    if child == 0:
        check(order)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, order
"""


@pytest.mark.slow
def test_public_functions_stay_functions() -> None:
    subprocess.run([sys.executable, "-c", f"ORDERS = {ORDERS!r}{SCRIPT}"], check=True)


def test_names_are_listed_and_unknown_ones_refused() -> None:
    assert set(losparse_cli.__all__) <= set(dir(losparse_cli))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = losparse_cli.nothing  # type: ignore[attr-defined]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, losparse_cli; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
