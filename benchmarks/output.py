"""What each benchmark's command does with its results: an earlier run's are read, a run's are printed, written and drawn."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

R = TypeVar("R")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all have."""
    parser.add_argument("--from", type=Path, metavar="FILE", dest="earlier",
                        help="measure nothing, take the results of an earlier run that --json wrote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page here too, with what is drawn")
    parser.add_argument("--chart", type=Path, metavar="DIR",
                        help="draw the charts, as SVG and PNG, into this directory (needs matplotlib)")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; ends the process where what they ask for cannot be."""
    arguments = parser.parse_args()
    if arguments.chart and not find_spec("matplotlib"):
        parser.error("--chart needs matplotlib: pip install 'logkv[bench]'")
    return arguments


def results(parser: argparse.ArgumentParser, arguments: argparse.Namespace, load: Callable[[Path], R],
            measure: Callable[[], R]) -> R:
    """Those of an earlier run, or measured now."""
    if not arguments.earlier:
        return measure()
    try:
        return load(arguments.earlier)
    except (OSError, ValueError) as problem:
        parser.error(f"--from: {problem}")


def publish(arguments: argparse.Namespace, page: Callable[[str | None], str], save: Callable[[Path], object],
            draw: Callable[[Path], bool]) -> bool:
    """Prints the page, writes and draws what was asked for.  page: its text, given where the charts are as seen from it.
    draw: into a directory; returns whether there was anything to draw, as this does."""
    print(page(None), end="")
    for file in (arguments.json, arguments.markdown):
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
    if arguments.json:
        save(arguments.json)
    drawn = False
    if arguments.chart:
        arguments.chart.mkdir(parents=True, exist_ok=True)
        drawn = draw(arguments.chart)
    if arguments.markdown:
        arguments.markdown.write_text(page(os.path.relpath(arguments.chart, arguments.markdown.parent) if drawn else None))
    return drawn
