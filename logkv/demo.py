"""`logkv demo`: prices are written and read live, the writer is killed, everything acknowledged is found again.

A put counts as acknowledged when its number has come through a pipe; the writer sends it after the put returned.
The stream of puts follows from its seed, so that the store can be compared with it, put by put.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import count, islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import logkv
from logkv.cli import explain

MARKETS = {"btc": (4411.99, 2), "eth": (303.15, 2), "sol": (24.682, 3), "doge": (0.12345, 5)}     # price, decimals
READERS = 2
STEP = 2e-4                     # by half of which a trade moves its market's price at the most
BEGAN = 1_503_230_400_000       # time of the first trade, in milliseconds; one more for each trade
ACK = 8                         # bytes; a write to a pipe is whole or absent also when its process is killed
POLL = 0.005                    # seconds in which the writer cannot fill the pipe
FRAME = 0.1                     # seconds between two drawings
RECORDS, BASELINE_RECORDS, ROUNDS = 200_000, 20_000, 5


def stream(seed: int) -> Iterator[tuple[str, str]]:
    """The puts of a seed, without end: a trade under `btc/<number>`, then its price under `btc`."""
    chance = random.Random(seed).random
    markets = [(name, decimals) for name, (_, decimals) in MARKETS.items()]
    prices = [price for price, _ in MARKETS.values()]
    for number in count():
        market = int(chance() * len(markets))
        name, decimals = markets[market]
        prices[market] *= 1 + (chance() - 0.5) * STEP
        price = f"{prices[market]:.{decimals}f}"
        yield f"{name}/{number:09d}", f'{{"time":{BEGAN + number},"price":{price},"size":{chance():.4f}}}'
        yield name, price


# -- the processes --------------------------------------------------------------------------------------


def _writer(path: str, seed: int, acks: Connection) -> None:
    pipe = acks.fileno()
    with logkv.Writer(path) as writer:
        for number, (key, value) in enumerate(stream(seed)):
            writer.put(key, value)
            os.write(pipe, number.to_bytes(ACK, "little"))


def _reader(path: str, prices: Connection) -> None:
    with logkv.Reader(path) as reader:
        while True:
            seen = {name: reader.get(name.encode()) for name in MARKETS}
            prices.send({name: price.decode() for name, price in seen.items() if price is not None})
            time.sleep(FRAME / 2)


def _child(role: Callable[..., None], problems: Connection, *arguments: Any) -> None:
    try:
        role(*arguments)
    except BrokenPipeError:
        pass                        # the parent has gone
    except Exception as problem:
        problems.send(f"the {role.__name__.strip('_')}: {explain(problem)}")


class _Show:
    """A writer and its readers, and what the parent knows of them."""

    def __init__(self, path: str, seed: int, cleanup: ExitStack) -> None:
        context = multiprocessing.get_context("spawn")

        def pipe() -> tuple[Connection, Connection]:
            ends = context.Pipe(duplex=False)
            for end in ends:
                cleanup.callback(end.close)
            return ends

        def start(role: Callable[..., None], *arguments: Any) -> BaseProcess:
            process = context.Process(target=_child, args=(role, problems, *arguments), daemon=True)
            # Ctrl-C is for the parent: the children inherit that they ignore it.
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                process.start()
                cleanup.callback(_end, process)
            finally:
                signal.signal(signal.SIGINT, before)
            return process

        self.acknowledged = 0
        self.prices: list[dict[str, str]] = [{} for _ in range(READERS)]
        self._problems, problems = pipe()
        self._acks, acks = pipe()
        os.set_blocking(self._acks.fileno(), False)
        self._writer = start(_writer, path, seed, acks)
        acks.close()                # what is left in the pipe has an end then
        self._readers = []
        for _ in range(READERS):
            prices, sent = pipe()
            self._readers.append(prices)
            start(_reader, path, sent)
            sent.close()

    def poll(self) -> None:
        """Takes in what the processes have sent; raises logkv.Error if one of them has a problem."""
        if not self._take_acks() or self._problems.poll():
            raise self._failure("writer")
        for number, reader in enumerate(self._readers):
            while reader.poll():
                try:
                    self.prices[number] = reader.recv()
                except EOFError:
                    raise self._failure("reader") from None

    def kill_writer(self) -> None:
        """Kills it and takes in what it had acknowledged."""
        self._writer.kill()
        self._writer.join()
        if self._writer.exitcode != -signal.SIGKILL:
            raise self._failure("writer")
        self._take_acks()

    def _failure(self, who: str) -> logkv.Error:
        return logkv.Error(self._problems.recv() if self._problems.poll(1) else f"the {who} ended by itself")

    def _take_acks(self) -> bool:
        """Whether the pipe has a writer still."""
        try:
            while chunk := os.read(self._acks.fileno(), 8192 * ACK):
                self.acknowledged += len(chunk) // ACK
                last = int.from_bytes(chunk[-ACK:], "little")
                if last + 1 != self.acknowledged:
                    raise logkv.Error(f"acknowledgement {last:,} came where {self.acknowledged - 1:,} was expected")
        except BlockingIOError:
            return True
        return False


def _end(process: BaseProcess) -> None:
    process.kill()
    process.join()
    process.close()


# -- the report -----------------------------------------------------------------------------------------


def find(store: Mapping[bytes, bytes], seed: int, acknowledged: int) -> int:
    """How many of a stream's first puts are in the store.

    A trade is, if its value is exact.  A price was overwritten by the next one: all of a market's are there if its
    latest is the last one acknowledged, or the one that was under way.
    """
    puts = stream(seed)
    found = 0
    latest: dict[str, str] = {}
    prices: Counter[str] = Counter()
    for key, value in islice(puts, acknowledged):
        if key in MARKETS:
            latest[key] = value
            prices[key] += 1
        elif store.get(key.encode()) == value.encode():
            found += 1
    under_way = next(puts)
    for key, value in latest.items():
        stored = store.get(key.encode())
        if stored == value.encode() or stored is not None and (key, stored.decode()) == under_way:
            found += prices[key]
    return found


def _baseline() -> Any:
    """The pure-Python store, which only a source checkout has; None without one."""
    root = Path(__file__).resolve().parent.parent
    if (root / "benchmarks" / "baseline.py").is_file():
        sys.path.insert(0, str(root))
    try:
        return importlib.import_module("benchmarks.baseline").BaselineStore
    except (ImportError, AttributeError):
        return None


def measure(directory: Path) -> dict[str, dict[str, int]]:
    """Puts and gets a second in a plain loop, of LogKV and of the baseline if it is there, by turns."""
    items = [(key.encode(), value.encode()) for key, value in islice(stream(0), 0, 2 * RECORDS, 2)]
    baseline = _baseline()
    counts = {"logkv": RECORDS} | ({"baseline": BASELINE_RECORDS} if baseline else {})
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    with ExitStack() as stack:
        stores = {name: stack.enter_context((logkv.open if name == "logkv" else baseline)(directory / name))
                  for name in counts}
        for turn in range(ROUNDS):
            for name, store in stores.items():
                part = items[:counts[name]][turn::ROUNDS]
                began = time.perf_counter()
                for key, value in part:
                    store.put(key, value)
                seconds[name, "puts"] += time.perf_counter() - began
        for turn in range(ROUNDS):
            for name, store in stores.items():
                keys = [key for key, _ in items[:counts[name]][turn::ROUNDS]]
                random.Random(turn).shuffle(keys)
                began = time.perf_counter()
                for key in keys:
                    store[key]
                seconds[name, "gets"] += time.perf_counter() - began
    return {name: {"records": records} | {f"{kind}_per_second": round(records / seconds[name, kind])
                                          for kind in ("puts", "gets")} for name, records in counts.items()}


def table(report: Mapping[str, Any]) -> str:
    """The report as text."""
    acknowledged, found = report["acknowledged"], report["found"]
    lines = [
        f"The writer was killed (SIGKILL) after {report['killed_after_ms'] / 1000:.2f} s, in mid-stream.", "",
        f"  puts acknowledged {acknowledged:>15,}",
        f"  found again       {found:>15,}     " + ("all" if found == acknowledged else
                                                     f"{acknowledged - found:,} ARE MISSING"),
        f"  reopened in       {report['reopened_ms']:>15,.2f} ms",
        f"  get(\"btc\")        {report['btc'] or '-':>15}",
        f"  log on disk       {report['log_bytes'] / 1e6:>15,.1f} MB",
        f"  index on disk     {report['index_bytes'] / 1e6:>15,.1f} MB", "",
        f"  {'':12}{'puts per second':>21}{'gets per second':>18}",
    ]
    rates = {name: [report[name][kind + "_per_second"] for kind in ("puts", "gets")]
             for name in ("logkv", "baseline") if report[name]}
    for name, title in (("logkv", "LogKV"), ("baseline", "pure Python")):
        if name in rates:
            lines.append(f"  {title:12}{rates[name][0]:>21,}{rates[name][1]:>18,}")
    if "baseline" in rates:
        puts, gets = (fast / slow for fast, slow in zip(rates["logkv"], rates["baseline"], strict=True))
        lines.append(f"  {'':12}{f'{puts:,.1f} x':>21}{f'{gets:,.1f} x':>18}")
    else:
        lines += ["", "  The pure-Python store to compare with is only in the source checkout."]
    lines += ["", f"To see the same prices again: --seed {report['seed']}"]
    if report["store"]:
        lines.append(f"The store: {report['store']}")
    return "\n".join(lines)


# -- live -----------------------------------------------------------------------------------------------


class _Screen:
    """Live prices: drawn in place on a terminal, a line a second elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stdout.isatty()
        self._height = 0
        self._next = 0.0 if self._terminal else 1.0

    def say(self, text: str) -> None:
        if not self._quiet:
            print(text, flush=True)

    def show(self, seconds: float, acknowledged: int, prices: list[dict[str, str]]) -> None:
        """To be called often; draws when it is time to."""
        if self._quiet or seconds < self._next:
            return
        if self._terminal:
            self._next += FRAME
            lines = [f"  {'':8}" + "".join(f"{f'reader {number}':>14}" for number in range(1, READERS + 1))]
            for name in MARKETS:
                lines.append(f"  {name:8}" + "".join(f"{seen.get(name, '-'):>14}" for seen in prices))
            lines += ["", f"  {seconds:4.1f} s   {acknowledged:,} puts acknowledged"]
            up = f"\x1b[{self._height}A" if self._height else ""
            print(up + "".join(f"{line}\x1b[K\n" for line in lines), end="", flush=True)
            self._height = len(lines)
        else:
            second = int(seconds)
            self._next = second + 1
            number = second % READERS           # the readers by turns
            seen = "  ".join(f"{name} {price:<8}" for name, price in prices[number].items())
            print(f"{second:3} s  reader {number + 1}:  {seen}  {acknowledged:,} puts acknowledged", flush=True)


