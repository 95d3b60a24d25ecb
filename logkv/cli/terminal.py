"""What the commands show: with rich where it is installed and the output is a terminal, as plain text elsewhere."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

REDRAW = 0.2        # seconds between two drawings of a plain progress line


class Update(Protocol):
    """Says how much is done, and of how much."""

    def __call__(self, done: int, total: int | None = None) -> None: ...


def explain(problem: BaseException) -> str:
    """One line, without the number that an OSError begins with; its notes follow in brackets."""
    if isinstance(problem, KeyboardInterrupt):
        text = "interrupted"
    elif isinstance(problem, OSError) and problem.strerror:
        where = f": {os.fsdecode(problem.filename)}" if problem.filename is not None else ""
        text = f"{problem.strerror}{where}"
    else:
        text = str(problem) or type(problem).__name__
    return " ".join(text.splitlines()) + "".join(f" ({note})" for note in getattr(problem, "__notes__", ()))


@contextmanager
def noted(note: Callable[[], str]) -> Iterator[None]:
    """Whatever ends the block early says how far it came: `note` is asked then; "" is nothing to say."""
    try:
        yield
    except BaseException as problem:
        if said := note():
            problem.add_note(said)
        raise


def emit(thing: object) -> None:
    """One JSON object on a line of standard output, flushed."""
    print(json.dumps(thing), flush=True)


def size(number: float) -> str:
    """A number of bytes for people: 312 B, 4.7 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.0f} B" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.0f} TB" if number >= 999.5 else f"{number:.3g} TB"


def counted(number: int, thing: str) -> str:
    """A number and a noun: 1 row, 2,000 rows."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _signs() -> tuple[str, str, str]:
    """What bars are drawn with: full, half, empty."""
    return ("█", "▒", "░") if "utf" in (sys.stdout.encoding or "").lower() else ("#", "+", ".")


def bar(share: float, width: int = 24) -> str:
    """A horizontal bar; whatever is more than nothing can be seen, and whatever is missing."""
    full, _, empty = _signs()
    filled = min(width - (share < 1), max(round(share * width), share > 0))
    return full * filled + empty * (width - filled)


def split_bar(share: float, other: float, width: int = 24) -> str:
    """A bar of two shares and the rest; of each, whatever is more than nothing can be seen."""
    shares = (share, other, max(1 - share - other, 0.0))
    cells = [max(round(part * width), part > 0) for part in shares]
    widest = max(range(3), key=lambda at: (cells[at], at))
    cells[widest] += width - sum(cells)
    return "".join(sign * count for sign, count in zip(_signs(), cells, strict=True))


def split_bar_head(name: str, other: str, rest: str) -> str:
    """Says what its parts are."""
    return "  ".join(map(" ".join, zip(_signs(), (name, other, rest), strict=True)))


def percent(share: float) -> str:
    """0% and 100% are said of nothing and of everything only."""
    if 0 < share < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= share < 1 else f"{share:.0%}"


def _rich(stream: Any) -> bool:
    """Whether rich is there and somebody looks."""
    if not stream.isatty():
        return False
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


# -- tables ---------------------------------------------------------------------------------------------


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
    """Prints a table.  Numbers, with their thousands set apart, stand on the right; an empty head is left out."""
    cells = [[_cell(value) for value in row] for row in rows]
    right = [bool(rows) and all(isinstance(row[column], int) for row in rows) for column in range(len(head))]
    if _rich(sys.stdout):
        _rich_table(head, cells, right, title)
    else:
        _plain_table(head, cells, right, title)


def _rich_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool], title: str | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=Text(title, "bold") if title else None, title_justify="left", box=box.SIMPLE_HEAD,
                  show_header=any(head), header_style="bold cyan")
    for name, is_number in zip(head, right, strict=True):
        drawn.add_column(Text(name), justify="right" if is_number else "left")
    for row in rows:
        drawn.add_row(*map(Text, row))
    Console().print(drawn)


def _plain_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool], title: str | None) -> None:
    lines = [head, *rows] if any(head) else rows
    widths = [max((len(line[column]) for line in lines), default=0) for column in range(len(head))]
    if title:
        print(title)
    for line in lines:
        print("  ".join(cell.rjust(width) if is_number else cell.ljust(width)
                        for cell, width, is_number in zip(line, widths, right, strict=True)).rstrip())


# -- progress -------------------------------------------------------------------------------------------


@contextmanager
def progress(title: str, total: int | None = None, *, unit: str = "records",
             show: bool | None = None) -> Iterator[Update]:
    """A bar on standard error with rate and time left; yields what is to be called with how much is done, and with the
    total where that was not known before.

    unit: "bytes" are shown as sizes, others as numbers.  show: None where standard error is a terminal.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda done, total=None: None
    elif _rich(sys.stderr):
        with _rich_progress(title, total, unit) as update:
            yield update
    else:
        line = _Line(title, total, unit)
        try:
            yield line.update
        finally:
            line.end()


def _state(done: int, total: int, rate: float, unit: str) -> str:
    """How much, how fast, how long still; total: 0 if it is not known."""
    if unit == "bytes":
        parts = [size(done), f"{size(rate)}/s"]
    else:
        parts = [f"{done:,} {unit}", f"{rate:,.0f}/s"]
    if total:
        parts += [f"{done / total:.0%}", f"{(total - done) / rate:.0f} s left" if rate else ""]
    return ", ".join(filter(None, parts))


@contextmanager
def late_progress(title: str, *, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress that begins when it is told how much there is to do: update(done, total)."""
    with ExitStack() as stack:
        update: Update | None = None

        def tell(done: int, total: int) -> None:
            nonlocal update
            if update is None:
                update = stack.enter_context(progress(title, total, unit=unit))
            update(done)

        yield tell


@contextmanager
def _rich_progress(title: str, total: int | None, unit: str) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class State(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(_state(int(task.completed), int(task.total or 0), task.finished_speed or task.speed or 0, unit))

    with Progress(TextColumn("{task.description}", markup=False), BarColumn(), State(), console=Console(stderr=True),
                  redirect_stdout=False) as drawn:
        task = drawn.add_task(title, total=total)
        yield lambda done, total=None: drawn.update(task, completed=done, total=total)


class _Line:
    """Progress without rich: a line that is written anew a few times a second."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._began = time.monotonic()
        self._next = 0.0
        self._done = 0

    def update(self, done: int, total: int | None = None) -> None:
        self._done, self._total = done, total or self._total
        now = time.monotonic()
        if now >= self._next:
            self._next = now + REDRAW
            self._draw(now)

    def _draw(self, now: float) -> None:
        rate = self._done / max(now - self._began, 1e-6)
        sys.stderr.write(f"\r{self._title}: {_state(self._done, self._total or 0, rate, self._unit)}\x1b[K")
        sys.stderr.flush()

    def end(self) -> None:
        self._draw(time.monotonic())
        sys.stderr.write("\n")
