"""`logkv.dbm` and `logkv.shelve` in the place of the standard library's."""

from __future__ import annotations

import dbm.dumb
import doctest
import os
import pickle
import shelve as standard_shelve
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import logkv
from logkv import dbm as kv
from logkv import files, shelve


@pytest.fixture(params=[shelve.open, lambda path, flag="c": standard_shelve.Shelf(logkv.open(path, flag))],
                ids=["logkv.shelve", "shelve.Shelf"])
def open_shelf(request: pytest.FixtureRequest) -> Callable[..., standard_shelve.Shelf]:
    """Both ways to open a shelf."""
    opener: Callable[..., standard_shelve.Shelf] = request.param
    return opener


@pytest.fixture
def foreign(tmp_path: Path) -> str:
    """A database of the standard library's, which has its files beside the path that names it."""
    path = str(tmp_path / "old")
    with dbm.dumb.open(path, "n") as db:
        db["btc"] = "4411.99"
    return path


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.mark.parametrize("module", [kv, shelve])
def test_docstrings(module: ModuleType) -> None:
    failed, tried = doctest.testmod(module)
    assert tried >= 3 and not failed


# -- dbm --------------------------------------------------------------------------------------------------------


def test_an_error_of_dbm_is_an_error_of_logkv() -> None:
    assert kv.error is logkv.error and issubclass(kv.error, OSError)


def test_flags(path: str) -> None:
    for flag in ("r", "w"):
        with pytest.raises(kv.error):
            kv.open(path, flag)
    with pytest.raises(FileNotFoundError):
        kv.open(path)
    with kv.open(path, "c") as db:
        db["a"] = "1"
    with kv.open(path, "w") as db:
        db["b"] = "2"
    with kv.open(path) as db:
        assert db == {b"a": b"1", b"b": b"2"}
    with kv.open(path, "n") as db:
        assert not db and db.keys() == []
    with pytest.raises(ValueError, match="flag"):
        kv.open(path, "x")


def test_keys_are_bytes_or_str_and_values_come_back_as_bytes(path: str) -> None:
    with kv.open(path, "c") as db:
        db["a"], db[b"b"], db["\u00f6"] = "1", b"2", "\u00fc"
        assert sorted(db.keys()) == [b"a", b"b", "\u00f6".encode()]
        assert db[b"a"] == b"1" and db["b"] == b"2" and db["\u00f6"] == "\u00fc".encode()
        assert db.get("x") is None and db.get("x", b"0") == b"0" and db.setdefault("x", b"3") == b"3"
        assert "x" in db and sorted(db) == sorted(db.keys())
        for wrong in (1, None, 1.5):
            with pytest.raises(TypeError):
                db[wrong] = b"1"        # type: ignore[index]
            with pytest.raises(TypeError):
                db["a"] = wrong         # type: ignore[assignment]


def test_keys_is_a_list(path: str) -> None:
    with kv.open(path, "c") as db:
        db.update({str(i): "value" for i in range(100)})
        keys = db.keys()
        assert isinstance(keys, list) and len(keys) == 100
        for key in keys:
            del db[key]
        assert len(db) == 0 and len(keys) == 100


def test_reorganize_gives_space_back(path: str) -> None:
    with kv.open(path, "c") as db:
        for _ in range(2):
            for number in range(1_000):
                db[str(number)] = "x" * 100
        before = db.stats()["dead_bytes"]
        db.reorganize()
        assert before > 100_000 and db.stats()["dead_bytes"] < 1_000 and len(db) == 1_000
    with kv.open(path) as db, pytest.raises(kv.error):
        db.reorganize()


def test_what_is_closed_raises_dbm_error(path: str) -> None:
    db = kv.open(path, "c")
    db.close()
    db.close()
    calls: list[Callable[[], object]] = [
        lambda: db["a"], lambda: db.__setitem__("a", b""), lambda: db.__delitem__("a"), lambda: "a" in db,
        lambda: len(db), lambda: db.keys(), lambda: db.get("a"), lambda: list(db), lambda: db.sync(),
        lambda: db.setdefault("a", b"")]
    for call in calls:
        with pytest.raises(kv.error, match="closed"):
            call()