def _empty(directory: str) -> Path:
    """A new or empty directory: puts of an earlier run would be found again, too."""
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--dir must be a new or an empty directory: {directory}")
    return path


def run(seconds: float, seed: int | None = None, directory: str | None = None, *, as_json: bool = False) -> int:
    """The demo; returns the exit status: 0 if every acknowledged put was found, else 1."""
    if seed is None:
        seed = secrets.randbits(32)
    screen = _Screen(quiet=as_json)
    with tempfile.TemporaryDirectory(prefix="logkv-demo-") as scratch, ExitStack() as cleanup:
        path = _empty(directory) if directory is not None else Path(scratch, "prices.db")
        logkv.open(path).close()
        screen.say(f"One process writes trades of {len(MARKETS)} markets, {READERS} others read the latest prices.\n")
        show = _Show(str(path), seed, cleanup)
        while not show.acknowledged:
            time.sleep(POLL)
            show.poll()
        began = time.perf_counter()
        end = seconds * random.Random(f"kill {seed}").uniform(0.5, 1)
        while (elapsed := time.perf_counter() - began) < end:
            time.sleep(min(POLL, end - elapsed))
            show.poll()
            screen.show(elapsed, show.acknowledged, show.prices)
        show.kill_writer()
        killed = time.perf_counter() - began
        screen.say("\nThe writer is dead. Looking for every put that it had acknowledged ...\n")

        began = time.perf_counter()
        store = cleanup.enter_context(logkv.open(path, "w"))
        reopened = time.perf_counter() - began
        found = find(store, seed, show.acknowledged)
        btc, stats = store.get("btc"), store.stats()
        cleanup.close()             # the readers have seen it all: a writer live, dead, and the next one
        rates = measure(Path(scratch))
        report = {
            "seed": seed,
            "killed_after_ms": round(1000 * killed, 1),
            "acknowledged": show.acknowledged,
            "found": found,
            "reopened_ms": round(1000 * reopened, 3),
            "btc": btc.decode() if btc is not None else None,
            "keys": stats["keys"],
            "log_bytes": stats["log_bytes"],
            "index_bytes": stats["index_bytes"],
            "logkv": rates["logkv"],
            "baseline": rates.get("baseline"),
            "store": directory,
        }
    print(json.dumps(report) if as_json else table(report))
    return 0 if found == show.acknowledged else 1
