"""The demo's live screen, with rich.  Up is blue and ▲, down is orange and ▼: nothing is said by colour alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from logkv.cli.show import KINDS, Scene, Screen, Seen, Step, conditions, facts, factors, hints, plural, rates
from logkv.cli.terminal import size

WIDEST = 112        # columns
UP, DOWN, DEAD = "dodger_blue2", "dark_orange", "bold white on red3"
SPARKS = "▁▂▃▄▅▆▇█"
EIGHTHS = " ▏▎▍▌▋▊▉"
SAMPLES = 80        # that a spark line can have
CELLS = 8           # of a segment


class _Rate:
    """Events a second, over the last second."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def __call__(self, number: int) -> float:
        """Takes in how many there have been by now."""
        now = time.perf_counter()
        self._samples.append((now, number))
        while now - self._samples[0][0] > 1:
            self._samples.popleft()
        began, first = self._samples[0]
        return (number - first) / (now - began) if now > began else 0.0


class LiveScreen(Screen):
    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._prices: dict[tuple[int, str], deque[float]] = {}
        self._speeds: deque[float] = deque(maxlen=SAMPLES)
        self._put_rate = _Rate()
        self._read_rates: dict[int, _Rate] = {}

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._live.stop()

    @property
    def _width(self) -> int:
        return min(self._console.width, WIDEST)

    def draw(self, scene: Scene) -> None:
        title = Table.grid(expand=True)
        title.add_column(no_wrap=True)
        title.add_column(justify="right")
        plot = f"  one writes, {len(scene.readers)} read live, kill -9"
        title.add_row(Text.assemble(" ", ("LogKV", f"bold {UP}"), plot), Text(f"{scene.seconds:.1f} s ", "dim"))
        readers = Table.grid(expand=True)
        for _ in scene.readers:
            readers.add_column(ratio=1)
        readers.add_row(*(self._reader(number, reader, scene) for number, reader in enumerate(scene.readers)))
        whole = Table.grid()
        whole.add_column(width=self._width)
        for part in (title, self._writer(scene), readers, self._steps(scene)):
            whole.add_row(part)
        self._live.update(whole, refresh=True)

    def _writer(self, scene: Scene) -> Panel:
        dead = scene.step >= Step.DEAD
        speed = self._put_rate(scene.acknowledged)
        if scene.step == Step.STREAM:
            self._speeds.append(speed)
        inner = self._width - 4
        first = Text("killed  ", "bold") if dead else Text(f"{speed:>9,.0f} puts/s  ", "bold")
        last = Text(f"  {scene.acknowledged:,} acknowledged")
        first.append(_spark(self._speeds, inner - len(first) - len(last), floor=0), UP)
        first.pad_right(max(0, inner - len(first) - len(last)))
        name = Text.assemble("writer ", (f"· {_pid(scene.writer)}", "dim"), ("  ✖ dead ", DEAD) if dead else "")
        return Panel(Group(first.append_text(last), _segments(scene, inner)), title=name, title_align="left",
                     border_style="red3" if dead else UP)

    def _reader(self, number: int, reader: Seen, scene: Scene) -> Panel:
        room = self._width // len(scene.readers) - 4
        table = Table.grid(padding=(0, 1))
        for market in scene.markets:
            past = self._prices.setdefault((number, market), deque(maxlen=SAMPLES))
            price = reader.prices.get(market)
            if price is not None and scene.step <= Step.DEAD:
                past.append(float(price))
            arrow, style = _direction(past)
            table.add_row(Text(market, "bold"), Text(f"{price or '-':>8}", style), Text(arrow, style),
                          Text(_spark(past, room - 17), "dim"))
        rate = self._read_rates.setdefault(number, _Rate())(reader.reads)
        reads = f"{rate:,.0f} reads/s" if scene.step < Step.MEASURE else f"{reader.reads:,} reads"
        return Panel(table, title=Text.assemble(f"reader {number + 1} ", (f"· {_pid(reader.pid)}", "dim")),
                     title_align="left", subtitle=Text(reads, "bold"), subtitle_align="right", border_style="dim")

    def _steps(self, scene: Scene) -> Table:
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        room = max(self._width - 32, 4)
        killed = Text("SIGKILL for the writer, at any moment now")
        if scene.step >= Step.DEAD:
            killed = Text(f"SIGKILL for {scene.writer} after {scene.killed:.2f} s, in mid-stream", DEAD)
        reopened = Text("another process takes over the store")
        if scene.step == Step.DEAD:
            reopened = Text("the readers read on as if nothing had happened")
        elif scene.step > Step.DEAD:
            reopened = Text(f"opened again in {scene.reopened_ms:.2f} ms", "bold")
        checked = Text("every acknowledged put, compared byte for byte")
        if scene.step == Step.CHECK:
            checked = _bar(scene.checked / scene.acknowledged, room, UP).append(f"  {scene.checked:,}")
        elif scene.step > Step.CHECK:
            checked = Text(f"{scene.found:,} of {scene.acknowledged:,} acknowledged puts found",
                           "bold" if scene.found == scene.acknowledged else DEAD)
        verdict = "✔" if scene.found == scene.acknowledged else "✖"
        measured = Text("puts and gets a second on this machine")
        if scene.step == Step.MEASURE:
            measured = _bar(scene.measured, room, UP)
        for step, mark, name, text in ((Step.DEAD, "✖", "kill", killed), (Step.CHECK, "✔", "recover", reopened),
                                       (Step.MEASURE, verdict, "check", checked),
                                       (Step.DONE, "✔", "measure", measured)):
            past, now = scene.step >= step, scene.step == step - 1
            table.add_row(Text(f" {mark if past else '▸' if now else '·'} {name:8}", "" if past or now else "dim"),
                          text if past or now else Text(text.plain, "dim"))
        return table

    def report(self, report: Mapping[str, Any]) -> None:
        lines = Table.grid(padding=(0, 2))
        for column in ("left", "right", "left"):
            lines.add_column(justify=column)
        whole = report["found"] == report["acknowledged"]
        for what, much, remark in facts(report):
            lines.add_row(what, Text(much, "bold"), Text(remark, DEAD if remark.isupper() else UP))
        whole_report = Group(lines, "", Text(conditions(report), "dim"), "", self._rates(report))
        self._console.print(Panel(whole_report, title="report", title_align="left", padding=(1, 2),
                                  width=self._width, border_style=UP if whole else "red3"))
        for hint in hints(report):
            self._console.print(Text(f" {hint}", "dim"), soft_wrap=True)

    def _rates(self, report: Mapping[str, Any]) -> Table:
        measured = rates(report)
        room = (self._width - 56) // 2
        room = room if room >= CELLS else 0
        table = Table.grid(padding=(0, 1))
        for justify in ("left", *("right", "left") * len(KINDS)):
            table.add_column(justify=justify)       # type: ignore[arg-type]
        table.add_row("", *_flat((Text(f"{kind} a second", "dim"), "") for kind in KINDS))
        best = [max(numbers) for numbers in zip(*measured.values(), strict=True)]
        for (title, numbers), colour in zip(measured.items(), (UP, DOWN)):
            bars = (_filled(number / most, room, colour) for number, most in zip(numbers, best, strict=True))
            table.add_row(title, *_flat(zip((Text(f"{number:,}", "bold") for number in numbers), bars, strict=True)))
        if times := factors(report):
            table.add_row("", *_flat((Text(factor, f"bold {UP}"), "") for factor in times))
        return table


