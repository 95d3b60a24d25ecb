"""`logkv demo`: prices are written and read live, the writer is killed, everything acknowledged is found again.

A put counts as acknowledged when its number has come through a pipe; the writer sends it after the put returned.
The stream of puts follows from its seed, so that the store can be compared with it, put by put.
"""

from __future__ import annotations

import argparse
import importlib
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
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import logkv
from logkv.cli import Commands
from logkv.cli.show import Scene, Screen, Seen, Step, choose
from logkv.cli.terminal import emit, explain

MARKETS = {"btc": (4411.99, 2), "eth": (303.15, 2), "sol": (24.682, 3), "doge": (0.12345, 5)}     # price, decimals
READERS = 2
STEP = 2e-4                     # by half of which a trade moves its market's price at the most
BEGAN = 1_503_230_400_000       # time of the first trade, in milliseconds; one more for each trade
ACK = 8                         # bytes; a write to a pipe is whole or absent also when its process is killed
POLL = 0.005                    # seconds in which the writer cannot fill the pipe
FRAME = 0.1                     # seconds between two drawings
SEGMENT = 32 << 20              # bytes: small, for the log to be seen growing
ALONE = 1.2                     # seconds that the readers are left without a writer
BURST = 100                     # reads of all prices between two looks at the clock
BETWEEN = 8192                  # puts that are checked between two looks at the screen
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
    with logkv.Writer(path, segment_size=SEGMENT) as writer:
        for number, (key, value) in enumerate(stream(seed)):
            writer.put(key, value)
            os.write(pipe, number.to_bytes(ACK, "little"))


def _reader(path: str, seen: Connection) -> None:
    """Reads the latest prices half of the time, and says now and then which, and how many reads that were."""
    keys = [name.encode() for name in MARKETS]
    reads = 0
    with logkv.Reader(path) as reader:
        while True:
            rest = time.monotonic() + FRAME / 4
            while time.monotonic() < rest:
                for _ in range(BURST):
                    prices = [reader.get(key) for key in keys]
                reads += BURST * len(keys)
            seen.send(({name: price.decode() for name, price in zip(MARKETS, prices, strict=True) if price}, reads))
            time.sleep(FRAME / 4)


def _child(role: Callable[..., None], problems: Connection, *arguments: Any) -> None:
    try:
        role(*arguments)
    except BrokenPipeError:
        pass                        # the parent has gone
    except Exception as problem:
        problems.send(f"the {role.__name__.strip('_')}: {explain(problem)}")


class _Processes:
    """A writer and its readers; puts what they say into the scene."""

    def __init__(self, path: str, scene: Scene, cleanup: ExitStack) -> None:
        context = multiprocessing.get_context("spawn")

        def pipe() -> tuple[Connection, Connection]:
            ends = context.Pipe(duplex=False)
            for end in ends:
                cleanup.callback(end.close)
            return ends

        def start(role: Callable[..., None], *arguments: Any) -> BaseProcess:
            process = context.Process(target=_child, args=(role, problems, *arguments), daemon=True)
            # Ctrl-C is for the parent, and waits until the child is on the list: children inherit what is blocked.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                process.start()
                cleanup.callback(_end, process)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return process

        resource_tracker.ensure_running()       # its start would unblock SIGINT
        self._scene = scene
        self._problems, problems = pipe()
        self._acks, acks = pipe()
        os.set_blocking(self._acks.fileno(), False)
        self._writer = start(_writer, path, scene.seed, acks)
        scene.writer = self._writer.pid or 0
        acks.close()                # what is left in the pipe has an end then
        self._killed = False
        self._seen = []
        for reader in scene.readers:
            seen, sent = pipe()
            self._seen.append(seen)
            reader.pid = start(_reader, path, sent).pid or 0
            sent.close()

    def poll(self) -> None:
        """Takes in what the processes have sent; raises logkv.Error if one of them has a problem."""
        if not (self._killed or self._take_acks()) or self._problems.poll():
            raise self._failure("writer")
        for reader, seen in zip(self._scene.readers, self._seen, strict=True):
            while seen.poll():
                try:
                    reader.prices, reader.reads = seen.recv()
                except EOFError:
                    raise self._failure("reader") from None

    def kill_writer(self) -> None:
        """Kills it and takes in what it had acknowledged."""
        self._writer.kill()
        self._writer.join()
        if self._writer.exitcode != -signal.SIGKILL:
            raise self._failure("writer")
        self._take_acks()
        self._killed = True

    def _failure(self, who: str) -> logkv.Error:
        return logkv.Error(self._problems.recv() if self._problems.poll(1) else f"the {who} ended by itself")

    def _take_acks(self) -> bool:
        """Whether the pipe has a writer still."""
        scene = self._scene
        try:
            while chunk := os.read(self._acks.fileno(), 8192 * ACK):
                scene.acknowledged += len(chunk) // ACK
                last = int.from_bytes(chunk[-ACK:], "little")
                if last + 1 != scene.acknowledged:
                    raise logkv.Error(f"acknowledgement {last:,} came where {scene.acknowledged - 1:,} was expected")
        except BlockingIOError:
            return True
        return False


