"""Which layers a request means: by name, by glob, by class, or by regular expression."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from ..errors import UsageError

EXPRESSION = "re:"
Kinds = Mapping[str, tuple[str, ...]]
"""Module name -> name of its class, and of those that it is made from."""


def matches(target: str, name: str, kinds: tuple[str, ...] = ()) -> bool:
    """Whether one of `target`'s parts, with commas between them, means the module `name`, of the classes `kinds`.

    `q_proj` and `layers.0` are modules of that name with all that lies inside, wherever they are, as in PEFT. With *,
    ? or [ it is a glob on the whole name. `Linear` is a class, and `re:` begins an expression that the name's begin
    must match, both as in llm-compressor.
    """
    return any(_means(part, name, kinds) for part in parts(target))


def parts(target: str) -> list[str]:
    """What stands between the commas; those inside brackets belong to a glob or an expression."""
    return [part for text in re.split(r",(?![^\[\](){}]*[\])}])", target) if (part := text.strip())]


def only(name: str) -> str:
    """The target that means the module `name` alone."""
    return f"{EXPRESSION}{re.escape(name)}$"


def check_expressions(target: str, option: str) -> None:
    """UsageError naming `option` if `target` is empty, or an expression in it is none."""
    if not parts(target):
        raise UsageError(f"{option} is empty: name layers, such as q_proj, or leave it out.")
    for part in parts(target):
        if part.startswith(EXPRESSION):
            try:
                re.compile(part.removeprefix(EXPRESSION))
            except re.error as error:
                raise UsageError(f"{option} {part!r} is no regular expression: {error}. Correct it.") from error


def require_match(target: str, kinds: Kinds, compressible: Iterable[str], option: str) -> None:
    """UsageError with near misses if a part of `target`, given by `option`, means no layer, compressible or not."""
    for part in parts(target):
        if not any(_means(part, name, kinds[name]) for name in kinds):
            raise UsageError(f"{option} {part!r} matches no layer. {_near_misses(part, list(compressible))}")


def choose(
    kinds: Kinds, dense: Mapping[str, str], targets: Iterable[str], ignore: Iterable[str]
) -> tuple[list[str], dict[str, str]]:
    """The layers that `targets` and `ignore` leave, and all others with the reason.

    kinds: of every layer of the model; dense: those that cannot be compressed, with the reason. UsageError with near
    misses on a target that means no layer.
    """
    possible = [name for name in kinds if name not in dense]
    for option, asked in (("--targets", targets), ("--ignore", ignore)):
        for target in asked:
            require_match(target, kinds, possible, option)
    chosen, skipped = [], dict(dense)
    for name in possible:
        if targets and not any(matches(target, name, kinds[name]) for target in targets):
            skipped[name] = "not among --targets"
        elif any(matches(target, name, kinds[name]) for target in ignore):
            skipped[name] = "named by --ignore"
        else:
            chosen.append(name)
    return chosen, skipped


def _means(part: str, name: str, kinds: tuple[str, ...]) -> bool:
    if part.startswith(EXPRESSION):
        return re.match(part.removeprefix(EXPRESSION), name) is not None
    if any(sign in part for sign in "*?["):
        return fnmatchcase(name, part)
    return part in kinds or f".{part}." in f".{name}."


def _is_expression_of(part: str, names: list[str]) -> bool:
    """Whether PEFT, which takes expressions without a mark, would find one of the names."""
    try:
        return any(re.fullmatch(part, name) for name in names)
    except re.error:  # a glob may be none
        return False


def _near_misses(part: str, names: list[str]) -> str:
    """A sentence with a few module names that resemble `part`, or with the expression that it is meant as."""
    if not part.startswith(EXPRESSION) and _is_expression_of(part, names):
        return f"Did you mean '{EXPRESSION}{part}'?"
    core = part.removeprefix(EXPRESSION).strip("*.^$")
    close = [name for name in names if core.lower() in name.lower()] or get_close_matches(core, names, 3, 0.3)
    suffixes = {name.rpartition(".")[2]: name for name in names}
    close = close or [suffixes[s] for s in get_close_matches(core.rpartition(".")[2], list(suffixes), 3, 0.4)]
    return (
        f"Close names: {', '.join((close or names)[:3])}. A target is a module's name or the end of one, a glob, a "
        "class such as Linear, or re: and an expression."
    )
