"""A store is a dict in every way that does not need an order or a second type of key."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import logkv

KEYS = st.sampled_from(["", "a", "b", "c", "€"])
SETS = st.sets(st.one_of(KEYS, KEYS.map(str.encode)))


@pytest.fixture
def abc(store: logkv.Store[bytes]) -> logkv.Store[bytes]:
    store |= {"a": "1", "b": "2", "c": "3"}
    return store


def test_update_in_all_its_forms(store: logkv.Store[bytes]) -> None:
    store |= {"a": "1"}
    store |= [("b", b"2"), (b"c", bytearray(b"3"))]
    store.update({"d": "4"}, e="5")
    store.update(iter([("f", "6")]))
    store.update(g="7")
    store.update()
    store.update(store)
    assert store == dict(zip("abcdefg", "1234567"))
    for wrong in (7, [1], ["abc"], {"a": 1}, {1: "a"}):
        with pytest.raises((TypeError, ValueError)):
            store.update(wrong)
    assert len(store) == 7


def test_union_makes_a_dict(abc: logkv.Store[bytes]) -> None:
    assert abc | {"c": "4", b"d": b"5"} == {b"a": b"1", b"b": b"2", b"c": b"4", b"d": b"5"}
    assert {"c": "4", "d": "5"} | abc == {b"a": b"1", b"b": b"2", b"c": b"3", b"d": b"5"}
    assert abc.copy() == {**{b"a": b"1", b"b": b"2"}, b"c": b"3"} and type(abc.copy()) is dict
    with pytest.raises(TypeError):
        abc | [("a", "b")]          # type: ignore[operator]
    assert len(abc) == 3


def test_equality(abc: logkv.Store[bytes], tmp_path: Path) -> None:
    pairs: dict[Any, Any] = {"a": "1", "b": b"2", b"c": bytearray(b"3")}
    assert abc == pairs and pairs == abc and abc == abc
    assert {str(key): value for key, value in abc.items()} != abc
    for other in (pairs | {"d": "4"}, pairs | {"a": "2"}, {"a": "1", "b": "2"}, {1: 2}, {**pairs, b"a": "1", "x": 1}, {}, 7,
                  list(pairs), {"a": 1, "b": 2, "c": 3}, {"a": "1", b"a": "1", "b": "2"}):
        assert abc != other and other != abc
    with logkv.open(tmp_path / "other", codec="str") as other_store:
        other_store.update({"a": "1", "b": "2", "c": "3"})
        assert abc == {key: value.encode() for key, value in other_store.items()}
        with logkv.Reader(abc.path) as reader:
            assert reader == abc
    with pytest.raises(TypeError):
        hash(abc)


@settings(deadline=None)
@given(one=SETS)
def test_set_operations_of_views(tmp_path_factory: pytest.TempPathFactory, one: set[Any]) -> None:
    """As those of a dict's views with the same keys, where a str stands for its bytes."""
    held = ["a", "b", "€"]
    other = {key.encode() if isinstance(key, str) else key for key in one}
    with logkv.open(tmp_path_factory.mktemp("views"), "n") as db:
        db.update(dict.fromkeys(held, "1"))
        plain = {key.encode(): b"1" for key in held}
        keys, model = db.keys(), plain.keys()
        assert keys & one == model & other and one & keys == other & model
        assert keys | one == model | other and one | keys == other | model
        assert keys - one == model - other and one - keys == other - model
        assert keys ^ one == model ^ other and one ^ keys == other ^ model
        assert (keys == one) == (model == other) and (keys <= one) == (model <= other)
        assert (keys < one) == (model < other) and (keys >= one) == (model >= other) and (keys > one) == (model > other)
        assert keys.isdisjoint(one) == model.isdisjoint(other)
        assert keys & list(one) == model & other and keys.isdisjoint(iter(one)) == model.isdisjoint(other)
        pairs = {(key, "1") for key in one}
        items, expected = db.items(), {(key, b"1") for key in other}
        assert items & pairs == plain.items() & expected and items - pairs == plain.items() - expected
        assert items | pairs == plain.items() | expected and items ^ pairs == plain.items() ^ expected
        assert (items == pairs) == (plain.items() == expected) and items.isdisjoint(pairs) == (not plain.items() & expected)


def test_views_are_live_and_say_what_they_are(abc: logkv.Store[bytes]) -> None:
    keys, values, items = abc.keys(), abc.values(), abc.items()
    abc["d"] = "4"
    assert len(keys) == len(values) == len(items) == 4
    assert "d" in keys and "4" in values and ("d", "4") in items and (b"d", b"5") not in items
    assert keys != ["a"] and keys != {"a", "b", "c"} and keys == {"a", "b", "c", "d"} and keys == abc.keys()
    assert keys == dict.fromkeys([b"a", b"b", b"c", b"d"]).keys()
    assert 7 not in items and ("d",) not in items
    for view, name in ((keys, "keys"), (values, "values"), (items, "items")):
        assert repr(view).startswith(f"<{name} of <logkv.Store ")
        with pytest.raises(TypeError):
            reversed(view)          # type: ignore[call-overload]
    with pytest.raises(TypeError, match="order"):
        reversed(abc)


def test_setdefault_and_popitem(store: logkv.Store[bytes]) -> None:
    assert store.setdefault("a") == b"" and store.setdefault("a", "1") == b""
    assert store.setdefault("b", "2") == b"2"
    assert {store.popitem(), store.popitem()} == {(b"a", b""), (b"b", b"2")}
    with pytest.raises(KeyError):
        store.popitem()