def test_what_is_read_only_raises_dbm_error(path: str) -> None:
    with kv.open(path, "c") as db:
        db["a"] = "1"
    with kv.open(path) as db:
        calls: list[Callable[[], object]] = [
            lambda: db.__setitem__("a", b""), lambda: db.__delitem__("a"), lambda: db.setdefault("b", b""),
            lambda: db.pop("a"), lambda: db.clear(), lambda: db.update(b=b"")]
        for call in calls:
            with pytest.raises(kv.error, match="for reading only"):
                call()
        assert db == {b"a": b"1"}


def test_it_is_a_store_as_any_other(path: str) -> None:
    with kv.open(path, "c", sync="always") as db:
        assert isinstance(db, logkv.Store) and db.codec is None
        db["a"] = "1"
        with pytest.raises(ValueError, match="sync"):
            kv.open(path, "c", sync="os")
    with logkv.open(path, "w") as db:
        assert db["a"] == b"1"
        db["b"] = "2"
    with kv.open(path) as db:
        assert db["b"] == b"2"


@pytest.mark.parametrize("opener", [kv.open, shelve.open])
def test_a_second_writer_is_told(opener: Callable[..., object], path: str,
                                 in_child: Callable[[Callable[[], None]], int]) -> None:
    def second() -> None:
        with pytest.raises(kv.error, match="being written"):
            opener(path, "c")
        with pytest.raises(ValueError, match="timeout"):
            opener(path, "c", timeout=-1)

    with logkv.open(path):
        assert in_child(second) == 0


# -- whichdb and databases of other modules ---------------------------------------------------------------------


def test_whichdb_knows_a_store(path: str) -> None:
    assert kv.whichdb(path) is None
    kv.open(path, "c").close()
    assert kv.whichdb(path) == kv.whichdb(path.encode()) == kv.whichdb(Path(path)) == "logkv.dbm"
    assert dbm.whichdb(path) is None
    manifest = Path(path, files.MANIFEST)
    manifest.write_bytes(manifest.read_bytes()[:-1])
    with pytest.raises(logkv.CorruptionError):
        kv.open(path)
    assert kv.whichdb(path) == "logkv.dbm"


def test_whichdb_leaves_the_rest_to_the_standard_library(foreign: str, tmp_path: Path) -> None:
    assert kv.whichdb(foreign) == "dbm.dumb"
    (tmp_path / "file").write_bytes(b"something else")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / files.MANIFEST).write_bytes(b"Manifest-Version: 1.0\n")
    for name in ("file", "directory", "missing"):
        assert kv.whichdb(tmp_path / name) == dbm.whichdb(tmp_path / name), name


@pytest.mark.parametrize("flag", "rwcn")
@pytest.mark.parametrize("opener", [kv.open, shelve.open])
def test_the_databases_of_other_modules_are_refused_and_not_touched(opener: Callable[..., object], flag: str,
                                                                    foreign: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"not a database")
    before = contents(tmp_path)
    with pytest.raises(logkv.FormatError, match=r"old is a database of dbm\.dumb.*logkv migrate"):
        opener(foreign, flag)
    with pytest.raises(logkv.FormatError, match="file is a file"):
        opener(file, flag)
    assert contents(tmp_path) == before and not Path(foreign).exists()


def test_a_store_may_lie_beside_the_database_that_it_was_copied_from(foreign: str) -> None:
    with dbm.dumb.open(foreign, "r") as old, logkv.open(foreign) as db:
        for key in old.keys():
            db[key] = old[key]
    with kv.open(foreign, "c") as db:
        assert db["btc"] == b"4411.99"


# -- shelve -----------------------------------------------------------------------------------------------------

VALUES = {"int": 1, "text": "\u00f6", "list": [1, [2, {"three": 3}]], "none": None, "path": Path("a"), "": b""}


def test_a_shelf_keeps_what_can_be_pickled(path: str, open_shelf: Callable[..., standard_shelve.Shelf]) -> None:
    with open_shelf(path) as shelf:
        shelf.update(VALUES)
        assert dict(shelf) == VALUES
        with pytest.raises((pickle.PicklingError, AttributeError)):
            shelf["int"] = lambda: 1
    with open_shelf(path) as shelf:
        assert dict(shelf) == VALUES and len(shelf) == len(VALUES)
        assert shelf.pop("int") == 1 and "int" not in shelf
        with pytest.raises(KeyError):
            shelf["int"]


