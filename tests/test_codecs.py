"""Values that are something other than bytes, and the name that keeps a store from being opened for something else."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import logkv.store
from logkv import codecs
from logkv.codecs import Codec
from logkv.engine import Engine
from logkv.writer import Writing

RunInChild = Callable[[Callable[[], None]], int]


class Packed:
    """A codec of one's own."""

    name = "packed"

    def encode(self, value: str) -> bytes:
        return zlib.compress(value.encode())

    def decode(self, stored: bytes) -> str:
        return zlib.decompress(stored).decode()


class Nameless(Packed):
    name = None         # type: ignore[assignment]


VALUES: list[tuple[Any, list[Any], bytes]] = [
    ("str", ["4411.99", "", "€"], b"4411.99"),
    ("json", [{"price": 4411.99, "at": [1, None]}, "€", None, 7], b'{"price":4411.99,"at":[1,null]}'),
    ("pickle", [("a", 1), {1, 2}, None, b"x"], pickle.dumps(("a", 1), protocol=5)),
    (Packed(), ["4411.99" * 1000, ""], zlib.compress(b"4411.99" * 1000)),
]


@pytest.mark.parametrize("codec, values, stored", VALUES)
def test_what_is_stored_comes_back(path: str, codec: Any, values: list[Any], stored: bytes) -> None:
    with logkv.open(path, codec=codec) as db:
        for number, value in enumerate(values):
            db[f"k{number}"] = value
            assert db.put(f"again{number}", value) > 0
    with logkv.open(path, "w", codec=codec) as db, logkv.Reader(path, codec=codec) as reader:
        for handle in (db, reader):
            assert [handle[f"k{number}"] for number in range(len(values))] == values
            assert handle.get("k0") == values[0] and handle.get("none", 5) == 5
            assert sorted(map(repr, handle.values())) == sorted(map(repr, values * 2))
            assert handle == {f"{name}{number}": value for name in ("k", "again") for number, value in enumerate(values)}
            assert ("k0", values[0]) in handle.items() and values[0] in handle.values()
            assert handle.codec == (codec if isinstance(codec, str) else "packed")
        assert db.pop("k0") == values[0] and db.setdefault("new", values[0]) == values[0]
        while db:
            assert db.popitem()[1] in values
    with logkv.open(path, codec=codec) as db:
        db["k0"] = values[0]
        with logkv.Reader(path, codec="bytes") as reader, logkv.open(path, "r", codec="bytes") as store:
            assert reader["k0"] == store["k0"] == stored


@pytest.mark.parametrize("codec, wrong", [("str", b"bytes"), ("str", 1), ("json", b"bytes"), ("json", {1}),
                                          ("pickle", lambda: 0)])
def test_what_a_codec_refuses_is_not_stored(path: str, codec: str, wrong: object) -> None:
    with logkv.open(path, codec=codec) as db:
        for store in (db.put, db.__setitem__, db.setdefault):
            with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
                store("key", wrong)
        assert len(db) == 0


def test_a_value_that_does_not_decode_raises_and_stays(path: str) -> None:
    with logkv.open(path, codec=codecs.as_stored("json", check=False)) as db:
        db["bad"] = b"{"
    with logkv.open(path, codec="json") as db:
        db["good"] = 1
        for read in (db.get, db.__getitem__, db.pop, db.setdefault):
            with pytest.raises(ValueError):
                read("bad")
        items = iter(db.items())
        seen: list[object] = []
        for _ in range(2):
            try:
                seen.append(next(items))
            except ValueError as problem:
                seen.append(problem)
        assert (b"good", 1) in seen and "bad" in db and next(items, None) is None


@pytest.mark.parametrize("made", [None, "str", "json", "pickle", Packed(), Nameless()])
def test_a_store_is_not_opened_with_another_codec(path: str, made: Any) -> None:
    logkv.open(path, codec=made).close()
    others: list[Any] = [other for other in (None, "str", "json", "pickle", Packed(), Nameless())
                         if codecs.resolve(other).name != codecs.resolve(made).name]
    assert len(others) == 5
    for other in others:
        for flag in "rwc":
            with pytest.raises(ValueError, match="holds values of"):
                logkv.open(path, flag, codec=other)
        for kind in (logkv.Reader, logkv.Writer):
            with pytest.raises(ValueError, match="holds values of"):
                kind(path, codec=other)
    if made is not None:
        with pytest.raises(ValueError, match="holds values of"):
            logkv.open(path, codec="bytes")
    with logkv.open(path, codec=made) as db:        # what was refused has let everything go
        assert db.codec == codecs.resolve(made).name
        with pytest.raises(ValueError):
            logkv.open(path, codec=others[0])


def test_names(path: str) -> None:
    assert codecs.resolve(Nameless()).name == f"{__name__}.Nameless"
    with pytest.raises(ValueError, match="'str', 'json', 'pickle'"):
        logkv.open(path, codec="yaml")
    with pytest.raises(TypeError, match="encode and decode"):
        logkv.open(path, codec=7)                   # type: ignore[call-overload]
    impostor = Packed()
    impostor.name = "json"
    with pytest.raises(ValueError, match="LogKV gives"):
        logkv.open(path, codec=impostor)
    assert not os.path.exists(path)


