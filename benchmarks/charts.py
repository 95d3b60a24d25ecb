"""The charts of a run; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from benchmarks.compaction import MIB, Compaction, Run as Compacted, ceiling
from benchmarks.growth import SHOWN, Growth
from benchmarks.report import TARGETS_OF, shape_in_words
from benchmarks.results import Measured, Run

# Told apart also by those who do not see all colours, and in print: Okabe and Ito's blue and vermilion, and grey.
LOGKV, BASELINE, DICT = "#0072B2", "#D55E00", "#D9D9D9"
TEXT, QUIET = "#222222", "#666666"
WIDTH = 800 / 96  # inches: as wide as a README
WORDS = {
    "get": "random get",
    "miss": "get of a missing key",
    "items": "walk over all items",
    "fill": "first put of a key",
    "overwrite": "overwrite",
    "delete": "delete",
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": TEXT,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "svg.hashsalt": "logkv",  # the same run gives the same file
}


def compared(measured: Measured) -> dict[str, float]:
    """LogKV's time as a part of the dict's, by workload."""
    found = {workload: measured.ratio(workload, "logkv", "dict") for workload in WORDS}
    return {workload: ratio for workload, ratio in found.items() if ratio is not None}


def slowest(shapes: list[Measured]) -> float:
    """The longest of the openings that are shown, in ms."""
    return max(median(opened.times) for measured in shapes for opened in measured.openings) / 1e6


def beside_dict(axes: Axes, measured: Measured) -> None:
    """Bars of LogKV's time on those of the built-in dict, and how many times as fast as the baseline that is."""
    shown = compared(measured)
    rows, end = range(len(shown)), 1.02 * max(1.0, *shown.values())
    axes.barh(rows, [1] * len(shown), height=0.78, color=DICT, label="built-in dict")
    axes.barh(rows, list(shown.values()), height=0.42, color=LOGKV, label="LogKV")
    for row, (workload, ratio) in enumerate(shown.items()):
        fits = ratio > 0.3 * end
        axes.text(ratio + (-0.02 if fits else 0.02) * end, row, f"{ratio:.2f}", va="center_baseline", weight="bold",
                  ha="right" if fits else "left", color="white" if fits else LOGKV)
        times = measured.ratio(workload, "baseline", "logkv")
        if times:
            axes.text(1.03, row, f"{times:,.0f}×" if times >= 10 else f"{times:.1f}×", va="center_baseline",
                      weight="bold", color=BASELINE, transform=axes.get_yaxis_transform())
    axes.set_yticks(rows, [WORDS[workload] for workload in shown], color=TEXT)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, end)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 5, 10]))
    axes.set_xlabel("shorter is faster")


def bars_legend(place: Axes | SubFigure, bars: Axes, **where: Any) -> None:
    """What the bars and the numbers beside them are."""
    handles, labels = bars.get_legend_handles_labels()
    handles.append(Line2D([], [], linestyle="", marker="$n×$", markersize=13, color=BASELINE))
    legend = place.legend(handles, [*labels, "times as fast as pure Python"], ncols=3, frameon=False, borderpad=0,
                          columnspacing=1.2, handletextpad=0.6, **where)
    legend.set_in_layout(place is not bars)  # there it may reach beyond the bars


def openings(axes: Axes, measured: Measured, highest: float) -> None:
    """The time of opening, by the number of keys; the number at a line's end is the last."""
    for engine, killed, colour, marker, label in (
        ("logkv", False, LOGKV, "o", "LogKV, closed cleanly"),
        ("logkv", True, LOGKV, "s", "LogKV, after kill -9"),
        ("baseline", False, BASELINE, "^", None),
    ):
        opened = measured.opened(engine, killed)
        times = [median(one.times) / 1e6 for one in opened]
        axes.plot([one.keys for one in opened], times, color=colour, marker=marker, markersize=5, label=label,
                  markerfacecolor="white" if killed else colour, linestyle="--" if killed else "-")
        if opened and not killed:
            text, at, align = ("", (0, 6), "center") if label else ("pure-Python\nstore ", (-8, -8), "right")
            axes.annotate(text + duration(times[-1]), (opened[-1].keys, times[-1]), at, textcoords="offset points",
                          color=colour, ha=align, weight="bold")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(x=0.1)
    axes.set_ylim(0.08, 2 * highest)  # room for the legend
    axes.xaxis.set_major_formatter(FuncFormatter(lambda keys, _: many(keys)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda time, _: duration(time)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=20))
        axis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=DICT, linewidth=0.5)
    axes.set_xlabel("keys in the store")


def duration(milliseconds: float) -> str:
    """With two digits that mean something."""
    rounded = float(f"{milliseconds:.2g}")
    return f"{rounded / 1000:g} s" if rounded >= 1000 else f"{rounded:g} ms"


def many(keys: float) -> str:
    """A power of ten in few letters."""
    return f"{keys / 1e6:g} M" if keys >= 1e6 else f"{keys / 1e3:g} k" if keys >= 1e3 else f"{keys:g}"


def overview(run: Run) -> Figure:
    """The first picture of a newcomer: beside the dict, beside pure Python, and opening."""
    measured = run.of(TARGETS_OF) or run.shapes[0]
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    beside_dict(left, measured)
    left.set_title("Time of an operation, built-in dict = 1", pad=24)
    bars_legend(left, left, loc="lower left", bbox_to_anchor=(0, 1.01))
    openings(right, measured, slowest([measured]))
    right.set_title("Time to open a store", pad=24)
    right.legend(loc="lower left", frameon=False)
    figure.supxlabel(shape_in_words(measured), color=QUIET, fontsize=8)
    return figure