def test_a_shelf_is_the_same_store_for_both(path: str) -> None:
    with shelve.open(path) as ours:
        ours["ours"] = [1]
    with standard_shelve.Shelf(logkv.open(path)) as theirs:
        theirs["theirs"] = [2]
        assert theirs["ours"] == [1]
    with shelve.open(path) as ours:
        assert ours["theirs"] == [2] and isinstance(ours, shelve.Shelf)
    with logkv.open(path, "r") as db:
        assert db.codec is None and pickle.loads(db["ours"]) == [1]
    assert kv.whichdb(path) == "logkv.dbm"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_protocol_is_pickles(path: str, protocol: int) -> None:
    with shelve.open(path, protocol=protocol) as shelf:
        shelf["a"] = (1, 2)
    with logkv.open(path, "r") as db:
        assert db["a"] == pickle.dumps((1, 2), protocol)


def test_the_default_protocol(path: str) -> None:
    with shelve.open(path) as shelf:
        shelf["a"] = (1, 2)
    with logkv.open(path, "r") as db:
        assert db["a"] == pickle.dumps((1, 2), pickle.DEFAULT_PROTOCOL)


def test_writeback(path: str) -> None:
    with shelve.open(path) as shelf:
        shelf["a"] = [1]
        shelf["a"].append(2)
        assert shelf["a"] == [1]
    with shelve.open(path, writeback=True) as shelf:
        shelf["a"].append(2)
        shelf.sync()
        with logkv.Reader(path) as reader:
            assert pickle.loads(reader["a"]) == [1, 2]
        shelf["a"].append(3)
    with shelve.open(path, "r") as shelf:
        assert shelf["a"] == [1, 2, 3]


def test_sync_reaches_the_device(path: str, open_shelf: Callable[..., standard_shelve.Shelf],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    synced, real = [], files.sync_data

    def noted(fd: int) -> None:
        real(fd)
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))

    with open_shelf(path) as shelf:
        monkeypatch.setattr(files, "sync_data", noted)
        shelf["a"] = 1
        assert not synced
        shelf.sync()
        assert any(name.endswith(".seg") for name in synced)


def test_a_shelf_that_cannot_write_back_lets_the_store_go(path: str) -> None:
    shelf = shelve.open(path, writeback=True)
    shelf["a"] = []
    shelf["a"].append(lambda: 1)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        shelf.close()
    shelf.close()
    with shelve.open(path, "n") as shelf:       # refused while it is open
        assert not shelf


def test_a_shelf_that_is_read(path: str, open_shelf: Callable[..., standard_shelve.Shelf]) -> None:
    with pytest.raises(kv.error):
        open_shelf(path, "r")
    with open_shelf(path) as shelf:
        shelf["a"] = [1]
    shelf = open_shelf(path, "r")
    assert shelf["a"] == [1] and list(shelf.items()) == [("a", [1])]
    with pytest.raises(kv.error, match="for reading only"):
        shelf["a"] = [2]
    shelf.sync()
    shelf.close()
    with pytest.raises(ValueError, match="closed shelf"):
        shelf["a"]
    with open_shelf(path, "n") as shelf:
        assert not shelf


def test_a_shelf_over_a_reader_follows_the_writer(path: str) -> None:
    with shelve.open(path) as shelf, standard_shelve.Shelf(logkv.Reader(path)) as reading:
        for count in range(3):
            shelf["count"] = [count]
            assert reading["count"] == [count]


def test_clear_is_one_step_and_forgets_what_would_be_written_back(path: str) -> None:
    with shelve.open(path, writeback=True) as shelf:
        shelf.update({str(i): [i] for i in range(100)})
        shelf["7"].append(8)
        with logkv.open(path) as db:
            before = db.stats()["epoch"]
            shelf.clear()
            assert not shelf and db.stats()["epoch"] == before + 1
    with shelve.open(path) as shelf:
        assert not shelf and list(shelf) == []
