"""CPython's own tests for mappings, dbm and shelve, run against LogKV.

They are those of the interpreter that runs this, from its package `test`, which some distributions leave out.  A case
that the contract excludes is not left out: it must fail as EXCLUDED says.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import shelve
import tempfile
import unittest
from collections.abc import MutableMapping
from typing import Any
from unittest import mock

import pytest

import logkv
import logkv.dbm
import logkv.shelve

mapping_cases = pytest.importorskip("test.mapping_tests")
dbm_cases = pytest.importorskip("test.test_dbm")
shelve_cases = pytest.importorskip("test.test_shelve")

NUMBERS = (TypeError, "a key must be bytes or str, not int", "the case uses numbers as keys")

# By the class that has the case: what it raises in place of passing, what that says, and why.  CPython itself runs
# only BasicTestMappingProtocol on what is stored.  TestHashMappingProtocol is left to dicts: it adds keys of any class,
# the repr of a dict, and that iterating over what changes is an error.
EXCLUDED: dict[type, dict[str, tuple[type[Exception], str, str]]] = {
    dbm_cases.AnyDBMTestCase: {
        "test_anydbm_creation_n_file_exists_with_invalid_contents":
            (logkv.FormatError, "is a file", 'flag "n" replaces nothing but a store'),
    },
    mapping_cases.TestMappingProtocol: {
        "test_values": NUMBERS,
        "test_items": NUMBERS,
        "test_clear": NUMBERS,
        "test_update": NUMBERS,
        "test_copy": NUMBERS,
        "test_fromkeys": (AttributeError, "fromkeys", "a store has a path, which fromkeys() cannot be given"),
        "test_setdefault": (IndexError, "list index", "what comes back is a copy, which may change by itself"),
    },
}


def excluding(case: type[unittest.TestCase]) -> type[unittest.TestCase]:
    """The class with its excluded cases turned round: they pass if they raise what EXCLUDED says."""
    for theirs, names in EXCLUDED.items():
        if issubclass(case, theirs):
            for name, (problem, message, _) in names.items():
                setattr(case, name, raises(problem, message, getattr(theirs, name)))
    return case


def raises(problem: type[Exception], message: str, method: Any) -> Any:
    @functools.wraps(method)
    def check(self: unittest.TestCase) -> None:
        with self.assertRaisesRegex(problem, message):
            method(self)

    return check


class Elsewhere(unittest.TestCase):
    """The files that a case makes lie in a directory of its own."""

    def setUp(self) -> None:
        self.enterContext(contextlib.chdir(self.enterContext(tempfile.TemporaryDirectory())))
        super().setUp()


# -- mappings ---------------------------------------------------------------------------------------------------


class Stores(unittest.TestCase):
    """Makes the mappings that are tested: each in a new store."""

    codec: str | None = None
    reference_values: tuple[object, object, object] = (b"2", b"value1", b"value2")

    def _reference(self) -> dict[bytes, object]:
        return dict(zip((b"1", b"key1", b"key2"), self.reference_values))

    def new_store(self) -> logkv.Store:
        directory = self.enterContext(tempfile.TemporaryDirectory())
        return self.enterContext(logkv.open(directory, codec=self.codec))

    def _empty_mapping(self) -> MutableMapping[Any, Any]:
        return self.new_store()

    def type2test(self, **pairs: object) -> MutableMapping[Any, Any]:
        mapping = self._empty_mapping()
        mapping.update(pairs)
        return mapping


class TestBytes(Stores, mapping_cases.BasicTestMappingProtocol):
    pass


class TestStr(Stores, mapping_cases.BasicTestMappingProtocol):
    codec = "str"
    reference_values = ("2", "", "\u00f6")


class TestJson(Stores, mapping_cases.BasicTestMappingProtocol):
    codec = "json"
    reference_values = ("2", 17, 0.5)


class TestPickle(Stores, mapping_cases.BasicTestMappingProtocol):
    codec = "pickle"
    reference_values = ("2", b"value1", (1, 2, 3))


@excluding
class TestJsonAsDict(Stores, mapping_cases.TestMappingProtocol):
    codec = "json"
    reference_values = ("2", 17, 0.5)


@excluding
class TestPickleAsDict(Stores, mapping_cases.TestMappingProtocol):
    codec = "pickle"
    reference_values = ("2", b"value1", (1, 2, 3))


class TestStandardShelf(Stores, shelve_cases.TestShelveBase, mapping_cases.BasicTestMappingProtocol):
    """The standard library's shelf over a store."""

    _reference = shelve_cases.TestShelveBase._reference

    def _empty_mapping(self) -> MutableMapping[str, Any]:
        return self.enterContext(shelve.Shelf(self.new_store()))