def _end(process: BaseProcess) -> None:
    process.kill()
    process.join()
    process.close()


# -- the report -----------------------------------------------------------------------------------------


def _ignore(done: float) -> None:
    pass


def find(store: Mapping[bytes, bytes], seed: int, acknowledged: int,
         progress: Callable[[int], None] = _ignore) -> int:
    """How many of a stream's first puts are in the store.

    A trade is, if its value is exact.  A price was overwritten by the next one: all of a market's are there if its
    latest is the last one acknowledged, or the one that was under way.
    """
    puts = stream(seed)
    found = 0
    latest: dict[str, str] = {}
    prices: Counter[str] = Counter()
    for number, (key, value) in enumerate(islice(puts, acknowledged)):
        if number % BETWEEN == 0:
            progress(number)
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
    root = Path(__file__).resolve().parents[2]
    if (root / "benchmarks" / "baseline.py").is_file():
        sys.path.insert(0, str(root))
    try:
        return importlib.import_module("benchmarks.baseline").BaselineStore
    except (ImportError, AttributeError):
        return None


def measure(directory: Path, progress: Callable[[float], None] = _ignore) -> dict[str, dict[str, int]]:
    """Puts and gets a second in a plain loop, of LogKV and of the baseline if it is there, by turns.

    `progress` gets the share that is done.
    """
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
            progress((turn + 1) / (2 * ROUNDS))
        for turn in range(ROUNDS):
            for name, store in stores.items():
                keys = [key for key, _ in items[:counts[name]][turn::ROUNDS]]
                random.Random(turn).shuffle(keys)
                began = time.perf_counter()
                for key in keys:
                    store[key]
                seconds[name, "gets"] += time.perf_counter() - began
            progress(0.5 + (turn + 1) / (2 * ROUNDS))
    return {name: {"records": records} | {f"{kind}_per_second": round(records / seconds[name, kind])
                                          for kind in ("puts", "gets")} for name, records in counts.items()}


# -- the run --------------------------------------------------------------------------------------------


