"""Tables that fit the terminal: space goes first, then what names share, then the columns that matter least.

Names stay whole, and whatever is left out is said above the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table

from .console import Console

Padding = tuple[int, int] | tuple[int, int, int, int]
PADDINGS: tuple[Padding, ...] = ((0, 1), (0, 1, 0, 0))
"""Room around columns: the first that fits the terminal is taken."""
TIGHT = (0, 0)
NARROW = 24  # columns of the terminal for words that wrap
ANY_WIDTH = 1000  # columns, more than any table here takes
FOLDED = "…"


@dataclass(frozen=True)
class Column:
    """Cells under a head, in rich's markup.

    goes: 0 for a column that always stays; the others go, 1 first. wraps: its words may stand on several lines.
    """

    head: str
    cells: Sequence[str]
    footer: str = ""
    left: bool = False
    goes: int = 0
    wraps: bool = False


def show_columns(
    out: Console, head: str, names: Sequence[str], columns: Sequence[Column], *, footer: str = "",
    after: Sequence[str] | None = None, bold: str | None = None,
) -> None:  # fmt: skip
    """Print a line for each of `names` (plain text, under `head`) with the cells of `columns`.

    after: markup behind each name. bold: the name whose line stands out. Footers are shown if there is one.
    """
    table, said = Table(), list[str]()
    for kept, shown, prefix, padding, narrow in _attempts(names, columns):
        whole = bool(footer or any(column.footer for column in kept))
        table = Table(box=box.SIMPLE_HEAD, show_footer=whole, padding=padding, pad_edge=False)
        table.show_edge = padding != TIGHT
        table.add_column(head, footer=footer, overflow="fold")
        for column in kept:
            table.add_column(
                column.head, footer=column.footer, justify="left" if column.left else "right",
                no_wrap=not column.wraps, overflow="fold", max_width=NARROW if column.wraps and narrow else None,
            )  # fmt: skip
        for i, name in enumerate(shown):
            behind = "" if after is None else after[i]
            style = "bold" if bold == names[i] else ""
            table.add_row(escape(name) + behind, *(column.cells[i] for column in kept), style=style)
        gone = [column.head for column in columns if column not in kept]
        said = [f"{FOLDED} stands for {prefix}"] if prefix else []
        said += [f"left out for want of room: {', '.join(gone)}"] if gone else []
        if table.__rich_measure__(out.out, out.out.options.update(width=ANY_WIDTH)).maximum <= out.out.width:
            break
    for line in said:
        out.show(line, style="dim", markup=False)
    out.table(table)


def _attempts(
    names: Sequence[str], columns: Sequence[Column]
) -> Iterator[tuple[list[Column], Sequence[str], str, Padding, bool]]:
    """(columns, names as shown, what was folded, padding, whether words wrap), from everything to the least."""
    folded, prefix = fold(names)
    kept = list(columns)
    going = sorted((column for column in columns if column.goes), key=lambda column: column.goes)
    for dropped in (None, *going):
        kept = [column for column in kept if column is not dropped]
        for shown, said in ((names, ""), (folded, prefix)) if prefix else ((names, ""),):
            for narrow in (False, True) if any(column.wraps for column in kept) else (False,):
                for padding in PADDINGS:
                    yield kept, shown, said, padding, narrow
    yield kept, folded, prefix, TIGHT, True


def fold(names: Sequence[str]) -> tuple[list[str], str]:
    """Names with the beginning that makes the longest of them shortest as FOLDED, and that beginning; "" if none does.

    A beginning ends with a dot, so that what is left is a name that --targets takes.
    """
    longest = max(names, key=len, default="")
    parts = longest.split(".")
    best, prefix = list(names), ""
    for count in range(1, len(parts)):
        beginning = ".".join(parts[:count]) + "."
        if len(beginning) <= len(FOLDED):
            continue
        folded = [FOLDED + name[len(beginning) :] if name.startswith(beginning) else name for name in names]
        if max(map(len, folded)) < max(map(len, best)):
            best, prefix = folded, beginning
    return best, prefix
