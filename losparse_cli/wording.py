"""What goes wrong in a call of a public function, in Python's words: errors name options as the command line does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

from .errors import LosparseError

PARTS = {
    "recipe": (("Recipe",), ""),
    "calibration": (("Calibration",), "calibration_"),
    "refinement": (("Refinement", "ModelRefinement"), "refine_"),
    "how": (("Finetuning", "Pruning"), ""),
    "task": (("TaskRequest",), ""),
}
"""Argument -> classes whose fields it holds, and what their options on the command line begin with."""


def in_python(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which says of a keyword that it does not have where that belongs, and notes beside its errors what
    the options that they name are called here. One that takes any keyword is returned as it is."""
    parameters = signature(function).parameters
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return function

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in parameters:
                raise TypeError(_unexpected(function.__name__, name, parameters))
        try:
            return function(*args, **kwargs)
        except LosparseError as error:
            options = dict.fromkeys(re.findall(r"--[a-z][a-z-]*[a-z]", str(error)))
            places = {option: place_of(option[2:].replace("-", "_"), parameters) for option in options}
            if any(places.values()):
                error.add_note("In Python " + ", ".join(f"{o} is {place}" for o, place in places.items() if place))
            raise

    return call


def place_of(name: str, parameters: Iterable[str]) -> str:
    """How a setting is given to a function of these parameters; "" if it is none of its."""
    if name in parameters:
        return name
    for parameter, (classes, prefix) in PARTS.items():
        if parameter not in parameters:
            continue
        if name == prefix.removesuffix("_") and prefix:
            return parameter
        for one in classes:
            field = name.removeprefix(prefix)
            if field in getattr(import_module(__package__), one).__dataclass_fields__:
                return f"{parameter}={one}({field}=...)"
    return ""


def _unexpected(function: str, name: str, parameters: Iterable[str]) -> str:
    place = place_of(name, parameters)
    near = get_close_matches(name, list(parameters), 1)
    remedy = f" Give {place}." if place else f" Did you mean {near[0]!r}?" if near else ""
    return f"{function}() got an unexpected keyword argument {name!r}.{remedy}"
