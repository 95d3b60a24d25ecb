"""What turns values into bytes and back: nothing, a codec by name, or an object with `encode` and `decode`.

The name goes into the store's MANIFEST, so that the store is not opened with another codec by mistake.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, TypeVar

V = TypeVar("V")


class SupportsCodec(Protocol[V]):
    """An object of the user's.  Its name is its attribute `name`, else that of its class, or of the module that it is."""

    def encode(self, value: V, /) -> bytes | str:
        """The bytes to store (str: as UTF-8)."""

    def decode(self, stored: bytes, /) -> V:
        """The value that was stored."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A name and two functions; None for a function that would change nothing."""

    name: str | None
    encode: Callable[[Any], bytes | str] | None
    decode: Callable[[bytes], Any] | None


def _text(value: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f'codec "str" stores str, not {type(value).__name__}')
    return value


def _pickle(value: object) -> bytes:
    import pickle
    return pickle.dumps(value, protocol=5)


def _unpickle(stored: bytes) -> object:
    import pickle
    return pickle.loads(stored)


def _from_json(stored: bytes) -> object:
    return json.loads(stored.decode())


PLAIN = Codec(None, None, None)         # where no codec is asked for
AS_STORED = Codec(None, None, None)     # where bytes are asked for, whatever the store's codec is
NAMED = {
    "bytes": AS_STORED,
    "str": Codec("str", _text, bytes.decode),
    "json": Codec("json", json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode, _from_json),
    "pickle": Codec("pickle", _pickle, _unpickle),
}


def resolve(codec: object) -> Codec:
    """The codec that an argument `codec=` asks for.

    Raises ValueError for a name that is not known or not to be used, TypeError for what is no codec.
    """
    if codec is None:
        return PLAIN
    if isinstance(codec, Codec):
        return codec
    if isinstance(codec, str):
        if codec not in NAMED:
            raise ValueError(f"codec must be one of {', '.join(map(repr, NAMED))} or an object with encode and decode, "
                             f"not {codec!r}")
        return NAMED[codec]
    encode, decode = getattr(codec, "encode", None), getattr(codec, "decode", None)
    if not callable(encode) or not callable(decode):
        raise TypeError(f"codec must be a name or an object with encode and decode, not {type(codec).__name__}")
    name = getattr(codec, "name", None)
    if not isinstance(name, str):
        kind = codec if isinstance(codec, type) else type(codec)
        name = codec.__name__ if isinstance(codec, ModuleType) else f"{kind.__module__}.{kind.__qualname__}"
    if name in NAMED:
        raise ValueError(f"a codec of your own cannot have the name {name!r}, which LogKV gives to one of its own")
    return Codec(name, encode, decode)


def as_stored(name: str | None, *, check: bool = True) -> Codec:
    """A codec of this name for values that are encoded already: str and buffers go in as they are, bytes come out.

    check: what goes in must decode.  Raises ValueError where that cannot be checked: unpickling would run what the
        value says, and what belongs to a name that is not LogKV's own is not known.
    """
    if not check or name is None:
        return Codec(name, None, None)
    if name not in ("str", "json"):
        raise ValueError(f"the store has codec {name!r}: whether a value is right for it cannot be checked here")
    decode = NAMED[name].decode
    assert decode is not None

    def checked(value: bytes | str) -> bytes | str:
        decode(value.encode() if isinstance(value, str) else bytes(value))
        return value

    return Codec(name, checked, None)


def check_name(asked: str | None, stored: str | None, path: str) -> None:
    """Raises ValueError if a store whose MANIFEST names the codec `stored` is not to be opened with the one asked for."""
    if asked != stored:
        names = ["plain bytes" if name is None else f"codec {name!r}" for name in (stored, asked)]
        hint = "" if stored is None else ' (logkv.Reader(path, codec="bytes") reads the bytes as they are stored)'
        raise ValueError(f"{path} holds values of {names[0]}; it cannot be opened for {names[1]}{hint}")
