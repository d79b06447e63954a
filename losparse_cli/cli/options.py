"""Option types that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SIZE, TEXT, RUN, HUB, SHOW = "Size", "Calibration", "Run", "Hub", "Output"

Source = Annotated[str, typer.Argument(help="A folder, or a Hub id such as user/name.", show_default=False)]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub model.", rich_help_panel=HUB, show_default=False)
]
CacheDir = Annotated[
    Path | None, typer.Option(help="Where Hub downloads are kept.", rich_help_panel=HUB, show_default=False)
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model's own Python code.", rich_help_panel=HUB)
]
MaxShardSize = Annotated[str, typer.Option(help="Largest weight file to write.", rich_help_panel=RUN)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.", rich_help_panel=RUN)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.", rich_help_panel=SHOW)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=SHOW)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=SHOW)]