def test_a_match_statement_takes_it_for_a_mapping(abc: logkv.Store[bytes]) -> None:
    match abc:
        case {"a": b"1", b"b": value}:
            assert value == b"2"
        case _:
            pytest.fail("no mapping")


# -- paths and handles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
def test_paths(tmp_path: Path, kind: Any) -> None:
    with logkv.open(kind(str(tmp_path / "s\udce9"))) as db:
        db["a"] = "1"
        assert db.verify().ok
    with logkv.Reader(kind(str(tmp_path / "s\udce9"))) as reader, logkv.Writer(kind(str(tmp_path / "s\udce9"))) as writer:
        assert reader["a"] == b"1" and writer["a"] == b"1"


def test_handles_are_pickled_as_readers(abc: logkv.Store[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with logkv.Reader(abc.path) as reader, pickle.loads(pickle.dumps(abc)) as one, pickle.loads(pickle.dumps(reader)) as two:
        assert type(one) is logkv.Store and type(two) is logkv.Reader
        abc["d"] = "4"
        assert one == two == abc
        with pytest.raises(logkv.ReadOnlyError):
            one["e"] = "5"
    monkeypatch.chdir(tmp_path)
    with logkv.open("relative") as db:
        data = pickle.dumps(db)
    monkeypatch.chdir("/")
    pickle.loads(data).close()
    with pytest.raises(logkv.ClosedError):
        pickle.dumps(db)
    with logkv.Writer(tmp_path / "relative") as writer, pytest.raises(TypeError, match="pickle a Reader"):
        pickle.dumps(writer)


def test_a_pickled_handle_opens_in_another_process(abc: logkv.Store[bytes]) -> None:
    code = "import pickle, sys; db = pickle.load(sys.stdin.buffer); print(len(db), db['a']); db.close()"
    result = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(abc), capture_output=True, check=True)
    assert result.stdout == b"3 b'1'\n"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copied_handle_is_another_one_of_the_same_store(path: str, copied: Any) -> None:
    with logkv.open(path) as db:
        twin = copied(db)
        twin["a"] = "1"
        assert db["a"] == b"1"
    assert twin["a"] == b"1" and db.closed and not twin.closed
    twin["b"] = "2"
    twin.close()
    with pytest.raises(logkv.ClosedError):
        copied(twin)
    with logkv.Writer(path) as writer, copied(writer) as another:
        assert another.put("c", "3") > 0


class Described(logkv.Store[bytes]):
    """A subclass keeps its kind."""


def test_subclasses(path: str) -> None:
    with Described(path) as db:
        db["a"] = "1"
        with copy.copy(db) as twin, pickle.loads(pickle.dumps(db)) as other:
            assert type(twin) is type(other) is Described and other["a"] == b"1"


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    """Handles that a test forgets would warn in another one."""
    yield
    gc.collect()


def test_a_handle_that_only_an_iterator_holds_stays_open(abc: logkv.Store[bytes]) -> None:
    assert sorted(logkv.Reader(abc.path)) == [b"a", b"b", b"c"]
    assert sorted(value for _, value in logkv.Reader(abc.path).items()) == [b"1", b"2", b"3"]
    assert sorted(map(bytes, logkv.Reader(abc.path).values())) == [b"1", b"2", b"3"]


def test_pairs_with_values_that_are_in_no_set(path: str) -> None:
    with logkv.open(path, codec="json") as db:
        db.update({"a": [1], "b": {"c": 2}})
        plain = db.copy()
        assert db.items() == plain.items() and db.items() <= plain.items() and not db.items() < plain.items()
        assert not db.items().isdisjoint([("a", [1])]) and db.items().isdisjoint([("a", [2])])
        assert db.keys() & {"a", "x"} == {b"a"}


class Scaled(logkv.Store[bytes]):
    """A subclass with a beginning and a state of its own."""

    def __init__(self, path: str, scale: int) -> None:
        super().__init__(path)
        self.scale = scale


def test_what_a_subclass_keeps_is_copied_and_pickled(path: str) -> None:
    with Scaled(path, 7) as db:
        db["a"] = "1"
        with copy.copy(db) as twin, pickle.loads(pickle.dumps(db)) as other:
            assert type(twin) is type(other) is Scaled and twin.scale == other.scale == 7
            assert twin["a"] == other["a"] == b"1"
            twin["b"] = "2"
            with pytest.raises(logkv.ReadOnlyError):
                other["c"] = "3"


def test_relative_paths_lead_to_the_store_that_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("here", "there"):
        (tmp_path / where).mkdir()
        monkeypatch.chdir(tmp_path / where)
        with logkv.open("s") as db:
            db["where"] = where
    monkeypatch.chdir(tmp_path / "here")
    with logkv.Reader("s") as reader, logkv.open("s") as store:
        monkeypatch.chdir(tmp_path / "there")
        with pickle.loads(pickle.dumps(reader)) as other, copy.copy(store) as twin, pickle.loads(pickle.dumps(twin)) as third:
            assert other["where"] == third["where"] == b"here"
        store["more"] = "1"
        assert store.verify().keys == 2
        os.rename(tmp_path / "here", tmp_path / "elsewhere")
        assert store.verify().keys == reader.verify().keys == 2


def test_a_dropped_handle_is_closed_where_warnings_are_errors(path: str) -> None:
    code = f"""
import gc, sys, warnings, logkv
sys.unraisablehook = lambda problem: print(type(problem.exc_value).__name__)
warnings.simplefilter("error")
db = logkv.open({path!r})
del db
gc.collect()
import os
if os.fork() == 0:
    logkv.open({path!r}).close()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert result.stdout.split() == ["ResourceWarning", "7"]
