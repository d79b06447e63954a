"""A report as a picture: PNG, SVG, or an HTML page that holds the SVG and the figures of every layer.

Names come from checkpoints that nobody vouches for: none is read as markup, in the picture or in the page.
"""

from __future__ import annotations

import importlib.util
import io
import os
import secrets
import stat
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError, OutputError, UsageError

if TYPE_CHECKING:
    from ..benchmark.report import BenchReport
    from ..checkpoint.report import Report
    from ..inspection import DenseReport

SUFFIXES = (".png", ".svg", ".html")
DOTS_PER_INCH = 110
SETTINGS = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and read aloud
    "svg.hashsalt": "losparse",  # the same report gives the same file
    "text.parse_math": False,  # a $ in a name is a $
    "text.usetex": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "hatch.linewidth": 1.2,
}


def check_plot(path: Path) -> None:
    """Everything that could stop `save_plot` and is known before the report is: call it before long work.

    UsageError for another suffix, MissingExtraError without matplotlib, OutputError where nothing can be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path.name} ends with none of .png, .svg and .html. Name the --plot with one of them.")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "plot", "Drawing")
    if not path.parent.is_dir():
        raise OutputError(f"The folder {path.parent} does not exist. Make it, or choose another place with --plot.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"The folder {path.parent} is not writable. Choose another place with --plot.")
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise OutputError(f"{path} is there, and no regular file. Choose another name with --plot.")


def save_plot(report: Report | DenseReport | BenchReport, path: Path) -> None:
    """Draw a report into `path`, in the form that its suffix says; a regular file there is replaced.

    Compressed: error and bytes by block and kind. Dense: energy against rank by kind, for which the report needs
    spectra. Of `bench`: times faster by shape of layer, and the model's speed and bytes over the dense one's. The file
    appears whole or not at all. Errors: those of `check_plot`; UsageError for a report without anything to draw.
    """
    check_plot(path)
    form = path.suffix.lower().removeprefix(".")
    if form == "html":
        from .page import page

        content = page(report, render(report, "svg", titled=False).decode()).encode()
    else:
        content = render(report, form)
    work = path.with_name(f".losparse-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(work, "xb") as file:
            file.write(content)
        os.replace(work, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"Cannot write {path}: {reason}. Choose another place with --plot.") from error
    finally:
        with suppress(OSError):
            work.unlink(missing_ok=True)


def render(report: Report | DenseReport | BenchReport, form: str, *, titled: bool = True) -> bytes:
    """The picture as a PNG or an SVG file; the same bytes for the same report. titled: with the headline in it."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "Drawing") from error
    from ..benchmark.report import BenchReport
    from . import figures, speed_figure

    buffer = io.BytesIO()
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes in a PNG, which is no news in a terminal.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        if isinstance(report, BenchReport):
            drawn, (title, _) = speed_figure.figure(report, titled=titled), speed_figure.headline(report)
        else:
            drawn, (title, _) = figures.figure(report, titled=titled), figures.headline(report)
        about: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type")) if form == "svg" else {}
        about["Title"] = title
        drawn.savefig(buffer, format=form, dpi=DOTS_PER_INCH if form == "png" else 72, metadata=about)
    return buffer.getvalue()
