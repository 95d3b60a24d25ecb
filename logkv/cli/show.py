"""What the demo shows: the scene, and a calm plain text of it where there is no rich or no terminal."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import TracebackType
from typing import Any, Self

from logkv.cli.terminal import size

NARROWEST = 56      # columns that the live screen needs


class Step(IntEnum):
    """How far the demo has come."""

    START = 0
    STREAM = 1
    DEAD = 2
    CHECK = 3
    MEASURE = 4
    DONE = 5


@dataclass
class Seen:
    """What a reader has said last."""

    pid: int = 0
    prices: dict[str, str] = field(default_factory=dict)
    reads: int = 0


@dataclass
class Scene:
    """What there is to see at a moment."""

    seed: int
    markets: list[str]
    readers: list[Seen]
    step: Step = Step.START
    writer: int = 0             # its pid
    seconds: float = 0.0        # since the first acknowledged put
    acknowledged: int = 0
    log_bytes: int = 0
    segments: list[tuple[float, bool]] = field(default_factory=list)     # how full, whether sealed
    killed: float = 0.0         # seconds after the first acknowledged put
    reopened_ms: float = 0.0
    checked: int = 0
    found: int = 0
    measured: float = 0.0       # share of the measurements that are done


class Screen:
    """Shows nothing: enough for `--json`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        pass

    def draw(self, scene: Scene) -> None:
        """To be called some ten times a second and at every step."""

    def report(self, report: Mapping[str, Any]) -> None:
        """To be called after the scene's end."""


class PlainScreen(Screen):
    """A line a second, a line for each step, the report; at most 60 columns."""

    def __init__(self) -> None:
        self._step: Step | None = None
        self._second = 0

    def draw(self, scene: Scene) -> None:
        if scene.step != self._step:
            self._step = scene.step
            self._say(self._headline(scene))
        if Step.STREAM <= scene.step <= Step.DEAD and int(scene.seconds) > self._second:
            self._second = int(scene.seconds)
            market = scene.markets[0]
            seen = "".join(f"  reader {number}: {reader.prices.get(market, '-'):7}"
                           for number, reader in enumerate(scene.readers, 1))
            self._say(f"{self._second:3} s{seen}  {scene.acknowledged:,} puts")

    def report(self, report: Mapping[str, Any]) -> None:
        self._say(report_text(report))

    def _headline(self, scene: Scene) -> str | None:
        match scene.step:
            case Step.START:
                return (f"One process writes trades of {len(scene.markets)} markets, {len(scene.readers)} others\n"
                        f"read the latest prices. Here is {scene.markets[0]} as they see it:\n")
            case Step.DEAD:
                return "\nSIGKILL: the writer is dead. The readers read on.\n"
            case Step.CHECK:
                return (f"\nOpened again in {scene.reopened_ms:.2f} ms. Looking for each of the\n"
                        f"{scene.acknowledged:,} puts that it had acknowledged ...")
            case Step.MEASURE:
                return f"{scene.found:,} found. Measuring ...\n"
        return None

    def _say(self, text: str | None) -> None:
        if text is not None:
            print(text, flush=True)


def choose(quiet: bool) -> Screen:
    """The screen that fits the output."""
    if quiet:
        return Screen()
    if not _can_redraw():
        return PlainScreen()
    try:
        from logkv.cli.live import LiveScreen
    except ImportError:         # there is no rich
        return PlainScreen()
    return LiveScreen()


def _can_redraw() -> bool:
    return (sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
            and "utf" in sys.stdout.encoding.lower()
            and os.get_terminal_size(sys.stdout.fileno()).columns >= NARROWEST)


# -- the report -----------------------------------------------------------------------------------------

KINDS = ("puts", "gets")
STORES = {"logkv": "LogKV", "baseline": "pure Python"}


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def facts(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The report's lines: what, how much, a remark."""
    acknowledged, found = report["acknowledged"], report["found"]
    return [
        ("puts acknowledged", f"{acknowledged:,}", ""),
        ("found again", f"{found:,}", "all" if found == acknowledged else f"{acknowledged - found:,} ARE MISSING"),
        ("reopened in", f"{report['reopened_ms']:,.2f} ms", ""),
        ("reads", f"{report['reads_while_dead']:,}", "while no writer lived"),
        ('get("btc")', report["btc"] or "-", ""),
        ("log", size(report["log_bytes"]), plural(report["segments"], "segment")),
        ("index", size(report["index_bytes"]), ""),
    ]


def rates(report: Mapping[str, Any]) -> dict[str, list[int]]:
    """Puts and gets a second of each store that was measured."""
    return {title: [report[name][f"{kind}_per_second"] for kind in KINDS]
            for name, title in STORES.items() if report[name]}


def conditions(report: Mapping[str, Any]) -> str:
    """What was measured."""
    fewer = f" ({report['baseline']['records']:,} in pure Python)" if report["baseline"] else ""
    return f"{report['logkv']['records']:,} short records{fewer}, nothing else running:"


def factors(report: Mapping[str, Any]) -> list[str]:
    """How many times as quick as the baseline; empty without one."""
    measured = rates(report)
    if len(measured) < len(STORES):
        return []
    return [f"{fast / slow:,.1f} x" for fast, slow in zip(*measured.values(), strict=True)]


def hints(report: Mapping[str, Any]) -> list[str]:
    """What to know at the end."""
    lines = [] if report["baseline"] else ["The pure-Python store to compare with is only in the source\ncheckout."]
    lines.append(f"To see the same prices again: --seed {report['seed']}")
    if report["store"]:
        lines.append(f"The store: {report['store']}")
    return lines


def report_text(report: Mapping[str, Any]) -> str:
    """The report as plain text."""
    lines = [f"The writer was killed (SIGKILL) after {report['killed_after_ms'] / 1000:.2f} s, in mid-stream.", ""]
    lines += [f"  {what:18}{much:>14}     {remark}".rstrip() for what, much, remark in facts(report)]
    lines += ["", textwrap.fill(conditions(report), 60, initial_indent="  ", subsequent_indent="  ")]
    lines += ["", f"  {'':12}" + "".join(f"{f'{kind} per second':>20}" for kind in KINDS)]
    lines += [f"  {title:12}" + "".join(f"{number:>20,}" for number in numbers)
              for title, numbers in rates(report).items()]
    if times := factors(report):
        lines.append(f"  {'':12}" + "".join(f"{factor:>20}" for factor in times))
    return "\n".join([*lines, "", *hints(report)])
