"""Linear layers whose weight other code than their own reads or changes: found in the source of every module's class.

A compressed layer's `weight` is one-dimensional, and holds S alone: any use but the layer's own breaks, or is wrong.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from functools import cache
from typing import Any

from torch import nn

BASES = ("transformers.modeling_utils", "transformers.generation", "transformers.integrations")
"""Modules of transformers whose classes are part of every model, and use weights only to change or to save them."""


def read_by_others(model: nn.Module) -> dict[str, str]:
    """Module name -> the class that uses the module's `weight` for more than its dtype, as Mamba's and RWKV's do."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        kind: Any = type(module)
        patterns = _read_by(kind)
        for inside, _ in module.named_modules() if patterns else ():
            if any(re.fullmatch(pattern, inside) for pattern in patterns):
                found.setdefault(f"{name}.{inside}" if name else inside, kind.__name__)
    _definitions.cache_clear()  # trees of whole files are large
    return found


def readers(model: nn.Module) -> dict[str, str]:
    """Last part of a name -> a class in the model that uses `weight` of something called so for more than its dtype.

    Wider than `read_by_others`: a method may be handed what it uses, as DeBERTa's head is the embeddings. An empty name
    stands for what a getter returns.
    """
    kinds = {
        base for module in model.modules() for base in type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    }
    named = [kind for kind in kinds if not kind.__module__.startswith(("torch.", *BASES))]
    found = {part: kind.__name__ for kind in named for part in _last_parts(kind)}
    _definitions.cache_clear()
    return found


def reads_own(kind: Any) -> bool:
    """Whether a class uses its own `weight` for more than its dtype, or has no source that would tell."""
    bases = kind.__mro__[: kind.__mro__.index(nn.Embedding)]
    found = [_definitions(base.__module__).get(base.__qualname__, ()) for base in bases]
    _definitions.cache_clear()
    nodes = [
        node for every in found for definition in every for method in _methods(definition) for node in _uses(method)
    ]
    own = any(isinstance(node.value, ast.Name) and node.value.id == "self" for node in nodes)
    return own or not all(found)


@cache
def _last_parts(kind: Any) -> frozenset[str]:
    found = set()
    for definition in _definitions(kind.__module__).get(kind.__qualname__, ()):
        for method in _methods(definition):
            aliases = _aliases(method)
            for node in _uses(method):
                value = aliases.get(node.value.id, node.value) if isinstance(node.value, ast.Name) else node.value
                for place in (node.value, value):
                    if isinstance(place, ast.Name | ast.Attribute):
                        found.add(place.id if isinstance(place, ast.Name) else place.attr)
                    elif isinstance(place, ast.Call) and "embeddings" in ast.unparse(place.func):
                        found.add("")
    return frozenset(found - {"self"})


def _read_by(kind: Any) -> frozenset[str]:
    """Patterns of the names, inside a module of the class, of those whose weight its methods use."""
    return frozenset().union(*map(_read_by_own, kind.__mro__[: kind.__mro__.index(nn.Module)]))


@cache
def _read_by_own(kind: Any) -> frozenset[str]:
    """The same, of those methods that the class itself defines."""
    found: set[str] = set()
    for definition in _definitions(kind.__module__).get(kind.__qualname__, ()):
        for method in _methods(definition):
            found |= _read_in(method)
    return frozenset(found)


def _methods(definition: ast.ClassDef) -> list[ast.FunctionDef]:
    """Those that compute; what only fills or changes weights does not count."""
    methods = [node for node in definition.body if isinstance(node, ast.FunctionDef)]
    return [method for method in methods if not re.match(r"_*(init|reset|resize|tie|set)_", method.name)]


@cache
def _definitions(module: str) -> dict[str, list[ast.ClassDef]]:
    """The classes that a module's source defines, by their qualified names; none where there is no source.

    A file is parsed once: `inspect.getsource` of a class parses all of its file.
    """
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return {}
    found: dict[str, list[ast.ClassDef]] = {}
    inside: list[tuple[str, ast.AST]] = [("", tree)]
    while inside:
        name, node = inside.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found.setdefault(name + child.name, []).append(child)
                inside.append((f"{name}{child.name}.", child))
            elif isinstance(child, ast.FunctionDef):
                inside.append((f"{name}{child.name}.<locals>.", child))
            elif isinstance(child, ast.stmt):
                inside.append((name, child))  # if, try, with
    return found


def _read_in(method: ast.FunctionDef) -> set[str]:
    aliases = _aliases(method)
    return {pattern for node in _uses(method) if (pattern := _path(node.value, aliases))}


def _aliases(method: ast.FunctionDef) -> dict[str, ast.expr]:
    """Local name -> what it is another name for."""
    assigned = [node for node in ast.walk(method) if isinstance(node, ast.Assign)]
    return {node.targets[0].id: node.value for node in assigned if isinstance(node.targets[0], ast.Name)}


def _uses(method: ast.FunctionDef) -> list[ast.Attribute]:
    """Every `.weight` that is used for more than its kind."""
    harmless: set[ast.AST] = set()
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr in ("dtype", "device"):
            harmless.add(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            harmless.add(node.args[0])
    return [n for n in ast.walk(method) if isinstance(n, ast.Attribute) and n.attr == "weight" and n not in harmless]


def _path(node: ast.expr, aliases: dict[str, ast.expr], deep: int = 9) -> str:
    """The pattern of a module's name, "" if `node` is no module inside this one, or nothing is known of it."""
    if isinstance(node, ast.Attribute):
        before, part = node.value, re.escape(node.attr)
    elif isinstance(node, ast.Subscript):
        before, part = node.value, r"[^.]+"
    elif isinstance(node, ast.Name) and node.id in aliases and deep:
        return _path(aliases[node.id], aliases, deep - 1)
    else:
        return ""
    if isinstance(before, ast.Name) and before.id == "self":
        return part
    outer = _path(before, aliases, deep)
    # What a loop runs over, or a function is given, may be any module inside.
    return rf"{outer}[.]{part}" if outer else rf"(.+[.])?{part}"
