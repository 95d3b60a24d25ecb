"""What the benchmarks' commands share: progress, and numbers among the arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.workloads import Tell


@contextmanager
def progress(total: int) -> Iterator[Tell]:
    """What runs and the time left, on standard error if that is a terminal.

    Drawn only between two measurements: a thread that draws would be measured too.
    """
    if not sys.stderr.isatty():
        yield lambda what, keys: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TimeRemainingColumn(), TextColumn("left  {task.description}"))
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, redirect_stdout=False,
                  redirect_stderr=False, transient=True, speed_estimate_period=600) as bar:
        task = bar.add_task("", total=total)
        before = 0

        def tell(what: str, keys: int) -> None:
            nonlocal before
            bar.update(task, advance=before, description=what, refresh=True)
            before = keys

        yield tell


def positive(text: str) -> int:
    """For argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a whole number above 0 is wanted, not {text!r}")
    return int(text)
