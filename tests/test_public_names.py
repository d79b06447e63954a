"""The package's public names: what they are, in whatever order things are imported."""

from __future__ import annotations

import subprocess
import sys
from inspect import signature

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


@pytest.mark.parametrize(
    ("function", "keyword", "said"),
    [
        ("compress", "targets", "Give recipe=Recipe(targets=...)."),
        ("plan", "solver", "Give recipe=Recipe(solver=...)."),
        ("compress", "tokens", "Give calibration=Calibration(tokens=...)."),
        ("compress", "calibration_length", "Give calibration=Calibration(length=...)."),
        ("refine", "refine_minutes", "Give refinement=ModelRefinement(minutes=...)."),
        ("compress", "refine", "Give refinement."),
        ("finetune", "train_file", "Give task=TaskRequest(train_file=...)."),
        ("compress", "calibraton", "Did you mean 'calibration'?"),
        ("evaluate", "window", "Did you mean 'windows'?"),
        ("verify", "nothing_like_it", "argument 'nothing_like_it'."),
    ],
)
def test_a_keyword_that_is_none_is_told_where_it_belongs(function: str, keyword: str, said: str) -> None:
    with pytest.raises(TypeError, match=rf"^{function}\(\) got an unexpected keyword argument '{keyword}'\.") as raised:
        getattr(losparse_cli, function)("nowhere", **{keyword: 1})
    assert str(raised.value).endswith(said)


def test_errors_note_what_options_are_called_in_python() -> None:
    with pytest.raises(losparse_cli.LosparseError, match="--calibration FILE") as raised:
        losparse_cli.compress("nowhere", refinement="blocks")
    assert raised.value.__notes__ == ["In Python --refine is refinement, --calibration is calibration"]
    with pytest.raises(losparse_cli.LosparseError, match="--calibration-tokens") as raised:
        losparse_cli.compress("nowhere", calibration={"source": "self", "tokens": 0})
    assert raised.value.__notes__ == ["In Python --calibration-tokens is calibration=Calibration(tokens=...)"]
    with pytest.raises(losparse_cli.LosparseError) as raised:
        losparse_cli.verify("nowhere")
    assert not hasattr(raised.value, "__notes__")


def test_what_a_function_takes_is_still_seen() -> None:
    assert "bits" in signature(losparse_cli.compress).parameters
    assert (losparse_cli.compress.__module__, losparse_cli.load.__name__) == ("losparse_cli.compress", "load")