def test_new_and_empty_with_another_codec(path: str) -> None:
    with logkv.open(path, codec="json") as db:
        db["a"] = 1
    with logkv.open(path, "n") as db:
        db["a"] = b"1"
        assert db.codec is None
    with logkv.open(path, "n", codec="str") as db:
        assert not db
        db["a"] = "1"
        db.clear()
        db["a"] = "2"
    with logkv.Reader(path, codec="str") as reader:
        assert reader["a"] == "2"


def test_a_reader_stops_when_the_store_is_emptied_for_another_codec(path: str, in_child: RunInChild) -> None:
    with logkv.open(path, codec="str") as db:
        db["a"] = "1"
    reader = logkv.Reader(path, codec="str")
    assert reader["a"] == "1"

    def empty() -> None:
        with logkv.open(path, "n", codec="pickle") as db:
            db["a"] = 2

    assert in_child(empty) == 0
    for _ in range(2):
        with pytest.raises(logkv.ClosedError):
            reader["a"]
    with logkv.Reader(path, codec="pickle") as again:       # while the old one is still held
        assert again["a"] == 2
    reader.close()


def test_nothing_is_unpickled_unless_asked_for(path: str, tmp_path: Path) -> None:
    witness = tmp_path / "witness"

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(witness),)

    with logkv.open(path, codec="pickle") as db:
        db["a"] = Evil()
    for codec in (None, "str", "json"):
        with pytest.raises(ValueError):
            logkv.open(path, codec=codec)
    with logkv.Reader(path, codec="bytes") as reader:
        assert reader["a"] and list(reader.items()) and reader.verify().ok
    assert not witness.exists()
    with logkv.Reader(path, codec="pickle") as reader:
        reader["a"]
    assert witness.exists()


def test_as_stored(path: str) -> None:
    assert codecs.as_stored(None) == Codec(None, None, None)
    with logkv.open(path, codec=codecs.as_stored("json")) as db:
        db["a"] = '{"b":1}'
        db["c"] = b"[1]"
        with pytest.raises(ValueError):
            db["d"] = "{"
        assert db["a"] == b'{"b":1}' and len(db) == 2
    with logkv.open(path, codec="json") as db:
        assert db == {"a": {"b": 1}, "c": [1]}
    for name in ("pickle", "packed"):
        with pytest.raises(ValueError, match="cannot be checked"):
            codecs.as_stored(name)
        assert codecs.as_stored(name, check=False).name == name


def test_handles_are_pickled_and_copied_with_their_codec(path: str) -> None:
    for codec in ("json", "bytes"):
        with logkv.open(path, codec="json") as db:
            db["a"] = [1]
            with logkv.Reader(path, codec=codec) as reader, pickle.loads(pickle.dumps(reader)) as other, \
                    copy.copy(reader) as twin:
                assert reader["a"] == other["a"] == twin["a"] == ([1] if codec == "json" else b"[1]")


def test_a_module_is_a_codec_with_its_own_name() -> None:
    modules = [ModuleType(name) for name in ("packing", "boxing")]
    for module in modules:
        module.encode, module.decode = str.encode, bytes.decode     # type: ignore[attr-defined]
    assert [codecs.resolve(module).name for module in modules] == ["packing", "boxing"]


def test_what_is_refused_is_not_touched(path: str) -> None:
    logkv.open(path, codec="json").close()
    before = {file.name: file.read_bytes() for file in Path(path).iterdir()}
    with pytest.raises(ValueError, match="holds values of"):
        logkv.open(path, "c", timeout=60)
    assert {file.name: file.read_bytes() for file in Path(path).iterdir()} == before


def test_a_codec_that_fails_while_a_store_is_opened_leaves_nothing_open(path: str, in_child: RunInChild) -> None:
    class Failing:
        calls = 0

        @property
        def encode(self) -> Callable[[Any], bytes]:
            Failing.calls += 1
            if Failing.calls > 1:
                raise ZeroDivisionError
            return bytes

        decode = bytes

    with pytest.raises(ZeroDivisionError):
        logkv.open(path, codec=Failing())
    assert in_child(lambda: logkv.open(path, "n").close()) == 0


def test_nobody_sees_a_store_before_it_is_emptied_for_another_codec(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with logkv.open(path) as db:
        db["a"] = b"1"
    clear, seen = Writing.clear, []

    def slowly(self: Writing, codec: str | None) -> None:
        def look() -> None:
            with pytest.raises((ValueError, logkv.LockedError)):
                logkv.open(path, "w", timeout=5)
            seen.append(True)

        other = threading.Thread(target=look)
        other.start()
        other.join(0.05)
        clear(self, codec)
        waiting.append(other)

    waiting: list[threading.Thread] = []
    monkeypatch.setattr(Writing, "clear", slowly)
    with logkv.open(path, "n", codec="json") as db:
        waiting[0].join()
        assert seen and db == {}


def test_a_reader_is_opened_anew_while_the_old_one_lets_go(path: str, in_child: RunInChild,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    with logkv.open(path, codec="str") as db:
        db["a"] = "1"
    old = logkv.Reader(path, codec="str")
    assert in_child(lambda: logkv.open(path, "n", codec="json").close()) == 0
    with pytest.raises(logkv.ClosedError):
        old["a"]
    real = Engine._open

    def open_and_close_the_old_one(self: Engine) -> None:
        thread = threading.Thread(target=old.close)
        thread.start()
        thread.join(5)
        real(self)

    monkeypatch.setattr(Engine, "_open", open_and_close_the_old_one)
    logkv.Reader(path, codec="json").close()
    assert old.closed and not [engine for engine in logkv.store._engines.values() if engine.directory.path == path]
