"""A run as a page in Markdown: ratios, targets, times, and how they were measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from benchmarks import workloads
from benchmarks.results import Measured, Run
from benchmarks.workloads import ENGINES, OPENINGS, SHAPES, WHOLE, WORKLOADS

TARGETS_OF = "16+100"
RATIOS = [("logkv", "dict"), ("baseline", "logkv")]


@dataclass(frozen=True, slots=True)
class Target:
    """A number that LogKV is to reach, and the one that was found; None where it was not measured."""

    what: str
    found: float | None
    bound: float
    at_least: bool = False

    def row(self) -> list[str]:
        """Its line in the table."""
        assert self.found is not None
        met = self.found >= self.bound if self.at_least else self.found <= self.bound
        sign = "≥" if self.at_least else "≤"
        return [self.what, f"{self.found:,.2f}", f"{sign} {self.bound:,g}", "met" if met else "**missed**"]


def targets(run: Run) -> list[Target]:
    """What is asked of LogKV, beside what was found."""
    measured = run.of(TARGETS_OF)
    if measured is None:
        return []
    keys = f"{measured.keys:,}"

    def growth(killed: bool) -> float | None:
        opened = measured.opened("logkv", killed)
        return median(ratios(opened[-1].times, opened[0].times)) if len(opened) > 1 else None

    asked = [
        Target("random get, of dict", measured.ratio("get", "logkv", "dict"), 0.7),
        Target("fill, of dict", measured.ratio("fill", "logkv", "dict"), 1.2),
        Target("miss, of dict", measured.ratio("miss", "logkv", "dict"), 1),
        Target("items, of dict", measured.ratio("items", "logkv", "dict"), 2.5),
        Target("random get, times as fast as the baseline", measured.ratio("get", "baseline", "logkv"), 5, True),
        Target("recovery, times as fast as the baseline", measured.ratio("recover", "baseline", "logkv"), 15, True),
        Target(f"index, bytes a key at {keys} keys", measured.index_bytes, 12),
        Target("a store of one short key, KiB on disk", run.one_key and run.one_key / 1024, 100),
        Target(f"opening {keys} keys after a clean close, of 1,000", growth(killed=False), 2.5),
        Target(f"opening {keys} keys after a kill, of 1,000", growth(killed=True), 2.5),
    ]
    return [target for target in asked if target.found is not None]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, padded to be read as it is."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(zip(cells, widths))]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (width - 1) + ":") if at else "-" * width for at, width in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def number(value: float | None) -> str:
    """With as many digits as mean something; a dash for what was not measured."""
    return "–" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def shape_in_words(measured: Measured) -> str:
    """What the keys and values were."""
    shape = SHAPES[measured.shape]
    return f"{measured.keys:,} keys of {shape.key} bytes, values of {shape.value:,} bytes"


def ratios_table(run: Run) -> str:
    """The ratios of every shape, side by side."""
    head = ["", *(f"{one}/{other}, {measured.shape}" for one, other in RATIOS for measured in run.shapes)]
    rows = []
    for workload in WORKLOADS + OPENINGS:
        found = [measured.ratio(workload, one, other) for one, other in RATIOS for measured in run.shapes]
        if any(found):
            rows.append([workload, *map(number, found)])
    return table(head, rows) if rows else ""


def times_table(measured: Measured) -> str:
    """The medians of one shape."""
    head = ["ns an operation", *(engine.name for engine in ENGINES), *("/".join(pair) for pair in RATIOS)]
    rows = []
    for workload in (name for name in WORKLOADS + OPENINGS if name in measured.samples):
        whole = workload in WHOLE
        times = [measured.median(workload, engine.name) for engine in ENGINES]
        cells = [time / 1000 if whole and time is not None else time for time in times]
        compared = [measured.ratio(workload, *pair) for pair in RATIOS]
        rows.append([f"{workload}, µs a call" if whole else workload, *map(number, [*cells, *compared])])
    return table(head, rows) if rows else ""


def openings_table(measured: Measured) -> str:
    """The openings of one shape in fresh processes."""
    rows = [
        [f"{opened.engine}, {opened.keys:,} keys, after a {'kill' if opened.killed else 'clean close'}",
         *(number(of(opened.times) / 1000) for of in (median, min, max))]
        for opened in measured.openings
    ]
    return table(["opening in a fresh process, µs", "median", "least", "most"], rows) if rows else ""


def page(run: Run, charts: str | None = None) -> str:
    """The whole page; `charts`: the directory of the figures, as seen from the page."""
    return "\n\n".join(part for part in _parts(run, charts) if part) + "\n"


def _parts(run: Run, charts: str | None) -> Iterator[str]:
    yield "# Benchmarks"
    yield (f"One run of `python -m benchmarks`, interleaved rounds: {run.rounds}, seed: {run.seed}. Times depend on "
           "the machine and on what else it does; only ratios within one run mean anything.")
    yield f"Machine: {run.machine}. LogKV {run.logkv}."
    if charts is not None:
        yield f"![Time of LogKV beside the built-in dict, and of opening a store]({charts}/overview.svg)"
    yield "## Ratios"
    yield ("`logkv/dict`: LogKV's time as a part of the built-in dict's; below 1, LogKV is faster. `baseline/logkv`: "
           "how many times as fast as the baseline it is, a pure-Python store of the same format.")
    yield ratios_table(run)
    if asked := targets(run):
        yield f"What is asked of LogKV at {TARGETS_OF}:"
        yield table(["target", "found", "bound", ""], [target.row() for target in asked])
    yield "## Times"
    if charts is not None:
        yield f"![The same for all shapes of keys and values]({charts}/shapes.svg)"
    for measured in run.shapes:
        yield f"### {measured.shape}"
        yield f"{shape_in_words(measured)}."
        yield times_table(measured)
        yield openings_table(measured)
    yield "## Method"
    yield "- " + (workloads.__doc__ or "").partition("\n- ")[2].strip()


def ratios(ones: list[int], others: list[int]) -> Iterator[float]:
    """Of what was measured in the same turn."""
    return (one / other for one, other in zip(ones, others, strict=True))