def shapes(run: Run) -> Figure:
    """The same for every shape, side by side."""
    figure = Figure(figsize=(WIDTH, 6.8), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False).flat
    above.suptitle("Time of an operation, built-in dict = 1", x=0.01, ha="left", weight="bold")
    below.suptitle("Time to open a store", x=0.01, ha="left", weight="bold")
    bars, lines = (part.subplots(1, len(run.shapes), sharey=True, squeeze=False)[0] for part in (above, below))
    for at, measured in enumerate(run.shapes):
        beside_dict(bars[at], measured)
        bars[at].set_title(shape_in_words(measured).replace(", ", ",\n"), fontsize=8, weight="normal")
        openings(lines[at], measured, slowest(run.shapes))
    bars_legend(above, bars[0], loc="outside upper right")
    lines[0].legend(loc="lower left", frameon=False)
    return figure


def draw(run: Run, directory: Path) -> bool:
    """Write `overview` and `shapes`, as SVG and PNG; False if the run lacks what they show."""
    if not all(compared(measured) and measured.openings for measured in run.shapes):
        return False
    with matplotlib.rc_context(STYLE):
        for plot in (overview, shapes):
            save(plot(run), directory / plot.__name__)
    return True


def save(figure: Figure, file: Path) -> None:
    """As SVG and PNG."""
    figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(file.with_suffix(".png"), dpi=192)


# ---- a store that grows


def latencies(axes: Axes, growth: Growth, name: str, colour: str) -> None:
    """Median, 99.9% and the longest of each window's puts."""
    millions = [keys / 1e6 for keys in growth.fill.filled]
    labels = ("median", f"{SHOWN[1]:g}%", "longest")
    for label, style, times in zip(labels, ("-", "--", ""), zip(*growth.fill.windows[name], strict=True), strict=True):
        axes.plot(millions, [time / 1e6 for time in times], color=colour, linestyle=style, label=label, linewidth=1.2,
                  marker="" if style else ".", markersize=3)
    axes.set_title(name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda time, _: short(time)))
    axes.yaxis.set_major_locator(LogLocator(numticks=20))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=DICT, linewidth=0.5)


def short(milliseconds: float) -> str:
    """Any time, with its unit."""
    if milliseconds < 1e-3:
        return f"{milliseconds * 1e6:.3g} ns"
    return f"{milliseconds * 1e3:.3g} µs" if milliseconds < 1 else duration(milliseconds)


def index_bytes(axes: Axes, growth: Growth) -> None:
    """The index's bytes a key over the fill."""
    millions, found = [keys / 1e6 for keys in growth.fill.filled], growth.fill.index
    axes.plot(millions, found, color=LOGKV)
    axes.axhline(mean(found), color=LOGKV, linestyle=":", linewidth=1)
    axes.set_title(f"Bytes of the index a key, on average {mean(found):.1f}")
    axes.set_ylim(0, 2 * mean(found))
    axes.grid(axis="y", color=DICT, linewidth=0.5)
    axes.set_xlabel("million keys in the store")


def growing(growth: Growth) -> Figure:
    """Time of a put beside a dict and a bare loop, above the index's size."""
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.3, 1]).flat
    above.suptitle("Time of each put, clock included", x=0.01, ha="left", weight="bold")
    columns = above.subplots(1, 3, sharey=True)
    for axes, name, colour in zip(columns, growth.fill.windows, (LOGKV, QUIET, BASELINE), strict=True):
        latencies(axes, growth, name, colour)
    columns[0].legend(frameon=False, loc="upper left", ncols=3, columnspacing=0.6, handlelength=1.2, borderaxespad=0)
    columns[0].margins(y=0.2)
    index_bytes(below.subplots(), growth)
    return figure


def draw_growth(growth: Growth, directory: Path) -> None:
    """Write `growth`, as SVG and PNG."""
    with matplotlib.rc_context(STYLE):
        save(growing(growth), directory / "growth")


# ---- space that comes back


def disk_use(axes: Axes, run: Compacted) -> None:
    """What a run took of the disk, beside its live data and the ceiling."""
    done = [moment.operations / 1e6 for moment in run.moments]
    axes.plot(done, [ceiling(moment.live) / MIB for moment in run.moments], color=BASELINE, linestyle="--",
              label="ceiling")
    axes.plot(done, [moment.disk / MIB for moment in run.moments], color=LOGKV, linewidth=1, label="on disk")
    axes.fill_between(done, [moment.live / MIB for moment in run.moments], color=DICT, label="live data")
    axes.set_title(f"{run.workload}: {run.share:.0%} of the ceiling at most")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MiB")
    axes.grid(axis="y", color=DICT, linewidth=0.5)


def compacting(found: Compaction) -> Figure:
    """The run of each workload that came nearest to the ceiling."""
    names = found.workloads
    rows = -(-len(names) // 2)
    figure = Figure(figsize=(WIDTH, 0.5 + 2.2 * rows), layout="constrained")
    places = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes, name in zip(places, names):
        disk_use(axes, max(found.of(name), key=lambda run: run.share))
        axes.set_xlabel("million operations")
    for axes in places[len(names):]:
        axes.set_axis_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
    return figure


def draw_compaction(found: Compaction, directory: Path) -> None:
    """Write `compaction`, as SVG and PNG."""
    with matplotlib.rc_context(STYLE):
        save(compacting(found), directory / "compaction")
