"""Writes docs/api.md from the docstrings and signatures of the public names: `make docs`."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import logkv
from logkv import backup, codecs, dbm, shelve, verification

REPAIR = importlib.import_module("logkv.repair")     # `logkv.repair` is the function
PAGE = Path(__file__).with_name("api.md")
INTRODUCTION = """\
# API reference

Made from the docstrings by `make docs`. To begin with, read [Getting started](getting-started.md); what each field of
`stats()` means is [there too](getting-started.md#how-large-and-is-it-whole).

Paths are str, bytes or `os.PathLike`; keys are bytes or str. `V` is what the store's codec makes of a value, bytes
without one. A `Reader` is a `collections.abc.Mapping`, a `Store` a `MutableMapping`."""
OPERATORS = {
    "__getitem__": "db[key]", "__setitem__": "db[key] = value", "__delitem__": "del db[key]",
    "__contains__": "key in db", "__len__": "len(db)", "__iter__": "iter(db)", "__eq__": "==",
    "__or__": "|", "__ior__": "|=", "__copy__": "copy.copy(db)", "__enter__": "with",
}


def signature(function: Callable[..., Any]) -> str:
    """As in the source, less the types of arguments; a function of the core has it in its docstring's first line."""
    if not inspect.isfunction(function):
        return "(" + str(function.__doc__).partition("\n")[0].partition("(self, ")[2]
    source = textwrap.dedent(inspect.getsource(function))
    node: Any = ast.parse(source).body[0]
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    for defaults in (node.args.defaults, node.args.kw_defaults):      # as they are written: 0o666
        defaults[:] = [value and ast.Name(str(ast.get_source_segment(source, value))) for value in defaults]
    arguments = re.sub(r"^self(, (/, )?)?", "", ast.unparse(node.args)).replace("_MISSING", "...")
    returns = ast.unparse(node.returns or ast.Constant(None))
    return f"({arguments})" + (f" -> {returns}" if returns != "None" else "")


def markdown(thing: object) -> str:
    """A docstring: what it says of arguments becomes a list, doctests become code."""
    text = inspect.getdoc(thing) or ""
    if inspect.ismethoddescriptor(thing) or inspect.isgetsetdescriptor(thing):
        text = text.partition("\n\n")[2]        # behind the signature
    return "\n\n".join(map(_paragraph, text.split("\n\n")))


def _paragraph(text: str) -> str:
    if text.startswith(">>>"):
        return f"```pycon\n{text}\n```"
    items = re.split(r"\n(?! )", text.replace(".  ", ". "))
    if all(re.match(r"[a-z_]+(, [a-z_]+)*: ", item) for item in items):
        items = ["- " + re.sub(r"^[^:]+", r"`\g<0>`", re.sub(r"\n +", "\n  ", item)) for item in items]
    return "\n".join(items)


def function(name: str, thing: Callable[..., Any], level: str = "###") -> str:
    return f"{level} {name}\n\n```\n{name.rpartition('.')[2]}{signature(thing)}\n```\n\n{markdown(thing)}"


def members(kind: type, names: set[str]) -> Iterator[str]:
    for name in sorted(names):
        member = getattr(kind, name)
        if callable(member):
            yield function(f"{kind.__name__}.{name}", member, "####")
        else:
            yield f"#### {kind.__name__}.{name}\n\nProperty. {markdown(member)}"


def handle(kind: Any, beside: Any = None) -> Iterator[str]:
    """A class that users open.  Members that `beside` has too are only named."""
    yield f"### {kind.__name__}\n\n```\n{kind.__name__}{signature(kind.__init__)}\n```\n\n{markdown(kind)}"
    yield markdown(kind.__init__)
    own = {name for base in kind.__mro__[:-1] for name in vars(base)}
    yield f"Operators: {', '.join(f'`{sign}`' for name, sign in OPERATORS.items() if name in own)}."
    names = {name for name in own if not name.startswith("_")}
    shared = {name for name in names if getattr(beside, name, None) == getattr(kind, name)}
    if shared:
        yield f"As of `Store`: {', '.join(f'[{name}](#store{name})' for name in sorted(shared))}."
    yield from members(kind, names - shared)


def public(module: Any, *names: str) -> Iterator[str]:
    yield f"## {module.__name__}\n\n{markdown(module)}"
    for name in names or module.__all__:
        thing = getattr(module, name)
        if inspect.isfunction(thing):
            yield function(f"{module.__name__.partition('.')[2]}.{name}", thing)
        elif thing.__name__ != name:
            yield f"### {name}\n\nAnother name of `{thing.__name__}`."
        elif thing.__module__ == module.__name__:
            bases = " and ".join(f"`{base.__name__}`" for base in thing.__bases__ if base.__module__ != "typing")
            yield f"### {name}\n\n{f'A kind of {bases}. ' if bases != '`object`' and bases else ''}{markdown(thing)}"
            fields = list(getattr(thing, "__dataclass_fields__", ()))
            if fields:
                yield f"Fields: {', '.join(f'`{field}`' for field in fields)}."
            yield from members(thing, {name for name in vars(thing) if not name.startswith("_")} - {*fields})


def render() -> str:
    """The page's text."""
    return "\n\n".join([
        INTRODUCTION, "## logkv", function("logkv.open", logkv.open), function("logkv.verify", logkv.verify),
        function("logkv.repair", logkv.repair),
        *handle(logkv.Store), *handle(logkv.Reader, logkv.Store), *handle(logkv.Writer, logkv.Store),
        *public(verification, "Report", "Problem"), *public(backup, "Backup"),
        *public(REPAIR, "RepairReport", "Loss"), *public(logkv.errors), *public(codecs, "SupportsCodec"),
        *public(dbm), *public(shelve),
    ]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