# -- dbm --------------------------------------------------------------------------------------------------------


@excluding
class TestDbm(Elsewhere, dbm_cases.AnyDBMTestCase, unittest.TestCase):
    module = logkv.dbm

    def setUp(self) -> None:
        self.enterContext(mock.patch.object(logkv.dbm, "_defaultmod", None, create=True))      # the cases look at it
        self.enterContext(mock.patch.object(dbm_cases, "dbm", logkv.dbm))
        super().setUp()


class TestWhichdb(Elsewhere, dbm_cases.WhichDBTestCase):
    """Stores, and everything that the standard library knows."""

    def setUp(self) -> None:
        modules = [logkv.dbm, *dbm_cases.dbm_iterator()]
        self.enterContext(mock.patch.object(dbm_cases, "dbm_iterator", lambda: modules))
        super().setUp()
        self.dbm = logkv.dbm


# -- shelve -----------------------------------------------------------------------------------------------------


class OurShelve(Elsewhere):
    def setUp(self) -> None:
        self.enterContext(mock.patch.object(shelve_cases, "shelve", logkv.shelve))
        super().setUp()


class TestShelve(OurShelve, shelve_cases.TestCase):
    pass


SHELVES = [type(f"TestShelveProtocol{protocol}",
                (OurShelve, shelve_cases.TestShelveFileBase, mapping_cases.BasicTestMappingProtocol),
                {"dbm_mod": logkv.dbm, "_args": {"protocol": protocol}, "__module__": __name__})
           for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
globals().update({case.__name__: case for case in SHELVES})


# -- all of them ------------------------------------------------------------------------------------------------

BASIC = ("test_read test_write test_constructor test_bool test_keys test_values test_items test_len test_getitem "
         "test_update test_get test_setdefault test_popitem test_pop").split()
AT_LEAST = {
    **dict.fromkeys([TestBytes, TestStr, TestJson, TestPickle, TestStandardShelf, *SHELVES], BASIC),
    **dict.fromkeys([TestJsonAsDict, TestPickleAsDict],
                    [*BASIC, "test_contains", "test_clear", "test_fromkeys", "test_copy"]),
    TestDbm: """test_error test_anydbm_not_existing test_anydbm_creation test_anydbm_modification test_anydbm_read
        test_anydbm_creation_n_file_exists_with_invalid_contents test_anydbm_keys test_anydbm_access test_empty_value
        test_open_with_bytes test_open_with_pathlib_path test_open_with_pathlib_path_bytes test_keys""".split(),
    TestWhichdb: ["test_whichdb"],
    TestShelve: """test_close test_open_template test_ascii_file_shelf test_binary_file_shelf test_proto2_file_shelf
        test_pathlib_path_file_shelf test_bytes_path_file_shelf test_pathlib_bytes_path_file_shelf test_mutable_entry
        test_in_memory_shelf test_keyencoding test_writeback_also_writes_immediately test_with
        test_default_protocol""".split(),
}


@pytest.mark.parametrize("case", AT_LEAST, ids=lambda case: case.__name__)
def test_the_cases_are_there(case: type[unittest.TestCase]) -> None:
    """A class that lost its cases would pass: these are in CPython 3.11 to 3.13, and the runner finds them."""
    assert set(AT_LEAST[case]) <= set(unittest.defaultTestLoader.getTestCaseNames(case))


def test_no_class_was_forgotten() -> None:
    here = {thing for thing in globals().values() if isinstance(thing, type) and issubclass(thing, unittest.TestCase)}
    assert {case for case in here if unittest.defaultTestLoader.getTestCaseNames(case)} == set(AT_LEAST)
