"""The command `logkv`.  Exit status: 0 done, 1 something missing or damaged, 2 wrong usage or an error, 130 Ctrl-C."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from logkv import __version__

Command = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """Wrong usage is one line and status 2, as any other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"logkv: {message} (see {self.prog} --help)\n")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"a number above 0 and up to 3600 is wanted, not {text!r}")
    return seconds


def _demo(arguments: argparse.Namespace) -> int:
    from logkv import demo
    return demo.run(arguments.seconds, arguments.seed, arguments.dir, as_json=arguments.json)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="logkv", description="LogKV: a persistent dict that keeps everything in a log.")
    parser.add_argument("--version", action="version", version=f"logkv {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Command, summary: str, description: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description)
        added.set_defaults(command=command)
        return added

    demo = add("demo", _demo, "stream prices, kill the writer in mid-stream, look what is there",
               "A process writes trades of a few made-up markets as fast as it can, two others read the latest prices, "
               "then the writer is killed with SIGKILL. The store is opened again and asked for every put that had "
               "been acknowledged; a report says what was found and how quick the store is on this machine. "
               "The status is 0 if everything was found, 1 if not.")
    demo.add_argument("--seconds", type=_seconds, default=6.0, metavar="S",
                      help="the writer is killed at a random moment in the second half of this time (default: 6)")
    demo.add_argument("--seed", type=int, metavar="N", help="decides the trades and the moment of the kill "
                      "(default: another one each time)")
    demo.add_argument("--dir", metavar="DIR", help="write the store to this new or empty directory and keep it "
                      "(default: a temporary directory, removed at the end)")
    demo.add_argument("--json", action="store_true", help="print the report only, as one JSON object")
    return parser


def explain(problem: BaseException) -> str:
    """One line, without the number that an OSError begins with."""
    if isinstance(problem, OSError) and problem.strerror:
        where = f": {os.fsdecode(problem.filename)}" if problem.filename is not None else ""
        return f"{problem.strerror}{where}"
    return str(problem) or type(problem).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status; wrong usage, --help and --version raise SystemExit."""
    arguments = _parser().parse_args(argv)
    try:
        command: Command = arguments.command
        status = command(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:         # nobody reads on (`logkv ... | head`); Python would flush once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except (OSError, ValueError, ImportError) as problem:
        print(f"logkv: {explain(problem)}", file=sys.stderr)
        return 2