def _flat(pairs: Iterable[tuple[Text | str, Text | str]]) -> list[Text | str]:
    return [part for pair in pairs for part in pair]


def _pid(pid: int) -> str:
    return f"pid {pid}" if pid else "starting"


def _direction(past: deque[float]) -> tuple[str, str]:
    """An arrow and its colour."""
    if len(past) < 2 or past[-1] == past[-2]:
        return "·", ""
    return ("▲", UP) if past[-1] > past[-2] else ("▼", DOWN)


def _spark(past: Iterable[float], width: int, floor: float | None = None) -> str:
    """The last numbers as a line of small bars, the lowest at `floor` or at the least of them."""
    numbers = list(past)[-width:] if width > 0 else []
    if not numbers:
        return ""
    low = min(numbers) if floor is None else floor
    span = max(numbers) - low or 1
    return "".join(SPARKS[round((number - low) / span * (len(SPARKS) - 1))] for number in numbers)


def _filled(share: float, width: int, style: str) -> Text:
    """A solid bar, drawn in eighths of a column."""
    whole, eighths = divmod(round(share * width * 8), 8)
    return Text("█" * whole + EIGHTHS[eighths].strip(), style)


def _bar(share: float, width: int, style: str) -> Text:
    """What is done, and what is left."""
    done = _filled(share, width, style)
    return Text.assemble(done, ("░" * (width - len(done)), "dim"))


def _segments(scene: Scene, width: int) -> Text:
    """The log's last segments, as far as there is room: sealed ones, full ones, and the one that grows."""
    number = len(scene.segments)
    text = Text.assemble((f"{size(scene.log_bytes):>7}", "bold"), " of log  ")
    count = "  " + plural(number, "segment")
    room = width - len(text) - len(count)
    cells = min(max(room // max(number, 1) - 1, 2), CELLS)
    for full, sealed in scene.segments[-max(room // (cells + 1), 1):]:
        text.append_text(_bar(full, cells, UP if sealed else DOWN)).append(" ")
    text.pad_right(max(0, width - len(text) - len(count)))
    return text.append(count)
