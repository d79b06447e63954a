"""docs/reference.md from the Typer app: every command, argument and option, with its default and help.

python docs/generate_reference.py           writes docs/reference.md
python docs/generate_reference.py --check   exit code 1 if it is not what would be written
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import typer.main

from losparse_cli.cli import app as terminal

PAGE = Path(__file__).with_name("reference.md")
VALUES = {int: " INTEGER", float: " FLOAT", str: " TEXT", Path: " PATH", bool: ""}

HEAD = """# Command reference

<!-- Written by docs/generate_reference.py from the commands themselves: edit those, then run it again. -->

`python -m losparse_cli` is the same as `losparse`. Every command takes `--help`, or `-h`.
Messages and progress go to standard error; tables, CSV and JSON go to standard output.
"""
COMPLETION = "| `--install-completion`, `--show-completion` | off | Completion of commands by the current shell. |\n"


def reference() -> str:
    """The whole page."""
    codes = re.search(r"Exit codes: (.*)\.", terminal.main.__doc__ or "")
    assert codes is not None, "the docstring of main() lists the exit codes"
    root: Any = typer.main.get_command(terminal.app)
    callback: Any = terminal.app.registered_callback
    text = HEAD + f"Exit codes: {codes[1]}.\n" + tables(root, callback.callback) + COMPLETION
    for info in terminal.app.registered_commands:
        function: Any = info.callback
        name = info.name or ""
        command = root.commands[name]
        arguments = [p.name.upper() for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(["losparse", name, *arguments, "[OPTIONS]"])
        text += f"\n## {name}\n\n```text\n{usage}\n```\n\n{plain(inspect.cleandoc(function.__doc__ or ''))}\n"
        text += tables(command, function)
    return text


def tables(command: Any, function: Callable[..., Any]) -> str:
    """A table of the arguments, then one for each panel of options, in the order of the signature."""
    hints = get_type_hints(function)
    panels: dict[str, list[str]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        shown = next(p for p in command.params if p.name == name)
        if shown.param_type_name == "argument":
            title, names = "Argument", f"`{name.upper()}`"
        else:
            title, value = shown.rich_help_panel or "Option", VALUES[type_of(hints[name])]
            names = ", ".join(f"`{flag}{value}`" for flag in (*shown.opts, *shown.secondary_opts))
        default = default_text(parameter.default, hints[name])
        if isinstance(shown.show_default, str):
            default = f"`{shown.show_default}`"
        panels.setdefault(title, []).append(f"| {names} | {default} | {plain(shown.help or '')} |\n")
    return "".join(
        f"\n| {title} | Default | Meaning |\n|---|---|---|\n{''.join(rows)}" for title, rows in panels.items()
    )


def type_of(hint: Any) -> Any:
    """int of `int`, `int | None` and `list[int] | None`."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return type_of(kinds[0]) if get_origin(hint) is not None and kinds else hint


def default_text(default: Any, hint: Any) -> str:
    if default is inspect.Parameter.empty:
        return "required"
    if type_of(hint) is bool:
        return "on" if default else "off"
    return "none" if default is None else f"`{default}`"


def plain(text: str) -> str:
    """Text without rich's markup, safe in a table; what was dim is an example, shown as code."""
    text = re.sub(r"\[dim\](.*?)\[/dim\]", r"`\1`", text)
    return re.sub(r"\[/?[a-z ]+\]", "", text).replace("<", "&lt;").replace("|", "\\|")


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(__doc__)
        return 2
    text = reference()
    if not arguments:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/reference.md is not what the commands say. Run: python docs/generate_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