class _Play:
    """What happens on the stage, one act after the other."""

    def __init__(self, path: Path, scene: Scene, screen: Screen, cleanup: ExitStack) -> None:
        self._scene, self._screen = scene, screen
        self._drawn = 0.0
        self._enter(Step.START)
        self._processes = _Processes(str(path), scene, cleanup)
        self._reader = cleanup.enter_context(logkv.Reader(path))
        self._began = time.perf_counter()

    def stream(self, seconds: float) -> None:
        """Until every reader has seen a price, and then for some time."""
        while not all(reader.prices for reader in self._scene.readers):
            self._watch(POLL)
        self._began = time.perf_counter()
        self._enter(Step.STREAM)
        self._watch(seconds)

    def kill(self) -> int:
        """Kills the writer and lets the readers go on alone; returns how many reads they do meanwhile."""
        self._processes.kill_writer()
        self._scene.killed = time.perf_counter() - self._began
        before = sum(reader.reads for reader in self._scene.readers)
        self._enter(Step.DEAD)
        self._watch(ALONE)
        return sum(reader.reads for reader in self._scene.readers) - before

    def check(self, store: Mapping[bytes, bytes]) -> None:
        self._enter(Step.CHECK)
        self._scene.found = find(store, self._scene.seed, self._scene.acknowledged, self._checked)

    def measure(self, scratch: Path) -> dict[str, dict[str, int]]:
        """To be called after all processes have gone."""
        self._enter(Step.MEASURE)
        measured = measure(scratch, self._measured)
        self._enter(Step.DONE)
        return measured

    def _enter(self, step: Step) -> None:
        self._scene.step = step
        self._screen.draw(self._scene)

    def _watch(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            time.sleep(min(POLL, left))
            self._tick()

    def _checked(self, puts: int) -> None:
        self._scene.checked = puts
        self._tick()

    def _measured(self, share: float) -> None:
        self._scene.measured = share
        self._screen.draw(self._scene)

    def _tick(self) -> None:
        """Takes in what is new and draws it when it is time to."""
        self._processes.poll()
        now = time.perf_counter()
        if now - self._drawn < FRAME:
            return
        self._drawn = now
        scene = self._scene
        if scene.step >= Step.STREAM:
            scene.seconds = now - self._began
        if scene.step <= Step.DEAD:
            stats = self._reader.stats()
            scene.log_bytes = left = stats["live_bytes"] + stats["dead_bytes"]
            scene.segments = []
            for segment in stats["segments"]:
                scene.segments.append((min(left / segment["capacity"], 1.0), segment["sealed"]))
                left = max(left - segment["capacity"], 0)
        self._screen.draw(scene)


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
    scene = Scene(seed, list(MARKETS), [Seen() for _ in range(READERS)])
    screen = choose(quiet=as_json)
    with tempfile.TemporaryDirectory(prefix="logkv-demo-") as scratch, ExitStack() as cleanup:
        path = _empty(directory) if directory is not None else Path(scratch, "prices.db")
        logkv.open(path, segment_size=SEGMENT).close()
        with screen:
            play = _Play(path, scene, screen, cleanup)
            play.stream(seconds * random.Random(f"kill {seed}").uniform(0.5, 1))
            reads = play.kill()
            began = time.perf_counter()
            store = cleanup.enter_context(logkv.open(path, "w", segment_size=SEGMENT))
            scene.reopened_ms = 1000 * (time.perf_counter() - began)
            play.check(store)
            btc, stats = store.get("btc"), store.stats()
            cleanup.close()         # the readers have seen it all: a writer live, dead, and the next one
            rates = play.measure(Path(scratch))
        report = {
            "seed": seed,
            "killed_after_ms": round(1000 * scene.killed, 1),
            "acknowledged": scene.acknowledged,
            "found": scene.found,
            "reopened_ms": round(scene.reopened_ms, 3),
            "reads": sum(reader.reads for reader in scene.readers),
            "reads_while_dead": reads,
            "btc": btc.decode() if btc is not None else None,
            "keys": stats["keys"],
            "log_bytes": stats["live_bytes"] + stats["dead_bytes"],
            "index_bytes": stats["index_bytes"],
            "segments": len(stats["segments"]),
            "logkv": rates["logkv"],
            "baseline": rates.get("baseline"),
            "store": directory,
        }
    if as_json:
        emit(report)
    else:
        screen.report(report)
    return 0 if scene.found == scene.acknowledged else 1


# -- the command ----------------------------------------------------------------------------------------


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"a number above 0 and up to 3600 is wanted, not {text!r}")
    return seconds


def _demo(arguments: argparse.Namespace) -> int:
    return run(arguments.seconds, arguments.seed, arguments.dir, as_json=arguments.json)


def register(commands: Commands) -> None:
    demo = commands.add(
        "demo", _demo, "stream prices, kill the writer in mid-stream, look what is there",
        "A process writes trades of a few made-up markets as fast as it can, two others read the latest prices, "
        "then the writer is killed with SIGKILL. The store is opened again and asked for every put that had "
        "been acknowledged; a report says what was found and how quick the store is on this machine. "
        "The status is 0 if everything was found, 1 if not.", "logkv demo --seconds 10")
    demo.add_argument("--seconds", type=_seconds, default=6.0, metavar="S",
                      help="the writer is killed at a random moment in the second half of this time (default: 6)")
    demo.add_argument("--seed", type=int, metavar="N", help="decides the trades and the moment of the kill "
                      "(default: another one each time)")
    demo.add_argument("--dir", metavar="DIR", help="write the store to this new or empty directory and keep it "
                      "(default: a temporary directory, removed at the end)")
    demo.add_argument("--json", action="store_true", help="print the report only, as one JSON object")
