# PYTHON_ARGCOMPLETE_OK
"""The command `logkv`.

Exit status: 0 done, 1 something missing or damaged, 2 wrong usage or an error, 130 Ctrl-C, 141 nobody reads the output.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from logkv import __version__
from logkv.cli.terminal import explain

Run = Callable[[argparse.Namespace], int]

# The modules of the commands.  Only the one that is wanted is imported: `logkv get` starts without what others need.
MODULES = {
    "records": ("get", "put", "delete"),
    "transfer": ("import", "export"),
    "migrate": ("migrate",),
    "inspect": ("stats", "verify"),
    "repair": ("repair",),
    "compact": ("compact",),
    "backup": ("backup",),
    "demo": ("demo",),
}


class Parser(argparse.ArgumentParser):
    """Wrong usage is one line and status 2, as any other error."""

    hint = ""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"logkv: {message} (see {self.prog} --help{self.hint})\n")


class Commands:
    """What a command module registers its commands with."""

    def __init__(self, subparsers: argparse._SubParsersAction[Any]) -> None:
        self._subparsers = subparsers

    def add(self, name: str, run: Run, summary: str, description: str,
            example: str | None = None) -> argparse.ArgumentParser:
        """A new command: its parser, to add arguments to.  `run` returns the exit status."""
        parser: argparse.ArgumentParser = self._subparsers.add_parser(
            name, help=summary, description=description, epilog=f"example: {example}" if example else None)
        parser.set_defaults(run=run, parser=parser)
        return parser


def _parser(argv: Sequence[str]) -> Parser:
    """Knows all commands; where these arguments name one, only those of its module."""
    command = argv[0] if argv else None
    parser = Parser(prog="logkv", description="LogKV: a persistent dict that keeps everything in a log.",
                    epilog="example: logkv import prices.db prices.csv --key symbol --key time")
    parser.add_argument("--version", action="version", version=f"logkv {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in [module for module, names in MODULES.items() if command in names] or MODULES:
        importlib.import_module(f"logkv.cli.{module}").register(Commands(subparsers))
    if command in MODULES["records"] and any(word[0] == "-" != word[1] for word in argv if len(word) > 1):
        subparsers.choices[command].hint = "; -- goes before a key that begins with a dash"
    return parser


def _complete(parser: Parser) -> None:
    """Answers the shell when it asks how a word may go on."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete
        argcomplete.autocomplete(parser)


def _drop_output() -> None:
    """Output that cannot be written is forgotten; Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: Sequence[str]) -> int:
    if argv and argv[0] == "help":
        argv = [*argv[1:], "--help"]
    parser = _parser(argv)
    _complete(parser)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        getattr(arguments, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if not hasattr(arguments, "run"):
        parser.print_help(sys.stderr)
        return 2
    run: Run = arguments.run
    status = run(arguments)
    sys.stdout.flush()
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status; wrong usage, --help and --version raise SystemExit."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:
        # `logkv export | head`: the status that a shell gives to a program that SIGPIPE ends.  0 would say that
        # everything was written, which a reader that has died did not see either.
        _drop_output()
        return 141
    except (OSError, ValueError, ImportError, KeyboardInterrupt) as problem:
        print(f"logkv: {explain(problem)}", file=sys.stderr)
        _drop_output()
        return 130 if isinstance(problem, KeyboardInterrupt) else 2
